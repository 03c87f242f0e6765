# SPDX-License-Identifier: Apache-2.0
"""DLPack in and out: shared memory where it may be shared, a copy or a sentence where not. CuPy by a stand-in."""

import contextlib
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

import moe_kernels as mk
from moe_kernels import interop


class Exporter:
    """What an array of another library offers, and nothing else."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **words: Any) -> Any:
        return self.tensor.__dlpack__(**words)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


NUMPY = ["float64", "float32", "float16", "int8", "int16", "int32", "int64", "uint8", "bool"]


@pytest.mark.parametrize("name", NUMPY)
def test_numpy_shares_memory_both_ways(name: str) -> None:
    array = np.ones((3, 4), dtype=name)
    tensor = interop.from_dlpack(array)
    assert str(tensor.dtype) == f"torch.{name}" and tensor.data_ptr() == array.ctypes.data
    tensor.zero_()
    assert not array.any()
    back = interop.to_dlpack(tensor)
    assert type(back) is np.ndarray and back.dtype == array.dtype and back.ctypes.data == tensor.data_ptr()
    back[0, 0] = 1
    assert array[0, 0] == 1


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 3, 5)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert interop.from_dlpack(np.zeros(shape)).shape == shape
    assert interop.to_dlpack(torch.zeros(shape)).shape == shape


def test_strided_views_are_shared() -> None:
    array = np.arange(24.0).reshape(4, 6)[::2, 1::2]
    tensor = interop.from_dlpack(array)
    assert tensor.data_ptr() == array.ctypes.data and tensor.stride() == (12, 2)
    assert np.array_equal(interop.to_dlpack(tensor), array)


def test_memory_outlives_its_first_owner() -> None:
    tensor = interop.from_dlpack(np.full(1000, 7.0))
    array = interop.to_dlpack(tensor + 0)
    junk = [np.zeros(1000) for _ in range(50)]
    assert bool((tensor == 7).all()) and (array == 7).all() and len(junk) == 50


def test_a_read_only_array_is_copied_or_refused() -> None:
    array = np.ones(3)
    array.flags.writeable = False
    tensor = interop.from_dlpack(array)
    tensor.zero_()
    assert array.all()
    with pytest.raises(ValueError, match="array must be writable.*got a read-only array"):
        interop.from_dlpack(array, copy=False)


def test_a_negative_stride_is_copied_or_refused() -> None:
    """torch.from_dlpack would end the process here."""
    array = np.arange(5.0)[::-1]
    assert interop.from_dlpack(array).tolist() == [4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="got a negative stride"):
        interop.from_dlpack(array, copy=False)


def test_the_other_byte_order_is_copied_or_refused() -> None:
    array = np.arange(3, dtype=np.dtype("i4").newbyteorder("S"))
    assert interop.from_dlpack(array).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="got the other byte order"):
        interop.from_dlpack(array, copy=False)


def test_copy() -> None:
    array = np.ones(3)
    interop.from_dlpack(array, copy=True).zero_()
    assert array.all()
    assert interop.from_dlpack(array, copy=False).data_ptr() == array.ctypes.data


def test_bfloat16_in_numpy() -> None:
    """ml_dtypes has the type that NumPy lacks; the memory is shared all the same."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy is ml_dtypes'")
    tensor = torch.randn(3, 5).bfloat16()
    array = interop.to_dlpack(tensor)
    assert array.dtype == ml_dtypes.bfloat16 and np.array_equal(array.astype("f4"), tensor.float().numpy())
    again = interop.from_dlpack(array)
    assert again.dtype == torch.bfloat16 and again.data_ptr() == tensor.data_ptr() and torch.equal(again, tensor)


