// Class weights together with label smoothing, in ATen operators, for a backend whose kernels do
// not know SpreadSmoothing. Both options at once are rare, so this may be slower.
#pragma once

#include "outlier_exposure.h"

namespace oe_ext {

// Replaces the losses in the kernels' result for the weights alone, which has a row_cross_entropy.
// The row statistics and the counts are the same.
ForwardResult with_weighted_smoothing(const LossInputs& inputs, ForwardResult of_weights,
                                      bool writes_gradient);

// The gradient with respect to the logits, in the dtype of the loss.
at::Tensor composed_gradient(const at::Tensor& grad, const LossInputs& inputs,
                             const at::Tensor& counts);

}  // namespace oe_ext
