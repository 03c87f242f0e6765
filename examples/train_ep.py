# SPDX-License-Identifier: Apache-2.0
"""A byte-level language model whose experts live on different ranks; the loss is that of one process.

    python examples/train_ep.py                              # one process
    torchrun --nproc-per-node 4 examples/train_ep.py         # the same run over four: gloo on CPUs, NCCL on GPUs
    torchrun --nproc-per-node 4 examples/train_ep.py --kill-rank 2 --kill-step 20     # who died?

Every rank takes its rows of every batch and its experts of every layer. What is no expert is kept the same by
DistributedDataParallel. A rank that dies ends the run, and the others say which one it was.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import moe_kernels as mk
from moe_kernels import expert_parallel
from moe_kernels.demo.text import batch, standard_library

HIDDEN, WIDTH, EXPERTS, TOP_K, LAYERS, CONTEXT = 64, 96, 8, 2, 2, 8


class Block(nn.Module):
    """Mix the last CONTEXT positions, then an MoE layer; both with a residual."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN, dtype=dtype), nn.RMSNorm(HIDDEN, dtype=dtype)
        self.mix = nn.Conv1d(HIDDEN, HIDDEN, CONTEXT, groups=4, dtype=dtype)
        self.moe = mk.MoELayer(
            HIDDEN, WIDTH, EXPERTS, TOP_K, shared_intermediate_size=WIDTH, init="fan_in", dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        past = F.pad(self.norm1(x).mT, (CONTEXT - 1, 0))
        x = x + F.silu(self.mix(past)).mT
        return x + self.moe(self.norm2(x))


class ByteModel(nn.Module):
    """Bytes [B, S] -> logits of the next one [B, S, 256]."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, HIDDEN, dtype=dtype)
        self.blocks = nn.Sequential(*(Block(dtype) for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(HIDDEN, dtype=dtype), nn.Linear(HIDDEN, 256, bias=False, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def connect() -> tuple[int, int, torch.device]:
    """rank, number of ranks and device; a single process needs no launcher."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def train(asked: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
    torch.manual_seed(0)  # the same weights everywhere, before the experts are spread
    model = ByteModel(getattr(torch, asked.dtype)).to(device)
    run: nn.Module = model
    if world > 1:
        for block in model.blocks:
            mk.ExpertParallel(block.moe, transport=asked.transport, timeout=asked.timeout, average_gradients=True)
        expert_parallel.ignore_in_ddp(model)
        run = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = standard_library()
    for step in range(asked.steps):
        if rank == asked.kill_rank and step == asked.kill_step:
            os.kill(os.getpid(), signal.SIGKILL)
        tokens = batch(text, step, asked.rows, asked.length + 1).chunk(world)[rank].to(device)
        loss = F.cross_entropy(run(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == asked.steps - 1:
            mean = loss.detach() / world
            if world > 1:
                dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step:4d}  loss {float(mean):.12f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8, help="of the whole batch; a multiple of the number of ranks")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--kill-rank", type=int, default=-1)
    parser.add_argument("--kill-step", type=int, default=0)
    asked = parser.parse_args()
    rank, world, device = connect()
    if asked.rows % world:
        parser.error(f"--rows must be a multiple of the {world} ranks, got {asked.rows}")
    try:
        train(asked, rank, world, device)
    except mk.MoECommError as error:
        print(f"[rank {rank}] {error}", flush=True)
        return 3
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
