// From the statistics of a tile's rows to their losses and the coefficients of their gradients. The
// formulas are those of row_math.h.
#pragma once

#include "labels.h"

namespace oe_ext::cpu {
namespace {

template <typename acc_t>
void clear_statistics(TileRows<acc_t>& rows) {
  std::fill_n(rows.max, rows.padded, std::numeric_limits<acc_t>::lowest());
  std::fill_n(rows.sum_exp, rows.padded, acc_t(0));
  std::fill_n(rows.sum_shifted, rows.padded, acc_t(0));
  std::fill_n(rows.at_label, rows.padded, acc_t(0));
}

// All that the forward writes for each row, the sums of losses, and the coefficients of gradients.
template <typename scalar_t, typename acc_t>
void finish_rows(const ForwardArgs<scalar_t, acc_t>& args, GroupCounts counts,
                 TileRows<acc_t>& rows, GroupSums& sums) {
  alignas(64) acc_t loss[kMaxTileRows];
  alignas(64) acc_t cross_entropy[kMaxTileRows];
  const auto num_classes = static_cast<acc_t>(args.layout.num_classes);
  const auto divisor = [&](RowKind kind) {
    return static_cast<acc_t>(reduction_divisor(args.reduction, kind, counts));
  };
  const acc_t inlier_divisor = divisor(RowKind::kInlier);
  const acc_t outlier_divisor = divisor(RowKind::kOutlier);
#pragma omp simd
  for (int64_t i = 0; i < rows.padded; ++i) {
    const bool outlier = rows.label[i] == kOutlier;
    const acc_t weight = rows.weight[i];
    const auto row_loss =
        RowLoss<acc_t>::of_row(rows.active[i] != acc_t(0), outlier, weight, log_of(rows.sum_exp[i]),
                               rows.at_label[i] - rows.max[i], rows.sum_shifted[i] / num_classes);
    loss[i] = row_loss.loss;
    cross_entropy[i] = row_loss.cross_entropy;
    const acc_t scale = weight / select(outlier, outlier_divisor, inlier_divisor);
    const auto gradient =
        GradientCoefficients<acc_t>::of_row(weight, outlier, rows.sum_exp[i], scale, num_classes);
    rows.factor[i] = gradient.factor;
    rows.offset[i] = gradient.offset;
  }

  double inliers = 0;
  double outliers = 0;
#pragma omp simd reduction(+ : inliers, outliers)
  for (int64_t i = 0; i < rows.size; ++i) {
    inliers += static_cast<double>(select(rows.label[i] >= 0, loss[i], acc_t(0)));
    outliers += static_cast<double>(select(rows.label[i] >= 0, acc_t(0), loss[i]));
  }
  sums.inliers = inliers;
  sums.outliers = outliers;

  if (args.row_loss != nullptr) {
    std::copy_n(loss, rows.size, args.row_loss + rows.first);
  }
  if (args.row_cross_entropy != nullptr) {
    std::copy_n(cross_entropy, rows.size, args.row_cross_entropy + rows.first);
  }
  if (args.row_max != nullptr) {
    acc_t* max = args.row_max + rows.first;
    acc_t* sum_exp = args.row_sum_exp + rows.first;
#pragma omp simd
    for (int64_t i = 0; i < rows.size; ++i) {
      max[i] = select(rows.active[i] != acc_t(0), rows.max[i], acc_t(0));
      sum_exp[i] = select(rows.active[i] != acc_t(0), rows.sum_exp[i], acc_t(0));
    }
  }
}

// What the forward left of rows, and the coefficients of their gradients.
template <typename scalar_t, typename acc_t>
void restore_rows(const BackwardArgs<scalar_t, acc_t>& args, TileRows<acc_t>& rows) {
  clear_statistics(rows);
  const auto num_classes = static_cast<acc_t>(args.layout.num_classes);
  const GroupCounts counts = args.group_counts();
  for (int64_t i = 0; i < rows.size; ++i) {
    if (rows.weight[i] == acc_t(0)) {
      rows.max[i] = rows.factor[i] = rows.offset[i] = 0;
      continue;
    }
    rows.max[i] = args.row_max[rows.first + i];
    rows.sum_exp[i] = args.row_sum_exp[rows.first + i];
    const bool outlier = rows.label[i] == kOutlier;
    const RowKind kind = outlier ? RowKind::kOutlier : RowKind::kInlier;
    const auto divisor = static_cast<acc_t>(reduction_divisor(args.reduction, kind, counts));
    const auto gradient = GradientCoefficients<acc_t>::of_row(
        rows.weight[i], outlier, rows.sum_exp[i],
        rows.weight[i] * args.grad[rows.first + i] / divisor, num_classes);
    rows.factor[i] = gradient.factor;
    rows.offset[i] = gradient.offset;
  }
}

}  // namespace
}  // namespace oe_ext::cpu
