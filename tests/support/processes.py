"""Runs a function in several processes that gloo connects."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def _child(rank: int, function: Callable[..., None], world: int, path: str, args: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    try:
        function(*args)
    finally:
        # Models of a test refer to the group in cycles. Without a collection, its threads would
        # outlive the group and the interpreter, which aborts at a thread that asks for it.
        gc.collect()
        dist.destroy_process_group()


def run(world: int, function: Callable[..., None], *args: Any) -> None:
    """Calls ``function(*args)``, a module-level function, in ``world`` processes. Raises the error
    of any of them here."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rendezvous")
        # From one process that has imported what takes seconds to import.
        multiprocessing.set_forkserver_preload(["torch.testing", "oe_ext.distributed", "pytest"])
        torch.multiprocessing.start_processes(
            _child, (function, world, path, args), nprocs=world, start_method="forkserver"
        )


def same(ours: Any, theirs: Any, rtol: float = 1e-12, atol: float = 1e-14) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
