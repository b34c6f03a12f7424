// The loss of upsampled logits as torch's upsampling and the loss: with logits of full size, for
// whatever the kernels do not do.
#pragma once

#include "upsampled_outlier_exposure.h"

namespace oe_ext {

// The logits at the size of the target, in the dtype of the loss.
at::Tensor upsampled_logits(const UpsampledInputs& inputs);

// The derivative of upsampled_logits(): a gradient of full size as one of the logits.
at::Tensor downsampled_gradient(const at::Tensor& grad, const UpsampledInputs& inputs);

// Kernels for UpsampledKernels. The loss and the backward can be differentiated to any order.
struct ComposedUpsampling {
  static at::Tensor loss(const UpsampledInputs& inputs);
  static UpsampledResult forward(const UpsampledInputs& inputs, const OptionalTensor& counts,
                                 const UpsampledOutputs& outputs);
  static at::Tensor backward(const at::Tensor& grad, const UpsampledInputs& inputs,
                             const at::Tensor& counts);
};

}  // namespace oe_ext
