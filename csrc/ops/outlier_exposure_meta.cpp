// Shapes, dtypes and strides of the outputs, without any data: for torch.compile and torch.export.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"

namespace oe_ext {
namespace {

at::Tensor empty_loss(const at::Tensor& logits, const at::Tensor& target, double alpha,
                      const OptionalTensor& alpha_tensor, std::string_view reduction) {
  const bool reduces = parse_reduction(reduction) != Reduction::kNone;
  check_inputs(logits, target);
  check_alpha(logits, target, alpha, alpha_tensor);
  const auto options = logits.options().dtype(loss_dtype(logits));
  return reduces ? at::empty({}, options) : at::empty_symint(target.sym_sizes(), options);
}

at::Tensor loss_meta(const at::Tensor& logits, const at::Tensor& target, double alpha,
                     std::string_view reduction, OptionalSymInt, OptionalSymInt) {
  return empty_loss(logits, target, alpha, std::nullopt, reduction);
}

at::Tensor loss_tensor_alpha_meta(const at::Tensor& logits, const at::Tensor& target,
                                  const at::Tensor& alpha, std::string_view reduction,
                                  OptionalSymInt, OptionalSymInt) {
  return empty_loss(logits, target, 0.0, alpha, reduction);
}

ForwardResult forward_meta(const at::Tensor& logits, const at::Tensor& target, double alpha,
                           const OptionalTensor& alpha_tensor, std::string_view reduction,
                           OptionalSymInt, OptionalSymInt, bool unit_gradient) {
  check_has_unit_gradient(unit_gradient, parse_reduction(reduction));
  const at::Tensor loss = empty_loss(logits, target, alpha, alpha_tensor, reduction);
  const auto per_row = [&] { return at::empty_symint(target.sym_sizes(), loss.options()); };
  const int64_t num_counts = parse_reduction(reduction) == Reduction::kNone ? 0 : 2;
  return {loss,
          alpha_tensor.has_value() ? per_row() : at::empty({0}, loss.options()),
          per_row(),
          per_row(),
          at::empty({num_counts}, loss.options().dtype(at::kLong)),
          unit_gradient ? at::empty_like(logits) : at::empty({0}, logits.options())};
}

at::Tensor backward_meta(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& target,
                         const at::Tensor& row_max, const at::Tensor& row_sum_exp,
                         const at::Tensor& counts, double alpha, const OptionalTensor& alpha_tensor,
                         std::string_view reduction, OptionalSymInt, OptionalSymInt) {
  check_inputs(logits, target);
  check_alpha(logits, target, alpha, alpha_tensor);
  check_backward(grad, logits, target, row_max, row_sum_exp, counts, parse_reduction(reduction));
  return at::empty_like(logits);
}

void backward_from_unit_meta(at::Tensor& unit_gradient, const at::Tensor& grad,
                             const at::Tensor& logits, const at::Tensor& target,
                             const at::Tensor& row_max, const at::Tensor& row_sum_exp,
                             const at::Tensor& counts, double alpha,
                             const OptionalTensor& alpha_tensor, std::string_view reduction,
                             OptionalSymInt, OptionalSymInt) {
  check_inputs(logits, target);
  check_alpha(logits, target, alpha, alpha_tensor);
  check_unit_gradient(unit_gradient, logits, parse_reduction(reduction));
  check_backward(grad, logits, target, row_max, row_sum_exp, counts, parse_reduction(reduction));
}

}  // namespace

TORCH_LIBRARY_IMPL(oe_ext, Meta, m) {
  m.impl("outlier_exposure_loss", TORCH_FN(loss_meta));
  m.impl("outlier_exposure_loss.tensor_alpha", TORCH_FN(loss_tensor_alpha_meta));
  m.impl("_outlier_exposure_loss_forward", TORCH_FN(forward_meta));
  m.impl("_outlier_exposure_loss_backward", TORCH_FN(backward_meta));
  m.impl("_outlier_exposure_loss_backward_from_unit", TORCH_FN(backward_from_unit_meta));
}

}  // namespace oe_ext
