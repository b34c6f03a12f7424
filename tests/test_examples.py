"""The examples run to their end and write their figures."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize(
    ("script", "figure", "shows"),
    [
        ("train_digits.py", "digits.png", ["AUROC", "AUPR", "FPR95", "accuracy", "Timing:"]),
        ("segment_textures.py", "textures.png", ["AUROC", "FPR95", "accuracy"]),
    ],
)
def test_example(tmp_path, script, figure, shows):
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, "--quick", "--out", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for text in shows:
        assert text in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [figure]
    assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
