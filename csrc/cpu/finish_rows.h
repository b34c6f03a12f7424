// Turns the statistics of a tile's rows into losses and gradient coefficients, by the formulas of
// row_math.h.
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

// A row whose label is not among the classes here gets a label term of 0.
template <typename acc_t>
void skip_labels_elsewhere(int64_t num_classes, TileRows<acc_t>& rows) {
#pragma omp simd
  for (int64_t i = 0; i < rows.padded; ++i) {
    const bool elsewhere = rows.label[i] >= static_cast<IntOf<acc_t>>(num_classes);
    rows.at_label[i] = select(elsewhere, rows.max[i], rows.at_label[i]);
  }
}

// Calls use(smoothed), a function that gives the Smoothed of row i.
template <typename Args, typename acc_t, typename Use>
OE_EXT_INLINE void with_smoothing(const Args& args, const TileRows<acc_t>& rows, const Use& use) {
  if (args.class_spread != nullptr) {
    use([&rows, spread = args.spread_smoothing](int64_t i) {
      return spread.of_inlier(rows.at_classes[i], rows.weight[i]);
    });
  } else {
    use([same = Smoothed<acc_t>::by(args.label_smoothing)](int64_t) { return same; });
  }
}

// What rows of one kind have in common: a scale of the gradient, and the uniform part of it.
template <typename acc_t>
struct RowScale {
  acc_t scale;
  acc_t uniform;

  OE_EXT_INLINE static RowScale of(acc_t weight, acc_t uniform, acc_t upstream, acc_t divisor,
                                   acc_t num_classes) {
    const acc_t scale = weight * upstream / divisor;
    return {scale, GradientCoefficients<acc_t>::uniform_of(uniform, scale, num_classes)};
  }
};

// The scale of any row.
template <typename acc_t>
OE_EXT_INLINE RowScale<acc_t> scale_of(const TileRows<acc_t>& rows, int64_t i,
                                       Smoothed<acc_t> smoothed, acc_t upstream,
                                       acc_t inlier_divisor, acc_t outlier_divisor,
                                       acc_t num_classes) {
  const auto row = rows.coefficients(i, smoothed);
  const acc_t divisor = select(rows.label[i] == kOutlier, outlier_divisor, inlier_divisor);
  return RowScale<acc_t>::of(row.weight, row.uniform, upstream, divisor, num_classes);
}

// Sets the coefficients of a row's gradient.
template <typename acc_t>
OE_EXT_INLINE void set_gradient(TileRows<acc_t>& rows, int64_t i, Smoothed<acc_t> smoothed,
                                RowScale<acc_t> scale) {
  const auto gradient = GradientCoefficients<acc_t>::of_row(
      rows.coefficients(i, smoothed), rows.sum_exp[i], scale.scale, scale.uniform);
  rows.factor[i] = gradient.factor;
  rows.offset[i] = gradient.offset;
  rows.at_label[i] = gradient.at_label;
}

// Moves the offsets of inliers to at_classes, where they are multiplied by the spread.
template <typename Args, typename acc_t>
void spread_offsets(const Args& args, TileRows<acc_t>& rows) {
  for (int64_t i = 0; args.class_spread != nullptr && i < rows.padded; ++i) {
    const bool inlier = rows.label[i] >= 0;
    const acc_t uniform = args.spread_smoothing.of_inlier(0, rows.weight[i]).uniform;
    rows.at_classes[i] = inlier ? uniform * rows.sum_exp[i] / args.num_classes() : acc_t(0);
    rows.offset[i] = inlier ? acc_t(0) : rows.offset[i];
  }
}

