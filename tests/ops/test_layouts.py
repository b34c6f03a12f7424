"""Memory: the layouts that are read without a copy, and the layout of the gradient."""

import pytest
import torch
from inputs import INT_DTYPES, LAYOUTS, SHAPES, UNCOPIED_LAYOUTS, make_logits, make_target
from torch.profiler import ProfilerActivity, profile

from oe_ext import outlier_exposure_loss

COPIES = {"aten::clone", "aten::copy_", "aten::_to_copy"}


def copies_in(function) -> list[str]:
    """The copies that PyTorch makes while a function runs, also inside operators."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    names = [event.name for event in record.events()]
    assert any("oe_ext::" in name for name in names), "the profiler saw nothing"
    return [name for name in names if name in COPIES]


def forward_backward(logits, target, **kwargs):
    loss = outlier_exposure_loss(logits, target, **kwargs)
    torch.autograd.grad(loss, logits)


def test_the_profiler_sees_a_copy():
    """Tests the instrument: it must find a copy."""
    logits, target = make_logits((3, 4)).requires_grad_(), make_target((3, 4))
    assert "aten::clone" in copies_in(lambda: forward_backward(logits.clone(), target))


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("layout", UNCOPIED_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_copy(dtype, layout, rank):
    logits = LAYOUTS[layout](make_logits(SHAPES[rank], dtype)).detach().requires_grad_()
    target = make_target(SHAPES[rank])
    assert copies_in(lambda: forward_backward(logits, target)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_copy_of_a_transposed_matrix(dtype):
    logits = LAYOUTS["transposed"](make_logits((13, 5), dtype)).detach().requires_grad_()
    target = make_target((13, 5))
    assert copies_in(lambda: forward_backward(logits, target)) == []


@pytest.mark.parametrize("label_dtype", INT_DTYPES, ids=str)
def test_no_copy_of_the_target(label_dtype):
    logits = make_logits((13, 5), torch.float32).requires_grad_()
    target = make_target((13, 5), "inliers").to(label_dtype)
    assert copies_in(lambda: forward_backward(logits, target)) == []


def test_one_copy_of_a_crop():
    """Two strides do not cover a crop: it is copied, once for forward and backward."""
    shape = (2, 3, 8, 9)
    logits = LAYOUTS["cropped"](make_logits(shape)).detach().requires_grad_()
    target = make_target(shape)
    copies = copies_in(lambda: forward_backward(logits, target))
    assert copies.count("aten::copy_") == 1


def test_inference_writes_no_gradient():
    """Without a gradient, nothing of the logits' size is allocated."""
    logits, target = make_logits((1000, 1000), torch.float32), make_target((1000, 1000))
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        outlier_exposure_loss(logits, target)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in record.key_averages())
    assert 0 < allocated < logits.nbytes / 50


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_the_gradient_has_the_strides_of_the_logits(device, layout, rank):
    logits = LAYOUTS[layout](make_logits(SHAPES[rank], torch.float32, device)).requires_grad_()
    target = make_target(SHAPES[rank], device=device)
    outlier_exposure_loss(logits, target).backward()
    assert logits.grad.stride() == logits.stride()


def test_channels_last_stays_channels_last(device):
    logits = make_logits((2, 3, 4, 5), torch.float32, device).to(memory_format=torch.channels_last)
    logits.requires_grad_()
    outlier_exposure_loss(logits, make_target((2, 3, 4, 5), device=device)).backward()
    assert logits.grad.is_contiguous(memory_format=torch.channels_last)


def test_overlapping_logits_are_only_read(device):
    base = make_logits((3, 7), device=device)
    logits = base.expand(5, 3, 7).permute(1, 2, 0)
    before = base.clone()
    target = make_target((3, 7, 5), device=device)
    outlier_exposure_loss(logits, target)
    assert torch.equal(base, before)
