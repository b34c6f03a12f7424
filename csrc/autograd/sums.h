// Sums of floats with the same bits for any number of threads, and their transposes.
//
// ATen splits a lone sum among its threads, and columns that it sums side by side, so that the
// number of threads shows in the last bits. It splits neither a sum over neighbours in memory nor,
// where there are two of them, the sums themselves: a lone one is computed twice.
#pragma once

#include <ATen/core/Tensor.h>

namespace oe_ext {

// The sum over the axes from `first` on.
at::Tensor sum_from_axis(const at::Tensor& values, int64_t first);

// The sum over the axes along which a tensor like `values` was repeated to become `repeated`.
at::Tensor sum_like(const at::Tensor& repeated, const at::Tensor& values);

// Broadcasts to the shape of `like`, with a derivative that is a sum of the above.
at::Tensor repeat_like(const at::Tensor& values, const at::Tensor& like);

}  // namespace oe_ext
