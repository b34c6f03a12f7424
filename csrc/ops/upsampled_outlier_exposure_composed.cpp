#include "upsampled_outlier_exposure_composed.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/upsample_bilinear2d.h>
#include <ATen/ops/upsample_bilinear2d_backward.h>

#include "checks.h"

namespace oe_ext {
namespace {

LossInputs of_full_size(const UpsampledInputs& inputs, const at::Tensor& logits) {
  const LossInputs& loss = inputs.loss;
  return {logits, loss.target, loss.alpha_tensor, loss.weight, loss.options};
}

at::Tensor empty_of(const at::Tensor& like) { return at::empty({0}, like.options()); }

}  // namespace

at::Tensor upsampled_logits(const UpsampledInputs& inputs) {
  const auto& [logits, target, alpha, weight, options] = inputs.loss;
  return at::upsample_bilinear2d_symint(logits.to(loss_dtype(logits)),
                                        {target.sym_size(1), target.sym_size(2)},
                                        inputs.align_corners);
}

at::Tensor downsampled_gradient(const at::Tensor& grad, const UpsampledInputs& inputs) {
  const at::Tensor& target = inputs.loss.target;
  return at::upsample_bilinear2d_backward_symint(grad, {target.sym_size(1), target.sym_size(2)},
                                                 inputs.loss.logits.sym_sizes(),
                                                 inputs.align_corners);
}

at::Tensor ComposedUpsampling::loss(const UpsampledInputs& inputs) {
  check_upsampled_inputs(inputs);
  return call_loss(of_full_size(inputs, upsampled_logits(inputs)));
}

UpsampledResult ComposedUpsampling::forward(const UpsampledInputs& inputs,
                                            const OptionalTensor& counts,
                                            const UpsampledOutputs& outputs) {
  check_upsampled_inputs(inputs);
  const at::Tensor logits = upsampled_logits(inputs);
  const LossInputs loss = of_full_size(inputs, logits);
  UpsampledResult result;
  std::tie(result.loss, result.row_cross_entropy, result.row_max, result.row_sum_exp, result.counts,
           result.unit_gradient) = call_forward(loss, counts, /*unit_gradient=*/false);
  if (outputs.unit_gradient.value_or(false)) {
    const RowStatistics statistics = {result.row_max, result.row_sum_exp, result.counts};
    result.unit_gradient =
        downsampled_gradient(call_backward(at::ones_like(result.loss), loss, statistics), inputs);
  }
  if (outputs.statistics) {
    result.row_argmax = logits.detach().argmax(1).to(at::kInt);
  } else {
    result.row_max = result.row_sum_exp = empty_of(result.loss);
    result.row_argmax = at::empty({0}, result.loss.options().dtype(at::kInt));
  }
  return result;
}

at::Tensor ComposedUpsampling::backward(const at::Tensor& grad, const UpsampledInputs& inputs,
                                        const at::Tensor& counts) {
  check_upsampled_inputs(inputs);
  const at::Tensor logits = upsampled_logits(inputs);
  const LossInputs loss = of_full_size(inputs, logits);
  const at::Tensor without_gradient = logits.detach();
  const auto result = call_forward(of_full_size(inputs, without_gradient), std::nullopt, false);
  const RowStatistics statistics = {std::get<2>(result), std::get<3>(result), counts};
  return downsampled_gradient(call_backward(grad, loss, statistics), inputs)
      .to(inputs.loss.logits.scalar_type());
}

}  // namespace oe_ext
