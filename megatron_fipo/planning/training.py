"""What the trainer's memory depends on, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_fipo.parallel import ParallelLayout
from megatron_fipo.weights.architecture import Architecture, padded_vocab_size

Granularity = Literal["full", "selective"]


@dataclass(frozen=True)
class Recompute:
    """Which activations backward makes again, by Megatron's flags; granularity None: none."""

    granularity: Granularity | None = None
    method: Literal["uniform", "block"] | None = None
    num_layers: int = 0
    modules: frozenset[str] = frozenset({"core_attn"})

    def redoes(self, module: str) -> bool:
        """Whether a part of a layer is made again by itself."""
        return self.granularity == "selective" and module in self.modules


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes per parameter of this rank's shard."""

    master: float
    moments: float
    gradient_copy: float  # an fp32 shard of gradients that are reduced in less


@dataclass(frozen=True)
class Training:
    """A trainer's model, layout, precision and batches.

    `rows` is the token budget of a micro-batch on one rank, all of it used; `longest` the longest sequence; both in
    tokens. `micro_batches` bounds how many an update has. `expert_imbalance`: tokens that the busiest rank's experts
    are sent, over the mean.
    """

    arch: Architecture
    layout: ParallelLayout
    vocab_divisible_by: int
    dtype_bytes: int  # of parameters and activations: 2 or 4
    gradient_bytes: int
    optimizer: OptimizerBytes
    is_sharded: bool  # the distributed optimizer
    overlaps_gradients: bool
    transformer_impl: Literal["local", "transformer_engine"]
    on_cpu: bool
    rows: int
    longest: int
    micro_batches: int
    chunk_size: int  # tokens whose logits exist at a time
    fuses_swiglu: bool = False
    fuses_weight_gradient: bool = False
    recompute: Recompute = field(default_factory=Recompute)
    expert_imbalance: float = 1.0

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding with what tensor parallelism adds to it."""
        return padded_vocab_size(self.arch.vocab_size, self.layout.tp, self.vocab_divisible_by)

    @property
    def rows_of_norms(self) -> float:
        """Rows of a rank between the tensor-parallel parts of a layer."""
        return self.rows / self.layout.tp if self.layout.sequence_parallel else self.rows

    @property
    def layers_per_chunk(self) -> int:
        """Layers of one of a pipeline rank's chunks."""
        return self.arch.num_layers // (self.layout.pp * self.layout.vpp)

    @property
    def expert_rows(self) -> float:
        """Copies of tokens that a rank's experts are sent in a layer: every token goes to its top k."""
        topk = self.arch.moe_router_topk or 0
        return self.rows_of_norms * topk * self.layout.etp * (self.expert_imbalance if self.layout.ep > 1 else 1.0)
