"""The program `python sglang_load.py (DIR OUT DTYPE)...`: SGLang's own loader reads each checkpoint DIR on a CPU.

What the model then holds goes to OUT: its parameters, before a kernel lays them out anew, and what SGLang made of the
quantisation config. A parameter that nothing was loaded into shows: all begin as NaN, or as the value SENTINEL.
"""

from __future__ import annotations

import socket
import sys

import torch

SENTINEL = 77


def main(words: list[str]) -> None:
    from megatron_fipo.patches.sglang_cpu.apply import apply_sglang_cpu

    apply_sglang_cpu()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    for i in range(0, len(words), 3):
        load(words[i], words[i + 1], words[i + 2], first=i == 0)


def load(directory: str, out: str, dtype: str, *, first: bool) -> None:
    """One checkpoint; the process groups are built by the `first`."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    backends = {"attention_backend": "torch_native", "sampling_backend": "pytorch", "grammar_backend": "none"}
    server_args = ServerArgs(model_path=directory, device="cpu", dtype=dtype, disable_cuda_graph=True, **backends)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    model_config = ModelConfig.from_server_args(server_args)
    if first:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        bootstrap.init_parallel_runtime(server_args=server_args, device="cpu", dist_port=port)
    bootstrap.init_layer_runtime(model_config=model_config)
    loader = DefaultModelLoader(LoadConfig())
    model = loader.initialize_model_for_startup(model_config=model_config, device_config=DeviceConfig("cpu", 0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan if parameter.dtype.is_floating_point else SENTINEL)
    DefaultModelLoader.load_weights_only(model, loader._get_all_weights(model_config, model), torch.device("cpu"))
    methods = {
        name: type(module.quant_method).__name__
        for name, module in model.named_modules()
        if getattr(module, "quant_method", None) is not None
    }
    parameters = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    torch.save({"quantization": model_config.quantization, "methods": methods, "parameters": parameters}, out)


if __name__ == "__main__":
    main(sys.argv[1:])
