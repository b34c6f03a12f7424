"""torch.compile's cache of kernels, apart for each capability of the CPU.

torch 2.13 keeps what it has compiled without regard to ``ATEN_CPU_CAPABILITY``: a kernel that was
made for 16 lanes runs as one of 8, and the other way round, and writes beyond its buffers.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch


def keep_caches_apart() -> None:
    """Names a folder, if none is named, before torch.compile looks for one."""
    folder = f"torchinductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / folder))
