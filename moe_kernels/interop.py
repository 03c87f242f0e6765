# SPDX-License-Identifier: Apache-2.0
"""Arrays of CuPy, NumPy and others in and out through DLPack, sharing their memory, and torch's stream for CuPy.

    with mk.interop.cupy_stream():                        # CuPy works on torch's current stream: no synchronisation
        x = mk.interop.from_dlpack(array)                 # a tensor over the same memory
        y = mk.fused_experts(x, w13, w2, topk_weights, topk_ids)
        result = mk.interop.to_dlpack(y, "cupy")          # an array over the same memory

Neither NumPy nor CuPy is imported before it is asked for. The CuPy half is unverified on hardware.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import check

DTYPES = frozenset(
    (*check.FLOATS, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
)  # what the ops take, and what travels with it


def from_dlpack(array: Any, *, copy: bool | None = None) -> Tensor:
    """A tensor of an array that speaks DLPack: of NumPy, CuPy, JAX, or a tensor.

    The tensor shares the array's memory and keeps it alive. An array that cannot be shared is copied: one that is
    read-only (writing to the tensor would change what its owner promised not to), one with a negative stride, one of
    the other byte order. bfloat16 arrays (of ml_dtypes in NumPy) become torch.bfloat16.

    Args:
        array: an object with __dlpack__ and __dlpack_device__.
        copy: True always copies; False raises where a copy would be needed.

    Errors: TypeError for an object without DLPack or a dtype that torch lacks, ValueError where copy=False cannot be.
    """
    if isinstance(array, Tensor):
        return array.clone() if copy else array
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        check.refuse("from_dlpack", "array", "an object with __dlpack__ (CuPy, NumPy, JAX, ..)", check.got(array),
                     TypeError)  # fmt: skip
    why = _why_not_shared(array)
    if why and copy is False:
        check.refuse("from_dlpack", "array", "writable and of plain strides and byte order to be shared", why)
    if why:
        array = array.astype(array.dtype.newbyteorder("=")) if why == _BYTE_ORDER else array.copy()
    bits = str(getattr(array, "dtype", "")) == "bfloat16" and hasattr(array, "view")
    source = array.view("int16") if bits else array  # NumPy exports no bfloat16, but its bits
    try:
        tensor = torch.utils.dlpack.from_dlpack(source)  # asks CuPy to make torch's current stream wait for its own
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        dtype = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"from_dlpack: array of {dtype} cannot become a tensor: {error}") from error
    if tensor.dtype not in DTYPES:
        raise TypeError(f"from_dlpack: array must be of {_names()}, got {getattr(array, 'dtype', tensor.dtype)}")
    tensor = tensor.view(torch.bfloat16) if bits else tensor
    return tensor.clone() if copy and not why else tensor


_BYTE_ORDER = "the other byte order"


def _why_not_shared(array: Any) -> str:
    """Why torch must not see this memory; torch itself checks none of these, and ends the process on the second."""
    flags = getattr(array, "flags", None)
    if getattr(flags, "writeable", True) is False:  # CuPy's flags have no such word
        return "a read-only array"
    if any(stride < 0 for stride in getattr(array, "strides", None) or ()):
        return "a negative stride"
    native = getattr(getattr(array, "dtype", None), "isnative", True)
    return "" if native else _BYTE_ORDER


def to_dlpack(tensor: Tensor, library: str | ModuleType = "numpy") -> Any:
    """An array of `library` over the tensor's memory; writing to one changes the other.

    Args:
        tensor: a dense tensor. A gradient does not pass: what comes back is a constant to autograd.
        library: "numpy", "cupy", or any module with a from_dlpack. NumPy has no bfloat16: the array is of ml_dtypes
            where that is installed.

    Errors: TypeError for what is no dense tensor, or bfloat16 without ml_dtypes; ValueError for a tensor on a device
    that the library cannot see; ImportError.
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        came = check.got(tensor) if not isinstance(tensor, Tensor) else str(tensor.layout)
        check.refuse("to_dlpack", "tensor", "a dense tensor", came, TypeError)
    name = library if isinstance(library, str) else library.__name__
    wanted = {"numpy": "cpu", "cupy": "cuda"}.get(name, tensor.device.type)
    if tensor.device.type != wanted:
        check.refuse("to_dlpack", "tensor", f"on {wanted} for {name}", str(tensor.device))
    module = _module(name) if isinstance(library, str) else library
    plain = tensor.detach().resolve_conj().resolve_neg()
    if name != "numpy" or tensor.dtype != torch.bfloat16:
        return module.from_dlpack(plain)
    try:
        kind = importlib.import_module("ml_dtypes").bfloat16
    except ImportError:
        raise TypeError(
            "to_dlpack: NumPy has no bfloat16: install ml_dtypes, or pass tensor.float(), got bfloat16 "
            f"{list(tensor.shape)}"
        ) from None
    return module.from_dlpack(plain.view(torch.int16)).view(kind)


@contextlib.contextmanager
def cupy_stream(device: torch.device | str | int | None = None) -> Iterator[Any]:
    """While open, CuPy works on torch's current stream of `device` (None: the current one); yields CuPy's stream.

    Kernels of both then run in the order of the calls, without a synchronisation. Unverified on hardware.

    Errors: ImportError without CuPy, RuntimeError without a CUDA device.
    """
    cupy = _module("cupy")
    if not torch.cuda.is_available():
        raise RuntimeError(f"cupy_stream: this torch ({torch.__version__}) sees no CUDA device")
    stream = torch.cuda.current_stream(device)
    with torch.cuda.device(stream.device), cupy.cuda.Device(stream.device.index):
        external = cupy.cuda.ExternalStream(stream.cuda_stream, stream.device.index)
        with external:
            yield external


def _module(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        hint = "pip install 'moe-kernels-torch[cupy]'" if name == "cupy" else f"pip install {name}"
        raise ImportError(f"moe_kernels.interop: {name} is not installed: {hint}") from error
    if not hasattr(module, "from_dlpack"):
        check.refuse("to_dlpack", "library", "a module with from_dlpack", name)
    return module


def _names() -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in DTYPES))
