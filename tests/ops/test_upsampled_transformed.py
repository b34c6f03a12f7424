"""Derivatives of higher orders, and transformed and traced calls, of the loss of upsampled
logits."""

import processes
import pytest
import torch
import torch.distributed as dist
from inputs import IGNORE, REDUCTIONS, make_logits
from torch.func import grad, hessian, jacfwd, vmap
from torch.utils.checkpoint import checkpoint

from oe_ext import outlier_exposure_loss, reference

OPS = torch.ops.oe_ext
OPTIONS = {"ignore_index": IGNORE, "upsample": "bilinear"}


def make_inputs(dtype=torch.float64, batch=1):
    logits = make_logits((batch, 3, 2, 3), dtype, scale=1.0)
    target = torch.randint(-1, 3, (batch, 4, 6))
    target[0, 0, 0] = IGNORE
    return logits, target


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives(reduction, align_corners):
    logits, target = make_inputs()
    alpha = torch.rand(6, dtype=torch.float64).requires_grad_()

    def loss(x, alpha):
        return outlier_exposure_loss(
            x, target, alpha, reduction, align_corners=align_corners, **OPTIONS
        )

    inputs = (logits.requires_grad_(), alpha)
    assert torch.autograd.gradcheck(
        loss,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_third_order():
    logits, target = make_inputs()
    leaf = logits.requires_grad_()

    def third(function):
        value = function(leaf, target, **OPTIONS)
        for _ in range(3):
            (derivative,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = (derivative**2).sum()
        return value.detach()

    torch.testing.assert_close(
        third(outlier_exposure_loss), third(reference.outlier_exposure_loss), rtol=1e-10, atol=0
    )


def test_functions_of_torch_func():
    logits, target = make_inputs(batch=4)

    def of_sample(function):
        return lambda x, y: function(x[None], y[None], **OPTIONS)

    ours, theirs = of_sample(outlier_exposure_loss), of_sample(reference.outlier_exposure_loss)
    for transform in (
        lambda f: vmap(f)(logits, target),
        lambda f: vmap(grad(f))(logits, target),
        lambda f: grad(lambda x: vmap(f)(x, target).sum())(logits),
        lambda f: hessian(f)(logits[0], target[0]),
        lambda f: jacfwd(grad(f))(logits[0], target[0]),
        lambda f: vmap(lambda x: f(x, target[0]))(logits),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=1e-11, atol=1e-12)


def test_vmap_with_statistics():
    logits, target = make_inputs(batch=4)

    def stats(x, y):
        return outlier_exposure_loss(x[None], y[None], return_stats=True, **OPTIONS)

    batched = vmap(stats)(logits, target)
    for i in range(4):
        single = stats(logits[i], target[i])
        torch.testing.assert_close(batched[0][i], single[0])
        torch.testing.assert_close(batched[1].num_correct[i], single[1].num_correct)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def loss(x, y, alpha):
        return outlier_exposure_loss(x, y, alpha, **OPTIONS)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for size in (8, 20, 32):
        logits = make_logits((2, 5, 8, 8), torch.float32).requires_grad_()
        target = torch.randint(-1, 5, (2, size, size))
        results = []
        for function in (loss, compiled):
            value = function(logits, target, 0.5)
            results += [value, *torch.autograd.grad(value, logits)]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])


def test_no_graph_holds_a_map_of_full_size():
    sizes = set()

    def record(graph, _):
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            for tensor in value if isinstance(value, tuple | list) else [value]:
                if isinstance(tensor, torch.Tensor):
                    sizes.add(tuple(tensor.shape))
        return graph

    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    logits = make_logits((2, 5, 8, 8), torch.float32).requires_grad_()
    target = torch.randint(-1, 5, (2, 32, 32))
    loss = torch.compile(lambda x: outlier_exposure_loss(x, target, **OPTIONS), backend=backend)
    loss(logits).backward()
    assert (2, 5, 8, 8) in sizes
    assert (2, 5, 32, 32) not in sizes


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return outlier_exposure_loss(x, y, return_stats=True, return_scores=True, **OPTIONS)

    logits, target = make_inputs(torch.float32, batch=2)
    program = torch.export.export(Model(), (logits, target)).module()
    for exported, eager in zip(
        torch.utils._pytree.tree_leaves(program(logits, target)),
        torch.utils._pytree.tree_leaves(Model()(logits, target)),
        strict=True,
    ):
        torch.testing.assert_close(exported, eager, equal_nan=True)


