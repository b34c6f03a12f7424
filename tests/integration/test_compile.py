"""torch.compile, torch.export, compiled autograd, and opcheck on every operator."""

import pytest
import torch
from inputs import IGNORE, REDUCTIONS, make_logits, make_target
from torch.library import opcheck

from oe_ext import outlier_exposure_loss

# Compilation sees only the operators, not their kernels.
pytestmark = pytest.mark.no_simt("no kernel matters here")

FORWARD = torch.ops.oe_ext._outlier_exposure_loss_forward
BACKWARD_FROM_UNIT = torch.ops.oe_ext._outlier_exposure_loss_backward_from_unit
BACKWARD = torch.ops.oe_ext._outlier_exposure_loss_backward


def grad_of(function, logits, *args):
    logits = logits.detach().requires_grad_()
    loss = function(logits, *args)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), grad


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(8, 5), (2, 5, 4, 3)])
@pytest.mark.parametrize("alpha", ["number", "tensor"])
def test_fullgraph(device, shape, reduction, alpha):
    logits = make_logits(shape, torch.float32, device)
    target = make_target(shape, device=device)
    alpha = 0.7 if alpha == "number" else torch.tensor(0.7, device=device)

    def function(x, y):
        return outlier_exposure_loss(x * 2, y, alpha, reduction, ignore_index=IGNORE)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(grad_of(compiled, logits, target), grad_of(function, logits, target))


def test_inductor(device):
    """The default backend, which compiles its own C++ around the operator."""
    logits = make_logits((8, 5), torch.float32, device)
    target = make_target((8, 5), device=device)

    def function(x, y):
        return outlier_exposure_loss(x.sin(), y, 0.5, "group_mean") * 2

    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(grad_of(compiled, logits, target), grad_of(function, logits, target))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha", ["number", "tensor"])
def test_fullgraph_with_both_indices(device, reduction, alpha):
    logits = make_logits((8, 5), torch.float32, device)
    target = torch.tensor([0, 1, 2, 254, 255, 3, 254, 4], dtype=torch.uint8, device=device)
    alpha = 0.7 if alpha == "number" else torch.rand(8, device=device)

    def function(x, y):
        return outlier_exposure_loss(x, y, alpha, reduction, ignore_index=255, ood_index=254)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(grad_of(compiled, logits, target), grad_of(function, logits, target))


