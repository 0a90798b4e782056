"""Where the product asks what a device is, or names torch.cuda: every such line, and why it is there.

Nothing in the Python path may differ between CPU and GPU but the layer spec, the device and the patches applied. A line
that tests/unit/test_device_branches.py finds and that is not in this list has to be taken back, or given a reason here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ANY_LINE = "*"
BACKEND = "NCCL or gloo, whichever the device has"
KERNEL = "one function, the device's kernel: a compiled loop or Triton; tests compare both with one reference"
BEFORE = "decides or refuses before anything starts: nothing runs differently because of it"
MEMORY = "memory of the device: pinned, given back, measured"
ASYNCHRONOUS = "CUDA works asynchronously and by threads: wait, and name the device"
FASTER = "the same numbers, or the same up to rounding, in the CPU's faster form"
PATCHES = "the patches applied"

ALLOWED: dict[str, dict[str, str]] = {
    "megatron_fipo/actor/checkpoint.py": {
        "if torch.cuda.is_available():": "the device's random state is part of a checkpoint",
        'state["cuda"] = torch.cuda.get_rng_state()': "the device's random state is part of a checkpoint",
        'torch.cuda.set_rng_state(state["cuda"])': "the device's random state is part of a checkpoint",
    },
    "megatron_fipo/actor/export.py": {'backend = "nccl" if device.type == "cuda" else "gloo"': BACKEND},
    "megatron_fipo/actor/local_spec.py": {
        'if query.device.type == "cpu" and key.size(1) <= LONGEST_IN_FP32:': FASTER,
    },
    "megatron_fipo/actor/model.py": {'if device.type == "cpu":': "megatron-core's fusions are CUDA kernels"},
    "megatron_fipo/actor/offload.py": {
        'self._memory: dict[Part, _MainMemory] = {part: _MainMemory(pinned=device.type == "cuda") for part in PARTS}': (
            MEMORY
        ),
        "torch.cuda.ipc_collect()  # buckets that an engine let go of later than we did": MEMORY,
        "torch.cuda.empty_cache()": MEMORY,
        'if device.type == "cuda":': ASYNCHRONOUS,
        "torch.cuda.synchronize(device)": ASYNCHRONOUS,
    },
    "megatron_fipo/actor/optimizer.py": {
        'if next(chunks[0].parameters()).device.type == "cpu":': FASTER,
    },
    "megatron_fipo/actor/reference.py": {
        "kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)": MEMORY,
    },
    "megatron_fipo/actor/setup.py": {'backend = "nccl" if device.type == "cuda" else "gloo"': BACKEND},
    "megatron_fipo/checks.py": {ANY_LINE: BEFORE},
    "megatron_fipo/conversion_check.py": {ANY_LINE: PATCHES},
    "megatron_fipo/engine_nodes.py": {'use_cpu=device.type == "cpu",': PATCHES},
    "megatron_fipo/flags/megatron_meaning.py": {ANY_LINE: BEFORE},
    "megatron_fipo/hybrid/memory.py": {ANY_LINE: MEMORY},
    "megatron_fipo/hybrid/turns.py": {
        'device_type: Literal["cpu", "cuda"] = "cuda" if actor.device.type == "cuda" else "cpu"': (
            "SGLang hashes weights in another way on either"
        ),
    },
    "megatron_fipo/megatron_config.py": {ANY_LINE: BEFORE},
    "megatron_fipo/ops/fipo_terms.py": {ANY_LINE: KERNEL},
    "megatron_fipo/ops/future_kl.py": {ANY_LINE: KERNEL},
    "megatron_fipo/plan_arguments.py": {ANY_LINE: BEFORE},
    "megatron_fipo/preview.py": {ANY_LINE: BEFORE},
    "megatron_fipo/quantization/checkpoint.py": {ANY_LINE: BEFORE},
    "megatron_fipo/rollout/distributed_update.py": {
        "if flat.is_cuda:": ASYNCHRONOUS,
        "torch.cuda.current_stream(flat.device).synchronize()  # the thread's stream does not wait for ours": (
            ASYNCHRONOUS
        ),
        "torch.cuda.set_device(flat.device)  # of this thread": ASYNCHRONOUS,
        'device = "cpu" if backend == "gloo" else "cuda"': BACKEND,
    },
    "megatron_fipo/run.py": {
        'engines_first = has_engines and device.type == "cuda" and settings.engine.placement == "colocated"': MEMORY,
        'if device.type == "cpu":': PATCHES,
        'offload_trainer=engine.offload_trainer and is_colocated and actor.device.type == "cuda",': MEMORY,
    },
    "megatron_fipo/weights/buffers.py": {'if device.type != "cpu":': MEMORY},
    "megatron_fipo/weights/checksum.py": {ANY_LINE: KERNEL},
    "megatron_fipo/weights/engine_layout.py": {
        'padding = _Padding(arch.num_query_groups, tp_size, is_cpu=device_type == "cpu", is_fp8=fp8)': (
            "SGLang pads weights in another way on either"
        ),
    },
    "patches/megatron_cpu/apply.py": {"if torch.cuda.is_available():": PATCHES},
    "patches/megatron_cpu/torch_on_cpu.py": {ANY_LINE: PATCHES},
    "patches/sglang_cpu/apply.py": {"if torch.cuda.is_available():": PATCHES},
}
"""By file: the line, or any line of it, and the reason."""


def device_lines(path: Path) -> Iterator[str]:
    """The lines of a file, stripped, in which a device is compared or torch.cuda is named; each once."""
    text = path.read_text()
    if "cuda" not in text and "cpu" not in text:
        return
    lines = text.splitlines()
    found: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            is_module = node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch"
            if node.attr == "is_cuda" or is_module:
                found.add(node.lineno)
        elif isinstance(node, ast.Compare | ast.IfExp):
            words = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)} & {"cpu", "cuda"}
            names = ast.unparse(node)
            if words and (isinstance(node, ast.IfExp) or "device" in names or "backend" in names):
                found.add(node.lineno)
    yield from dict.fromkeys(lines[number - 1].strip() for number in sorted(found))
