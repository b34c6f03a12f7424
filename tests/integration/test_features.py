"""docs/FEATURES.md: its tests exist, and its statements about other projects hold."""

import re

import optional
import pytest
import torch
import torch.nn.functional as F
from paths import ROOT

PAGE = (ROOT / "docs" / "FEATURES.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("|")
][2:]

LOGITS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3, -1, -1, 0, 4])


def cross_entropy(logits, target):
    return F.cross_entropy(logits, target.clamp(min=0))


#: What makes the loss of a column.
OTHERS = {2: lambda: cross_entropy, 3: lambda: optional.pytorch_ood_class()(0.5)}


class Model(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, logits, target):
        return self.loss(logits, target)


def double_backward(loss):
    x = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x, TARGET), x, create_graph=True)
    torch.autograd.grad(grad.square().sum(), x)


def export(loss):
    batch = torch.export.Dim("batch")
    shapes = {"logits": {0: batch}, "target": {0: batch}}
    torch.export.export(Model(loss), (LOGITS, TARGET), dynamic_shapes=shapes)


def compiled(loss):
    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(LOGITS, TARGET)


def scripted(loss):
    torch.jit.script(torch.nn.CrossEntropyLoss() if loss is cross_entropy else loss)


def float32_loss(loss):
    assert loss(LOGITS.half(), TARGET).dtype == torch.float32


def untouched(loss):
    x = LOGITS.clone().requires_grad_()
    loss(x, TARGET).backward()
    assert torch.equal(x, LOGITS)


def batched(function):
    torch.vmap(function, (0, None))(torch.stack([LOGITS, LOGITS]), TARGET)


#: What a row says, as something that runs or raises.
CLAIMS = {
    "`torch.compile(fullgraph=True)`": compiled,
    "`torch.export` with a dynamic batch": export,
    "`vmap`": batched,
    "per-sample gradients, `vmap(grad)`": lambda loss: batched(torch.func.grad(loss)),
    "`torch.func.hessian`": lambda loss: torch.func.hessian(loss)(LOGITS, TARGET),
    "forward-mode AD": lambda loss: torch.func.jvp(lambda x: loss(x, TARGET), (LOGITS,), (LOGITS,)),
    "double backward": double_backward,
    "float16 logits `[N, C]`": lambda loss: loss(LOGITS.half(), TARGET),
    "loss of float16 logits in float32": float32_loss,
    "int32 target": lambda loss: loss(LOGITS, TARGET.int()),
    "leaves the logits as they are": untouched,
    "`torch.jit.script`": scripted,
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_tests_of_a_row_exist(row):
    assert len(row) == 6
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", row[5])
    assert named
    for path, test in named:
        text = (ROOT / path).read_text()
        assert test == "" or f"def {test}(" in text, f"{path}::{test}"


def test_every_bold_cell_is_a_claim():
    bold = {row[0] for row in ROWS if any(cell.startswith("**") for cell in row)}
    assert bold == CLAIMS.keys()


@pytest.mark.parametrize("feature", CLAIMS)
@pytest.mark.parametrize("column", OTHERS, ids=["cross_entropy", "pytorch-ood"])
def test_what_is_said_of_others(column, feature):
    (row,) = [row for row in ROWS if row[0] == feature]
    loss = OTHERS[column]()
    verdict = "**yes**"
    try:
        CLAIMS[feature](loss)
    except Exception:
        verdict = "**no**"
    assert row[column] == verdict
