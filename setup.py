"""Package metadata. `patches/` ships as megatron_fipo.patches; versions are pinned in requirements/."""

from setuptools import find_packages, setup

setup(
    name="megatron_fipo",
    version="0.1.0",
    description="FIPO reinforcement-learning post-training on Megatron and SGLang",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megatron_fipo", "megatron_fipo.*"])]
    + ["megatron_fipo.patches"]
    + [f"megatron_fipo.patches.{name}" for name in find_packages("patches")],
    package_dir={"megatron_fipo.patches": "patches"},
    entry_points={"sglang.srt.platforms": ["megatron_fipo_cpu = megatron_fipo.patches.sglang_cpu.plugin:activate"]},
)
