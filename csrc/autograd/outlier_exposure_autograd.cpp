// Registers the gradient of each operator.
//
// Uses Nodes of its own, like PyTorch's generated code, since torch.func refuses
// torch::autograd::Function. An operator whose inputs need gradients makes a Node, computes below
// autograd, and adds tangents for forward-mode AD. The loss and its backward operator are both
// differentiable, in both modes, to any order.
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "../ops/row_view.h"
#include "../torch_compat.h"
#include "outlier_exposure_jvp.h"
#include "outlier_exposure_nodes.h"

namespace oe_ext {
namespace {

void set_tangent(const at::Tensor& output, const at::Tensor& tangent) {
  output._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

// Should the forward pass also write the gradient for an upstream gradient of 1? That saves a read
// of the logits. Not in float16, where a later scale comes after the rounding; not if the call is
// traced or transformed, which would have to copy the gradient; not if the user's hooks decide what
// is saved for the backward.
bool wants_unit_gradient(const LossInputs& inputs) {
  const auto is_plain = [](const at::Tensor& tensor) { return !at::isTensorSubclassLike(tensor); };
  return torch::autograd::compute_requires_grad(inputs.logits) &&
         inputs.options.reduction.is_scalar && inputs.logits.scalar_type() != at::kHalf &&
         is_plain(inputs.logits) && is_plain(inputs.target) &&
         (!inputs.alpha_tensor.has_value() || is_plain(*inputs.alpha_tensor)) &&
         (!inputs.weight.has_value() || is_plain(*inputs.weight)) &&
         !at::SavedTensorDefaultHooks::get_hooks().has_value();
}

// Copies logits with a layout that the kernels cannot read, once; the backward reads the copy
// again. The gradient gets the memory format of the copy: a crop of channels_last images stays
// channels_last.
at::Tensor readable_logits(const at::Tensor& logits) {
  const bool has_strides = logits.layout() == at::kStrided && logits.dim() >= 2 &&
                           !logits.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  return !has_strides || row_layout(logits).has_value()
             ? logits
             : logits.contiguous(logits.suggest_memory_format());
}

struct AutogradKernels {
  static at::Tensor loss(const LossInputs& inputs) {
    check_no_gradient(inputs.weight, "weight");
    if (torch::autograd::compute_requires_grad(inputs.logits, inputs.alpha_tensor) ||
        any_tangent(inputs.logits, inputs.alpha_tensor)) {
      const at::Tensor logits = readable_logits(inputs.logits);
      return std::get<0>(differentiable_forward(
          {logits, inputs.target, inputs.alpha_tensor, inputs.weight, inputs.options}, {},
          std::nullopt));
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_loss(inputs);
  }

  static ForwardResult forward(const LossInputs& inputs, const OptionalTensor& counts,
                               std::optional<bool> unit_gradient) {
    check_no_gradient(inputs.weight, "weight");
    check_no_gradient(counts, "counts");
    ForwardResult result = differentiable_forward(inputs, counts, unit_gradient);
    at::Tensor& gradient = std::get<5>(result);
    // The node alone has a gradient that nobody asked for: it finishes it in place only if no one
    // else does, and a tensor that Python has seen is never its alone again.
    if (!unit_gradient.has_value() && gradient.dim() == inputs.logits.dim()) {
      gradient = at::empty({0}, gradient.options());
    }
    return result;
  }

  static at::Tensor backward(const at::Tensor& grad, const LossInputs& inputs,
                             const RowStatistics& statistics) {
    check_no_gradient(inputs.weight, "weight");
    NodePtr<OutlierExposureLossBackwardBackward0> node;
    if (torch::autograd::compute_requires_grad(grad, inputs.logits, inputs.alpha_tensor)) {
      node = make_node<OutlierExposureLossBackwardBackward0>();
      node->set_next_edges(
          torch::autograd::collect_next_edges(grad, inputs.logits, inputs.alpha_tensor));
    }
    const bool has_tangent = any_tangent(grad, inputs.logits, inputs.alpha_tensor);
    TORCH_CHECK_NOT_IMPLEMENTED(
        !(node || has_tangent) || !inputs.options.is_part(),
        "_outlier_exposure_loss_backward: a part of the classes cannot be differentiated twice");
    at::Tensor grad_logits;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      grad_logits = call_backward(grad, inputs, statistics);
    }
    if (has_tangent) {
      set_tangent(grad_logits, backward_jvp(grad, inputs, statistics.counts));
    }
    if (node) {
      node->save_inputs(inputs, statistics.counts);
      node->save_grad(grad);
      torch::autograd::set_history(grad_logits, node);
    }
    return grad_logits;
  }

 private:
  // Only the loss has a derivative here, not the statistics. The derivative of the backward
  // operator covers them, by way of the logits.
  static ForwardResult differentiable_forward(const LossInputs& inputs,
                                              const OptionalTensor& counts,
                                              std::optional<bool> unit_gradient) {
    NodePtr<OutlierExposureLossBackward0> node;
    if (torch::autograd::compute_requires_grad(inputs.logits, inputs.alpha_tensor)) {
      node = make_node<OutlierExposureLossBackward0>();
      node->set_next_edges(torch::autograd::collect_next_edges(inputs.logits, inputs.alpha_tensor));
    }
    const bool differentiates = node || any_tangent(inputs.logits, inputs.alpha_tensor);
    TORCH_CHECK_NOT_IMPLEMENTED(
        !differentiates || !inputs.options.is_part(),
        "_outlier_exposure_loss_forward: the loss of a part of the classes has no derivative of "
        "its own; class_parallel_outlier_exposure_loss has that of all");
    const bool writes_gradient = unit_gradient.value_or(wants_unit_gradient(inputs));
    ForwardResult result;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      result = call_forward(inputs, counts, writes_gradient);
    }
    const at::Tensor& loss = std::get<0>(result);
    const at::Tensor& used_counts = std::get<4>(result);
    if (any_tangent(inputs.logits, inputs.alpha_tensor)) {
      set_tangent(loss, loss_jvp(inputs, used_counts));
    }
    if (node) {
      node->save_inputs(inputs, used_counts);
      node->save_result(result, inputs);
      torch::autograd::set_history(loss, node);
    }
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(oe_ext, Autograd, m) {
  OutlierExposureKernels<AutogradKernels>::register_for(m);
  // The node calls it below autograd. For other callers it is not differentiable, and a backward
  // through it says so.
  m.impl("_outlier_exposure_loss_backward_from_unit",
         torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(oe_ext, ADInplaceOrView, m) {
  m.impl("_outlier_exposure_loss_backward_from_unit",
         torch::autograd::autogradNotImplementedInplaceOrViewFallback());
}

}  // namespace oe_ext
