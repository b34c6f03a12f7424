// The shapes, dtypes and strides of the outputs, without data: for torch.compile and torch.export.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "checks.h"

namespace oe_ext {
namespace {

at::Tensor empty_loss(const LossInputs& inputs) {
  const auto options = inputs.logits.options().dtype(loss_dtype(inputs.logits));
  return inputs.options.reduction.is_scalar ? at::empty({}, options)
                                            : at::empty_symint(inputs.target.sym_sizes(), options);
}

struct MetaKernels {
  static at::Tensor loss(const LossInputs& inputs) {
    check_inputs(inputs);
    return empty_loss(inputs);
  }

  static ForwardResult forward(const LossInputs& inputs, const OptionalTensor& counts,
                               std::optional<bool> unit_gradient) {
    const at::Tensor loss = MetaKernels::loss(inputs);
    const bool writes_gradient = unit_gradient.value_or(false);
    check_forward(inputs, counts, writes_gradient);
    const auto options = loss.options();
    const auto per_row = [&] { return at::empty_symint(inputs.target.sym_sizes(), options); };
    const at::Tensor& logits = inputs.logits;
    return {loss,
            inputs.alpha_tensor.has_value() ? per_row() : at::empty({0}, options),
            per_row(),
            per_row(),
            at::empty({inputs.options.reduction.is_scalar ? 2 : 0}, options.dtype(at::kDouble)),
            writes_gradient ? at::empty_like(logits) : at::empty({0}, logits.options())};
  }

  static at::Tensor backward(const at::Tensor& grad, const LossInputs& inputs,
                             const RowStatistics& statistics) {
    check_inputs(inputs);
    check_backward(grad, inputs, statistics);
    return at::empty_like(inputs.logits);
  }

  static void backward_from_unit(at::Tensor& unit_gradient, const at::Tensor& grad,
                                 const LossInputs& inputs, const RowStatistics& statistics) {
    check_inputs(inputs);
    check_unit_gradient(unit_gradient, inputs);
    check_backward(grad, inputs, statistics);
  }
};

struct UpsampledMetaKernels {
  static at::Tensor loss(const UpsampledInputs& inputs) {
    check_upsampled_inputs(inputs);
    return empty_loss(inputs.loss);
  }

  static UpsampledResult forward(const UpsampledInputs& inputs, const OptionalTensor& counts,
                                 const UpsampledOutputs& outputs) {
    const at::Tensor loss = UpsampledMetaKernels::loss(inputs);
    const bool writes_gradient = outputs.unit_gradient.value_or(false);
    check_forward(inputs.loss, counts, writes_gradient);
    const auto options = loss.options();
    const auto per_row = [&](bool needed, const at::TensorOptions& of) {
      return needed ? at::empty_symint(inputs.loss.target.sym_sizes(), of) : at::empty({0}, of);
    };
    return {
        loss,
        per_row(inputs.loss.alpha_tensor.has_value(), options),
        per_row(outputs.statistics, options),
        per_row(outputs.statistics, options),
        per_row(outputs.statistics, options.dtype(at::kInt)),
        at::empty({inputs.loss.options.reduction.is_scalar ? 2 : 0}, options.dtype(at::kDouble)),
        writes_gradient ? at::empty_like(inputs.loss.logits, options) : at::empty({0}, options)};
  }

  static at::Tensor backward(const at::Tensor& grad, const UpsampledInputs& inputs,
                             const at::Tensor& counts) {
    check_upsampled_inputs(inputs);
    check_upstream("_upsampled_outlier_exposure_loss_backward", grad, inputs.loss, counts);
    return at::empty_like(inputs.loss.logits);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(oe_ext, Meta, m) {
  OutlierExposureKernels<MetaKernels>::register_for(m);
  UpsampledKernels<UpsampledMetaKernels>::register_for(m);
}

}  // namespace oe_ext
