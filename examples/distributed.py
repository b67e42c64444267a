"""Distributed training: how fast does the blob move? Two processes, each with its own clips, and statistics of all.

In eight frames a blob stands still, goes or runs, in any direction. No frame by itself tells the speed; units of
Attention in Attention pool over time and can. The network is wrapped in DistributedDataParallel, and the batch norms in
its units share the statistics of all processes (SyncBatchNorm, on CPUs too).

    python examples/distributed.py      # two processes, or one for each GPU; under two minutes on two CPU cores
    torchrun --nproc-per-node 2 examples/distributed.py
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import side_by_side
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import aia_kernels

plt = side_by_side.plt
FRAMES, SIDE, CLIPS = 8, 24, 8
#: Pixels a frame: the classes.
SPEEDS = (0.0, 1.0, 2.5)


def make_clips(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips [number, FRAMES, 1, SIDE, SIDE] of a blob that wraps at the edges, in noise, and their speeds' numbers."""
    generator = torch.Generator().manual_seed(seed)
    speeds = torch.arange(number) % len(SPEEDS)
    angle = 2 * math.pi * torch.rand(number, generator=generator)
    step = torch.tensor(SPEEDS)[speeds] * torch.stack((angle.cos(), angle.sin()))
    time = torch.arange(FRAMES)
    centre = SIDE * torch.rand(2, number, 1, generator=generator) + step.unsqueeze(2) * time
    distance = (torch.arange(SIDE) - centre.unsqueeze(3) + SIDE / 2) % SIDE - SIDE / 2  # [2, number, FRAMES, SIDE]
    blob = torch.exp(-(distance**2) / 8)
    clips = blob[0].unsqueeze(3) * blob[1].unsqueeze(2)
    return (clips + 0.1 * torch.randn(clips.shape, generator=generator)).unsqueeze(2), speeds


class Network(nn.Module):
    """Two convolutions, each with a unit, and an average over positions and frames: logits [B] of clips [B * T]."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stages = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            aia_kernels.CinST(FRAMES),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.ReLU(),
            aia_kernels.STinC(FRAMES),
        )
        self.head = nn.Linear(2 * width, len(SPEEDS))

    def forward(self, clips: Tensor) -> Tensor:
        features = self.stages(clips.flatten(0, 1)).mean((2, 3))
        return self.head(features.unflatten(0, (-1, FRAMES)).mean(1))


def make_network(device: torch.device) -> nn.Module:
    wrapped = DistributedDataParallel(Network().to(device))
    # Afterwards, for the wrapper refuses SyncBatchNorm on CPUs, where its own forward cannot run. The units do not call
    # it: they read from it with whom to share.
    nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)
    return wrapped


def work(options) -> None:
    """One process of the group."""
    rank, members = dist.get_rank(), dist.get_world_size()
    number = 64 if options.quick else 512
    steps = options.steps or (3 if options.quick else 120)
    clips, speeds = (t.to(options.device) for t in make_clips(number, seed=1))
    unseen = tuple(t.to(options.device) for t in make_clips(16 if options.quick else 128, seed=2))
    # All processes draw the same numbers; each takes its own part of every batch.
    batches = torch.randint(number, (steps, members, CLIPS), generator=torch.Generator().manual_seed(options.seed))

    def loss_of(model: nn.Module, step: int) -> Tensor:
        batch = batches[step, rank].to(options.device)
        return F.cross_entropy(model(clips[batch]), speeds[batch])

    runs = side_by_side.train(lambda: make_network(options.device), loss_of, steps, 1e-2, options, bar=rank == 0)
    apart = parameters_apart(runs["fused"].model)
    if rank > 0:
        return
    plural = "es" if members > 1 else ""
    print(f"{members} process{plural} on {options.device.type}; parameters of the members apart: {apart:.1e}")
    side_by_side.report(runs, "attention_in_attention", options.device)
    for name, backend in side_by_side.BACKENDS.items():
        with torch.no_grad(), aia_kernels.use_backend(backend):
            found = runs[name].model.module(unseen[0]).argmax(1)
        print(f"{name:>9}: {(found == unseen[1]).float().mean():.1%} of {len(found)} unseen speeds right")
    draw(runs, unseen, found, options)


def parameters_apart(model: nn.Module) -> float:
    """The largest difference between the parameters of two members of the group: 0 if they trained as one."""
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    extremes = torch.stack((values, -values))
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return extremes.sum(0).max().item()


def draw(runs, unseen, found: Tensor, options) -> None:
    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    side_by_side.draw_losses(left.subplots(), runs)
    right.suptitle("unseen clips, maximum over time; pixels a frame", fontsize=11)
    for i, axes in enumerate(right.subplots(2, len(SPEEDS)).flat):
        axes.imshow(unseen[0][i, :, 0].amax(0).cpu(), cmap="magma", vmin=0, vmax=1)
        answer, truth = SPEEDS[found[i]], SPEEDS[unseen[1][i]]
        axes.set_title(f"{answer}" if answer == truth else f"{answer}, is {truth}", fontsize=10)
        axes.set_axis_off()
    side_by_side.save(figure, options)


def main() -> None:
    if "RANK" not in os.environ:
        # torchrun's own command, for as many processes as there are GPUs, or two.
        processes = torch.cuda.device_count() or 2
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        raise SystemExit(subprocess.call([sys.executable, *command, *sys.argv]))
    options = side_by_side.arguments(__doc__.split("\n")[0], "distributed.png")
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
    else:
        torch.set_num_threads(1)
    options.device = torch.device(options.device)
    dist.init_process_group("nccl" if options.device.type == "cuda" else "gloo")
    try:
        work(options)
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
