#include "upsampled_outlier_exposure_nodes.h"

#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/graph_task.h>

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
  if (result.unit_gradient.dim() == inputs.loss.logits.dim()) {
    unit_gradient_ = result.unit_gradient;
  }
}

void UpsampledOutlierExposureLossBackward0::release_variables() {
  LossNode::release_variables();
  const std::lock_guard<std::mutex> lock(mutex_);
  unit_gradient_.reset();
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
  const bool is_last = unit_gradient_.use_count() == 1 &&
                       !torch::autograd::get_current_graph_task_keep_graph() &&
                       !at::isTensorSubclassLike(grad);
  at::Tensor gradient;
  if (!is_last) {
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
  const at::Tensor logits = saved_[kLogits].unpack();
  const at::Tensor target = saved_[kTarget].unpack();
  const at::Tensor counts = saved_[kCounts].unpack();
  const OptionalTensor alpha = unpack(kAlpha);
  const OptionalTensor weight = unpack(kWeight);
  const UpsampledInputs inputs = {{logits, target, alpha, weight, options_}, align_corners_};
  if (task_should_compute_output(0)) {
    result[0] = logits_gradient(grad, inputs, counts);
  }
  if (alpha.has_value() && task_should_compute_output(1)) {
    const RowScales scales(inputs.loss, counts);
    const at::Tensor cross_entropy = at::GradMode::is_enabled()
                                         ? scales.outlier_cross_entropy(upsampled_logits(inputs))
                                         : scales.of_outliers(saved_[kRowCrossEntropy].unpack());
    result[1] = scales.alpha_gradient(grad, cross_entropy, *alpha);
  }
  return result;
}

}  // namespace oe_ext
