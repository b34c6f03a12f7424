#include "upsampled_outlier_exposure_nodes.h"

#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>

#include <mutex>

#include "../ops/upsampled_outlier_exposure_composed.h"

namespace oe_ext {

using torch::autograd::variable_list;

void UpsampledOutlierExposureLossBackward0::save(const UpsampledInputs& inputs,
                                                 const UpsampledResult& result) {
  save_inputs(inputs.loss, result.counts);
  align_corners_ = inputs.align_corners;
  if (inputs.loss.alpha_tensor.has_value()) {
    saved_[kRowCrossEntropy] =
        torch::autograd::SavedVariable(result.row_cross_entropy, /*is_output=*/false);
  }
  save_unit_gradient(result.unit_gradient, inputs.loss);
}

at::Tensor UpsampledOutlierExposureLossBackward0::logits_gradient(const at::Tensor& grad,
                                                                  const UpsampledInputs& inputs,
                                                                  const at::Tensor& counts) {
  if (at::GradMode::is_enabled()) {
    return ComposedUpsampling::backward(grad, inputs, counts);
  }
  // A trace of the backward alone knows nothing of a gradient from the forward.
  if (!unit_gradient_.defined() ||
      (at::isTensorSubclassLike(grad) && !at::isTensorSubclassLike(unit_gradient_))) {
    return call_upsampled_backward(grad, inputs, counts);
  }
  at::Tensor gradient;
  if (!may_finish_in_place(grad)) {
    gradient = unit_gradient_.mul(grad);
  } else {
    gradient = std::move(unit_gradient_);
    if (!grad.is_cpu() || grad.item<double>() != 1) {
      gradient.mul_(grad);
    }
  }
  return gradient.to(inputs.loss.logits.scalar_type());
}

variable_list UpsampledOutlierExposureLossBackward0::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  variable_list result(2);
  const at::Tensor& grad = grads[0];
  if (!grad.defined()) {
    return result;
  }
  const Unpacked saved(*this);
  const UpsampledInputs inputs = {saved.inputs(), align_corners_};
  if (task_should_compute_output(0)) {
    result[0] = logits_gradient(grad, inputs, saved.counts);
  }
  if (saved.alpha.has_value() && task_should_compute_output(1)) {
    const bool needs_history = at::GradMode::is_enabled();
    result[1] =
        alpha_gradient(grad, saved, needs_history ? upsampled_logits(inputs) : at::Tensor());
  }
  return result;
}

}  // namespace oe_ext
