"""Groups of gloo processes, for the tests that compare them with one process.

Where one of them fails, its traceback names the work.
"""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import runnable

WORLD = 2


def launch(tmp_path, work: dict, world: int = WORLD) -> None:
    """Call functions(rank, backend), listed by family, in so many processes, with each backend that runs here."""
    mp.spawn(start, (str(tmp_path / "store"), world, work), nprocs=world)


def start(rank: int, store: str, world: int, work: dict) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # nothing rests on what torch gives up
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for family, functions in work.items():
        for backend in ("reference", "cpu"):
            if runnable(backend, "cpu", family) is None:
                for function in functions:
                    function(rank, backend)
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()
    # Without the interpreter's teardown: now and then it aborts over a thread that gloo has left behind.
    os._exit(0)
