"""Separates torch.compile's cache of kernels by the capability of the CPU.

torch 2.13 caches kernels without regard to ``ATEN_CPU_CAPABILITY``: a kernel that was compiled for
16 lanes runs as one of 8, or the other way round, and writes beyond its buffers.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch


def keep_caches_apart() -> None:
    """Sets the cache folder, if it is not set, before torch.compile reads it."""
    folder = f"torchinductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / folder))
