#include "outlier_exposure_derivatives.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>
#include <vector>

#include "sums.h"

namespace oe_ext {
namespace {

constexpr int64_t kClassAxis = 1;

at::Tensor where_or_zero(const at::Tensor& mask, const at::Tensor& values) {
  return at::where(mask, values, at::zeros({}, values.options()));
}

// Moves the classes to the last axis, copying if necessary, so that sums over classes add
// neighbours in memory.
at::Tensor with_classes_last(const at::Tensor& like_logits) {
  return like_logits.movedim(kClassAxis, -1).contiguous();
}

// 1 / divisor of a group, with one axis for each axis of the target: vmap reads the first sample of
// 0-dim tensors, and a batch may be empty. Counts of 0 give 0, see Divisor.
at::Tensor group_scale(const Divisor& divisor, const at::Tensor& counts, const at::Tensor& one,
                       int64_t num_axes) {
  if (!divisor.counts()) {
    return one;
  }
  const at::Tensor members = divisor.by_inliers && divisor.by_outliers
                                 ? counts.sum()
                                 : counts.select(0, divisor.by_inliers ? 0 : 1);
  const std::vector<int64_t> ones(num_axes, 1);
  const double infinity = std::numeric_limits<double>::infinity();
  return members.masked_fill(members.eq(0), infinity)
      .to(one.scalar_type())
      .reciprocal()
      .reshape(ones);
}

at::Tensor with_classes_second(const at::Tensor& values) { return values.movedim(-1, kClassAxis); }

}  // namespace

RowScales::RowScales(const LossInputs& inputs, const at::Tensor& counts) {
  const auto& [logits, target, alpha_tensor, weight, options] = inputs;
  const at::ScalarType dtype = loss_dtype(logits);
  is_scalar_ = options.reduction.is_scalar;

  label_ = target.to(at::kLong);
  const at::Tensor ignored = options.ignore_index.has_value() ? label_.eq(*options.ignore_index)
                                                              : at::zeros_like(label_, at::kBool);
  const at::Tensor special =
      options.ood_index.has_value() ? label_.eq(*options.ood_index) : label_.lt(0);
  outlier_ = special.logical_and(ignored.logical_not());
  inlier_ = special.logical_or(ignored).logical_not();

  const at::Tensor one = at::scalar_tensor(1, logits.options().dtype(dtype));
  const at::Tensor zero = at::zeros_like(one);
  const DivisorRule& rule = options.reduction.divisors;
  const at::Tensor inlier_scale = group_scale(rule.inliers, counts, one, target.dim());
  const at::Tensor outlier_scale = group_scale(rule.outliers, counts, one, target.dim());
  const at::Tensor alpha = alpha_tensor.has_value() ? repeat_like(alpha_tensor->to(dtype), target)
                                                    : one.mul(options.alpha);
  if (alpha_tensor.has_value()) {
    weightless_ = alpha.eq(0);
  }
  alpha_scale = at::where(outlier_, outlier_scale, zero);
  scale = at::where(inlier_, inlier_scale, at::where(outlier_, alpha.mul(outlier_scale), zero));
}

at::Tensor RowScales::reduce(const at::Tensor& per_row) const {
  return is_scalar_ ? sum_from_axis(per_row, 0) : per_row;
}

at::Tensor RowScales::of_outliers(const at::Tensor& values) const {
  return where_or_zero(outlier_, repeat_like(values, outlier_));
}

at::Tensor RowScales::alpha_gradient(const at::Tensor& grad, const at::Tensor& cross_entropy,
                                     const at::Tensor& alpha) const {
  return sum_like(alpha_scale * of_outliers(grad) * cross_entropy, alpha).to(alpha.scalar_type());
}

at::Tensor RowScales::silent(const at::Tensor& logits) const {
  if (!weightless_.defined()) {
    return at::Tensor();
  }
  const at::Tensor has_softmax = logits.detach().amax(kClassAxis).isfinite();
  return outlier_.logical_and(weightless_).logical_and(has_softmax.logical_not());
}

at::Tensor RowScales::outlier_cross_entropy(const at::Tensor& logits) const {
  const c10::SymInt kOutlier = -1;
  const c10::SymInt kIgnored = 0;
  const at::Tensor silent_rows = silent(logits);
  const bool has_silent = silent_rows.defined();
  const at::Tensor seen = has_silent ? outlier_.logical_and(silent_rows.logical_not()) : outlier_;
  const at::Tensor labels = at::zeros_like(label_).masked_fill(seen, kOutlier);
  const LossOptions of_each_row = {/*alpha=*/1.0, parse_reduction("none"), kIgnored, kOutlier};
  const at::Tensor cross_entropy =
      call_loss({logits, labels, std::nullopt, std::nullopt, of_each_row});
  return has_silent
             ? cross_entropy.masked_fill(silent_rows, std::numeric_limits<double>::quiet_NaN())
             : cross_entropy;
}

RowDerivatives::RowDerivatives(const LossInputs& inputs, const at::Tensor& counts)
    : RowScales(inputs, counts) {
  const auto& [logits, target, alpha_tensor, weight, options] = inputs;
  counted_ = inlier_;
  if (alpha_tensor.has_value()) {
    counted_ = inlier_.logical_or(outlier_).logical_and(silent(logits).logical_not());
  } else if (options.alpha != 0) {
    counted_ = inlier_.logical_or(outlier_);
  }
  x_ = part_of(logits);
  softmax_ = at::softmax(x_, -1);
  const at::Tensor classes =
      at::arange(logits.sym_size(kClassAxis), logits.options().dtype(at::kLong));
  const at::Tensor uniform = at::ones({}, x_.options()) / logits.sym_size(kClassAxis);
  at::Tensor of_inlier = classes.eq(label_.unsqueeze(-1)).to(x_.scalar_type());
  if (options.label_smoothing != 0) {
    of_inlier = of_inlier * (1 - options.label_smoothing) + uniform * options.label_smoothing;
  }
  if (weight.has_value()) {
    of_inlier = of_inlier * weight->to(x_.scalar_type());
    k_ = sum_from_axis(of_inlier, label_.dim()).masked_fill(outlier_, 1).unsqueeze(-1);
  }
  q_ = at::where(outlier_.unsqueeze(-1), uniform, of_inlier);
  residual_ = times_k(softmax_) - q_;
}

at::Tensor RowDerivatives::times_k(const at::Tensor& values) const {
  return k_.defined() ? values * k_ : values;
}

at::Tensor RowDerivatives::part_of(const at::Tensor& like_logits) const {
  return where_or_zero(counted_.unsqueeze(-1),
                       with_classes_last(like_logits.to(scale.scalar_type())));
}

at::Tensor RowDerivatives::of_rows(const at::Tensor& values) const {
  return where_or_zero(counted_, repeat_like(values, counted_));
}

at::Tensor RowDerivatives::cross_entropy() const {
  return sum_from_axis(q_ * at::log_softmax(x_, -1), label_.dim()).neg();
}

at::Tensor RowDerivatives::loss() const {
  const at::Tensor weightless = outlier_.logical_and(scale.eq(0));
  const at::Tensor active = counted_.logical_and(weightless.logical_not());
  return where_or_zero(active, scale * cross_entropy());
}

at::Tensor RowDerivatives::inlier_cross_entropy_or(const at::Tensor& others) const {
  return at::where(inlier_, cross_entropy(), others);
}

at::Tensor RowDerivatives::cross_entropy_along(const at::Tensor& v) const {
  return sum_from_axis(residual_ * part_of(v), label_.dim());
}

at::Tensor RowDerivatives::times_residual(const at::Tensor& factor) const {
  return with_classes_second(factor.unsqueeze(-1) * residual_);
}

at::Tensor RowDerivatives::times_outlier_residual(const at::Tensor& factor) const {
  return with_classes_second(factor.unsqueeze(-1) *
                             where_or_zero(outlier_.unsqueeze(-1), residual_));
}

at::Tensor RowDerivatives::times_softmax_along(const at::Tensor& factor,
                                               const at::Tensor& v) const {
  const at::Tensor direction = part_of(v);
  const at::Tensor mean = sum_from_axis(softmax_ * direction, label_.dim()).unsqueeze(-1);
  return with_classes_second(times_k(factor.unsqueeze(-1) * softmax_) * (direction - mean));
}

}  // namespace oe_ext
