#include "row_calculus.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace oe_ext {
namespace {

constexpr int64_t kClassAxis = 1;

// [C, 1, ..., 1], to compare with labels of shape [N, 1, d1, ..., dk].
at::Tensor class_numbers(const at::Tensor& logits) {
  at::Tensor classes = at::arange(logits.sym_size(kClassAxis), logits.options().dtype(at::kLong));
  for (int64_t dim = 2; dim < logits.dim(); ++dim) {
    classes = classes.unsqueeze(-1);
  }
  return classes;
}

// A mask of rows keeps values of rows, or of logits.
at::Tensor keep_rows(const at::Tensor& mask, const at::Tensor& values) {
  return at::where(values.dim() > mask.dim() ? mask.unsqueeze(kClassAxis) : mask, values,
                   at::zeros({}, values.options()));
}

}  // namespace

at::Tensor row_cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                             const LossOptions& options) {
  return loss_operator().call(logits, target, /*alpha=*/1.0, "none", options.ignore_index,
                              options.ood_index);
}

RowScales::RowScales(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& counts,
                     const OptionalTensor& alpha_tensor, const LossOptions& options) {
  const at::ScalarType dtype = loss_dtype(logits);
  const Reduction reduction = parse_reduction(options.reduction);
  reduces_ = reduction != Reduction::kNone;

  label_ = target.to(at::kLong);
  const at::Tensor ignored = options.ignore_index.has_value() ? label_.eq(*options.ignore_index)
                                                              : at::zeros_like(label_, at::kBool);
  const at::Tensor marked =
      options.ood_index.has_value() ? label_.eq(*options.ood_index) : label_.lt(0);
  outlier_ = marked.logical_and(ignored.logical_not());
  inlier_ = marked.logical_or(ignored).logical_not();

  const at::Tensor one = at::scalar_tensor(1, logits.options().dtype(dtype));
  const at::Tensor zero = at::zeros_like(one);
  at::Tensor inlier_scale = one;
  at::Tensor outlier_scale = one;
  if (reduction == Reduction::kMean) {
    inlier_scale = outlier_scale = counts.sum().to(dtype).reciprocal();
  } else if (reduction == Reduction::kGroupMean) {
    inlier_scale = counts.select(0, 0).to(dtype).reciprocal();
    outlier_scale = counts.select(0, 1).to(dtype).reciprocal();
  }
  const at::Tensor alpha =
      alpha_tensor.has_value() ? alpha_tensor->to(dtype) : one.mul(options.alpha);
  // where(), not products: the reciprocal is inf in a group without members
  alpha_scale = at::where(outlier_, outlier_scale, zero);
  const at::Tensor outlier_weighs = outlier_.logical_and(alpha.ne(0));
  scale =
      at::where(inlier_, inlier_scale, at::where(outlier_weighs, alpha.mul(outlier_scale), zero));
}

at::Tensor RowScales::reduce(const at::Tensor& per_row) const {
  return reduces_ ? per_row.sum() : per_row;
}

at::Tensor RowScales::where_weighed(const at::Tensor& values) const {
  return keep_rows(scale.ne(0), values);
}

at::Tensor RowScales::where_outlier(const at::Tensor& values) const {
  return keep_rows(outlier_, values);
}

RowCalculus::RowCalculus(const at::Tensor& logits, const at::Tensor& target,
                         const at::Tensor& counts, const OptionalTensor& alpha_tensor,
                         const LossOptions& options)
    : RowScales(logits, target, counts, alpha_tensor, options) {
  // An alpha of 0 that is a tensor still has a gradient, which looks at the logits.
  const bool outliers_count = alpha_tensor.has_value() || options.alpha != 0;
  const at::Tensor counted =
      (outliers_count ? inlier_.logical_or(outlier_) : inlier_).unsqueeze(kClassAxis);
  const at::Tensor zero = at::zeros({}, scale.options());
  const at::Tensor x = at::where(counted, logits.to(scale.scalar_type()), zero);
  softmax = at::where(counted, at::softmax(x, kClassAxis), zero);
  const at::Tensor one_hot =
      class_numbers(logits).eq(label_.unsqueeze(kClassAxis)).to(scale.scalar_type());
  const at::Tensor uniform = at::ones({}, scale.options()) / logits.sym_size(kClassAxis);
  const at::Tensor q = at::where(outlier_.unsqueeze(kClassAxis), uniform, one_hot);
  residual = at::where(counted, softmax - q, zero);
}

at::Tensor RowCalculus::cross_entropy_along(const at::Tensor& v) const {
  return (residual * v.to(residual.scalar_type())).sum(kClassAxis);
}

at::Tensor RowCalculus::softmax_along(const at::Tensor& v) const {
  const at::Tensor direction = v.to(softmax.scalar_type());
  return softmax * (direction - (softmax * direction).sum(kClassAxis, /*keepdim=*/true));
}

}  // namespace oe_ext
