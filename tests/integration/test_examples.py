"""The examples run to the end and write their figures."""

import csv
import re
import subprocess
import sys

import optional
from paths import ROOT

EXAMPLES = ROOT / "examples"


def test_digits(tmp_path):
    output = run_with_figure(tmp_path, "train_digits.py", "digits.png")
    for text in ("AUROC", "AUPR", "FPR95", "accuracy", "Timing:"):
        assert text in output


def test_textures(tmp_path):
    """Whether the loss interpolates the logits or torch does, the scores are the same."""
    output = run_with_figure(tmp_path, "segment_textures.py", "textures.png")
    number = r"\s+(\d+\.\d)"
    scores = re.findall(rf"^(?:AUROC|AUPR|FPR95|accuracy),.*?{3 * number}$", output, re.MULTILINE)
    assert len(scores) == 7
    for _, fused, unfused in scores:
        assert abs(float(fused) - float(unfused)) <= 1
    costs = re.findall(rf"^  (fused|unfused){number} ms\s+(\d+) MiB$", output, re.MULTILINE)
    assert [name for name, _, _ in costs] == 2 * ["fused", "unfused"]
    assert all(float(time) > 0 and int(memory) > 0 for _, time, memory in costs)


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


def run_with_figure(folder, script, figure):
    optional.require("sklearn", "skimage", "matplotlib", "tqdm")
    output = run(folder, script)
    assert [path.name for path in folder.iterdir()] == [figure]
    assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    return output


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
