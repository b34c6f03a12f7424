// How the axes of the logits become rows and classes, without a copy wherever two strides say it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../core/kernel_args.h"

namespace oe_ext {

// The rows of logits of shape [N, C, d1, ..., dk], or nothing where N, d1, ..., dk are not two
// axes with a stride each (a crop of an image, say).
std::optional<RowLayout> row_layout(const at::Tensor& logits);

// Cuts the rows of both into as many outer ones. A layout that one stride walks through need not be
// that of a gradient, where classes of the logits lie at the same place.
void cut_alike(RowLayout& logits, RowLayout& grad);

struct RowView {
  at::Tensor tensor;
  RowLayout layout;
};

// The logits as they are, or a contiguous copy.
RowView rows_to_read(const at::Tensor& logits);

// The gradient as it is, or a contiguous buffer for the caller to copy into it.
RowView rows_to_write(const at::Tensor& grad);

}  // namespace oe_ext
