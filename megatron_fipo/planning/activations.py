"""What forward keeps for backward, and what backward needs beside it: bytes on one rank.

The counts follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", equations 1
to 5), for grouped queries, RMSNorm, SwiGLU, attention that keeps no scores, and packed sequences. They differ by the
layers' implementation in what a norm keeps; docs/planning.md has the terms one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fipo.planning.states import largest_layer_parameter
from megatron_fipo.planning.training import Training

_LONGEST_IN_FP32 = 512  # actor/local_spec.py: up to here attention on the CPU is computed in fp32
_PADDED_TO = 16
_STATISTICS_BYTES = 64  # of a token on the last stage: the loss's inputs, terms and statistics
_HEAD_BYTES = 50  # of a trained token: indices and sums in fp32


@dataclass(frozen=True)
class ActivationBytes:
    """The peak of an update beyond the states, on the ranks of one pipeline stage."""

    saved: int  # for the backward passes that are still to come
    recomputed: int  # of the layers that backward is making again
    logits: int  # one chunk's
    working: int  # gradients on their way through one layer or through the head

    @property
    def total(self) -> int:
        """All at once."""
        return self.saved + self.recomputed + self.logits + self.working


def activation_bytes(training: Training, pp_rank: int) -> ActivationBytes:
    """The larger of two moments of the first backward pass: in the head, where a chunk of logits and the projection's
    gradient exist beside all that was saved, and in the layer below it."""
    one_chunk, recomputed = chunk_bytes(training)
    received = _received_bytes(training) if training.layout.pp > 1 else 0.0
    saved = chunks_in_flight(training, pp_rank) * (one_chunk + received) + training.rows * 16
    working = _layer_working_bytes(training) + _weight_gradient_bytes(training)
    in_layer = ActivationBytes(round(saved), round(recomputed), 0, round(working))
    if pp_rank < training.layout.pp - 1:
        return in_layer
    saved += norm_bytes(training, training.arch.hidden_size) + training.rows * _STATISTICS_BYTES
    saved += head_saved_bytes(training)
    in_head = ActivationBytes(round(saved), 0, logits_bytes(training), round(head_working_bytes(training)))
    return max(in_layer, in_head, key=lambda moment: moment.total)


def chunks_in_flight(training: Training, pp_rank: int) -> int:
    """Chunks of layers, times micro-batches, whose activations a rank holds at once: Megatron's 1F1B schedules.

    Interleaved (Narayanan et al. 2021, section 2.2): what a rank runs forward before its first backward pass.
    """
    layout = training.layout
    if layout.vpp == 1:
        return min(layout.pp - pp_rank, training.micro_batches)
    rounds = -(-training.micro_batches // layout.pp) * layout.pp
    return min(2 * (layout.pp - pp_rank - 1) + (layout.vpp - 1) * layout.pp + 1, rounds * layout.vpp)


def chunk_bytes(training: Training) -> tuple[float, float]:
    """(saved by forward, made again by backward at a time) of one chunk's layers and one micro-batch."""
    recompute, num_layers = training.recompute, training.layers_per_chunk
    layer = layer_bytes(training)
    if recompute.granularity != "full":
        again = layer_bytes(training, redone=True) - layer
        return num_layers * layer, max(again, 0.0)
    a_checkpoint = training.rows_of_norms * training.arch.hidden_size * training.dtype_bytes
    if recompute.method == "uniform":
        together = min(recompute.num_layers, num_layers)
        return -(-num_layers // together) * a_checkpoint, together * layer
    redone = min(recompute.num_layers, num_layers)  # the first ones: those above them are gone when they are made again
    return redone * a_checkpoint + (num_layers - redone) * layer, layer if redone == num_layers else 0.0


def layer_bytes(training: Training, *, redone: bool = False) -> float:
    """Saved by one layer's forward for one micro-batch. `redone`: as if no part of it were left to recomputation."""
    return attention_bytes(training, redone=redone) + feed_forward_bytes(training, redone=redone)


def attention_bytes(training: Training, *, redone: bool = False) -> float:
    """Norm, projections, RoPE and attention."""
    arch, layout, rows, width = training.arch, training.layout, training.rows, training.dtype_bytes
    hidden, dim = arch.hidden_size, arch.kv_channels
    queries = arch.num_attention_heads * dim / layout.tp  # elements of a row
    keys = arch.num_query_groups * dim / layout.tp
    norm = norm_bytes(training, hidden) + training.rows_of_norms * hidden * width
    if training.recompute.redoes("layernorm") and not redone:
        norm -= training.rows_of_norms * hidden * width
    rope = 4 * rows * dim * width  # sines and cosines, for queries and for keys
    head_norms = 0.0
    if arch.qk_layernorm:
        head_norms = (norm_bytes(training, dim) / training.rows_of_norms) * rows * (queries + keys) / dim
    projected = rows * queries * width  # what the output projection reads
    fused_qkv = rows * (queries + 2 * keys) * width  # kept where attention saves values, which are a view of it
    rotated = rows * (queries + keys) * width
    if training.recompute.redoes("core_attn") and not redone:
        return norm + rope + head_norms + fused_qkv + rotated + projected
    if training.transformer_impl == "transformer_engine":
        sums = 4 * rows * arch.num_attention_heads / layout.tp
        return norm + rope + head_norms + fused_qkv + rotated + projected + sums
    return norm + rope + head_norms + projected + _local_core_bytes(training, queries, keys)


def _local_core_bytes(training: Training, queries: float, keys: float) -> float:
    """SDPA's inputs, output and sums of actor/local_spec.py's PackedAttention."""
    rows, cp = training.rows, training.layout.cp
    in_fp32 = training.on_cpu and training.longest <= _LONGEST_IN_FP32
    width = 4 if in_fp32 else training.dtype_bytes
    sums = 4 * rows * training.arch.num_attention_heads / training.layout.tp
    own = 2 * rows * queries * width + sums
    if cp == 1:
        padding = -(-training.longest // _PADDED_TO) * _PADDED_TO / training.longest
        return (own + 2 * rows * keys * width) * padding + 16 * rows
    gathered = 2 * rows * cp * keys * width
    is_visible = rows * training.longest * width  # SDPA turns the mask into numbers
    return own + gathered + is_visible + 8 * rows * cp


def feed_forward_bytes(training: Training, *, redone: bool = False) -> float:
    """Norm and MLP, or norm, router and experts."""
    arch, layout, width = training.arch, training.layout, training.dtype_bytes
    is_moe, recompute = bool(arch.num_moe_experts), training.recompute
    norm = norm_bytes(training, arch.hidden_size)
    into_mlp = training.rows_of_norms * arch.hidden_size * width
    if not redone and recompute.redoes("moe" if is_moe else "mlp"):
        return norm + into_mlp
    if not redone and recompute.redoes("layernorm") and not is_moe:
        into_mlp = 0.0
    if not is_moe:
        channels = arch.ffn_hidden_size / layout.tp
        return norm + into_mlp + training.rows * channels * width * _copies_of_channels(training)
    assert arch.num_moe_experts is not None, arch
    assert arch.moe_ffn_hidden_size is not None, arch
    assert arch.moe_router_topk is not None, arch
    channels = arch.moe_ffn_hidden_size / layout.etp
    copies = _copies_of_channels(training) + (0 if training.fuses_swiglu else 1)  # the product with the router's weight
    routing = training.rows_of_norms * (5 * arch.num_moe_experts + 20 * arch.moe_router_topk)
    experts = training.expert_rows * ((arch.hidden_size + copies * channels) * width + 4)
    return norm + into_mlp + routing + experts


def _copies_of_channels(training: Training) -> int:
    """Tensors of the FFN's width that SwiGLU keeps: gate and up, and the product; unfused also silu(gate) and a copy of
    up."""
    return 3 if training.fuses_swiglu else 5


def norm_bytes(training: Training, hidden: int) -> float:
    """What an RMSNorm over `hidden` keeps: its input and 1 / rms; the local one input and normalised input in fp32."""
    rows = training.rows_of_norms
    if training.transformer_impl == "local":
        return rows * (8 * hidden + 4)
    return rows * (hidden * training.dtype_bytes + 4)


def head_saved_bytes(training: Training) -> float:
    """The hidden states that log-probs are made of, gathered under sequence parallelism."""
    return training.rows * (training.arch.hidden_size * training.dtype_bytes + _HEAD_BYTES)


def logits_bytes(training: Training) -> int:
    """One chunk of logits; it stays from forward to backward."""
    chunk = min(training.chunk_size, training.rows)
    return chunk * training.padded_vocab // training.layout.tp * training.dtype_bytes


def head_working_bytes(training: Training) -> float:
    """Gradients of hidden states and of the projection, whose sum over several bf16 chunks is in fp32."""
    hidden, width = training.arch.hidden_size, training.dtype_bytes
    weight = training.padded_vocab // training.layout.tp * hidden
    is_summed = training.rows > training.chunk_size and width < 4
    gathered = training.rows * hidden * width if training.layout.sequence_parallel else 0
    return training.rows * hidden * width + gathered + weight * (width + (4 if is_summed else 0))


def _layer_working_bytes(training: Training) -> float:
    """The MLP's backward, beyond what it has freed: gradients of its output and input, of gate and up; experts' inputs
    and outputs come beside."""
    arch, layout, width = training.arch, training.layout, training.dtype_bytes
    if arch.num_moe_experts:
        assert arch.moe_ffn_hidden_size is not None
        moved = training.expert_rows * (3 * arch.hidden_size + 2 * arch.moe_ffn_hidden_size / layout.etp)
        return (moved + 2 * training.rows * arch.hidden_size) * width
    return training.rows * (2 * arch.hidden_size + 2 * arch.ffn_hidden_size / layout.tp) * width


def _weight_gradient_bytes(training: Training) -> float:
    """A layer's largest weight's gradient before it is added to the buffer; Megatron's fused kernel makes none."""
    return 0.0 if training.fuses_weight_gradient else largest_layer_parameter(training) * training.dtype_bytes


def _received_bytes(training: Training) -> float:
    """The stage's input, where the first norm keeps a copy in fp32 instead of it."""
    is_kept = training.transformer_impl == "local" and training.dtype_bytes < 4
    return training.rows_of_norms * training.arch.hidden_size * training.dtype_bytes if is_kept else 0.0
