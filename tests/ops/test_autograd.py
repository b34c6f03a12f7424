"""Derivatives: reverse and forward mode, first and second order, and their use by autograd."""

import warnings

import pytest
import torch
from inputs import IGNORE, REDUCTIONS, make_logits, make_target
from oracles import exact, loss_and_grad, max_error
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from oe_ext import outlier_exposure_loss, reference

SHAPES = [(5, 4), (3, 4, 2, 2)]


def case(shape, device="cpu"):
    logits = make_logits(shape, device=device, scale=1.0).requires_grad_()
    return logits, make_target(shape, device=device)


def loss_of(target, reduction, function=outlier_exposure_loss):
    return lambda x, alpha=0.7: function(x, target, alpha, reduction, ignore_index=IGNORE)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.no_simt("finite differences launch too many kernels")
def test_gradcheck(device, shape, reduction):
    logits, target = case(shape, device)
    function = loss_of(target, reduction)
    assert gradcheck(function, (logits,), check_forward_ad=True)
    assert gradgradcheck(function, (logits,), check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha_shape", [(), (1,), (2,), (3, 1, 2), (2, 1)])
@pytest.mark.no_simt("finite differences launch too many kernels")
def test_gradcheck_alpha(device, alpha_shape, reduction):
    logits, target = case((3, 4, 2, 2), device)
    alpha = torch.rand(alpha_shape, dtype=torch.float64, device=device).requires_grad_()
    function = loss_of(target, reduction)
    assert gradcheck(function, (logits, alpha), check_forward_ad=True)
    assert gradgradcheck(function, (logits, alpha), check_fwd_over_rev=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alpha_tensor_matches_the_reference(device, dtype, reduction):
    """Values and both gradients, with one weight per position, some of them 0."""
    logits = make_logits((40, 6), dtype, device).requires_grad_()
    target = make_target((40, 6), device=device)
    alpha = (torch.rand(40, device=device) - 0.3).clamp(min=0).requires_grad_()
    loss = loss_of(target, reduction)(logits, alpha)
    ours = torch.autograd.grad(loss.sum(), (logits, alpha))
    x, a = logits.detach().double().requires_grad_(), alpha.detach().double().requires_grad_()
    expected = loss_of(target, reduction, reference.outlier_exposure_loss)(x, a)
    theirs = torch.autograd.grad(expected.sum(), (x, a))
    assert max_error(loss, expected) <= 3e-6 * max(1, expected.abs().max().item())
    assert max_error(ours[0], theirs[0]) <= max(torch.finfo(dtype).eps, 2e-6)
    assert max_error(ours[1], theirs[1]) <= 3e-6 * theirs[1].abs().max().item()
    assert ours[1].dtype == alpha.dtype


def test_alpha_as_a_number_and_as_a_tensor_agree(device):
    logits, target = case((9, 4), device)
    for reduction in REDUCTIONS:
        function = loss_of(target, reduction)
        for alpha in (torch.tensor(0.7), torch.full((9,), 0.7), torch.tensor([0.7]).double()):
            torch.testing.assert_close(
                function(logits, alpha.to(device)), function(logits, 0.7), rtol=1e-7, atol=0
            )


def test_a_0_dim_alpha_keeps_its_gradient_in_the_operator(device):
    """Overload resolution could turn alpha into a number."""
    logits, target = case((9, 4), device)
    alpha = torch.tensor(0.5, device=device, requires_grad=True)
    loss = torch.ops.oe_ext.outlier_exposure_loss(logits.detach(), target, alpha)
    loss.backward()
    assert alpha.grad.abs() > 0


def test_only_what_is_asked_for_is_computed(device):
    logits, target = case((9, 4), device)
    alpha = torch.tensor(0.5, dtype=torch.float64, device=device)
    assert not outlier_exposure_loss(logits.detach(), target, alpha).requires_grad
    with torch.no_grad():
        assert not outlier_exposure_loss(logits, target).requires_grad
    with torch.inference_mode():
        loss = outlier_exposure_loss(logits, target)
    torch.testing.assert_close(loss, outlier_exposure_loss(logits, target).detach())


def test_retain_graph_and_a_second_backward(device):
    logits, target = case((9, 4), device)
    before = logits.detach().clone()
    loss = outlier_exposure_loss(logits, target)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(3 * loss, logits, retain_graph=True)
    torch.testing.assert_close(second, 3 * kept)
    first.zero_()  # a returned gradient is the caller's
    (third,) = torch.autograd.grad(loss, logits)
    assert torch.equal(third, kept)
    assert torch.equal(logits.detach(), before)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_expanded_upstream_gradient(device, shape):
    """The upstream gradient from .sum() of "none" has stride 0."""
    logits, target = case(shape, device)
    (ours,) = torch.autograd.grad(outlier_exposure_loss(logits, target, 0.5, "none").sum(), logits)
    (theirs,) = torch.autograd.grad(outlier_exposure_loss(logits, target, 0.5, "sum"), logits)
    assert torch.equal(ours, theirs)


def test_a_transposed_upstream_gradient(device):
    logits, target = case((3, 4, 5), device)
    weight = torch.rand(5, 3, dtype=torch.float64, device=device).t()
    _, ours = loss_and_grad(outlier_exposure_loss, logits, target, 0.5, "none", upstream=weight)
    _, theirs = exact(logits, target, 0.5, "none", upstream=weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_changing_the_logits_in_place_is_noticed(device):
    logits, target = case((9, 4), device)
    x = logits * 1
    loss = outlier_exposure_loss(x, target)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_accumulates_and_hooks_run(device):
    logits, target = case((9, 4), device)
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.clone()))
    for _ in range(2):
        outlier_exposure_loss(logits, target).backward()
    torch.testing.assert_close(logits.grad, seen[0] + seen[1])
    grad_fn = outlier_exposure_loss(logits, target).grad_fn
    assert grad_fn.name() == "OutlierExposureLossBackward0"


def test_a_gradient_penalty_trains(device):
    """create_graph=True inside a training loop: the same steps as with the reference."""
    inputs = torch.randn(30, 6, dtype=torch.float64, device=device)
    target = make_target((30, 4), device=device)

    def train(function):
        torch.manual_seed(1)
        model = torch.nn.Linear(6, 4, device=device, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            x = inputs.clone().requires_grad_()
            loss = function(model(x), target)
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            optimizer.zero_grad()
            (loss + 10 * grad.square().sum()).backward()
            optimizer.step()
        return model.weight.detach()

    torch.testing.assert_close(
        train(outlier_exposure_loss), train(reference.outlier_exposure_loss), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_forward_mode(device, reduction):
    logits, target = case((9, 4), device)
    tangent = torch.randn_like(logits)
    results = []
    for function in (outlier_exposure_loss, reference.outlier_exposure_loss):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(logits.detach(), tangent)
            output = loss_of(target, reduction, function)(dual)
            results.append(forward_ad.unpack_dual(output).tangent)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    assert results[0].abs().sum() > 0


TRANSFORMS = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "grad of grad": lambda f: torch.func.jacrev(torch.func.grad(f)),
    "forward of forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
}


@pytest.mark.parametrize("reduction", ["sum", "mean", "group_mean"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(device, transform, reduction):
    logits, target = case((4, 3), device)
    transform = TRANSFORMS[transform]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        ours = transform(loss_of(target, reduction))(logits.detach())
        theirs = transform(loss_of(target, reduction, reference.outlier_exposure_loss))(
            logits.detach()
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
