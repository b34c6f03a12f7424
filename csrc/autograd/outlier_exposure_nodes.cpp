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

LossNode::Unpacked::Unpacked(const LossNode& node) : options(node.options_) {
  const auto unpack = [&](Slot slot) { return node.saved_[slot].unpack(); };
  const auto unpack_optional = [&](Slot slot) {
    const at::Tensor tensor = unpack(slot);
    return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
  };
  logits = unpack(kLogits);
  target = unpack(kTarget);
  counts = unpack(kCounts);
  alpha = unpack_optional(kAlpha);
  weight = unpack_optional(kWeight);
}

void LossNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (SavedVariable& variable : saved_) {
    variable.reset_data();
  }
}

void FirstLossNode::release_variables() {
  LossNode::release_variables();
  const std::lock_guard<std::mutex> lock(mutex_);
  unit_gradient_.reset();
}

void FirstLossNode::save_unit_gradient(const at::Tensor& unit_gradient, const LossInputs& inputs) {
  if (unit_gradient.dim() == inputs.logits.dim()) {  // else there is none
    unit_gradient_ = unit_gradient;
  }
}

bool FirstLossNode::may_finish_in_place(const at::Tensor& grad) const {
  return unit_gradient_.defined() && unit_gradient_.use_count() == 1 &&
         !torch::autograd::get_current_graph_task_keep_graph() && !at::GradMode::is_enabled() &&
         !at::isTensorSubclassLike(grad);
}

at::Tensor FirstLossNode::alpha_gradient(const at::Tensor& grad, const Unpacked& saved,
                                         const at::Tensor& logits) const {
  const RowScales scales(saved.inputs(), saved.counts);
  const at::Tensor cross_entropy = logits.defined()
                                       ? scales.outlier_cross_entropy(logits)
                                       : scales.of_outliers(saved_[kRowCrossEntropy].unpack());
  return scales.alpha_gradient(grad, cross_entropy, *saved.alpha);
}

void OutlierExposureLossBackward0::save_result(const ForwardResult& result,
                                               const LossInputs& inputs) {
  const auto& [loss, row_cross_entropy, row_max, row_sum_exp, counts, unit_gradient] = result;
  saved_[kRowCrossEntropy] = save(row_cross_entropy);
  saved_[kRowMax] = save(row_max);
  saved_[kRowSumExp] = save(row_sum_exp);
  save_unit_gradient(unit_gradient, inputs);
}

at::Tensor OutlierExposureLossBackward0::logits_gradient(const at::Tensor& grad,
                                                         const LossInputs& inputs,
                                                         const at::Tensor& counts) {
  const at::Tensor row_max = saved_[kRowMax].unpack();
  const at::Tensor row_sum_exp = saved_[kRowSumExp].unpack();
  const RowStatistics statistics = {row_max, row_sum_exp, counts};
  if (may_finish_in_place(grad) && !any_tangent(grad, inputs.logits, inputs.alpha_tensor)) {
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
  const Unpacked saved(*this);
  if (task_should_compute_output(0)) {
    result[0] = logits_gradient(grad, saved.inputs(), saved.counts);
  }
  if (saved.alpha.has_value() && task_should_compute_output(1)) {
    const bool needs_history = at::GradMode::is_enabled() || any_tangent(saved.logits);
    result[1] = alpha_gradient(grad, saved, needs_history ? saved.logits : at::Tensor());
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
  const Unpacked saved(*this);
  const at::Tensor grad = saved_[kGrad].unpack();
  const RowDerivatives rows(saved.inputs(), saved.counts);
  if (task_should_compute_output(0)) {
    result[0] = rows.reduce(rows.scale * rows.cross_entropy_along(direction));
  }
  if (task_should_compute_output(1)) {
    result[1] = rows.times_softmax_along(rows.scale * rows.of_rows(grad), direction)
                    .to(saved.logits.scalar_type());
  }
  if (saved.alpha.has_value() && task_should_compute_output(2)) {
    result[2] = rows.alpha_gradient(grad, rows.of_outliers(rows.cross_entropy_along(direction)),
                                    *saved.alpha);
  }
  return result;
}

}  // namespace oe_ext
