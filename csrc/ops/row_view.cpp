#include "row_view.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace oe_ext {
namespace {

// An axis of rows, merged from neighbouring axes of the tensor, outermost first.
struct Axis {
  int64_t size = 1;
  int64_t stride = 0;

  // Appends the next inner axis, if one stride covers both.
  bool append(int64_t inner_size, int64_t inner_stride) {
    if (inner_size == 1) {
      return true;
    }
    if (size != 1 && stride != inner_size * inner_stride) {
      return false;
    }
    size *= inner_size;
    stride = inner_stride;
    return true;
  }
};

void split_batch(RowLayout& layout, int64_t num_outer) {
  if (layout.num_outer == num_outer) {
    return;
  }
  TORCH_INTERNAL_ASSERT(layout.num_outer == 1, "the outer axis is the batch, or nothing");
  layout.num_outer = num_outer;
  layout.num_inner /= num_outer;
  layout.outer_stride = layout.num_inner * layout.inner_stride;
}

RowView contiguous_view(const at::Tensor& tensor) {
  const std::optional<RowLayout> layout = row_layout(tensor);
  TORCH_INTERNAL_ASSERT(layout.has_value(), "a contiguous tensor has two axes of rows at most");
  return {tensor, *layout};
}

}  // namespace

std::optional<RowLayout> row_layout(const at::Tensor& logits) {
  RowLayout layout;
  layout.num_outer = 1;
  layout.num_inner = logits.numel() > 0 ? logits.size(0) : 0;
  layout.inner_stride = logits.stride(0);
  layout.num_classes = logits.size(1);
  layout.class_stride = layout.num_classes > 1 ? logits.stride(1) : 1;
  if (logits.numel() == 0) {
    return layout;  // no rows
  }

  Axis spatial;
  for (int64_t dim = 2; dim < logits.dim(); ++dim) {
    if (!spatial.append(logits.size(dim), logits.stride(dim))) {
      return std::nullopt;
    }
  }
  Axis rows{logits.size(0), logits.stride(0)};
  if (rows.append(spatial.size, spatial.stride)) {
    layout.num_inner = rows.size;
    layout.inner_stride = rows.stride;
  } else {
    layout.num_outer = logits.size(0);
    layout.outer_stride = logits.stride(0);
    layout.num_inner = spatial.size;
    layout.inner_stride = spatial.stride;
  }
  return layout;
}

void split_batch_alike(RowLayout& logits, RowLayout& grad) {
  const int64_t num_outer = std::max(logits.num_outer, grad.num_outer);
  split_batch(logits, num_outer);
  split_batch(grad, num_outer);
}

RowView rows_to_read(const at::Tensor& logits) {
  const std::optional<RowLayout> layout = row_layout(logits);
  return layout.has_value() ? RowView{logits, *layout} : contiguous_view(logits.contiguous());
}

RowView rows_to_write(const at::Tensor& grad) {
  const std::optional<RowLayout> layout = row_layout(grad);
  return layout.has_value() ? RowView{grad, *layout}
                            : contiguous_view(at::empty(grad.sizes(), grad.options()));
}

}  // namespace oe_ext
