// The derivatives of the rows in ATen operators, which PyTorch can differentiate again: for double
// backward and forward-mode AD, where a fused kernel would gain little.
//
// The loss and its derivative along the logits are linear in alpha, so a row with an alpha of 0
// still has a derivative with respect to alpha. Masks depend on the kind of a row, never on its
// weight: a mask made from weights would cut the graph that leads to alpha. Rows that do not count
// are replaced by zeros before any computation: a mask applied afterwards would hide their values
// but not their derivatives, where 0 * inf and 0 * NaN are NaN.
#pragma once

#include <ATen/core/Tensor.h>

#include "../ops/checks.h"

namespace oe_ext {

// The factor of each position's cross-entropy in the loss, in the shape of target and the dtype of
// the loss.
struct RowScales {
  RowScales(const LossInputs& inputs, const at::Tensor& counts);

  // Reduces one value per position to the shape of the loss.
  at::Tensor reduce(const at::Tensor& per_row) const;

  // Zeroes all rows but outliers. The values broadcast to the shape of target.
  at::Tensor of_outliers(const at::Tensor& values) const;

  // The gradient of alpha, in its shape and dtype, from the cross-entropy of every outlier.
  at::Tensor alpha_gradient(const at::Tensor& grad, const at::Tensor& cross_entropy,
                            const at::Tensor& alpha) const;

  // The cross-entropy of every outlier, without weight or reduction, differentiable by autograd.
  at::Tensor outlier_cross_entropy(const at::Tensor& logits) const;

  at::Tensor scale;        // 1 or alpha / divisor of the reduction; without class weights
  at::Tensor alpha_scale;  // the same for alpha = 1, in outlier rows; else 0

 protected:
  // Outliers with a weight of 0 and without a softmax, whose NaN and inf must be hidden. Only a
  // tensor alpha has such rows; undefined for a number.
  at::Tensor silent(const at::Tensor& logits) const;

  bool is_scalar_;         // of the loss
  at::Tensor label_;       // int64
  at::Tensor outlier_;     // bool
  at::Tensor inlier_;      // bool
  at::Tensor weightless_;  // bool: where a tensor alpha is 0; or undefined
};

// The rows, with their classes along the last axis. The cross-entropy of a row is
// k logsumexp(x) - <q, x> with k the sum of q, which is uniform for an outlier, and
// w_c ((1 - e) [c = y] + e / C) for an inlier, with the weights w of the classes and the label
// smoothing e. Rows that do not count have logits of zero, and a factor or a direction of zero
// excludes them.
struct RowDerivatives : RowScales {
  RowDerivatives(const LossInputs& inputs, const at::Tensor& counts);

  // Zeroes rows that do not count. The values broadcast to the shape of target.
  at::Tensor of_rows(const at::Tensor& values) const;

  // Each row's cross-entropy against q: its loss without alpha and divisor.
  at::Tensor cross_entropy() const;

  // The loss of each row, divided as the reduction does.
  at::Tensor loss() const;

  // The cross-entropies of inliers, and the other values elsewhere.
  at::Tensor inlier_cross_entropy_or(const at::Tensor& others) const;

  // <k softmax(x) - q, v>: the derivative of each row's cross-entropy along v, which has the shape
  // of the logits.
  at::Tensor cross_entropy_along(const at::Tensor& v) const;

  // factor * (k softmax(x) - q), in the shape of the logits. The factor must come from of_rows().
  at::Tensor times_residual(const at::Tensor& factor) const;

  // The same for outlier rows, and 0 elsewhere: inliers do not depend on alpha.
  at::Tensor times_outlier_residual(const at::Tensor& factor) const;

  // factor * k softmax(x) * (v - <softmax(x), v>), in the shape of the logits: the factor times the
  // derivative of each row's k softmax along v. The factor must come from of_rows().
  at::Tensor times_softmax_along(const at::Tensor& factor, const at::Tensor& v) const;

 private:
  at::Tensor part_of(const at::Tensor& like_logits) const;
  at::Tensor times_k(const at::Tensor& values) const;

  at::Tensor counted_;  // bool: the rows that count
  at::Tensor x_;
  at::Tensor q_;
  at::Tensor k_;  // with an axis for the classes; undefined without class weights: 1
  at::Tensor softmax_;
  at::Tensor residual_;  // k softmax(x) - q
};

}  // namespace oe_ext
