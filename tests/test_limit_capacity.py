# SPDX-License-Identifier: Apache-2.0
"""limit_capacity: exactly the slots that come too late, in any grouping."""

import pytest
import torch

import moe_kernels as mk
from moe_kernels.testing import make_ids


def naive(ids, E, capacity, group_size):
    """A dictionary of what each expert has taken, walked by slot position."""
    T, K = ids.shape
    dropped = torch.zeros(T, K, dtype=torch.bool)
    for begin in range(0, T, group_size or max(T, 1)):
        taken = {}
        for k in range(K):
            for t in range(begin, min(begin + (group_size or T), T)):
                e = int(ids[t, k])
                if 0 <= e < E:
                    dropped[t, k] = taken.get(e, 0) >= capacity
                    taken[e] = taken.get(e, 0) + 1
    return dropped


@pytest.mark.parametrize("group_size", [None, 1, 4, 7, 1000])
@pytest.mark.parametrize("capacity", [1, 3, 50])
@pytest.mark.parametrize(("T", "E", "K"), [(0, 4, 2), (1, 1, 1), (23, 6, 3), (40, 37, 5), (12, 3, 3), (30, 8, 1)])
def test_exact(backend, T, E, K, capacity, group_size):
    for skew in ("uniform", "zipf", "one"):
        ids = make_ids(T, E, K, skew, torch.Generator().manual_seed(T * E + K))
        got = backend.limit_capacity(ids, E, capacity, group_size=group_size)
        assert got.dtype == torch.bool and torch.equal(got, naive(ids, E, capacity, group_size))


def test_absent_ids_take_no_place_and_are_not_dropped(backend):
    ids = torch.tensor([[-1], [0], [5], [0], [-7], [0]], dtype=torch.int64)
    got = backend.limit_capacity(ids, 2, 2)
    assert got.flatten().tolist() == [False, False, False, False, False, True]


def test_first_choices_come_before_second_ones(backend):
    ids = torch.tensor([[0, 1], [1, 0], [1, 0]])
    assert backend.limit_capacity(ids, 2, 1).tolist() == [[False, True], [False, True], [True, True]]


def test_strided_and_wide_ids(backend):
    ids = torch.randint(0, 5, (30, 8), generator=torch.Generator().manual_seed(0))
    for view in (ids[:, ::2], ids[::3], ids.T.contiguous().T):
        assert torch.equal(backend.limit_capacity(view, 5, 3), naive(view, 5, 3, None))
    wide = ids + 2**32  # past int32: absent, not wrapped
    assert not backend.limit_capacity(wide, 5, 1).any()


def test_any_number_of_threads():
    ids = make_ids(500, 16, 4, "zipf", torch.Generator().manual_seed(1))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(mk.limit_capacity(ids, 16, 7, group_size=33))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)
    assert torch.equal(found[0], naive(ids, 16, 7, 33))


@pytest.mark.parametrize(("error", "text", "args"), [
    (TypeError, r"topk_ids must be int32 or int64 \[T, K\], got float32 \[3, 2\]", (torch.zeros(3, 2), 4, 1)),
    (ValueError, r"topk_ids must be int32 or int64 \[T, K\], got \[3\]", (torch.zeros(3, dtype=torch.int32), 4, 1)),
    (ValueError, "num_experts must be 1 or more, got 0", (torch.zeros(3, 2, dtype=torch.int32), 0, 1)),
    (ValueError, "capacity must be 1 or more, got 0", (torch.zeros(3, 2, dtype=torch.int32), 4, 0)),
    (TypeError, "capacity must be an int, got float 1.5", (torch.zeros(3, 2, dtype=torch.int32), 4, 1.5)),
])  # fmt: skip
def test_errors(error, text, args):
    with pytest.raises(error, match="limit_capacity: " + text):
        mk.limit_capacity(*args)


def test_errors_of_the_rest(monkeypatch):
    ids = torch.tensor([[0, 9]])
    with pytest.raises(ValueError, match="limit_capacity: group_size must be 1 or more, got 0"):
        mk.limit_capacity(ids, 4, 1, group_size=0)
    with pytest.raises(RuntimeError, match="limit_capacity: num_experts, capacity and group_size must be positive"):
        torch.ops.moe_kernels.limit_capacity(ids, 4, 1, 0)
    mk.limit_capacity(ids, 4, 1)
    monkeypatch.setenv("MOE_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"topk_ids must be in -1..3 .*got values from 0 to 9"):
        mk.limit_capacity(ids, 4, 1)
