// The derivatives of the rows in ATen operators, which PyTorch can differentiate again: for double
// backward and forward-mode AD, where a fused kernel would bring little.
//
// The loss is linear in alpha, and so is its derivative along the logits: an alpha of 0 hides
// nothing. Rows are told apart by what they are and never by what they weigh, for a mask made of
// weights would cut the graph that leads to alpha. Rows that take no part are replaced by zeros
// before anything is computed of them, for a mask made afterwards stops their values and not their
// derivatives: 0 * inf and 0 * NaN are NaN.
#pragma once

#include <ATen/core/Tensor.h>

#include "../ops/checks.h"

namespace oe_ext {

// What each position's cross-entropy is multiplied by on its way into the loss; target's shape, in
// the dtype of the loss.
struct RowScales {
  RowScales(const LossInputs& inputs, const at::Tensor& counts);

  // From one value a position to the shape of the loss.
  at::Tensor reduce(const at::Tensor& per_row) const;

  // Zero where no outlier is. Of values that broadcast to the target's shape.
  at::Tensor of_outliers(const at::Tensor& values) const;

  // Every outlier's cross-entropy, not weighted and not summed, as a function that autograd knows.
  at::Tensor outlier_cross_entropy(const at::Tensor& logits) const;

  at::Tensor scale;        // weight / divisor of the reduction
  at::Tensor alpha_scale;  // the same per unit of alpha: 0 but in outlier rows

 protected:
  // Outliers that weigh nothing and have no softmax: their NaN and inf are not to be seen. Only a
  // tensor alpha has such rows; undefined for a number.
  at::Tensor silent(const at::Tensor& logits) const;

  bool is_scalar_;         // the loss is
  at::Tensor label_;       // int64
  at::Tensor outlier_;     // bool
  at::Tensor inlier_;      // bool
  at::Tensor weightless_;  // bool: a tensor alpha is 0; or undefined
};

// The rows themselves, their classes along the last axis. Those that take no part have logits of
// zero; a factor or a direction of zero is what keeps them out.
struct RowDerivatives : RowScales {
  RowDerivatives(const LossInputs& inputs, const at::Tensor& counts);

  // Zero where a row takes no part. Of values that broadcast to the target's shape.
  at::Tensor of_rows(const at::Tensor& values) const;

  // <softmax(x) - q, v>: the derivative along v of each row's cross-entropy. v is like the logits.
  at::Tensor cross_entropy_along(const at::Tensor& v) const;

  // factor * (softmax(x) - q), in the shape of the logits. The factor is of_rows().
  at::Tensor times_residual(const at::Tensor& factor) const;

  // The same, and 0 but in outlier rows: what an inlier holds is nothing to alpha.
  at::Tensor times_outlier_residual(const at::Tensor& factor) const;

  // factor * softmax(x) * (v - <softmax(x), v>), in the shape of the logits: the factor times the
  // derivative along v of each row's softmax. The factor is of_rows().
  at::Tensor times_softmax_along(const at::Tensor& factor, const at::Tensor& v) const;

 private:
  at::Tensor part_of(const at::Tensor& like_logits) const;

  at::Tensor counted_;  // bool: the rows that take part
  at::Tensor softmax_;
  at::Tensor residual_;  // softmax(x) - q
};

}  // namespace oe_ext