// Writes the outputs of the forward for each row, sums the losses, and sets the coefficients of the
// gradients. A loop that calls a function is not made of vectors, and how much a compiler inlines
// by itself depends on all that a file holds.
template <typename scalar_t, typename acc_t>
__attribute__((flatten)) void finish_rows(const ForwardArgs<scalar_t, acc_t>& args,
                                          const GroupDivisors& divisors, TileRows<acc_t>& rows,
                                          GroupSums& sums) {
  alignas(64) acc_t loss[kMaxTileRows];
  alignas(64) acc_t cross_entropy[kMaxTileRows];
  const acc_t num_classes = args.num_classes();
  const auto inlier_divisor = static_cast<acc_t>(divisors.inliers);
  const auto outlier_divisor = static_cast<acc_t>(divisors.outliers);
  if (args.labels.rule.num_classes > args.layout.num_classes) {
    skip_labels_elsewhere(args.layout.num_classes, rows);
  }
  const auto finish = [&](auto smoothed, auto scale) {
#pragma omp simd
    for (int64_t i = 0; i < rows.padded; ++i) {
      const auto row_loss =
          RowLoss<acc_t>::of_row(rows.coefficients(i, smoothed(i)), log_of(rows.sum_exp[i]),
                                 rows.at_label[i] - rows.max[i], rows.sum_shifted[i] / num_classes);
      loss[i] = row_loss.loss;
      cross_entropy[i] = row_loss.cross_entropy;
      set_gradient(rows, i, smoothed(i), scale(i));
    }
  };
  with_smoothing(args, rows, [&](auto smoothed) {
    if (args.class_weights.data == nullptr && args.alpha.values.data == nullptr) {
      // All rows of a kind have the same scale: two divisions less a row, of five.
      const auto inlier = RowScale<acc_t>::of(acc_t(1), args.label_smoothing, acc_t(1),
                                              inlier_divisor, num_classes);
      const auto outlier =
          RowScale<acc_t>::of(args.alpha.value, acc_t(1), acc_t(1), outlier_divisor, num_classes);
      finish(smoothed, [&rows, inlier, outlier](int64_t i) {
        const bool is_inlier = rows.label[i] >= 0;
        return RowScale<acc_t>{select(is_inlier, inlier.scale, outlier.scale),
                               select(is_inlier, inlier.uniform, outlier.uniform)};
      });
    } else {
      finish(smoothed, [&, smoothed](int64_t i) {
        return scale_of(rows, i, smoothed(i), acc_t(1), inlier_divisor, outlier_divisor,
                        num_classes);
      });
    }
  });
  spread_offsets(args, rows);

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
  if (args.row_max != nullptr) {
    acc_t* max = args.row_max + rows.first;
    acc_t* sum_exp = args.row_sum_exp + rows.first;
#pragma omp simd
    for (int64_t i = 0; i < rows.size; ++i) {
      max[i] = select(rows.active[i] != acc_t(0), rows.max[i], acc_t(0));
      sum_exp[i] = select(rows.active[i] != acc_t(0), rows.sum_exp[i], acc_t(0));
    }
  }
  if (args.row_cross_entropy != nullptr) {
    acc_t* to = args.row_cross_entropy + rows.first;
#pragma omp simd
    for (int64_t i = 0; i < rows.size; ++i) {
      to[i] = select(rows.label[i] == kOutlier, cross_entropy[i], loss[i]);
      const bool counts = (rows.label[i] >= 0) | (rows.weight[i] != acc_t(0));
      rows.active[i] = select(counts, acc_t(1), acc_t(0));
    }
  }
}

// Sets the coefficients of the gradients, for the upstream gradients of a backward.
template <typename scalar_t, typename acc_t>
void set_gradients(const BackwardArgs<scalar_t, acc_t>& args, TileRows<acc_t>& rows) {
  const acc_t num_classes = args.num_classes();
  const GroupDivisors divisors = args.divisors();
  const auto inlier_divisor = static_cast<acc_t>(divisors.inliers);
  const auto outlier_divisor = static_cast<acc_t>(divisors.outliers);
  with_smoothing(args, rows, [&](auto smoothed) {
    for (int64_t i = 0; i < rows.size; ++i) {
      if (rows.active[i] == acc_t(0)) {
        rows.factor[i] = rows.offset[i] = rows.at_label[i] = 0;
        continue;
      }
      set_gradient(rows, i, smoothed(i),
                   scale_of(rows, i, smoothed(i), args.grad[rows.first + i], inlier_divisor,
                            outlier_divisor, num_classes));
    }
  });
  spread_offsets(args, rows);
}

// Loads the statistics that the forward saved, and sets the coefficients of the gradients.
template <typename scalar_t, typename acc_t>
void restore_rows(const BackwardArgs<scalar_t, acc_t>& args, TileRows<acc_t>& rows) {
  clear_statistics(rows);
  for (int64_t i = 0; i < rows.size; ++i) {
    const bool active = rows.active[i] != acc_t(0);
    rows.max[i] = active ? args.row_max[rows.first + i] : acc_t(0);
    rows.sum_exp[i] = active ? args.row_sum_exp[rows.first + i] : acc_t(0);
  }
  set_gradients(args, rows);
}

}  // namespace
}  // namespace oe_ext::cpu
