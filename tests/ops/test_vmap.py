"""torch.vmap: our batching rules against the reference, sample by sample."""

import pytest
import torch
from inputs import IGNORE, REDUCTIONS, make_logits, make_target

from oe_ext import outlier_exposure_loss, reference

BATCH = 3
SHAPES = [(5, 4), (2, 4, 3, 2)]


@pytest.fixture(autouse=True)
def _no_slow_path():
    """Without a batching rule, PyTorch loops over the samples; here it raises instead. Its warning
    is not a Python warning if an operator is called by name."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def batch_of(shape, dtype=torch.float64, device="cpu"):
    logits = torch.stack([make_logits(shape, dtype, device, scale=1.0) for _ in range(BATCH)])
    target = torch.stack([make_target(shape, device=device) for _ in range(BATCH)])
    return logits, target


def loss_with(reduction, function=outlier_exposure_loss):
    return lambda x, y, alpha=0.7: function(x, y, alpha, reduction, ignore_index=IGNORE)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 1), (-1, -1)])
def test_values(device, shape, reduction, in_dims):
    logits, target = batch_of(shape, device=device)
    args, expected = [], []
    for tensor, dim in zip((logits, target), in_dims, strict=True):
        args.append(tensor[0] if dim is None else tensor.movedim(0, dim).contiguous())
        expected.append(tensor[:1].expand_as(tensor) if dim is None else tensor)
    ours = torch.vmap(loss_with(reduction), in_dims)(*args)
    theirs = [loss_with(reduction)(x, y) for x, y in zip(*expected, strict=True)]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha_shape", [(), (5,), (BATCH,), (BATCH, 5)])
def test_alpha(device, alpha_shape, reduction):
    """A tensor alpha, one for all samples or one for each."""
    logits, target = batch_of((5, 4), device=device)
    alpha = torch.rand(alpha_shape, dtype=torch.float64, device=device)
    has_batch = alpha_shape[:1] == (BATCH,)
    ours = torch.vmap(loss_with(reduction), (0, 0, 0 if has_batch else None))(logits, target, alpha)
    theirs = [
        loss_with(reduction, reference.outlier_exposure_loss)(
            logits[i], target[i], alpha[i] if has_batch else alpha
        )
        for i in range(BATCH)
    ]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["sum", "mean", "group_mean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_per_sample_gradients(device, shape, reduction):
    logits, target = batch_of(shape, device=device)
    alpha = torch.tensor(0.7, dtype=torch.float64, device=device)
    ours = torch.vmap(torch.func.grad(loss_with(reduction), argnums=(0, 2)), (0, 0, None))(
        logits, target, alpha
    )
    gradient = torch.func.grad(
        loss_with(reduction, reference.outlier_exposure_loss), argnums=(0, 2)
    )
    for i in range(BATCH):
        theirs = gradient(logits[i], target[i], alpha)
        torch.testing.assert_close((ours[0][i], ours[1][i]), theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(device, dtype):
    logits, target = batch_of((6, 4), dtype, device)
    ours = torch.vmap(torch.func.grad_and_value(loss_with("mean")))(logits, target)
    for i in range(BATCH):
        gradient, loss = torch.func.grad_and_value(loss_with("mean"))(logits[i], target[i])
        assert (ours[0][i].dtype, ours[1][i].dtype) == (dtype, torch.float32)
        torch.testing.assert_close((ours[0][i], ours[1][i]), (gradient, loss))


@pytest.mark.parametrize("reduction", ["sum", "mean", "group_mean"])
def test_second_order(device, reduction):
    """vmap over a Hessian: vmap in vmap, with forward over reverse."""
    logits, target = batch_of((3, 4), device=device)
    ours = torch.vmap(torch.func.hessian(loss_with(reduction)))(logits, target)
    hessian = torch.func.hessian(loss_with(reduction, reference.outlier_exposure_loss))
    for i in range(BATCH):
        torch.testing.assert_close(ours[i], hessian(logits[i], target[i]), rtol=1e-9, atol=1e-13)


def test_tangents(device):
    logits, target = batch_of((5, 4), device=device)
    tangents = torch.randn_like(logits)

    def tangent_of(x, y, v, function=outlier_exposure_loss):
        return torch.func.jvp(lambda z: loss_with("mean", function)(z, y), (x,), (v,))[1]

    ours = torch.vmap(tangent_of)(logits, target, tangents)
    theirs = [
        tangent_of(logits[i], target[i], tangents[i], reference.outlier_exposure_loss)
        for i in range(BATCH)
    ]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-11, atol=1e-14)


def test_samples_without_counted_rows(device):
    """A fully ignored sample has a loss of 0; one without rows has a mean of NaN."""
    logits, target = batch_of((5, 4), device=device)
    target[1] = IGNORE
    for reduction in ("mean", "group_mean"):
        losses = torch.vmap(loss_with(reduction))(logits, target)
        assert losses[1] == 0
        assert losses[0] > 0
    nothing = logits[:, :0].clone().requires_grad_()
    empty = torch.vmap(loss_with("mean"))(nothing, target[:, :0])
    empty.sum().backward()  # as for any loss
    assert empty.shape == (BATCH,)
    assert empty.isnan().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("num_rows", [5, 0])
def test_a_batch_of_nothing(device, reduction, num_rows):
    """An empty batch gives the usual shapes, for each kind of alpha and for derivatives."""
    logits = torch.zeros(0, num_rows, 4, dtype=torch.float64, device=device)
    target = torch.zeros(0, num_rows, dtype=torch.int64, device=device)
    alpha = torch.zeros(0, num_rows, dtype=torch.float64, device=device)
    loss = loss_with(reduction)
    shape = (0, num_rows) if reduction == "none" else (0,)
    assert torch.vmap(loss)(logits, target).shape == shape
    assert torch.vmap(loss)(logits, target, alpha).shape == shape
    assert torch.vmap(loss, (0, 0, None))(logits, target, alpha.new_zeros(())).shape == shape
    assert torch.vmap(loss, (None, 0))(logits.new_zeros(num_rows, 4), target).shape == shape
    assert (
        torch.vmap(loss, (1, None))(logits.movedim(0, 1), target.new_zeros(num_rows)).shape == shape
    )
    nested = torch.vmap(torch.vmap(loss), (0, None))(logits.new_zeros(3, 0, num_rows, 4), target)
    assert nested.shape == (3, *shape)
    leaf = logits.clone().requires_grad_()
    torch.vmap(loss)(leaf, target, alpha).sum().backward()
    assert leaf.grad.shape == leaf.shape
    if reduction != "none":
        in_x, in_a = torch.vmap(torch.func.grad(loss, (0, 2)))(logits, target, alpha)
        assert (in_x.shape, in_a.shape) == (logits.shape, alpha.shape)
        hessian = torch.vmap(torch.func.hessian(loss))(logits, target, alpha)
        assert hessian.shape == (0, num_rows, 4, num_rows, 4)


@pytest.mark.parametrize(
    ("logits", "target", "alpha", "reduction", "error", "text"),
    [
        ((5, 4), (5,), 0.5, "median", ValueError, "reduction must be one of"),
        ((5, 4), (4,), 0.5, "sum", ValueError, r"target must have shape \[5\]"),
        ((5,), (5,), 0.5, "sum", ValueError, r"got logits of shape \[5\]"),
        ((5, 0), (5,), 0.5, "sum", ValueError, r"at least one class .* shape \[5, 0\]"),
        ((5, 4), (5,), float("inf"), "sum", ValueError, "finite number, got inf"),
        ((5, 4), (5,), (3,), "mean", ValueError, r"\[3\] does not broadcast .* \[5\]"),
        ((5, 4), (5,), (1, 5), "mean", ValueError, r"\[1, 5\] does not broadcast .* \[5\]"),
    ],
)
def test_errors(device, logits, target, alpha, reduction, error, text):
    """Errors name the shapes of one sample, which the caller knows."""
    logits = torch.zeros((BATCH, *logits), device=device)
    target = torch.zeros((BATCH, *target), dtype=torch.int64, device=device)
    if isinstance(alpha, tuple):
        alpha = torch.ones((BATCH, *alpha), device=device)
    in_dims = (0, 0, 0 if isinstance(alpha, torch.Tensor) else None)
    with pytest.raises(error, match=text):
        torch.vmap(lambda x, y, a: outlier_exposure_loss(x, y, a, reduction), in_dims)(
            logits, target, alpha
        )


def test_what_has_no_rule_raises(device):
    """Callers of vmap cannot request the gradient that the forward writes."""
    logits, target = batch_of((5, 4), device=device)
    forward = torch.ops.oe_ext._outlier_exposure_loss_forward
    from_unit = torch.ops.oe_ext._outlier_exposure_loss_backward_from_unit
    options = (0.5, None, "mean", None, None)
    with pytest.raises(RuntimeError, match="no unit_gradient under vmap"):
        torch.vmap(lambda x, y: forward(x, y, *options, True)[0])(logits, target)

    def in_place(x, y):
        loss, _, *statistics, _ = forward(x, y, *options, False)
        from_unit(torch.zeros_like(x), loss, x, y, *statistics, *options)
        return loss

    with pytest.raises(RuntimeError, match="_from_unit"):
        torch.vmap(in_place)(logits, target)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_chunks_and_nests(device, reduction):
    logits, target = batch_of((5, 4), device=device)
    ours = loss_with(reduction)
    theirs = torch.stack([ours(x, y) for x, y in zip(logits, target, strict=True)])
    torch.testing.assert_close(torch.vmap(ours, chunk_size=2)(logits, target), theirs)
    both = torch.stack([logits, 2 * logits])
    nested = torch.vmap(torch.vmap(ours), (0, None))(both, target)
    doubled = torch.stack([ours(2 * x, y) for x, y in zip(logits, target, strict=True)])
    torch.testing.assert_close(nested, torch.stack([theirs, doubled]))


@pytest.mark.parametrize("reduction", ["sum", "mean", "group_mean"])
def test_gradients_where_nothing_counts(device, reduction):
    """Gradients are 0, whatever the ignored logits are."""
    logits, target = batch_of((5, 4), device=device)
    target[1], logits[1] = IGNORE, float("nan")
    gradient = torch.vmap(torch.func.grad(loss_with(reduction)))(logits, target)
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).any()


def test_labels_are_checked():
    """The labels of every sample are checked. On CUDA the kernel asserts."""
    logits, target = batch_of((5, 4))
    target[2, 3] = 4
    with pytest.raises(IndexError, match=r"target must hold classes in \[0, 4\)"):
        torch.vmap(outlier_exposure_loss)(logits, target)


@pytest.mark.no_simt("no kernel matters here")
def test_compiled(device):
    logits, target = batch_of((5, 4), torch.float32, device)
    gradient = torch.func.grad(loss_with("mean"))
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits[0], target[0]), gradient(logits[0], target[0]))
    torch.testing.assert_close(
        torch.compile(torch.vmap(gradient), fullgraph=True, backend="aot_eager")(logits, target),
        torch.vmap(gradient)(logits, target),
    )
