// Forward-mode AD: the tangents of the operators' outputs from those of their inputs.
#pragma once

#include "outlier_exposure_derivatives.h"

namespace oe_ext {

// The tangent of a tensor; undefined if it has none.
at::Tensor tangent_of(const OptionalTensor& tensor);

template <typename... Tensors>
bool any_tangent(const Tensors&... tensors) {
  return (tangent_of(tensors).defined() || ...);
}

// Raises an error for a tensor that has no derivative but requires one.
void check_no_gradient(const OptionalTensor& tensor, const char* name);

// The tangents of the loss and of the result of the backward operator. A mean divides by counts.
at::Tensor loss_jvp(const LossInputs& inputs, const at::Tensor& counts);
at::Tensor backward_jvp(const at::Tensor& grad, const LossInputs& inputs, const at::Tensor& counts);

}  // namespace oe_ext
