// Walks along the classes of one long row: a vector holds neighbouring classes.
#pragma once

#include "tile_rows.h"

namespace oe_ext::cpu {
namespace {

// Terms of a long row that are summed in one chain of each lane before they join a sum in double.
constexpr int64_t kChainLength = 64;

template <typename scalar_t, typename acc_t>
acc_t max_of_row(const scalar_t* logits, int64_t num_classes) {
  using V = Vec<acc_t>;
  using P = Packed<scalar_t, acc_t>;
  V max[4];
  for (V& m : max) {
    m = V(std::numeric_limits<acc_t>::lowest());
  }
  int64_t i = 0;
  for (; i + 4 * V::kSize <= num_classes; i += 4 * V::kSize) {
    for (int j = 0; j < 4; ++j) {
      max[j] = larger(P::load(logits + i + j * V::kSize), max[j]);
    }
  }
  for (; i + V::kSize <= num_classes; i += V::kSize) {
    max[0] = larger(P::load(logits + i), max[0]);
  }
  max[1] = larger(P::load(logits + num_classes - V::kSize), max[1]);
  return largest_lane(larger(larger(max[0], max[1]), larger(max[2], max[3])));
}

// The lanes of the last vector of a row that no vector before it holds; all of it fits the row.
template <typename acc_t>
OE_EXT_INLINE Mask<acc_t> lanes_of_tail(int64_t num_classes) {
  using IntV = IntVec<acc_t>;
  constexpr int64_t kSize = Vec<acc_t>::kSize;
  typename IntV::Lane index[kSize];
  for (int64_t i = 0; i < kSize; ++i) {
    index[i] = static_cast<typename IntV::Lane>(i);
  }
  return IntV::load(index) >=
         IntV::broadcast(static_cast<typename IntV::Lane>(kSize - num_classes % kSize));
}

// The sums of a row; its exponentials go to `exps`, if that is not null.
template <bool kKeepExp, typename scalar_t, typename acc_t>
void add_row(const scalar_t* logits, int64_t num_classes, acc_t* exps, int64_t i_row,
             TileRows<acc_t>& rows) {
  using V = Vec<acc_t>;
  using P = Packed<scalar_t, acc_t>;
  const V max = rows.max[i_row];
  double sum_exp = 0;
  double sum_shifted = 0;
  int64_t i = 0;
  while (i + V::kSize <= num_classes) {
    const int64_t end = std::min(i + kChainLength * 4 * V::kSize, num_classes);
    RowStats<V> part[4];
    for (RowStats<V>& p : part) {
      p = RowStats<V>::below(max);
    }
    for (; i + 4 * V::kSize <= end; i += 4 * V::kSize) {
      for (int j = 0; j < 4; ++j) {
        const V exp_shifted = part[j].add(P::load(logits + i + j * V::kSize));
        if (kKeepExp) {
          exp_shifted.store(exps + i + j * V::kSize);
        }
      }
    }
    for (; i + V::kSize <= end; i += V::kSize) {
      const V exp_shifted = part[0].add(P::load(logits + i));
      if (kKeepExp) {
        exp_shifted.store(exps + i);
      }
    }
    sum_exp +=
        sum_of_lanes((part[0].sum_exp + part[1].sum_exp) + (part[2].sum_exp + part[3].sum_exp));
    sum_shifted += sum_of_lanes((part[0].sum_shifted + part[1].sum_shifted) +
                                (part[2].sum_shifted + part[3].sum_shifted));
  }
  if (i < num_classes) {
    const Mask<acc_t> is_new = lanes_of_tail<acc_t>(num_classes);
    RowStats<V> tail = RowStats<V>::below(max);
    const V exp_shifted = tail.add(P::load(logits + num_classes - V::kSize));
    if (kKeepExp) {
      exp_shifted.store(exps + num_classes - V::kSize);
    }
    sum_exp += sum_of_lanes(select(is_new, tail.sum_exp, V(acc_t(0))));
    sum_shifted += sum_of_lanes(select(is_new, tail.sum_shifted, V(acc_t(0))));
  }
  rows.sum_exp[i_row] = static_cast<acc_t>(sum_exp);
  rows.sum_shifted[i_row] = static_cast<acc_t>(sum_shifted);
}

template <bool kFromExp, typename source_t, typename acc_t>
struct RowGradientAt {
  using V = Vec<acc_t>;

  OE_EXT_INLINE RowGradientAt(const source_t* source, const TileRows<acc_t>& rows, int64_t i)
      : source(source),
        max(rows.max[i]),
        inverse_sum(rows.inverse_sum[i]),
        scale(rows.scale[i]),
        uniform(rows.uniform[i]) {}

  OE_EXT_INLINE V operator()(int64_t cls) const {
    const V stored = Packed<source_t, acc_t>::load(source + cls);
    const V exp_shifted = kFromExp ? stored : exp(stored - max);
    return logit_gradient(exp_shifted, inverse_sum, uniform, scale);
  }

  const source_t* source;
  V max;
  V inverse_sum;
  V scale;
  V uniform;
};

// Gradients of a row from its exponentials (kFromExp) or its logits, which may stand where the
// gradients go.
template <bool kFromExp, typename source_t, typename scalar_t, typename acc_t>
void write_row_gradient(const source_t* source, scalar_t* grad, int64_t num_classes, int64_t i_row,
                        const TileRows<acc_t>& rows) {
  using V = Vec<acc_t>;
  if (rows.label[i_row] == kInactiveLane) {
    std::fill_n(grad, num_classes, scalar_t(0));
    return;
  }
  const RowGradientAt<kFromExp, source_t, acc_t> gradient_at(source, rows, i_row);
  // The last vector overlaps the one before: read before that is overwritten.
  const V tail = gradient_at(num_classes - V::kSize);
  int64_t i = 0;
  for (; i + 4 * V::kSize <= num_classes; i += 4 * V::kSize) {
    for (int j = 0; j < 4; ++j) {
      Packed<scalar_t, acc_t>::store(grad + i + j * V::kSize, gradient_at(i + j * V::kSize));
    }
  }
  for (; i + V::kSize <= num_classes; i += V::kSize) {
    Packed<scalar_t, acc_t>::store(grad + i, gradient_at(i));
  }
  Packed<scalar_t, acc_t>::store(grad + num_classes - V::kSize, tail);
}

}  // namespace
}  // namespace oe_ext::cpu
