// Forward-mode AD: the tangents of the operators' outputs from those of their inputs.
#pragma once

#include "outlier_exposure_derivatives.h"

namespace oe_ext {

// The tangent of a tensor; undefined where it has none.
at::Tensor tangent_of(const OptionalTensor& tensor);

template <typename... Tensors>
bool any_tangent(const Tensors&... tensors) {
  return (tangent_of(tensors).defined() || ...);
}

at::Tensor loss_tangent(const at::Tensor& logits, const at::Tensor& target,
                        const at::Tensor& counts, const OptionalTensor& alpha_tensor,
                        const LossOptions& options);

at::Tensor backward_tangent(const at::Tensor& grad, const at::Tensor& logits,
                            const at::Tensor& target, const at::Tensor& counts,
                            const OptionalTensor& alpha_tensor, const LossOptions& options);

}  // namespace oe_ext
