// What the kernels of every backend are given: raw pointers, sizes and strides, and the few
// per-row steps that do not depend on how a backend walks memory. No ATen here.
#pragma once

#include "row_math.h"

namespace oe_ext {

// Logits as rows: row = outer * num_inner + inner, in the order of the target's elements.
// Strides count elements; every offset is 64 bits wide.
struct RowLayout {
  int64_t num_outer = 0;
  int64_t num_inner = 0;
  int64_t num_classes = 0;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
  int64_t class_stride = 0;

  C10_HOST_DEVICE int64_t num_rows() const { return num_outer * num_inner; }

  C10_HOST_DEVICE int64_t row_offset(int64_t row) const {
    if (num_outer == 1) {
      return row * inner_stride;
    }
    const int64_t outer = row / num_inner;
    return outer * outer_stride + (row - outer * num_inner) * inner_stride;
  }

  C10_HOST_DEVICE int64_t class_offset(int64_t cls) const { return cls * class_stride; }

  // Neighbouring rows lie closer together than neighbouring classes (pixels of a contiguous
  // segmentation map, or a transposed matrix): walk rows first.
  C10_HOST_DEVICE bool rows_are_closest() const {
    return num_inner > 1 && num_classes > 1 && inner_stride < class_stride;
  }
};

enum class LabelType : int8_t { kInt64, kInt32, kInt16, kInt8, kUInt8, kUInt16, kUInt32 };

struct Labels {
  const void* data = nullptr;  // [num_rows], contiguous
  LabelType type = LabelType::kInt64;
  LabelRule rule;

  bool are_unsigned() const {
    return type == LabelType::kUInt8 || type == LabelType::kUInt16 || type == LabelType::kUInt32;
  }

  C10_HOST_DEVICE int64_t operator[](int64_t row) const {
    switch (type) {
      case LabelType::kInt32:
        return static_cast<const int32_t*>(data)[row];
      case LabelType::kInt16:
        return static_cast<const int16_t*>(data)[row];
      case LabelType::kInt8:
        return static_cast<const int8_t*>(data)[row];
      case LabelType::kUInt8:
        return static_cast<const uint8_t*>(data)[row];
      case LabelType::kUInt16:
        return static_cast<const uint16_t*>(data)[row];
      case LabelType::kUInt32:
        return static_cast<const uint32_t*>(data)[row];
      default:
        return static_cast<const int64_t*>(data)[row];
    }
  }
};

// One value a row, or one for all of them (stride 0).
template <typename T>
struct PerRow {
  const T* data = nullptr;
  int64_t stride = 0;

  C10_HOST_DEVICE T operator[](int64_t row) const { return data[row * stride]; }
};

// The weight of an outlier: a number, or one read from memory.
template <typename acc_t>
struct Alpha {
  acc_t value = 0;
  PerRow<acc_t> values;

  C10_HOST_DEVICE acc_t operator[](int64_t row) const {
    return values.data != nullptr ? values[row] : value;
  }
};

template <typename acc_t>
C10_HOST_DEVICE acc_t row_weight(RowKind kind, const Alpha<acc_t>& alpha, int64_t row) {
  if (kind == RowKind::kInlier) {
    return acc_t(1);
  }
  return kind == RowKind::kOutlier ? alpha[row] : acc_t(0);
}

// Where a loss that is reduced goes; null for none.
template <typename acc_t>
struct LossOutput {
  acc_t* loss = nullptr;      // one element
  int64_t* counts = nullptr;  // inliers, outliers

  C10_HOST_DEVICE void write(const GroupSums& sums, Reduction reduction, int64_t num_rows) const {
    *loss = static_cast<acc_t>(sums.reduce(reduction, num_rows));
    counts[0] = sums.counts.inliers;
    counts[1] = sums.counts.outliers;
  }
};

template <typename scalar_t, typename acc_t>
struct ForwardArgs {
  RowLayout layout;
  const scalar_t* logits = nullptr;
  Labels labels;
  Alpha<acc_t> alpha;
  Reduction reduction = Reduction::kMean;
  // Outputs of each row, [num_rows] each.
  acc_t* row_loss = nullptr;           // the weighted loss, for none; else null
  acc_t* row_cross_entropy = nullptr;  // the same, not weighted; or null
  acc_t* row_max = nullptr;            // for the backward; or null
  acc_t* row_sum_exp = nullptr;        // for the backward; or null
  LossOutput<acc_t> output;
  // The gradient for an upstream gradient of 1; or null. Not for none.
  RowLayout grad_layout;  // with num_outer and num_inner of layout
  scalar_t* grad_logits = nullptr;

