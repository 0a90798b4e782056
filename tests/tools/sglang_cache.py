"""Prints as JSON what SGLang's own cache of 64 tokens takes on one GPU, for every model and number of ranks given."""

from __future__ import annotations

import json
import sys

from megatron_fipo.patches.sglang_cpu.import_stubs import install_import_stubs

NUM_TOKENS = 64


def main() -> None:
    install_import_stubs()
    import torch
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    found = []
    for model, tp in json.loads(sys.argv[1]):
        config = ModelConfig(model)
        pool = MHATokenToKVPool(
            size=NUM_TOKENS,
            page_size=1,
            dtype=torch.bfloat16,
            head_num=config.get_num_kv_heads(tp),
            head_dim=config.head_dim,
            layer_num=config.num_hidden_layers,
            device="cpu",
            enable_memory_saver=False,
        )
        found.append(sum(int(size) for size in pool.get_kv_size_bytes()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
