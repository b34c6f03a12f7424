"""The environment of programs that tests start."""

import os
from pathlib import Path


def python_path(*folders: Path) -> str:
    """A PYTHONPATH: these folders, then those of this process."""
    parts = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, parts))


def environment(path: Path, **variables: str) -> dict[str, str]:
    """This process's environment without oe_ext's switches; Python looks in ``path`` first."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OE_EXT_")}
    return inherited | {"PYTHONPATH": str(path)} | variables


def jit_environment(checkout: Path, cache: Path, **variables: str) -> dict[str, str]:
    """An environment in which ``import oe_ext`` builds from ``checkout`` in ``cache``."""
    jit = {"TORCH_EXTENSIONS_DIR": str(cache), "OE_EXT_JIT": "1"}
    return environment(checkout, **(jit | variables))
