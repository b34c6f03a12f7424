#include "outlier_exposure_nodes.h"

#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/graph_task.h>

#include <mutex>

#include "outlier_exposure_jvp.h"

namespace oe_ext {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

namespace {

SavedVariable save(const OptionalTensor& tensor) {
  return SavedVariable(tensor, /*is_output=*/false);
}

}  // namespace

void LossNode::save_inputs(const LossInputs& inputs, const at::Tensor& counts) {
  saved_[kLogits] = save(inputs.logits);
  saved_[kTarget] = save(inputs.target);
  saved_[kCounts] = save(counts);
  // A slot that holds nothing costs less if it is left alone.
  if (inputs.alpha_tensor.has_value()) {
    saved_[kAlpha] = save(inputs.alpha_tensor);
  }
  if (inputs.weight.has_value()) {
    saved_[kWeight] = save(inputs.weight);
  }
  options_ = inputs.options;
}

OptionalTensor LossNode::unpack(Slot slot) const {
  const at::Tensor tensor = saved_[slot].unpack();
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

void LossNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (SavedVariable& variable : saved_) {
    variable.reset_data();
  }
}

void OutlierExposureLossBackward0::save_result(const ForwardResult& result) {
  const auto& [loss, row_cross_entropy, row_max, row_sum_exp, counts, unit_gradient] = result;
  saved_[kRowCrossEntropy] = save(row_cross_entropy);
  saved_[kRowMax] = save(row_max);
  saved_[kRowSumExp] = save(row_sum_exp);
  if (unit_gradient.numel() > 0) {
    unit_gradient_ = unit_gradient;
  }
}

void OutlierExposureLossBackward0::release_variables() {
  LossNode::release_variables();
  const std::lock_guard<std::mutex> lock(mutex_);
  unit_gradient_.reset();
}

at::Tensor OutlierExposureLossBackward0::logits_gradient(const at::Tensor& grad,
                                                         const LossInputs& inputs,
                                                         const at::Tensor& counts) {
  const at::Tensor row_max = saved_[kRowMax].unpack();
  const at::Tensor row_sum_exp = saved_[kRowSumExp].unpack();
  const RowStatistics statistics = {row_max, row_sum_exp, counts};
  // In place only if this is the last backward, nobody records it, and nobody else holds the
  // tensor.
  if (unit_gradient_.defined() && unit_gradient_.use_count() == 1 &&
      !torch::autograd::get_current_graph_task_keep_graph() && !at::GradMode::is_enabled() &&
      !at::isTensorSubclassLike(grad) && !any_tangent(grad, inputs.logits, inputs.alpha_tensor)) {
    at::Tensor gradient = std::move(unit_gradient_);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    call_backward_from_unit(gradient, grad, inputs, statistics);
    return gradient;
  }
  return call_backward(grad, inputs, statistics);
}

variable_list OutlierExposureLossBackward0::apply(variable_list&& grads) {
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
  const LossInputs inputs = {logits, target, alpha, weight, options_};
  if (task_should_compute_output(0)) {
    result[0] = logits_gradient(grad, inputs, counts);
  }
  if (alpha.has_value() && task_should_compute_output(1)) {
    const RowScales scales(inputs, counts);
    const bool needs_history = at::GradMode::is_enabled() || any_tangent(logits);
    const at::Tensor cross_entropy = needs_history
                                         ? scales.outlier_cross_entropy(logits)
                                         : scales.of_outliers(saved_[kRowCrossEntropy].unpack());
    result[1] = scales.alpha_gradient(grad, cross_entropy, *alpha);
  }
  return result;
}

void OutlierExposureLossBackwardBackward0::save_grad(const at::Tensor& grad) {
  saved_[kGrad] = save(grad);
}

variable_list OutlierExposureLossBackwardBackward0::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  variable_list result(3);
  const at::Tensor& direction = grads[0];
  if (!direction.defined()) {
    return result;
  }
  const at::Tensor logits = saved_[kLogits].unpack();
  const at::Tensor target = saved_[kTarget].unpack();
  const at::Tensor grad = saved_[kGrad].unpack();
  const OptionalTensor alpha = unpack(kAlpha);
  const OptionalTensor weight = unpack(kWeight);
  const RowDerivatives rows({logits, target, alpha, weight, options_}, saved_[kCounts].unpack());
  if (task_should_compute_output(0)) {
    result[0] = rows.reduce(rows.scale * rows.cross_entropy_along(direction));
  }
  if (task_should_compute_output(1)) {
    result[1] = rows.times_softmax_along(rows.scale * rows.of_rows(grad), direction)
                    .to(logits.scalar_type());
  }
  if (alpha.has_value() && task_should_compute_output(2)) {
    result[2] =
        rows.alpha_gradient(grad, rows.of_outliers(rows.cross_entropy_along(direction)), *alpha);
  }
  return result;
}

}  // namespace oe_ext
