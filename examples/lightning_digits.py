"""Outlier Exposure in a Lightning module, on scikit-learn's 8x8 digits.

Uses the data and the network of train_digits.py: 0-5 are learnt, 6 and 7 are shown as outliers, 8
and 9 are never shown. If several processes share a batch (the Trainer's devices=2), the loss is
that of the whole batch, although the module is built before the processes start.

    python examples/lightning_digits.py [--epochs 15] [--out FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import lightning
import torch
from common import detection_metrics
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from train_digits import BATCH_SIZE, Split, load_split, make_network

from oe_ext import LossStats, OutlierExposureLoss


class DigitsModule(lightning.LightningModule):
    """A classifier that is trained with outliers, which its batches label -1."""

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = make_network()
        self.criterion = OutlierExposureLoss(alpha, "group_mean", process_group="world")
        # The statistics are those of this process. In the run without outliers, these do not enter
        # the loss, but get scores.
        self.statistics = OutlierExposureLoss(return_stats=True, return_scores=True)
        self.tested: LossStats | None = None
        self.scores: dict[bool, list[Tensor]] = {False: [], True: []}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        logits, target = self.network(batch[0]), batch[1]
        _, stats, _ = self.statistics(logits.detach(), target)
        self.log_dict({f"train_{name}": value.float() for name, value in stats._asdict().items()})
        loss: Tensor = self.criterion(logits, target)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        target = batch[1]
        _, stats, scores = self.statistics(self.network(batch[0]), target)
        # Batches hold different numbers of inliers, some of them none, so sums and counts are
        # added.
        self.tested = stats if self.tested is None else self.tested.merge(stats)
        for is_outlier in (False, True):
            self.scores[is_outlier].append(1 - scores.max_softmax[(target < 0) == is_outlier])

    def on_test_epoch_end(self) -> None:
        inliers, outliers = (torch.cat(self.scores[k]).cpu().numpy() for k in (False, True))
        self.log_dict({f"test_{k}": v for k, v in detection_metrics(inliers, outliers).items()})
        assert self.tested is not None
        self.log("test_accuracy", self.tested.inlier_accuracy)
        self.tested, self.scores = None, {False: [], True: []}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def loaders(split: Split) -> tuple[DataLoader, DataLoader]:
    """To train on: 0-5, and 6-7 as outliers. To test on: others of 0-5, and 8-9."""

    def dataset(images: Tensor, labels: Tensor, outliers: Tensor) -> TensorDataset:
        target = torch.cat([labels, torch.full((len(outliers),), -1)])
        return TensorDataset(torch.cat([images, outliers]), target)

    train = dataset(split.train_images, split.train_labels, split.shown)
    test = dataset(split.test_images, split.test_labels, split.unseen)
    return DataLoader(train, 2 * BATCH_SIZE, shuffle=True), DataLoader(test, 2 * BATCH_SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="two epochs: a smoke test")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "out",
        help="folder for the log and the checkpoint (examples/out)",
    )
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    lightning.seed_everything(0, verbose=False)
    torch.set_num_threads(1)  # as in train_digits.py

    train, test = loaders(load_split(seed=0))
    trainer = lightning.Trainer(
        max_epochs=2 if args.quick else args.epochs,
        accelerator="cpu",
        logger=CSVLogger(args.out, name="", version="lightning"),
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsModule(), train)
    (metrics,) = trainer.test(ckpt_path="best", dataloaders=test, verbose=False)
    print("Digits, 0-5 held out against 8-9 never shown, %:")
    print(f"accuracy {100 * metrics.pop('test_accuracy'):.1f}")
    for name, value in metrics.items():
        print(f"{name.removeprefix('test_')} {value:.1f}")
    print(f"wrote {args.out / 'lightning'}")


if __name__ == "__main__":
    main()
