# SPDX-License-Identifier: Apache-2.0
"""The CUDA build where torch has no CUDA: MOE_KERNELS_CUDA=1 compiles and links, the library loads, the CPU path works.

    python build_support/forced_build.py     into build/cuda_build, one architecture; later runs only what changed

Exit status 0: it works. 1: it does not, with the reason. 77: skipped, this machine has no nvcc.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import nvcc

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/cuda_build"
SKIPPED = 77

# Run in a process of its own, with the built package alone on the path.
CHECK = """
import torch
import moe_kernels as mk
from moe_kernels import _build, ops, reference

info = _build.info()
assert _build.ops_loaded and not _build.reason, _build.reason
assert info["library"].startswith({lib!r}), info["library"]
assert info["cuda"] and "MOE_KERNELS_CUDA=1" in info["cuda_reason"], info["cuda_reason"]
for op in ("route", "route_backward", "expert_choice", "sinkhorn", "permute", "unpermute_backward"):
    assert ops.backend_of(op, "cuda")[0] == "cuda kernel", ops.backend_of(op, "cuda")
torch.manual_seed(0)
layer = mk.MoELayer(16, 24, 8, 2)
x = torch.randn(12, 16, requires_grad=True)
y, r = layer(x), layer.last_routing
wanted = reference.fused_experts(x, layer.experts.w13, layer.experts.w2, r.topk_weights, r.topk_ids)
torch.testing.assert_close(y, wanted)
y.sum().backward()
assert x.grad.isfinite().all()
print("cuda: the CUDA build, nvcc " + info["cuda"] + ", loads on torch " + torch.__version__ + " and runs on the CPU")
"""


def build() -> Path:
    """The folder of the built package. Errors: RuntimeError with the compiler's words."""
    env = {"TORCH_CUDA_ARCH_LIST": "9.0a", **os.environ, "MOE_KERNELS_CUDA": "1"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuda: the forced build failed:\n{(done.stdout + done.stderr)[-6000:]}")
    return next(BUILD.glob("lib*"))


def main() -> int:
    if nvcc.find() is None:
        print("cuda: SKIPPED, the forced build was not tried: no nvcc")
        return SKIPPED
    begin = time.monotonic()
    try:
        lib = build()
    except RuntimeError as error:
        print(error)
        return 1
    env = {**os.environ, "PYTHONPATH": str(lib), "MOE_KERNELS_STRICT": "1"}
    check = [sys.executable, "-c", CHECK.format(lib=str(lib))]
    code = subprocess.run(check, cwd=lib, env=env, check=False).returncode
    print(f"cuda: {time.monotonic() - begin:.0f} s, in {BUILD.relative_to(ROOT)}")
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
