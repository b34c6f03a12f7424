"""How the C++ and CUDA sources become a library: one description for ``setup.py`` and the JIT.

``setup.py`` loads this file by its path, before the package can be imported. Therefore this file
imports nothing of the package, and torch only inside the functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_TORCH = "2.11"

# torch's headers need C++20. No debug information: it would grow the library from 0.3 MB to 11 MB.
# Hidden inline functions need not be emitted: that saves a tenth of the time of a file.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-Wall", "-Wextra"]
CXX_FLAGS += ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]
# Results are those of IEEE 754, whatever CFLAGS say: what comes last holds.
CXX_FLAGS += ["-fno-fast-math"]
# Vectorises loops under "omp simd", without OpenMP's threads. Nothing reads errno or traps, either
# of which would prevent it.
CXX_FLAGS += ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
# Loops start with a cache line: where a build puts them is worth up to 5 % (docs/CPU.md).
CXX_FLAGS += ["-falign-loops=64"]
# With -Ofast or -ffast-math at the link, g++ before 13 adds code that flushes subnormal numbers in
# the whole process that loads the library.
LINK_FLAGS = ["-O3", "-fno-fast-math", "-fno-unsafe-math-optimizations"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--threads=2", "--expt-relaxed-constexpr"]
# Small headers instead of one for all operators: 5 s per file instead of 15 s.
DEFINES = ["AT_PER_OPERATOR_HEADERS"]

# In a folder of objects: the sources that they were made from.
RECORD = "oe_ext.json"

# Turing, Ampere, Hopper, Blackwell, and later ones through PTX.
DEFAULT_CUDA_ARCH_LIST = "7.5;8.0;9.0;10.0+PTX"


def switch(name: str) -> bool | None:
    """The value of a switch in the environment, or None if it is not set."""
    value = os.environ.get(name, "").strip().lower()
    if not value:
        return None
    if value in ("1", "on", "yes", "true"):
        return True
    if value in ("0", "off", "no", "false"):
        return False
    raise ValueError(f"the environment variable {name} must be 1 or 0, got {value!r}")


def _has_nvcc(path: Path) -> bool:
    return (path / "bin" / "nvcc").is_file()


def find_cuda_home() -> Path | None:
    """The CUDA toolkit. Call it before ``torch.utils.cpp_extension`` is imported.

    An ``nvcc`` on PATH may be a wrapper script in ``/usr/local/bin``. torch would take
    ``/usr/local`` for the toolkit, compile with it, and fail at the link. The folder that CUDA_HOME
    names is taken as it is, as torch does.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return Path(os.environ[name])
    candidates = [Path("/usr/local/cuda")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.insert(0, Path(nvcc).resolve().parent.parent)
    for path in candidates:
        if (path / "include" / "cuda_runtime.h").is_file() and _has_nvcc(path):
            os.environ["CUDA_HOME"] = str(path)
            return path
    return None


def require_compiler() -> None:
    """Checks for a compiler that torch can run: without one, a build ends in a list of failed
    commands. torch takes CXX for one program, whose name may hold spaces.

    Raises:
        RuntimeError: there is no C++ compiler.
    """
    named = os.environ.get("CXX")
    if shutil.which("c++" if named is None else named) is None:
        missing = "c++ is not on PATH"
        if named is not None:
            missing = f"CXX={named!r} is not a program (torch takes no flags or launchers there)"
        raise RuntimeError(
            f"oe_ext needs a C++20 compiler, but {missing}. Install g++ >= 11 "
            "(apt-get install g++), or set CXX to the compiler."
        )


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels.

    ``OE_EXT_CUDA`` and ``FORCE_CUDA`` decide. Without them, yes if torch is a CUDA build and the
    toolkit has the same major version. A GPU need not be present: build machines have none.

    Raises:
        RuntimeError: the kernels are requested but cannot be built here.
    """
    import torch

    home = find_cuda_home()
    ours, theirs = torch.version.cuda, _toolkit_version(home)
    missing = ""
    if home is None:
        missing = "no CUDA toolkit was found"
    elif not _has_nvcc(home):
        missing = f"CUDA_HOME={home} holds no bin/nvcc"
    mismatch = ours is not None and theirs is not None and _major(ours) != _major(theirs)
    versions = (
        f"torch {torch.__version__} is built with CUDA {ours}, the toolkit in {home} is {theirs}. "
        f"Set CUDA_HOME to a toolkit of CUDA {ours}, or OE_EXT_CUDA=0 to build for the CPU alone."
    )
    set_home = "Set CUDA_HOME to the folder that holds bin/nvcc."
    for name in ("OE_EXT_CUDA", "FORCE_CUDA"):
        choice = switch(name)
        if choice is not None:
            if choice and ours is None:
                raise RuntimeError(
                    f"{name}=1 asks for CUDA kernels, but torch {torch.__version__} is a build "
                    f"without CUDA. Install a CUDA build of torch, or set {name}=0."
                )
            if choice and missing:
                raise RuntimeError(f"{name}=1 asks for CUDA kernels, but {missing}. {set_home}")
            if choice and mismatch:
                raise RuntimeError(f"{name}=1 asks for CUDA kernels, but {versions}")
            return choice
    if mismatch or (ours is not None and home is not None and missing):
        why = f"{missing}. {set_home}" if missing else versions
        warnings.warn(f"no CUDA kernels are built: {why}", stacklevel=2)
    return ours is not None and theirs is not None and not missing and not mismatch


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _toolkit_version(home: Path | None) -> str | None:
    """The version in the toolkit's header, such as "13.0"; None without a toolkit."""
    try:
        header = (home / "include" / "cuda.h").read_text() if home else ""
    except OSError:
        return None
    for line in header.splitlines():
        if line.startswith("#define CUDA_VERSION"):
            number = int(line.split()[2])
            return f"{number // 1000}.{number % 1000 // 10}"
    return None


def _cuda_arch_list() -> list[str]:
    """The architectures to build for: as requested, or those of the GPUs here, or a default.

    torch has no default and fails without a GPU.
    """
    import torch

    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        if torch.cuda.is_available():
            gpus = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
            return sorted({f"{major}.{minor}" for major, minor in gpus})
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_CUDA_ARCH_LIST
    return os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ").split()


def hash_sources(root: Path) -> dict[str, str]:
    """The SHA-256 of each file in ``root / "csrc"``."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((root / "csrc").rglob("*"))
        if path.is_file()
    }


def build_id(root: Path) -> bytes:
    """Of a library of these sources: a checkout knows by it what has been installed from it."""
    return hashlib.sha256(json.dumps(hash_sources(root)).encode()).digest()


def link_flags(root: Path) -> list[str]:
    """The flags that link a library of the sources in ``root / "csrc"``."""
    has_build_id = sys.platform.startswith("linux")
    return LINK_FLAGS + ([f"-Wl,--build-id=0x{build_id(root).hex()}"] if has_build_id else [])


def read_record(folder: Path) -> dict[str, Any]:
    """What ``write_record`` has written; nothing, if that cannot be read."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record


def write_record(folder: Path, **record: Any) -> None:
    """Notes in a folder of objects what they were made from."""
    new = folder / f"{RECORD}.new"
    new.write_text(json.dumps(record))
    new.replace(folder / RECORD)


def forget_stale_objects(folder: Path, root: Path) -> None:
    """Lets ninja see every change of the sources since the last build in a folder.

    ninja compares times, and what replaces a file may be older (tar, rsync, cp -p). Without its
    log, it compiles everything.
    """
    sources = hash_sources(root)
    before = read_record(folder).get("sources", {})
    changed = [root / name for name in sources if sources[name] != before.get(name)]
    if before and changed:
        noted = (folder / RECORD).stat().st_mtime_ns
        if any(path.stat().st_mtime_ns <= noted for path in changed):
            (folder / ".ninja_log").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, sources=sources)


