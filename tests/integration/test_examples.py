"""The examples run to the end and write their figures."""

import csv
import re
import subprocess
import sys

import optional
import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("script", "figure", "shows"),
    [
        ("train_digits.py", "digits.png", ["AUROC", "AUPR", "FPR95", "accuracy", "Timing:"]),
        ("segment_textures.py", "textures.png", ["AUROC", "FPR95", "accuracy"]),
    ],
)
def test_example(tmp_path, script, figure, shows):
    optional.require("sklearn", "skimage", "matplotlib", "tqdm")
    output = run(tmp_path, script)
    for text in shows:
        assert text in output
    assert [path.name for path in tmp_path.iterdir()] == [figure]
    assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_lightning(tmp_path):
    """The example trains, logs the statistics of the loss, and tests its own checkpoint."""
    optional.require("sklearn", "matplotlib", "tqdm", "lightning")
    output = run(tmp_path, "lightning_digits.py")
    for text in ("AUROC", "AUPR", "FPR95"):
        assert text in output
    assert float(re.search(r"^accuracy (\S+)$", output, re.MULTILINE)[1]) > 60
    (folder,) = tmp_path.iterdir()
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train_inlier_loss"]]
    assert float(rows[-1]["train_inlier_loss"]) < float(rows[0]["train_inlier_loss"])
    assert all(
        float(row["train_num_inliers"]) + float(row["train_num_outliers"]) > 0 for row in rows
    )
    assert len(list((folder / "checkpoints").iterdir())) == 1


def files_of_examples():
    return {path for path in EXAMPLES.rglob("*") if "__pycache__" not in path.parts}


def run(folder, script):
    before = files_of_examples()
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, "--quick", "--out", folder],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert files_of_examples() == before, "it writes where it is told to, and nowhere else"
    return done.stdout