@pytest.mark.parametrize("shape", [(5,), (5, 3, 4)])
def test_dynamic_shapes_recompile_once_at_most(device, shape):
    compiled = torch.compile(outlier_exposure_loss, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for num_rows in (4, 7, 9, 16):
        case = (num_rows, *shape)
        logits, target = make_logits(case, device=device), make_target(case, device=device)
        expected = grad_of(outlier_exposure_loss, logits, target)
        torch.testing.assert_close(grad_of(compiled, logits, target), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_a_new_alpha_is_not_compiled_anew(device):
    """The second alpha becomes a variable of the graph, with the default backend."""
    compiled = torch.compile(outlier_exposure_loss, fullgraph=True)
    logits, target = make_logits((8, 5), device=device), make_target((8, 5), device=device)
    torch._dynamo.utils.counters.clear()
    for alpha in (0.1, 0.2, 0.3, 0.0, 2.5):
        expected = grad_of(outlier_exposure_loss, logits, target, alpha)
        torch.testing.assert_close(grad_of(compiled, logits, target, alpha), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_a_new_special_label_is_compiled_anew_once_at_most(device):
    compiled = torch.compile(outlier_exposure_loss, fullgraph=True, backend="aot_eager")
    logits, target = (
        make_logits((8, 5), device=device),
        make_target((8, 5), "inliers", device=device),
    )
    torch._dynamo.utils.counters.clear()
    for label in (0, 1, 2, 3, 4, -7):
        for options in ({"ignore_index": label}, {"ood_index": label}, {"ignore_index": 9 - label}):
            expected = outlier_exposure_loss(logits, target, **options)
            torch.testing.assert_close(compiled(logits, target, **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4, "two for each special label"


def test_special_labels_that_are_sizes_or_numbers_of_tensors(device):
    """Symbols of the graph, as with the ignore_index of F.cross_entropy."""
    logits, target = (
        make_logits((8, 5), device=device),
        make_target((8, 5), "inliers", device=device),
    )

    def of_size(x, y):
        return outlier_exposure_loss(x, y, ignore_index=x.shape[1] - 1, ood_index=x.shape[1])

    compiled = torch.compile(of_size, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(grad_of(compiled, logits, target), grad_of(of_size, logits, target))

    def of_item(x, y, label):
        return outlier_exposure_loss(x, y, ignore_index=label.item())

    label = torch.tensor(2)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(of_item, fullgraph=True, backend="aot_eager")
        ours = grad_of(compiled, logits, target, label)
    torch.testing.assert_close(ours, grad_of(of_item, logits, target, label))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("shape", "alpha_shape"), [((12, 5), (12,)), ((12, 5, 3), (12, 1)), ((12, 5, 3), (3,))]
)
def test_sizes_that_depend_on_data(device, shape, alpha_shape, backend):
    """x[mask]: the number of rows is known only at run time."""
    logits = make_logits(shape, torch.float32, device)
    target = make_target(shape, device=device)
    alpha = torch.rand(alpha_shape, device=device)
    mask = torch.arange(12, device=device) % 3 > 0
    per_row = alpha_shape[0] == 12

    def function(x, y, a, m):
        return outlier_exposure_loss(x[m], y[m], a[m] if per_row else a, "group_mean")

    results = []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for f in (function, torch.compile(function, fullgraph=True, backend=backend)):
            leaves = [t.detach().clone().requires_grad_() for t in (logits, alpha)]
            loss = f(leaves[0], target, leaves[1], mask)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results)


def test_export_of_sizes_that_depend_on_data():
    class Model(torch.nn.Module):
        def forward(self, x, y, a, m):
            return outlier_exposure_loss(x[m], y[m], a[m], "group_mean")

    example = (make_logits((12, 5)), make_target((12, 5)), torch.rand(12), torch.rand(12) > 0.3)
    program = torch.export.export(Model(), example)
    other = (*example[:3], torch.rand(12) > 0.6)
    torch.testing.assert_close(program.module()(*other), Model()(*other))


def test_export_with_a_special_label_of_a_dynamic_size(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return outlier_exposure_loss(x, y, ignore_index=x.shape[1] - 1)

    target = make_target((8, 3))
    classes = {1: torch.export.Dim("classes", min=3, max=50)}
    example = (make_logits((8, 5)), target)
    program = torch.export.export(Model(), example, dynamic_shapes=(classes, None))
    torch.export.save(program, tmp_path / "loss.pt2")
    logits = make_logits((8, 7))
    for exported in (program, torch.export.load(tmp_path / "loss.pt2")):
        torch.testing.assert_close(exported.module()(logits, target), Model()(logits, target))


def test_what_cuda_graphs_need(device):
    """mode="reduce-overhead" records a graph, which must not wait for a number or have a shape that
    depends on one."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    logits = make_logits((8, 5), device=device).requires_grad_()
    target = make_target((8, 5), device=device)

    def function(x, y):
        return outlier_exposure_loss(x, y, 0.5, "group_mean", ignore_index=IGNORE)

    aot = torch._dynamo.backends.common.aot_autograd(fw_compiler=backend)
    torch.compile(function, fullgraph=True, backend=aot)(logits, target).backward()
    assert len(graphs) == 2, "forward and backward"
    for graph in graphs:
        for node in graph.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
                assert not tags & set(node.target.tags), node
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("oe_ext" in name for name in names) == 2, "one operator each way"


@pytest.mark.parametrize("special_labels", [{}, {"ignore_index": IGNORE}, {"ignore_index": -7}])
def test_compiled_autograd(device, special_labels):
    logits = make_logits((8, 5), device=device).requires_grad_()
    target = make_target((8, 5), device=device)
    alpha = torch.rand(8, dtype=torch.float64, device=device).requires_grad_()

    def loss():
        return outlier_exposure_loss(logits, target, alpha, **special_labels)

    expected = torch.autograd.grad(loss(), (logits, alpha))

    def compiler(graph):
        return torch.compile(graph, backend="aot_eager", fullgraph=True)

    with torch._dynamo.compiled_autograd._enable(compiler):
        loss().backward()
    torch.testing.assert_close((logits.grad, alpha.grad), expected)


def test_export_with_a_dynamic_batch():
    class Model(torch.nn.Module):
        def forward(self, logits, target):
            return outlier_exposure_loss(logits, target, 0.5, "group_mean")

    shape = (8, 5, 3)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Model(), (make_logits(shape), make_target(shape)), dynamic_shapes=({0: batch}, {0: batch})
    )
    assert "oe_ext.outlier_exposure_loss" in program.graph_module.code
    other = (13, 5, 3)
    logits, target = make_logits(other), make_target(other)
    expected = outlier_exposure_loss(logits, target, 0.5, "group_mean")
    torch.testing.assert_close(program.module()(logits, target), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 4, 3)])
def test_opcheck(device, shape, dtype, reduction):
    """Schema, autograd registration, fake tensors, and AOT dispatch with dynamic shapes."""
    logits = make_logits(shape, dtype, device).requires_grad_()
    target = make_target(shape, device=device)
    special_labels = {"ignore_index": IGNORE, "ood_index": None}
    alpha = torch.tensor(0.7, device=device, requires_grad=True)
    operator = torch.ops.oe_ext.outlier_exposure_loss
    opcheck(operator.default, (logits, target, 0.5, reduction), special_labels)
    opcheck(operator.tensor_alpha, (logits, target, alpha, reduction), special_labels)

    for weight in (None, alpha.detach()):
        options = (0.5, weight, reduction, IGNORE, None)
        arguments = (logits.detach(), target, *options)
        opcheck(FORWARD.default, (*arguments, False))
        loss, _, *statistics, _ = FORWARD(*arguments, False)
        opcheck(
            BACKWARD.default,
            (torch.ones_like(loss).requires_grad_(), logits, target, *statistics, *options),
        )
        if reduction != "none":
            opcheck(FORWARD.default, (*arguments, True))
            unit_gradient = FORWARD(*arguments, True)[-1]
            grad = torch.full_like(loss, 3.0)
            opcheck(
                BACKWARD_FROM_UNIT.default,
                (unit_gradient, grad, logits.detach(), target, *statistics, *options),
            )


def test_opcheck_knows_every_operator():
    """test_opcheck covers all registered operators but those of upsampled logits, which
    ops/test_upsampled_transformed.py covers."""
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("oe_ext::")}
    names = {name for name in names if "upsampled" not in name}
    public = torch.ops.oe_ext.outlier_exposure_loss
    checked = [public.default, public.tensor_alpha]
    checked += [packet.default for packet in (FORWARD, BACKWARD, BACKWARD_FROM_UNIT)]
    assert {operator.name() for operator in checked} == names


@pytest.mark.parametrize(
    ("shape", "target_dtype", "alpha", "special_labels"),
    [
        ((6, 5), torch.uint8, 0.5, {"ignore_index": 255, "ood_index": 254}),
        ((6, 5), torch.int32, (6,), {"ood_index": 0}),
        ((6, 1), torch.int64, 0.0, {}),
        ((0, 5), torch.int64, (1,), {}),
        ((2, 5, 4, 3), torch.int8, (4, 1), {"ignore_index": 1}),
    ],
    ids=str,
)
def test_opcheck_over_a_spread_of_inputs(device, shape, target_dtype, alpha, special_labels):
    logits = make_logits(shape, torch.float16, device).requires_grad_()
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=device).to(target_dtype)
    operator = torch.ops.oe_ext.outlier_exposure_loss.default
    if isinstance(alpha, tuple):
        operator = torch.ops.oe_ext.outlier_exposure_loss.tensor_alpha
        alpha = torch.rand(alpha, device=device, requires_grad=True)
    for reduction in REDUCTIONS:
        if reduction == "mean" and shape[0] == 0:
            continue  # NaN, which opcheck finds unequal to itself
        opcheck(operator, (logits, target, alpha, reduction), special_labels)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck_memory_formats(device, layout):
    logits = make_logits((2, 5, 4, 3), torch.float32, device).to(memory_format=layout)
    target = make_target((2, 5, 4, 3), device=device)
    opcheck(torch.ops.oe_ext.outlier_exposure_loss.default, (logits.requires_grad_(), target))


def test_autocast_reads_half_logits_natively():
    logits = make_logits((6, 5), torch.bfloat16).requires_grad_()
    target = make_target((6, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = outlier_exposure_loss(logits, target)
    assert loss.dtype == torch.float32
    assert loss.grad_fn.name() == "OutlierExposureLossBackward0"
    assert loss.grad_fn.next_functions[0][0].variable is logits, "no cast in between"
