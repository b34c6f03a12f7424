// What becomes of rows once their sums are known: outputs, losses, and what their gradients need.
#pragma once

#include "tile_rows.h"

namespace oe_ext::cpu {
namespace {

// Sums of lanes, in double.
template <typename acc_t>
class LaneSums {
 public:
  LaneSums() {
    for (Vec<double>& part : parts_) {
      part = Vec<double>(0.0);
    }
  }
  OE_EXT_INLINE void add(Vec<acc_t> x) {
    if constexpr (kParts == 1) {
      parts_[0] += x;
    } else {
      parts_[0] += widen(Halves<acc_t, kVectorBytes>::low(x.raw));
      parts_[1] += widen(Halves<acc_t, kVectorBytes>::high(x.raw));
    }
  }
  double sum() const {
    double total = 0;
    for (const Vec<double>& part : parts_) {
      total += sum_of_lanes(part);
    }
    return total;
  }

 private:
  static constexpr int kParts = sizeof(double) / sizeof(acc_t);
  using Half = typename VectorType<acc_t, kVectorBytes / 2>::type;

  OE_EXT_INLINE static Vec<double> widen(Half x) {
#if defined(OE_EXT_AVX512)
    // GCC takes quarters instead.
    if constexpr (kParts == 2) {
      return (Vec<double>::Raw)_mm512_maskz_cvtps_pd(0xff, (__m256)x);
    }
#endif
    return Vec<double>(__builtin_convertvector(x, Vec<double>::Raw));
  }

  Vec<double> parts_[kParts];
};

// Stores the lanes of rows that exist; nothing where `values` is null.
template <typename acc_t>
OE_EXT_INLINE void store_rows(acc_t* values, const TileRows<acc_t>& rows, int64_t i, Vec<acc_t> x) {
  if (values == nullptr) {
    return;
  }
  if (i + Vec<acc_t>::kSize <= rows.size) {
    x.store(values + rows.first + i);
  } else {
    store_part(values + rows.first + i, x, rows.size - i);
  }
}

// What the gradients of a vector of rows need, beside their exponentials.
template <typename acc_t>
struct GradientLanes {
  Vec<acc_t> inverse_sum;
  Vec<acc_t> scale;
  Vec<acc_t> uniform;
  IntVec<acc_t> label;  // kInactiveLane where the gradient is zero
};

// Writes the outputs of rows and adds their losses. As ForwardArgs::write_row and row_gradient, for
// a vector of rows at once.
template <typename scalar_t, typename acc_t>
class RowFinisher {
  using V = Vec<acc_t>;
  using IntV = IntVec<acc_t>;

 public:
  RowFinisher(const ForwardArgs<scalar_t, acc_t>& args, GroupCounts counts,
              const TileRows<acc_t>& rows)
      : args_(args),
        rows_(rows),
        by_group_(args.reduction == Reduction::kGroupMean),
        num_classes_(static_cast<acc_t>(args.layout.num_classes)),
        uniform_(V(acc_t(1)) / num_classes_),
        inlier_scale_(V(acc_t(1)) / divisor(RowKind::kInlier, counts)),
        outlier_divisor_(divisor(RowKind::kOutlier, counts)),
        outlier_scale_(V(args.alpha.value) / outlier_divisor_) {}

  // The rows from i on, whose statistics lack only their count.
  OE_EXT_INLINE GradientLanes<acc_t> finish(int64_t i, RowStats<V> stats, V at_label) {
    const V zero = acc_t(0);
    const IntV label = IntV::load(rows_.label + i);
    const Mask<acc_t> is_inlier = label >= IntV::broadcast(0);
    const Mask<acc_t> is_outlier = label == IntV::broadcast(kOutlierLane);
    const bool one_alpha = args_.alpha.values.data == nullptr;
    const V alpha = one_alpha ? V(args_.alpha.value) : alphas(i);
    const V weight = select(is_inlier, V(acc_t(1)), select(is_outlier, alpha, zero));
    const Mask<acc_t> counts_for_loss = weight != zero;
    const Mask<acc_t> is_active =
        args_.row_cross_entropy != nullptr ? counts_for_loss | is_outlier : counts_for_loss;

    stats.count = num_classes_;
    const V cross_entropy = select(
        is_active,
        select(is_inlier, inlier_cross_entropy(stats, at_label), outlier_cross_entropy(stats)),
        zero);
    const V loss = select(counts_for_loss, weight * cross_entropy, zero);
    if (by_group_) {
      losses_.add(select(is_inlier, loss, zero));
      outlier_losses_.add(select(is_inlier, zero, loss));
    } else {
      losses_.add(loss);
    }
    store_rows(args_.row_loss, rows_, i, loss);
    store_rows(args_.row_cross_entropy, rows_, i, cross_entropy);
    store_rows(args_.row_max, rows_, i, select(is_active, stats.max, zero));
    store_rows(args_.row_sum_exp, rows_, i, select(is_active, stats.sum_exp, zero));

    GradientLanes<acc_t> gradient;
    gradient.inverse_sum = V(acc_t(1)) / stats.sum_exp;
    gradient.scale =
        select(is_outlier, one_alpha ? outlier_scale_ : alpha / outlier_divisor_, inlier_scale_);
    gradient.uniform = select(is_outlier, uniform_, zero);
    gradient.label = select(counts_for_loss, label, IntV::broadcast(kInactiveLane));
    return gradient;
  }

  // All but the group_mean divides either group by the same, and has both in one sum.
  void write_sums(GroupSums& sums) const {
    sums.inliers = losses_.sum();
    sums.outliers = by_group_ ? outlier_losses_.sum() : 0.0;
  }

 private:
  V divisor(RowKind kind, GroupCounts counts) const {
    return static_cast<acc_t>(reduction_divisor(args_.reduction, kind, counts));
  }

  V alphas(int64_t i) const {
    acc_t lanes[V::kSize];
    for (int64_t j = 0; j < V::kSize; ++j) {
      lanes[j] = args_.alpha.values[rows_.first + std::min(i + j, rows_.size - 1)];
    }
    return V::load(lanes);
  }

  const ForwardArgs<scalar_t, acc_t>& args_;
  const TileRows<acc_t>& rows_;
  bool by_group_;
  V num_classes_;
  V uniform_;
  V inlier_scale_;
  V outlier_divisor_;
  V outlier_scale_;
  LaneSums<acc_t> losses_;
  LaneSums<acc_t> outlier_losses_;
};

// The same for all rows of a tile, whose statistics lie in memory, and so do the gradients' needs
// afterwards.
template <typename scalar_t, typename acc_t>
void finish_rows(const ForwardArgs<scalar_t, acc_t>& args, GroupCounts counts,
                 TileRows<acc_t>& rows, GroupSums& sums) {
  using V = Vec<acc_t>;
  RowFinisher<scalar_t, acc_t> finisher(args, counts, rows);
  for (int64_t i = 0; i < rows.padded; i += V::kSize) {
    RowStats<V> stats;
    stats.max = V::load(rows.max + i);
    stats.sum_exp = V::load(rows.sum_exp + i);
    stats.sum_shifted = V::load(rows.sum_shifted + i);
    const GradientLanes<acc_t> gradient = finisher.finish(i, stats, V::load(rows.at_label + i));
    gradient.inverse_sum.store(rows.inverse_sum + i);
    gradient.scale.store(rows.scale + i);
    gradient.uniform.store(rows.uniform + i);
    gradient.label.store(rows.label + i);
  }
  finisher.write_sums(sums);
}

}  // namespace
}  // namespace oe_ext::cpu
