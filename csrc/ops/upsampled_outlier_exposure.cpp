// The schemas of the operators of upsampled logits, and the C++ functions that call them.
#include "upsampled_outlier_exposure.h"

#include <torch/library.h>

#include <vector>

#include "../include/oe_ext/oe_ext.h"
#include "upsampled_outlier_exposure_composed.h"

namespace oe_ext {

TORCH_LIBRARY_FRAGMENT(oe_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  m.def(
      "upsampled_outlier_exposure_loss.tensor_alpha(Tensor logits, Tensor target, Tensor alpha, "
      "str reduction=\"mean\", *, SymInt? ignore_index=None, SymInt? ood_index=None, "
      "bool align_corners=False, Tensor? weight=None, float label_smoothing=0.0) -> Tensor",
      tags);
  m.def(
      "upsampled_outlier_exposure_loss(Tensor logits, Tensor target, float alpha=0.5, "
      "str reduction=\"mean\", *, SymInt? ignore_index=None, SymInt? ood_index=None, "
      "bool align_corners=False, Tensor? weight=None, float label_smoothing=0.0) -> Tensor",
      tags);

  // As _outlier_exposure_loss_forward; the statistics of pixels are empty unless asked for, but for
  // the row_cross_entropy of a tensor alpha. row_argmax is int32. unit_gradient has the shape of
  // the logits and the dtype of the loss: half types are rounded only after the upstream gradient.
  m.def(
      "_upsampled_outlier_exposure_loss_forward(Tensor logits, Tensor target, float alpha, "
      "Tensor? alpha_tensor, str reduction, SymInt? ignore_index, SymInt? ood_index, "
      "bool align_corners, bool statistics=False, bool? unit_gradient=None, Tensor? counts=None, "
      "Tensor? weight=None, float label_smoothing=0.0) -> (Tensor loss, Tensor row_cross_entropy, "
      "Tensor row_max, Tensor row_sum_exp, Tensor row_argmax, Tensor counts, "
      "Tensor unit_gradient)",
      tags);

  // The gradient with respect to the logits, from the logits alone.
  m.def(
      "_upsampled_outlier_exposure_loss_backward(Tensor grad, Tensor logits, Tensor target, "
      "Tensor counts, float alpha, Tensor? alpha_tensor, str reduction, SymInt? ignore_index, "
      "SymInt? ood_index, bool align_corners, Tensor? weight=None, float label_smoothing=0.0) "
      "-> Tensor",
      tags);
}

namespace {

using Kernels = UpsampledKernels<void>;

}  // namespace

at::Tensor call_upsampled_loss(const UpsampledInputs& inputs) {
  static const auto number =
      find_operator<decltype(Kernels::loss)>("oe_ext::upsampled_outlier_exposure_loss");
  static const auto tensor = find_operator<decltype(Kernels::loss_tensor_alpha)>(
      "oe_ext::upsampled_outlier_exposure_loss", "tensor_alpha");
  const auto& [logits, target, alpha_tensor, weight, options] = inputs.loss;
  return alpha_tensor.has_value()
             ? tensor.call(logits, target, *alpha_tensor, options.reduction.name,
                           options.ignore_index, options.ood_index, inputs.align_corners, weight,
                           options.label_smoothing)
             : number.call(logits, target, options.alpha, options.reduction.name,
                           options.ignore_index, options.ood_index, inputs.align_corners, weight,
                           options.label_smoothing);
}

UpsampledResult call_upsampled_forward(const UpsampledInputs& inputs, const OptionalTensor& counts,
                                       const UpsampledOutputs& outputs) {
  static const auto op =
      find_operator<decltype(Kernels::forward)>("oe_ext::_upsampled_outlier_exposure_loss_forward");
  const auto& [logits, target, alpha_tensor, weight, options] = inputs.loss;
  return UpsampledResult::of(
      op.call(logits, target, options.alpha, alpha_tensor, options.reduction.name,
              options.ignore_index, options.ood_index, inputs.align_corners, outputs.statistics,
              outputs.unit_gradient, counts, weight, options.label_smoothing));
}

at::Tensor call_upsampled_backward(const at::Tensor& grad, const UpsampledInputs& inputs,
                                   const at::Tensor& counts) {
  static const auto op = find_operator<decltype(Kernels::backward)>(
      "oe_ext::_upsampled_outlier_exposure_loss_backward");
  const auto& [logits, target, alpha_tensor, weight, options] = inputs.loss;
  return op.call(grad, logits, target, counts, options.alpha, alpha_tensor, options.reduction.name,
                 options.ignore_index, options.ood_index, inputs.align_corners, weight,
                 options.label_smoothing);
}

at::Tensor upsampled_outlier_exposure_loss(const at::Tensor& logits, const at::Tensor& target,
                                           double alpha, std::string_view reduction,
                                           std::optional<int64_t> ignore_index,
                                           std::optional<int64_t> ood_index, bool align_corners,
                                           const std::optional<at::Tensor>& weight,
                                           double label_smoothing) {
  return call_upsampled_loss({{logits, target, std::nullopt, weight,
                               LossOptions::of(alpha, reduction, symbolic(ignore_index),
                                               symbolic(ood_index), label_smoothing)},
                              align_corners});
}

at::Tensor upsampled_outlier_exposure_loss(const at::Tensor& logits, const at::Tensor& target,
                                           const at::Tensor& alpha, std::string_view reduction,
                                           std::optional<int64_t> ignore_index,
                                           std::optional<int64_t> ood_index, bool align_corners,
                                           const std::optional<at::Tensor>& weight,
                                           double label_smoothing) {
  return call_upsampled_loss({{logits, target, alpha, weight,
                               LossOptions::of(0.0, reduction, symbolic(ignore_index),
                                               symbolic(ood_index), label_smoothing)},
                              align_corners});
}

// vmap batches the two operators that the loss is composed of.
TORCH_LIBRARY_IMPL(oe_ext, FuncTorchBatched, m) {
  UpsampledKernels<ComposedUpsampling>::register_for(m);
}

}  // namespace oe_ext
