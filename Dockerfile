# The GPU image: CUDA 13.0, Python 3.12, torch 2.11. It has never been built: what is pinned here was checked against
# the packages' metadata only (SGLang 0.5.17 requires torch==2.11.0 and transformers==5.12.1; megatron-core 0.19.2
# requires Python 3.12 and torch >= 2.6; nvidia-modelopt 0.47.0 requires torch >= 2.8). Not checked: the base image's
# tag, that Transformer Engine and Apex compile against this torch, and that everything runs together. The engine code
# is written to SGLang 0.5.23 and megatron-core 0.16.1, so the other releases pinned here need a first run.
#
#   docker build -t megatron-fipo .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -it megatron-fipo
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

ARG TORCH=2.11.0
# The last release whose metadata names torch 2.11.0; 0.5.18 wants 2.13.0.
ARG SGLANG=0.5.17
# PyPI's `apex` is another project; NVIDIA's has tags only.
ARG APEX=26.09
# Hopper and Blackwell; set it to your own GPUs to compile for less long.
ARG TORCH_CUDA_ARCH_LIST="9.0;10.0"
ARG MAX_JOBS=8

ENV DEBIAN_FRONTEND=noninteractive PATH=/venv/bin:$PATH PIP_NO_CACHE_DIR=1 \
    TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST MAX_JOBS=$MAX_JOBS NVTE_FRAMEWORK=pytorch

RUN apt-get update && apt-get install -y --no-install-recommends \
        git ninja-build libnuma1 python3-dev python3-venv && rm -rf /var/lib/apt/lists/* && \
    python3 -m venv /venv

WORKDIR /workspace/megatron-fipo
COPY requirements requirements

RUN pip install -r requirements/build.txt ninja packaging pybind11 && \
    pip install "torch==$TORCH" --index-url https://download.pytorch.org/whl/cu130
RUN pip install "sglang==$SGLANG" "torch==$TORCH"
RUN APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation --no-deps \
        "apex @ git+https://github.com/NVIDIA/apex@$APEX"
RUN pip install --no-build-isolation -r requirements/gpu.txt -r requirements/test.txt "torch==$TORCH"

COPY . .
RUN pip install --no-deps --no-build-isolation --editable . && \
    python -c 'import megatron.core, megatron_fipo, transformer_engine.pytorch, apex'
