"""Prints the facts that a bug report needs: ``python -m oe_ext.collect_env``."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SWITCHES = (
    "OE_EXT_JIT",
    "OE_EXT_CUDA",
    "OE_EXT_VERBOSE",
    "FORCE_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "ATEN_CPU_CAPABILITY",
)


def _first_line(*command: str) -> str:
    """The first line that a program prints, or the reason why there is none."""
    if shutil.which(command[0]) is None:
        return "not found"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else f"printed nothing (exit status {done.returncode})"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _library() -> dict[str, str]:
    """Where the operators came from; a failed import is reported too."""
    import oe_ext
    from oe_ext import _ext

    if _ext.fault is not None:
        return {"oe_ext": f"{oe_ext.__version__}, which cannot be imported: {_ext.fault}"}
    facts = {"oe_ext": oe_ext.__version__, "library": _ext.origin}
    if _ext.module is not None:
        facts |= {f"built with {key}": str(v) for key, v in _ext.module.build_info().items()}
        facts["CPU kernels"] = _ext.module.cpu_capability()
    name = "oe_ext::outlier_exposure_loss"
    keys = ["CPU", "Meta", "Autograd"] + (["CUDA"] if _ext.has_cuda_kernels() else [])
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    facts["kernels"] = ", ".join(key for key in keys if has(name, key))
    return facts


def collect() -> dict[str, str]:
    """The facts, by name."""
    cuda = torch.version.cuda or "not in this build of torch"
    facts = _library()
    facts |= {
        "torch": torch.__version__,
        "torch's CUDA": cuda,
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "Python": sys.version.split()[0],
        "platform": platform.platform(),
        "CPU": _cpu_name(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "g++": _first_line(os.environ.get("CXX", "g++"), "--version"),
        "ninja": _first_line("ninja", "--version"),
        "nvcc": _first_line("nvcc", "--version"),
    }
    facts |= {name: os.environ[name] for name in SWITCHES if name in os.environ}
    return facts


def main() -> None:
    facts = collect()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
