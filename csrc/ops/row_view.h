// How the axes of the logits become rows and classes, without a copy wherever two strides say it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../core/kernel_args.h"

namespace oe_ext {

// The rows of logits of shape [N, C, d1, ..., dk], or nothing where N, d1, ..., dk are not two
// axes with a stride each (a crop of an image, say).
std::optional<RowLayout> row_layout(const at::Tensor& logits);

// Gives both the same num_outer. One stride may walk through all rows of the logits and not through
// those of the gradient, or the other way round.
void split_batch_alike(RowLayout& logits, RowLayout& grad);

struct RowView {
  at::Tensor tensor;
  RowLayout layout;
};

// The logits as they are, or a contiguous copy.
RowView rows_to_read(const at::Tensor& logits);

// The gradient as it is, or a contiguous buffer for the caller to copy into it.
RowView rows_to_write(const at::Tensor& grad);

}  // namespace oe_ext
