"""Package metadata. `patches/` ships as megatron_fipo.patches; versions are pinned in requirements/ alone."""

from pathlib import Path

from setuptools import find_packages, setup


def pins(*names: str) -> list[str]:
    """The requirements of files in requirements/, without comments."""
    lines: list[str] = []
    for name in names:
        lines += (Path(__file__).parent / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line for line in (line.partition("#")[0].strip() for line in lines) if line]


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
    # SGLang is in no extra: it must be installed without its dependencies on a CPU machine (examples/setup_env.sh)
    # and at the release made for the image's torch on a GPU (Dockerfile).
    extras_require={
        "cpu": pins("torch", "cpu"),
        "gpu": pins("gpu"),
        "quantize": pins("quantize"),
        "test": pins("test"),
    },
    entry_points={"sglang.srt.platforms": ["megatron_fipo_cpu = megatron_fipo.patches.sglang_cpu.plugin:activate"]},
)