def test_bfloat16_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match=r"NumPy has no bfloat16: install ml_dtypes, or pass tensor.float\(\)"):
        interop.to_dlpack(torch.ones(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_any_exporter(dtype: torch.dtype) -> None:
    """An object that has the two methods and nothing else; bfloat16 is a DLPack type of its own there."""
    owner = torch.ones(2, 3, dtype=dtype)
    tensor = interop.from_dlpack(Exporter(owner))
    assert tensor.dtype == dtype and tensor.data_ptr() == owner.data_ptr()


def test_a_tensor_passes() -> None:
    x = torch.ones(2, requires_grad=True)
    assert interop.from_dlpack(x) is x
    assert interop.from_dlpack(x, copy=True) is not x


def test_gradients_stop_at_the_border() -> None:
    x = torch.ones(2, requires_grad=True)
    assert np.array_equal(interop.to_dlpack(x * 2), [2, 2])


def test_ops_on_numpy_arrays_give_the_result_of_tensors() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size).astype("f4") for size in ((5, 8), (4, 12, 8), (4, 8, 6), (5, 2))]
    ids = rng.integers(0, 4, (5, 2))
    y = mk.fused_experts(*(interop.from_dlpack(a) for a in arrays), interop.from_dlpack(ids))
    want = mk.fused_experts(*(torch.tensor(a) for a in arrays), torch.tensor(ids))
    assert np.array_equal(interop.to_dlpack(y), want.numpy())


@pytest.mark.parametrize(
    ("array", "error", "match"),
    [
        ([1.0], TypeError, "array must be an object with __dlpack__.*got list"),
        (np.array(["a"]), TypeError, "array of <U1 cannot become a tensor"),
        (np.array([1j]), TypeError, "array must be of bfloat16, bool,.*got complex128"),
        (np.array([None]), TypeError, "array of object cannot become a tensor"),
    ],
)
def test_bad_arrays(array: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        interop.from_dlpack(array)


@pytest.mark.parametrize(
    ("tensor", "library", "error", "match"),
    [
        ([1.0], "numpy", TypeError, "tensor must be a dense tensor, got list"),
        (torch.eye(3).to_sparse(), "numpy", TypeError, "tensor must be a dense tensor, got torch.sparse_coo"),
        (torch.ones(2, device="meta"), "numpy", ValueError, "tensor must be on cpu for numpy, got meta"),
        (torch.ones(2), "cupy", ValueError, "tensor must be on cuda for cupy, got cpu"),
        (torch.ones(2), "json", ValueError, "library must be a module with from_dlpack, got json"),
        (torch.ones(2), "no_such_library", ImportError, "no_such_library is not installed"),
    ],
)
def test_bad_tensors(tensor: Any, library: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        interop.to_dlpack(tensor, library)


# ---- CuPy, by a stand-in: what we call and in which order


def test_cupy_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    said = r"cupy is not installed: pip install 'moe-kernels-torch\[cupy\]'"
    with pytest.raises(ImportError, match=said), interop.cupy_stream():
        pass


def stand_in(log: list[Any]) -> Any:
    """The part of CuPy that cupy_stream uses."""

    @contextlib.contextmanager
    def noted(*what: Any) -> Any:
        log.append(("enter", *what))
        try:
            yield
        finally:
            log.append(("exit", *what))

    def device(index: int) -> Any:
        return noted("device", index)

    def external_stream(pointer: int, index: int) -> Any:
        return noted("stream", pointer, index)

    cuda = types.SimpleNamespace(Device=device, ExternalStream=external_stream)
    return types.SimpleNamespace(from_dlpack=torch.from_dlpack, cuda=cuda)


def test_cupy_stream_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    monkeypatch.setitem(sys.modules, "cupy", stand_in(log))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="sees no CUDA device"), interop.cupy_stream():
        pass
    assert log == []


def test_cupy_stream_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy gets the pointer and the device of torch's current stream, and gets its own back, also after an error."""
    log: list[Any] = []
    monkeypatch.setitem(sys.modules, "cupy", stand_in(log))
    stream = types.SimpleNamespace(device=torch.device("cuda", 1), cuda_stream=0xABC)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with pytest.raises(KeyError), interop.cupy_stream():
        raise KeyError
    assert log == [
        ("enter", "device", 1),
        ("enter", "stream", 0xABC, 1),
        ("exit", "stream", 0xABC, 1),
        ("exit", "device", 1),
    ]


def test_a_module_as_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(interop.to_dlpack(torch.ones(2), np)) is np.ndarray


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, moe_kernels; moe_kernels.interop.from_dlpack; assert 'cupy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
