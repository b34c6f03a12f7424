"""Writes a classifier that scores its inputs, compiled ahead of time, for a C++ program to load.

    python export_model.py model.pt2 inputs.pt

The module returns each input's loss as an outlier: how far its softmax is from uniform. Its inputs
and what eager mode makes of them go to the second file.
"""

import sys

import torch

from oe_ext import outlier_exposure_loss


class Scorer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(6, 5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits = self.head(features)
        target = torch.full(logits.shape[:1], -1, device=logits.device)
        return outlier_exposure_loss(logits, target, 1.0, "none")


class Tensors(torch.nn.Module):
    """A file that torch::jit::load reads in C++."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def main() -> None:
    model_path, inputs_path = sys.argv[1:]
    torch.manual_seed(0)
    model = Scorer().eval()
    with torch.no_grad():
        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (torch.randn(4, 6),), dynamic_shapes=({0: batch},))
        torch._inductor.aoti_compile_and_package(program, package_path=model_path)
        features = torch.randn(9, 6)  # another batch size
        torch.jit.script(Tensors(features=features, expected=model(features))).save(inputs_path)


if __name__ == "__main__":
    main()