def test_compiled_autograd():
    logits, target = make_inputs(torch.float32, batch=2)
    results = []
    for align_corners in (False, True):
        leaf = logits.detach().requires_grad_()
        loss = outlier_exposure_loss(leaf, target, align_corners=align_corners, **OPTIONS)
        compiler = torch.compile(backend="eager", fullgraph=True)
        with torch._dynamo.compiled_autograd._enable(compiler):
            loss.backward()
        again = outlier_exposure_loss(leaf, target, align_corners=align_corners, **OPTIONS)
        assert torch.equal(leaf.grad, torch.autograd.grad(again, leaf)[0])
        results.append(leaf.grad)
    assert not torch.equal(*results)


def test_saved_tensor_hooks():
    logits, target = make_inputs(torch.float32, batch=2)
    leaf = logits.requires_grad_()

    def loss(x):
        return outlier_exposure_loss(2 * x, target, **OPTIONS)

    (plain,) = torch.autograd.grad(loss(leaf), leaf)
    (again,) = torch.autograd.grad(checkpoint(loss, leaf, use_reentrant=False), leaf)
    assert torch.equal(plain, again)
    with torch.autograd.graph.save_on_cpu():
        value = loss(leaf)
    assert torch.equal(plain, torch.autograd.grad(value, leaf)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    logits = make_logits((2, 5, 6, 7), dtype).requires_grad_()
    target = torch.randint(-1, 5, (2, 21, 31))
    alpha = torch.tensor(0.5, requires_grad=True)
    loss = OPS.upsampled_outlier_exposure_loss
    torch.library.opcheck(loss.default, (logits, target))
    options = {"align_corners": True, "ignore_index": 2}
    torch.library.opcheck(loss.tensor_alpha, (logits, target, alpha, "none"), options)
    arguments = (target, 0.5, None, "mean", None, None, False)
    forward = OPS._upsampled_outlier_exposure_loss_forward.default
    torch.library.opcheck(forward, (logits.detach(), *arguments, True, True))
    counts = torch.ones(2, dtype=torch.float64)
    backward = OPS._upsampled_outlier_exposure_loss_backward.default
    torch.library.opcheck(
        backward, (torch.tensor(1.0), logits.detach(), target, counts, *arguments[1:])
    )


def _shared_batch():
    torch.manual_seed(0)
    logits = make_logits((5, 4, 3, 4), torch.float64)
    target = torch.randint(-1, 4, (5, 12, 16))
    part = slice(0, 2) if dist.get_rank() == 0 else slice(2, 5)
    leaf = logits[part].clone().requires_grad_()
    loss = outlier_exposure_loss(
        leaf, target[part], process_group="world", reduction="group_mean", **OPTIONS
    )
    loss.backward()
    whole = logits.requires_grad_()
    expected = outlier_exposure_loss(whole, target, reduction="group_mean", **OPTIONS)
    expected.backward()
    value = loss.detach()
    dist.all_reduce(value)
    processes.same(value / 2, expected.detach())
    processes.same(leaf.grad / 2, whole.grad[part])


def test_process_group():
    processes.run(2, _shared_batch)


def _dtensor():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    logits = distribute_tensor(torch.randn(4, 3, 2, 3), mesh, [Shard(0)])
    target = distribute_tensor(torch.randint(-1, 3, (4, 8, 12)), mesh, [Shard(0)])
    with pytest.raises(NotImplementedError, match="DTensor"):
        outlier_exposure_loss(logits, target, upsample="bilinear")


def test_dtensor():
    processes.run(2, _dtensor)


def test_autocast():
    logits, target = make_inputs(torch.float32, batch=2)
    weight = torch.randn(3, 3, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        low = torch.nn.functional.conv2d(logits, weight)
        loss = outlier_exposure_loss(low, target, **OPTIONS)
    assert low.dtype == torch.bfloat16
    expected = outlier_exposure_loss(low.double(), target, **OPTIONS)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
