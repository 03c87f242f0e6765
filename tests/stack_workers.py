# SPDX-License-Identifier: Apache-2.0
"""What one rank does in test_stacks.py. The checkpoint and the ids lie in the folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

import moe_kernels as mk
from moe_kernels import hf
from moe_kernels.demo import families
from moe_kernels.expert_parallel import link as links
from moe_kernels.hf import exchange

Tensors = dict[str, torch.Tensor]


def load(folder: Path, **words: Any) -> Any:
    transformers = importlib.import_module("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float64, experts_implementation=hf.NAME, **words
    ).eval()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full value of a DTensor; every rank has to ask."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def train(model: Any, ids: torch.Tensor) -> tuple[Tensors, int]:
    """Logits, loss and all gradients of a sharded model, and the calls of our experts function."""
    with families.count_calls() as calls:
        result = model(input_ids=ids, labels=ids, use_cache=False)
        result.loss.backward()
    found = {"logits": whole(result.logits), "loss": whole(result.loss)}
    found.update({n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None})
    return found, calls[0]


def fsdp(rank: int, folder: Path) -> tuple[Tensors, int]:
    """FSDP2: every layer and the whole model sharded over the ranks, each rank with its half of the batch."""
    model = load(folder)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert type(model.model.layers[0].mlp.experts.down_proj).__name__ == "DTensor"
    return train(model, torch.load(folder / "ids.pt").chunk(2)[rank])


def _expert_parallel(folder: Path, implementation: str) -> tuple[Tensors, int]:
    config = importlib.import_module("transformers.distributed").DistributedConfig(
        tp_size=2, ep_size=2, ep_implementation=implementation
    )
    model = load(folder, distributed_config=config)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.to_local().shape[0] * 2 == experts.gate_up_proj.shape[0]
    return train(model, torch.load(folder / "ids.pt"))


def expert_parallel_all_reduce(rank: int, folder: Path) -> tuple[Tensors, int]:
    """Hugging Face's expert parallelism: every rank runs its experts on the shared batch."""
    return _expert_parallel(folder, "all_reduce")


def expert_parallel_all_to_all(rank: int, folder: Path) -> tuple[Tensors, int]:
    """The same, exchanging tokens."""
    return _expert_parallel(folder, "all_to_all")


def expert_parallel_moe_kernels(rank: int, folder: Path) -> tuple[Tensors, int]:
    """The same over our exchange."""
    exchange.register_expert_parallel()
    found = _expert_parallel(folder, exchange.NAME)
    assert any(link.sequence > 0 for link in links._links.values()), "our exchange was not used"
    return found


def fails_on_one_rank(rank: int, folder: Path) -> None:
    """For the test of the harness: rank 1 fails while rank 0 waits for it."""
    if rank == 1:
        raise RuntimeError("rank 1 has had enough")
    torch.distributed.barrier()


def small_model() -> torch.nn.Module:
    """Two MoE layers with residuals, the same on every rank."""
    torch.manual_seed(0)
    words: dict[str, Any] = {"shared_intermediate_size": 12, "dtype": torch.float64}
    words["router"] = mk.Router(scoring_func="sigmoid", correction_bias=True, num_expert_group=2, topk_group=1)
    return torch.nn.Sequential(*(torch.nn.Sequential(mk.MoELayer(16, 12, 8, 2, **words)) for _ in range(2)))


def step(model: torch.nn.Module, x: torch.Tensor) -> Tensors:
    """Output, loss and all gradients by the names of the bare model."""
    y = model(x)
    loss = (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).square().mean()
    loss.backward()
    found = {"y": whole(y), "loss": whole(loss)}
    found.update({n.removeprefix("module."): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None})
    return found


def layer_fsdp(rank: int, folder: Path) -> Tensors:
    """FSDP2 around MoELayer: parameters of every layer sharded over the ranks."""
    model = small_model()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return step(model, torch.load(folder / "x.pt").chunk(2)[rank])


def layer_ddp(rank: int, folder: Path) -> Tensors:
    """DistributedDataParallel, without find_unused_parameters: every parameter gets a gradient in every step."""
    model = torch.nn.parallel.DistributedDataParallel(small_model())
    return step(model, torch.load(folder / "x.pt").chunk(2)[rank])
