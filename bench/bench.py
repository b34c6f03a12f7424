"""Forward + backward of our loss against its rivals, on this machine, in one run.

The rivals take turns, so that whatever else the machine does slows them all; the medians are
compared as ratios. A rival whose loss differs from ours ends the run.

    python bench/bench.py [--quick] [--threads 1] [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from oe_ext import collect_env, outlier_exposure_loss, reference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from oracles import load_pytorch_ood_class

SHAPES = [(384, 10), (384, 1000), (4096, 1000), (1024, 32000), (8, 2, 256, 256), (2, 19, 512, 512)]
QUICK_SHAPES = [(384, 10), (384, 1000), (2, 19, 128, 128)]

Loss = Callable[[Tensor, Tensor], Tensor]


def rivals(dtype: torch.dtype) -> dict[str, Loss]:
    """All compute the loss, but for cross_entropy, which takes every outlier for class 0."""
    losses: dict[str, Loss] = {
        "ours": outlier_exposure_loss,
        "pytorch-ood": load_pytorch_ood_class()(),
        "plain torch": reference.outlier_exposure_loss,
        "cross_entropy": lambda logits, target: F.cross_entropy(logits, target.clamp(min=0)),
    }
    if dtype != torch.float32:
        del losses["pytorch-ood"]  # an error, for (N, C) logits
    return losses


def seconds(loss: Loss, logits: Tensor, target: Tensor) -> float:
    if logits.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    torch.autograd.grad(loss(logits, target), logits)
    if logits.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    shape: tuple[int, ...], repeats: int, device: str, dtype: torch.dtype
) -> dict[str, float]:
    """The median seconds of each rival."""
    logits = torch.randn(shape).to(device, dtype).requires_grad_()
    target = torch.randint(-shape[1], shape[1], (shape[0], *shape[2:])).to(device)
    losses = rivals(dtype)
    ours = outlier_exposure_loss(logits, target)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name in losses.keys() - {"ours", "cross_entropy"}:
        theirs = losses[name](logits, target).to(ours.dtype)
        torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=0, msg=name)
    rounds = [
        {name: seconds(loss, logits, target) for name, loss in losses.items()}
        for _ in range(repeats + 2)
    ][2:]
    return {name: statistics.median(times[name] for times in rounds) for name in losses}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU and a CUDA build of torch; there is none here")
    dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    facts = collect_env.collect()
    facts["threads"] = str(args.threads)
    for name in ("CPU", "CPU capability", "threads", "torch", "oe_ext", "built with compiler"):
        print(f"{name}: {facts.get(name, 'unknown')}")
    if args.device == "cuda":
        print(f"GPU: {torch.cuda.get_device_name()}")
    print(f"forward + backward, {args.device}, {args.dtype}: the time of each over ours")
    print("(above 1: ours is faster)\n")
    shapes = QUICK_SHAPES if args.quick else SHAPES
    names = [name for name in rivals(dtype) if name != "ours"]
    print(f"{'shape':<20}" + "".join(f"{name:>16}" for name in names))
    for shape in shapes:
        repeats = 11 if args.quick else 31
        medians = measure(shape, repeats, args.device, dtype)
        cells = "".join(f"{medians[name] / medians['ours']:>16.2f}" for name in names)
        print(f"{shape!s:<20}{cells}")


if __name__ == "__main__":
    main()
