// Sums of floats whose bits do not depend on the number of threads, and their transposes.
//
// ATen splits a single sum among its threads, and also columns that it sums side by side, so the
// number of threads changes the last bits. It splits neither sums over neighbours in memory nor the
// sums themselves if there are two or more. A single sum is therefore computed twice.
#pragma once

#include <ATen/core/Tensor.h>

namespace oe_ext {

// The sum over the axes from `first` on.
at::Tensor sum_from_axis(const at::Tensor& values, int64_t first);

// The sum over the axes along which a tensor like `values` was repeated to become `repeated`.
at::Tensor sum_like(const at::Tensor& repeated, const at::Tensor& values);

// Broadcasts to the shape of `like`. Its derivative is one of the sums above.
at::Tensor repeat_like(const at::Tensor& values, const at::Tensor& like);

}  // namespace oe_ext
