"""What SGLang 0.5.23 must be taught to serve on a CPU without triton, torchvision and AMX kernels.

`apply.apply_sglang_cpu()` puts all of it in place and is called by every process of a CPU engine, before sglang is
imported there; on a machine with CUDA it refuses to run.
"""
