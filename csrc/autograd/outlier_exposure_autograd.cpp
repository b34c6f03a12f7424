// Which gradient belongs to which operator.
//
// Own Nodes, as PyTorch's generated code has them, and not torch::autograd::Function: torch.func
// refuses the latter. An operator whose inputs have gradients makes a Node, computes below
// autograd, and adds tangents where forward-mode AD asks for them. The loss and its backward
// operator are both differentiable, in both modes, to any order.
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
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

// The loss has a derivative; the statistics have none of their own. Whoever differentiates the
// backward operator differentiates them with the logits.
ForwardResult differentiable_forward(c10::DispatchKeySet keys, const at::Tensor& logits,
                                     const at::Tensor& target, const OptionalTensor& alpha_tensor,
                                     LossOptions options, bool unit_gradient) {
  NodePtr<OutlierExposureLossBackward0> node;
  if (torch::autograd::compute_requires_grad(logits, alpha_tensor)) {
    node = make_node<OutlierExposureLossBackward0>();
    node->set_next_edges(torch::autograd::collect_next_edges(logits, alpha_tensor));
  }
  ForwardResult result;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = forward_operator().redispatch(keys & c10::after_autograd_keyset, logits, target,
                                           options.alpha, alpha_tensor, options.reduction,
                                           options.ignore_index, options.ood_index, unit_gradient);
  }
  const auto& [loss, row_cross_entropy, row_max, row_sum_exp, counts, gradient] = result;
  if (any_tangent(logits, alpha_tensor)) {
    set_tangent(loss, loss_tangent(logits, target, counts, alpha_tensor, options));
  }
  if (node) {
    node->save_inputs(logits, target, counts, alpha_tensor, std::move(options));
    node->save_statistics(row_cross_entropy, row_max, row_sum_exp);
    if (unit_gradient) {
      node->save_unit_gradient(gradient);
    }
    torch::autograd::set_history(loss, node);
  }
  return result;
}

ForwardResult forward_autograd(c10::DispatchKeySet keys, const at::Tensor& logits,
                               const at::Tensor& target, double alpha,
                               const OptionalTensor& alpha_tensor, std::string_view reduction,
                               OptionalSymInt ignore_index, OptionalSymInt ood_index,
                               bool unit_gradient) {
  return differentiable_forward(keys, logits, target, alpha_tensor,
                                {alpha, std::string(reduction), ignore_index, ood_index},
                                unit_gradient);
}

// Should the forward pass write the gradient too, for an upstream gradient of 1? That saves a read
// of the logits. Not in float16, where a scale that comes later comes too late; not where the
// graph is traced, which would have to copy the gradient; not where the user's hooks decide what is
// kept for the backward.
bool wants_unit_gradient(const at::Tensor& logits, std::string_view reduction) {
  return torch::autograd::compute_requires_grad(logits) && reduction != "none" &&
         logits.scalar_type() != at::kHalf && !at::isTensorSubclassLike(logits) &&
         !at::SavedTensorDefaultHooks::get_hooks().has_value();
}

// Logits whose layout the kernels cannot read are copied here, once, and the copy is what the
// backward reads again. Its memory format is also the gradient's: a crop of channels_last images
// stays channels_last.
at::Tensor readable_logits(const at::Tensor& logits) {
  const bool has_strides = logits.layout() == at::kStrided && logits.dim() >= 2 &&
                           !logits.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  return !has_strides || row_layout(logits).has_value()
             ? logits
             : logits.contiguous(logits.suggest_memory_format());
}

at::Tensor loss_autograd(c10::DispatchKeySet keys, const at::Tensor& logits,
                         const at::Tensor& target, double alpha, std::string_view reduction,
                         OptionalSymInt ignore_index, OptionalSymInt ood_index) {
  if (torch::autograd::compute_requires_grad(logits) || any_tangent(logits)) {
    return std::get<0>(
        differentiable_forward(keys, readable_logits(logits), target, std::nullopt,
                               {alpha, std::string(reduction), ignore_index, ood_index},
                               wants_unit_gradient(logits, reduction)));
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return loss_operator().redispatch(keys & c10::after_autograd_keyset, logits, target, alpha,
                                    reduction, ignore_index, ood_index);
}

at::Tensor loss_tensor_alpha_autograd(c10::DispatchKeySet keys, const at::Tensor& logits,
                                      const at::Tensor& target, const at::Tensor& alpha,
                                      std::string_view reduction, OptionalSymInt ignore_index,
                                      OptionalSymInt ood_index) {
  if (torch::autograd::compute_requires_grad(logits, alpha) || any_tangent(logits, alpha)) {
    return std::get<0>(
        differentiable_forward(keys, readable_logits(logits), target, alpha,
                               {0.0, std::string(reduction), ignore_index, ood_index},
                               wants_unit_gradient(logits, reduction)));
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return loss_tensor_alpha_operator().redispatch(keys & c10::after_autograd_keyset, logits, target,
                                                 alpha, reduction, ignore_index, ood_index);
}

at::Tensor backward_autograd(c10::DispatchKeySet keys, const at::Tensor& grad,
                             const at::Tensor& logits, const at::Tensor& target,
                             const at::Tensor& row_max, const at::Tensor& row_sum_exp,
                             const at::Tensor& counts, double alpha,
                             const OptionalTensor& alpha_tensor, std::string_view reduction,
                             OptionalSymInt ignore_index, OptionalSymInt ood_index) {
  NodePtr<OutlierExposureLossBackwardBackward0> node;
  if (torch::autograd::compute_requires_grad(grad, logits, alpha_tensor)) {
    node = make_node<OutlierExposureLossBackwardBackward0>();
    node->set_next_edges(torch::autograd::collect_next_edges(grad, logits, alpha_tensor));
  }
  at::Tensor grad_logits;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    grad_logits = backward_operator().redispatch(keys & c10::after_autograd_keyset, grad, logits,
                                                 target, row_max, row_sum_exp, counts, alpha,
                                                 alpha_tensor, reduction, ignore_index, ood_index);
  }
  const LossOptions options{alpha, std::string(reduction), ignore_index, ood_index};
  if (any_tangent(grad, logits, alpha_tensor)) {
    set_tangent(grad_logits, backward_tangent(grad, logits, target, counts, alpha_tensor, options));
  }
  if (node) {
    node->save_inputs(logits, target, counts, alpha_tensor, options);
    node->save_grad(grad);
    torch::autograd::set_history(grad_logits, node);
  }
  return grad_logits;
}

}  // namespace

TORCH_LIBRARY_IMPL(oe_ext, Autograd, m) {
  m.impl("outlier_exposure_loss", TORCH_FN(loss_autograd));
  m.impl("outlier_exposure_loss.tensor_alpha", TORCH_FN(loss_tensor_alpha_autograd));
  m.impl("_outlier_exposure_loss_forward", TORCH_FN(forward_autograd));
  m.impl("_outlier_exposure_loss_backward", TORCH_FN(backward_autograd));
  // The node calls it below autograd. Whoever else calls it is told that it records no graph.
  m.impl("_outlier_exposure_loss_backward_from_unit",
         torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(oe_ext, ADInplaceOrView, m) {
  m.impl("_outlier_exposure_loss_backward_from_unit",
         torch::autograd::autogradNotImplementedInplaceOrViewFallback());
}

}  // namespace oe_ext
