"""What importing a part of the package brings into a fresh process."""

from __future__ import annotations

import subprocess
import sys

from processes import REPO_ROOT

PACKAGE = REPO_ROOT / "megatron_fipo"
WITH_MEGATRON_OR_SGLANG = {"actor", "rollout", "hybrid"}  # and the modules directly in the package, but those of BELOW
BELOW = {"types", "config", "data_config", "run_config", "megatron_config", "parallel", "user_function"}


def test_importing_the_trainer_loads_neither_megatron_nor_sglang() -> None:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part, *rest = path.relative_to(PACKAGE).with_suffix("").parts
        # kernels are imported when they are called
        if (rest or part in BELOW) and part not in WITH_MEGATRON_OR_SGLANG and not path.stem.endswith("_triton"):
            names.append(".".join(["megatron_fipo", part, *rest]).removesuffix(".__init__"))
    assert {"megatron_fipo.trainer.loop", "megatron_fipo.losses.fused", "megatron_fipo.config"} <= set(names)
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
    code += "print(sorted({name.split('.')[0] for name in sys.modules} & {'megatron', 'sglang', 'triton'}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO_ROOT)
    assert found.stdout.strip() == "[]"
