"""Random sequences of calls: graphs that coexist, run twice or never, have inputs changed in place,
and are dropped; with hooks, and errors in between."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from inputs import LAYOUTS, REDUCTIONS, is_read_in_place, make_logits
from oracles import exact, max_error

from oe_ext import outlier_exposure_loss

SHAPES = [(5, 3), (3, 70), (2, 4, 3, 5)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
STEPS = 12


class Graph:
    """A loss before its backward, with the expected result."""

    def __init__(self, leaf, target, reduction, alpha):
        self.leaf, self.target = leaf, target
        self.saved = leaf.detach().clone()
        self.alpha = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
        self.loss = outlier_exposure_loss(leaf, target, self.alpha, reduction)
        weight = torch.ones(self.loss.shape, dtype=torch.float64)
        self.truth = exact(self.saved, target, alpha, reduction, upstream=weight)
        self.changed = self.freed = False
        self.factor = 1.0  # of hooks on the leaf

    def close(self, actual: torch.Tensor, expected: torch.Tensor) -> bool:
        # As in test_unit_gradient.py: one rounding of the stored dtype, or of the arithmetic.
        return max_error(actual, expected) <= self.allowed * max(1.0, expected.abs().max().item())

    @property
    def allowed(self) -> float:
        return max(1e-6 if self.saved.dtype != torch.float64 else 1e-14, self.stored)

    @property
    def stored(self) -> float:
        return 2**-8 if self.saved.dtype == torch.bfloat16 else 0.0


class Calls(RuleBasedStateMachine):
    graphs = Bundle("graphs")

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.number = 0

    @rule(
        target=graphs,
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(["contiguous", "channels_last", "cropped"]),
        reduction=st.sampled_from(REDUCTIONS),
        alpha=st.sampled_from([0.5, 0.0, -2.0]),
    )
    def forward(self, shape, dtype, layout, reduction, alpha):
        self.number += 1
        torch.manual_seed(self.number)
        leaf = LAYOUTS[layout](make_logits(shape, dtype)).detach().requires_grad_()
        labels = torch.randint(-2, shape[1], (shape[0], *shape[2:]))
        graph = Graph(leaf, labels, reduction, alpha)
        loss_error = max_error(graph.loss.detach(), graph.truth[0])
        scale = max(1.0, graph.truth[0].abs().max().item())
        assert loss_error <= (1e-14 if dtype == torch.float64 else 4e-7) * scale
        return graph

    @rule(
        graph=graphs,
        upstream=st.sampled_from([1.0, -0.37, 0.0]),
        retain=st.booleans(),
        whole=st.booleans(),
    )
    def backward(self, graph, upstream, retain, whole):
        inputs = [graph.leaf, graph.alpha] if whole else [graph.leaf]
        weight = torch.full_like(graph.loss, upstream)
        arguments = {"retain_graph": retain}
        if graph.freed or graph.changed:
            message = "second time" if graph.freed else "modified by an inplace operation"
            with pytest.raises(RuntimeError, match=message):
                torch.autograd.grad(graph.loss, inputs, weight, **arguments)
            return
        grad, *_ = torch.autograd.grad(graph.loss, inputs, weight, **arguments)
        graph.freed = not retain
        assert graph.close(grad, upstream * graph.factor * graph.truth[1])
        self.kept.append((grad, grad.clone()))

    @rule(graph=graphs)
    def accumulate(self, graph):
        """Accumulates into .grad twice, from a separate graph."""
        leaf = graph.saved.clone().requires_grad_()
        for times in (1, 2):
            loss = outlier_exposure_loss(leaf, graph.target, reduction="sum")
            loss.backward()
            expected = exact(graph.saved, graph.target, 0.5, "sum")[1] * times
            error = max_error(leaf.grad, expected)
            assert error <= times * graph.allowed * max(1.0, expected.abs().max().item())

    @rule(graph=consumes(graphs))
    def drop(self, graph):
        """Drops the inputs and the loss of a graph, used or unused."""

    @rule(graph=graphs)
    def change_logits(self, graph):
        with torch.no_grad():
            graph.leaf.add_(1)
        # For a crop of images, the graph holds a copy, which nobody changes.
        graph.changed |= is_read_in_place(graph.leaf)

    @rule(graph=graphs)
    def change_target(self, graph):
        graph.target.clamp_(min=0)
        graph.changed = True

    @rule(graph=graphs)
    def hook(self, graph):
        graph.leaf.register_hook(lambda grad: grad * 2)
        graph.factor *= 2

    @rule(graph=graphs)
    def illegal_label(self, graph):
        target = graph.target.clone()
        target.view(-1)[-1] = graph.saved.shape[1]
        with pytest.raises(IndexError, match=f"got {graph.saved.shape[1]} "):
            outlier_exposure_loss(graph.leaf, target)

    @rule()
    def collect(self):
        gc.collect(1)  # young generations: all would take a tenth of a second

    @rule()
    def forget_gradients(self):
        del self.kept[: len(self.kept) // 2]

    @invariant()
    def no_gradient_changes_once_it_is_returned(self):
        for tensor, copy in self.kept:
            assert torch.equal(tensor, copy)


TestCalls = Calls.TestCase
# A sequence is up to twelve calls.
TestCalls.settings = settings(
    max_examples=max(1, settings().max_examples * 80 // 1000), stateful_step_count=STEPS
)
