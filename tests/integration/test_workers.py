"""Python threads, DataLoader workers, and processes that are forked after OpenMP ran in the
parent."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import programs
import pytest
import torch
from inputs import make_logits, make_target
from paths import SUPPORT

from oe_ext import OutlierExposureLoss, outlier_exposure_loss

SHAPE = (512, 400)  # enough logits for every thread of the operator
TIMEOUT = 60


def train(seed: int) -> torch.Tensor:
    """The weights after a few steps."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(256, 32, generator=random)
    target = torch.randint(-20, 400, (256,), generator=random)
    weight = torch.zeros(400, 32, requires_grad=True)
    criterion = OutlierExposureLoss(reduction="group_mean")
    for _ in range(30):
        (grad,) = torch.autograd.grad(criterion(features @ weight.T, target), weight)
        with torch.no_grad():
            weight -= 0.5 * grad
    return weight.detach()


def test_two_threads_train_as_one_does():
    serial = [train(seed) for seed in (1, 2)]
    results: dict[int, torch.Tensor] = {}
    start = threading.Barrier(2)

    def work(seed: int) -> None:
        start.wait()
        results[seed] = train(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not torch.equal(*serial)
    for seed, expected in zip((1, 2), serial, strict=True):
        assert torch.equal(results[seed], expected)


def loss_and_norm(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    logits = make_logits(SHAPE, torch.float32).requires_grad_()
    loss = outlier_exposure_loss(logits, make_target(SHAPE))
    loss.backward()
    return torch.stack([loss.detach(), logits.grad.norm()])


class Losses(torch.utils.data.Dataset):
    """A worker that computes losses and their gradients."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return loss_and_norm(index)


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_of_a_dataloader(context):
    expected = torch.stack([loss_and_norm(index) for index in range(4)])  # the parent's threads run
    loader = torch.utils.data.DataLoader(
        Losses(), batch_size=4, num_workers=2, multiprocessing_context=context, timeout=TIMEOUT
    )
    (actual,) = list(loader)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)  # the norm is torch's
    assert torch.equal(actual[:, 0], expected[:, 0])


IN_A_CHILD = """
import multiprocessing, sys, torch
from test_workers import loss_and_norm, outlier_exposure_loss

def child(queue, threads):
    if threads:
        torch.set_num_threads(threads)
    queue.put(float(loss_and_norm(0)[0]))

if __name__ == "__main__":
    torch.set_num_threads(2)
    expected = float(loss_and_norm(0)[0])
    context = multiprocessing.get_context("{method}")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue, {threads}))
    process.start()
    process.join({timeout})
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    print("hangs" if hangs else queue.get() == expected)
"""


def run_child(tmp_path: Path, method: str, threads: int, timeout: int) -> str:
    script = tmp_path / "script.py"
    script.write_text(IN_A_CHILD.format(method=method, threads=threads, timeout=timeout))
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * TIMEOUT,
        env={**os.environ, "PYTHONPATH": programs.python_path(Path(__file__).parent, SUPPORT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("method", "threads"), [("forkserver", 0), ("spawn", 0), ("fork", 1)])
def test_a_child_after_the_parents_threads_ran(tmp_path, method, threads):
    """A plain fork needs torch.set_num_threads(1) in the child, like DataLoader workers: GNU's
    OpenMP does not survive a fork, and every operator of PyTorch hangs there."""
    assert run_child(tmp_path, method, threads, TIMEOUT) == "True"
