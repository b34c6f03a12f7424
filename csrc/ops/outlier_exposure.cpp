// The schemas of the operators, and the C++ functions that call them.
#include "outlier_exposure.h"

#include <torch/library.h>

#include <vector>

#include "../include/oe_ext/oe_ext.h"

namespace oe_ext {

TORCH_LIBRARY_FRAGMENT(oe_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // The overload with a tensor comes first: overload resolution by arguments would otherwise turn a
  // 0-dim alpha into a number, which loses its gradient.
  m.def(
      "outlier_exposure_loss.tensor_alpha(Tensor logits, Tensor target, Tensor alpha, "
      "str reduction=\"mean\", *, SymInt? ignore_index=None, SymInt? ood_index=None, "
      "Tensor? weight=None, float label_smoothing=0.0) -> Tensor",
      tags);
  m.def(
      "outlier_exposure_loss(Tensor logits, Tensor target, float alpha=0.5, "
      "str reduction=\"mean\", *, SymInt? ignore_index=None, SymInt? ood_index=None, "
      "Tensor? weight=None, float label_smoothing=0.0) -> Tensor",
      tags);

  // The loss, with the values that its backward needs. alpha_tensor, if given, replaces alpha. With
  // num_classes, the logits hold only a part of that many classes, from first_class on. The loss is
  // then that of the part alone, and has no derivative.
  //   row_cross_entropy  shape of target: the loss for an alpha of 1, for the gradient of
  //                      alpha_tensor; empty without one
  //   row_max, row_sum_exp  shape of target: the maximum, and the sum of exp(logit - maximum)
  //   counts             float64 [2]: what a mean divides by, given or taken from this target: the
  //                      number of inliers, or their summed class weights, and the number of
  //                      outliers; numbers for "sum", empty for "none"
  //   unit_gradient      shape of logits: the gradient for an upstream gradient of 1, if True
  //                      asks for it (not for "none"); else empty. With None the operator decides
  //                      whether a backward will want it, and only its autograd node has it
  m.def(
      "_outlier_exposure_loss_forward(Tensor logits, Tensor target, float alpha, "
      "Tensor? alpha_tensor, str reduction, SymInt? ignore_index, SymInt? ood_index, "
      "bool? unit_gradient=None, Tensor? counts=None, SymInt? num_classes=None, "
      "SymInt first_class=0, Tensor? weight=None, float label_smoothing=0.0) -> (Tensor loss, "
      "Tensor row_cross_entropy, Tensor row_max, Tensor row_sum_exp, Tensor counts, "
      "Tensor unit_gradient)",
      tags);

  // The gradient with respect to the logits. For a part of the classes, it is that of the loss over
  // all classes if the statistics are those of all classes.
  m.def(
      "_outlier_exposure_loss_backward(Tensor grad, Tensor logits, Tensor target, Tensor row_max, "
      "Tensor row_sum_exp, Tensor counts, float alpha, Tensor? alpha_tensor, str reduction, "
      "SymInt? ignore_index, SymInt? ood_index, SymInt? num_classes=None, SymInt first_class=0, "
      "Tensor? weight=None, float label_smoothing=0.0) -> Tensor",
      tags);

  // The same in place: turns the gradient for an upstream gradient of 1 into that for grad. If grad
  // is 1, it reads only grad, and the host does not wait for its value.
  m.def(
      "_outlier_exposure_loss_backward_from_unit(Tensor(a!) unit_gradient, Tensor grad, "
      "Tensor logits, Tensor target, Tensor row_max, Tensor row_sum_exp, Tensor counts, "
      "float alpha, Tensor? alpha_tensor, str reduction, SymInt? ignore_index, SymInt? ood_index, "
      "Tensor? weight=None, float label_smoothing=0.0) -> ()",
      tags);
}

namespace {

using Kernels = OutlierExposureKernels<void>;

}  // namespace

at::Tensor call_loss(const LossInputs& inputs) {
  static const auto number =
      find_operator<decltype(Kernels::loss)>("oe_ext::outlier_exposure_loss");
  static const auto tensor = find_operator<decltype(Kernels::loss_tensor_alpha)>(
      "oe_ext::outlier_exposure_loss", "tensor_alpha");
  const auto& [logits, target, alpha_tensor, weight, options] = inputs;
  return alpha_tensor.has_value()
             ? tensor.call(logits, target, *alpha_tensor, options.reduction.name,
                           options.ignore_index, options.ood_index, weight, options.label_smoothing)
             : number.call(logits, target, options.alpha, options.reduction.name,
                           options.ignore_index, options.ood_index, weight,
                           options.label_smoothing);
}

ForwardResult call_forward(const LossInputs& inputs, const OptionalTensor& counts,
                           std::optional<bool> unit_gradient) {
  static const auto op =
      find_operator<decltype(Kernels::forward)>("oe_ext::_outlier_exposure_loss_forward");
  const auto& [logits, target, alpha_tensor, weight, options] = inputs;
  return op.call(logits, target, options.alpha, alpha_tensor, options.reduction.name,
                 options.ignore_index, options.ood_index, unit_gradient, counts,
                 options.num_classes, options.first_class, weight, options.label_smoothing);
}

at::Tensor call_backward(const at::Tensor& grad, const LossInputs& inputs,
                         const RowStatistics& statistics) {
  static const auto op =
      find_operator<decltype(Kernels::backward)>("oe_ext::_outlier_exposure_loss_backward");
  const auto& [logits, target, alpha_tensor, weight, options] = inputs;
  return op.call(grad, logits, target, statistics.row_max, statistics.row_sum_exp,
                 statistics.counts, options.alpha, alpha_tensor, options.reduction.name,
                 options.ignore_index, options.ood_index, options.num_classes, options.first_class,
                 weight, options.label_smoothing);
}

void call_backward_from_unit(at::Tensor& unit_gradient, const at::Tensor& grad,
                             const LossInputs& inputs, const RowStatistics& statistics) {
  static const auto op = find_operator<decltype(Kernels::backward_from_unit)>(
      "oe_ext::_outlier_exposure_loss_backward_from_unit");
  const auto& [logits, target, alpha_tensor, weight, options] = inputs;
  op.call(unit_gradient, grad, logits, target, statistics.row_max, statistics.row_sum_exp,
          statistics.counts, options.alpha, alpha_tensor, options.reduction.name,
          options.ignore_index, options.ood_index, weight, options.label_smoothing);
}

namespace {

// The batching rules are in Python (oe_ext/_vmap.py). torch.library.register_vmap takes none for an
// operator with a keyword-only tensor, such as weight, so the loss runs by the rule of the forward.
struct BatchedKernels {
  static at::Tensor loss(const LossInputs& inputs) {
    return std::get<0>(call_forward(inputs, std::nullopt, std::nullopt));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(oe_ext, FuncTorchBatched, m) {
  OutlierExposureKernels<BatchedKernels>::register_for(m);
}

at::Tensor outlier_exposure_loss(const at::Tensor& logits, const at::Tensor& target, double alpha,
                                 std::string_view reduction, std::optional<int64_t> ignore_index,
                                 std::optional<int64_t> ood_index,
                                 const std::optional<at::Tensor>& weight, double label_smoothing) {
  return call_loss({logits, target, std::nullopt, weight,
                    LossOptions::of(alpha, reduction, symbolic(ignore_index), symbolic(ood_index),
                                    label_smoothing)});
}

at::Tensor outlier_exposure_loss(const at::Tensor& logits, const at::Tensor& target,
                                 const at::Tensor& alpha, std::string_view reduction,
                                 std::optional<int64_t> ignore_index,
                                 std::optional<int64_t> ood_index,
                                 const std::optional<at::Tensor>& weight, double label_smoothing) {
  return call_loss({logits, target, alpha, weight,
                    LossOptions::of(0.0, reduction, symbolic(ignore_index), symbolic(ood_index),
                                    label_smoothing)});
}

}  // namespace oe_ext