@dataclass(frozen=True)
class Build:
    """What to compile, and with which flags."""

    cuda: bool
    sources: list[str]
    cxx_flags: list[str]
    nvcc_flags: list[str]
    libraries: list[str]


def describe_build(root: Path) -> Build:
    """The build of the sources in ``root / "csrc"``; sources are relative to ``root``."""
    import torch

    cuda = wants_cuda()
    sources = sorted(
        str(path.relative_to(root))
        for path in (root / "csrc").rglob("*")
        if path.suffix == ".cpp" or path.suffix == ".cu"
        if cuda or path.parent.name != "cuda"
    )
    define_flags = [f"-D{define}" for define in DEFINES]
    define_flags.append(f"-DOE_EXT_TORCH_VERSION={torch.__version__}")
    # For the C++ compiler only: nvcc ends a definition at a comma.
    host_define_flags = []
    if cuda and torch.version.cuda is not None:
        major, minor = torch.version.cuda.split(".")[:2]
        host_define_flags = [
            f"-DOE_EXT_WITH_CUDA={int(major) * 1000 + int(minor) * 10}",
            "-DOE_EXT_CUDA_ARCH_LIST=" + ",".join(_cuda_arch_list()),
        ]
    # Declared as system headers, so that all warnings come from our code.
    torch_headers = Path(torch.__file__).resolve().parent / "include"
    system_headers = []
    for folder in (torch_headers, torch_headers / "torch" / "csrc" / "api" / "include"):
        system_headers += ["-isystem", str(folder)]
    return Build(
        cuda=cuda,
        sources=sources,
        cxx_flags=CXX_FLAGS + define_flags + host_define_flags + system_headers,
        nvcc_flags=NVCC_FLAGS + define_flags,
        libraries=["c10_cuda"] if cuda else [],
    )
