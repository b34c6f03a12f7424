// Views the axes of the logits as rows and classes, without a copy if two strides for the rows
// suffice.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../core/kernel_args.h"

namespace oe_ext {

// The rows of logits of shape [N, C, d1, ..., dk]. Nothing if N, d1, ..., dk do not merge into two
// axes with one stride each (a crop of an image, say).
std::optional<RowLayout> row_layout(const at::Tensor& logits);

// Gives both layouts the same num_outer. One stride may cover all rows of the logits but not those
// of the gradient, or the other way round.
void split_batch_alike(RowLayout& logits, RowLayout& grad);

struct RowView {
  at::Tensor tensor;
  RowLayout layout;
};

// The logits themselves, or a contiguous copy.
RowView rows_to_read(const at::Tensor& logits);

// The gradient itself, or a contiguous buffer that the caller copies into it.
RowView rows_to_write(const at::Tensor& grad);

}  // namespace oe_ext