  // Must the rows be counted before the first gradient can be written?
  C10_HOST_DEVICE bool needs_counts_first() const {
    return grad_logits != nullptr &&
           (reduction == Reduction::kMean || reduction == Reduction::kGroupMean);
  }

  // Does anything that is written depend on the logits of this row?
  C10_HOST_DEVICE bool is_active(int64_t row, RowKind kind) const {
    return row_weight(kind, alpha, row) != acc_t(0) ||
           (row_cross_entropy != nullptr && kind == RowKind::kOutlier);
  }

  // Writes the outputs of one row and returns its weighted loss, which is 0 where the row does not
  // count. `stats` need not be filled where the row is not active.
  C10_HOST_DEVICE acc_t write_row(int64_t row, int64_t label, RowKind kind,
                                  const RowStats<acc_t>& stats) const {
    const bool active = is_active(row, kind);
    acc_t label_shifted = 0;
    if (active && kind == RowKind::kInlier) {
      const int64_t at_label = layout.row_offset(row) + layout.class_offset(label);
      label_shifted = static_cast<acc_t>(logits[at_label]) - stats.max;
    }
    const auto [cross_entropy, loss] =
        RowLoss<acc_t>::of_row(active, kind == RowKind::kOutlier, row_weight(kind, alpha, row),
                               stats.log_sum(), label_shifted, stats.sum_shifted / stats.count);
    if (row_loss != nullptr) {
      row_loss[row] = loss;
    }
    if (row_cross_entropy != nullptr) {
      row_cross_entropy[row] = cross_entropy;
    }
    if (row_max != nullptr) {
      row_max[row] = active ? stats.max : acc_t(0);
      row_sum_exp[row] = active ? stats.sum_exp : acc_t(0);
    }
    return loss;
  }

  // The gradient of a row for an upstream gradient of 1.
  C10_HOST_DEVICE RowGradient<acc_t> row_gradient(int64_t row, int64_t label, RowKind kind,
                                                  const RowStats<acc_t>& stats,
                                                  GroupCounts group_counts) const {
    const acc_t weight = row_weight(kind, alpha, row);
    return weight == acc_t(0)
               ? RowGradient<acc_t>()
               : RowGradient<acc_t>::of_row(
                     stats.max, stats.sum_exp, weight,
                     weight / static_cast<acc_t>(reduction_divisor(reduction, kind, group_counts)),
                     kind, label, layout.num_classes);
  }
};

template <typename scalar_t, typename acc_t>
struct BackwardArgs {
  RowLayout layout;
  const scalar_t* logits = nullptr;
  RowLayout grad_layout;  // with num_outer and num_inner of layout
  scalar_t* grad_logits = nullptr;
  Labels labels;
  Alpha<acc_t> alpha;
  Reduction reduction = Reduction::kMean;
  PerRow<acc_t> grad;                  // the upstream gradient
  const acc_t* row_max = nullptr;      // [num_rows]
  const acc_t* row_sum_exp = nullptr;  // [num_rows]
  const int64_t* counts = nullptr;     // inliers, outliers; null for none
  // grad_logits holds the gradient for an upstream gradient of 1 already; not for none.
  bool has_unit_gradient = false;

  // Is there nothing left to do? Reads device memory.
  C10_HOST_DEVICE bool is_done() const { return has_unit_gradient && grad[0] == acc_t(1); }

  C10_HOST_DEVICE GroupCounts group_counts() const {
    GroupCounts group_counts;
    if (counts != nullptr) {
      group_counts.inliers = counts[0];
      group_counts.outliers = counts[1];
    }
    return group_counts;
  }

  C10_HOST_DEVICE RowGradient<acc_t> row_gradient(int64_t row, int64_t label, RowKind kind) const {
    const acc_t weight = row_weight(kind, alpha, row);
    if (weight == acc_t(0)) {
      return RowGradient<acc_t>();
    }
    const auto divisor = static_cast<acc_t>(reduction_divisor(reduction, kind, group_counts()));
    return RowGradient<acc_t>::of_row(row_max[row], row_sum_exp[row], weight,
                                      weight * grad[row] / divisor, kind, label,
                                      layout.num_classes);
  }
};

}  // namespace oe_ext
