// The derivatives of the rows in ATen operators, which PyTorch can differentiate again: for double
// backward and forward-mode AD, where a fused kernel would bring little.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"

namespace oe_ext {

// The arguments of the loss beside its tensors.
struct LossOptions {
  double alpha = 0;
  std::string reduction;
  OptionalSymInt ignore_index;
  OptionalSymInt ood_index;
};

// Every row's cross-entropy as a function that autograd knows: alpha is 1, nothing is summed.
at::Tensor row_cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                             const LossOptions& options);

// What each position's cross-entropy is multiplied by on its way into the loss; target's shape, in
// the dtype of the loss.
struct RowScales {
  RowScales(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& counts,
            const OptionalTensor& alpha_tensor, const LossOptions& options);

  // From one value a position to the shape of the loss.
  at::Tensor reduce(const at::Tensor& per_row) const;

  // Zero where the weight is, or where no outlier is: a factor of 0 would let NaN and inf of a row
  // through that has no part in it. Of values of the target's shape or the logits'.
  at::Tensor where_weighed(const at::Tensor& values) const;
  at::Tensor where_outlier(const at::Tensor& values) const;

  at::Tensor scale;        // weight / divisor of the reduction
  at::Tensor alpha_scale;  // the same per unit of alpha: 0 but in outlier rows

 protected:
  bool reduces_;        // reduction is not none
  at::Tensor label_;    // int64
  at::Tensor outlier_;  // bool
  at::Tensor inlier_;   // bool
};

// The rows themselves. Those that do not count are zero everywhere.
struct RowCalculus : RowScales {
  RowCalculus(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& counts,
              const OptionalTensor& alpha_tensor, const LossOptions& options);

  // <softmax(x) - q, v>: the derivative along v of each row's cross-entropy.
  at::Tensor cross_entropy_along(const at::Tensor& v) const;

  // softmax(x) * (v - <softmax(x), v>): the derivative along v of each row's softmax.
  at::Tensor softmax_along(const at::Tensor& v) const;

  at::Tensor softmax;   // logits' shape
  at::Tensor residual;  // logits' shape: softmax(x) - q
};

}  // namespace oe_ext
