// The first derivative of the loss of upsampled logits is fused. Derivatives beyond it, forward
// mode and torch.func go by way of torch's upsampling and the loss, which have all of them.
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "../ops/upsampled_outlier_exposure_composed.h"
#include "../torch_compat.h"
#include "outlier_exposure_jvp.h"
#include "upsampled_outlier_exposure_nodes.h"

namespace oe_ext {
namespace {

// Is the call transformed by torch.func, or does it carry tangents? Then its derivatives are those
// of the operators that it is composed of.
bool is_composed(const LossInputs& inputs) {
  const auto is_transformed = [](const at::Tensor& tensor) {
    return tensor.key_set().has_any(c10::DispatchKeySet(
        {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper}));
  };
  return any_tangent(inputs.logits, inputs.alpha_tensor) || is_transformed(inputs.logits) ||
         is_transformed(inputs.target) ||
         (inputs.alpha_tensor.has_value() && is_transformed(*inputs.alpha_tensor)) ||
         (inputs.weight.has_value() && is_transformed(*inputs.weight));
}

struct UpsampledAutogradKernels {
  static at::Tensor loss(const UpsampledInputs& inputs) {
    const auto& [logits, target, alpha, weight, options] = inputs.loss;
    check_no_gradient(weight, "weight");
    if (inputs.has_equal_sizes()) {
      return call_loss(inputs.loss);
    }
    if (is_composed(inputs.loss)) {
      return ComposedUpsampling::loss(inputs);
    }
    if (torch::autograd::compute_requires_grad(logits, alpha)) {
      return forward(inputs, std::nullopt, {}).loss;
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return call_upsampled_loss(inputs);
  }

  static UpsampledResult forward(const UpsampledInputs& inputs, const OptionalTensor& counts,
                                 UpsampledOutputs outputs) {
    const auto& [logits, target, alpha, weight, options] = inputs.loss;
    check_no_gradient(weight, "weight");
    check_no_gradient(counts, "counts");
    if (is_composed(inputs.loss)) {
      return ComposedUpsampling::forward(inputs, counts, outputs);
    }
    const bool is_asked_for = outputs.unit_gradient.has_value();
    if (!is_asked_for) {
      // If the user's hooks decide what is saved, only what is an input is.
      outputs.unit_gradient = torch::autograd::compute_requires_grad(logits) &&
                              options.reduction.is_scalar &&
                              !at::SavedTensorDefaultHooks::get_hooks().has_value();
    }
    NodePtr<UpsampledOutlierExposureLossBackward0> node;
    if (torch::autograd::compute_requires_grad(logits, alpha)) {
      node = make_node<UpsampledOutlierExposureLossBackward0>();
      node->set_next_edges(torch::autograd::collect_next_edges(logits, alpha));
    }
    UpsampledResult result;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      result = call_upsampled_forward(inputs, counts, outputs);
    }
    if (node) {
      node->save(inputs, result);
      torch::autograd::set_history(result.loss, node);
    }
    if (!is_asked_for) {
      // The node finishes it in place only if no one else has it.
      result.unit_gradient = at::empty({0}, result.unit_gradient.options());
    }
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(oe_ext, Autograd, m) {
  UpsampledKernels<UpsampledAutogradKernels>::register_for(m);
  m.impl("_upsampled_outlier_exposure_loss_backward",
         torch::autograd::autogradNotImplementedFallback());
}

}  // namespace oe_ext
