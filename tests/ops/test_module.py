"""The module: arguments, repr, copies, checkpoints, a learnable alpha, and training with it."""

import copy
import inspect
import io
import pickle
import typing

import pytest
import torch
from inputs import make_logits, make_target

import oe_ext
from oe_ext import OutlierExposureLoss, outlier_exposure_loss


@pytest.fixture
def batch():
    return make_logits((12, 4), torch.float32), make_target((12, 4))


def test_defaults(batch):
    loss = OutlierExposureLoss()
    assert (loss.alpha, loss.reduction, loss.ignore_index, loss.ood_index) == (
        0.5,
        "mean",
        None,
        None,
    )
    assert torch.equal(loss(*batch), outlier_exposure_loss(*batch))


@pytest.mark.parametrize("reduction", ["none", None, "sum", "mean", "group_mean"])
def test_every_argument_reaches_the_operator(batch, reduction):
    logits, target = batch
    options = {"ignore_index": -7, "ood_index": -1}
    target = torch.where(target == -100, -1, target)
    loss = OutlierExposureLoss(0.3, reduction, **options)
    expected = outlier_exposure_loss(logits, target, 0.3, reduction, **options)
    assert torch.equal(loss(logits, target), expected)


def test_special_labels_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        OutlierExposureLoss(0.5, "mean", -100)


def test_repr_names_every_setting():
    assert repr(OutlierExposureLoss(0.25, "group_mean", ignore_index=255)) == (
        "OutlierExposureLoss(alpha=0.25, reduction='group_mean', ignore_index=255, ood_index=None)"
    )
    assert "alpha=0.5," in repr(OutlierExposureLoss(torch.nn.Parameter(torch.tensor(0.5))))
    assert "Tensor of shape [3]" in repr(OutlierExposureLoss(torch.ones(3)))


@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3), torch.nn.Parameter(torch.tensor(0.3))])
def test_copies_and_checkpoints(batch, alpha):
    loss = OutlierExposureLoss(alpha, "sum", ignore_index=-100)
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    for other in (
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(file, weights_only=False),
    ):
        assert repr(other) == repr(loss)
        assert torch.equal(other(*batch), loss(*batch))


def test_a_parameter_is_learned_and_saved(batch):
    loss = OutlierExposureLoss(torch.nn.Parameter(torch.tensor(0.5)))
    assert [name for name, _ in loss.named_parameters()] == ["alpha"]
    loss(*batch).backward()
    assert loss.alpha.grad > 0
    other = OutlierExposureLoss(torch.nn.Parameter(torch.tensor(0.0)))
    other.load_state_dict(loss.state_dict())
    assert other.alpha == 0.5
    assert OutlierExposureLoss(0.5).state_dict() == {}


@pytest.mark.parametrize("before", [0.3, torch.ones(12), torch.nn.Parameter(torch.ones(()))])
@pytest.mark.parametrize("after", [0.7, torch.rand(12), torch.nn.Parameter(torch.tensor(0.7))])
def test_alpha_may_become_a_number_a_buffer_or_a_parameter(batch, before, after):
    loss = OutlierExposureLoss(before)
    loss.alpha = after
    expected = OutlierExposureLoss(after)
    assert repr(loss) == repr(expected)
    assert loss.state_dict().keys() == expected.state_dict().keys()
    assert dict(loss.named_parameters()).keys() == dict(expected.named_parameters()).keys()
    assert torch.equal(loss(*batch), expected(*batch))
    assert torch.equal(copy.deepcopy(loss)(*batch), expected(*batch))
    with pytest.raises(TypeError, match="alpha must be a number or a tensor, got str"):
        loss.alpha = "0.5"
    with pytest.raises(TypeError, match="alpha must have a floating-point dtype"):
        loss.alpha = torch.tensor(1)
    assert torch.equal(loss(*batch), expected(*batch)), "what was refused changed nothing"


def test_all_processes_by_name(batch):
    """Before init_process_group(), "world" means this process alone; repr shows the name."""
    loss = OutlierExposureLoss(process_group="world")
    assert repr(loss).endswith("ood_index=None, process_group='world')")
    assert repr(copy.deepcopy(loss)) == repr(pickle.loads(pickle.dumps(loss))) == repr(loss)
    assert torch.equal(loss(*batch), OutlierExposureLoss()(*batch))
    both = outlier_exposure_loss(*batch, process_group="world", return_stats=True)
    assert torch.equal(both[0], OutlierExposureLoss()(*batch))


def public_callables():
    for module in (oe_ext, oe_ext.functional, oe_ext.loss, oe_ext.reference):
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                yield value
            if isinstance(value, type):
                yield from (v for v in vars(value).values() if inspect.isfunction(v))
                yield from (v.fget for v in vars(value).values() if isinstance(v, property))


def test_annotations_can_be_read():
    """Tools that build command lines or checks from annotations can read them."""
    seen = [typing.get_type_hints(value) for value in public_callables()]
    assert len(seen) > 10
    hints = typing.get_type_hints(OutlierExposureLoss.__init__)
    assert hints["process_group"] == torch.distributed.ProcessGroup | str | None


def test_jit_script_is_refused_with_a_way_out():
    model = torch.nn.Sequential(OutlierExposureLoss())
    for module in (model, OutlierExposureLoss()):
        with pytest.raises(NotImplementedError, match=r"torch\.compile"):
            torch.jit.script(module)


def test_a_network_learns_to_be_unsure():
    """A few steps: confident on the inliers, near uniform on the outliers."""
    inputs = torch.cat([torch.eye(3).repeat(20, 1), -torch.eye(3).repeat(20, 1)])
    inputs += 0.05 * torch.randn_like(inputs)
    target = torch.cat([torch.arange(3).repeat(20), torch.full((60,), -1)])
    model = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    criterion = OutlierExposureLoss(alpha=0.5)
    first = criterion(model(inputs), target).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = criterion(model(inputs), target)
        loss.backward()
        optimizer.step()
    confidence = model(inputs).softmax(1).amax(1)
    assert loss.item() < first / 2
    assert confidence[:60].min() > 0.9
    assert confidence[60:].max() < 0.5


def test_the_package_exports_what_it_says():
    assert set(oe_ext.__all__) == {
        "LossScores",
        "LossStats",
        "OutlierExposureLoss",
        "count_labels",
        "outlier_exposure_loss",
        "__version__",
    }
    assert all(hasattr(oe_ext, name) for name in oe_ext.__all__)
