// Walks along the classes of one long row: a vector holds neighbouring classes.
#pragma once

#include "tile_rows.h"

namespace oe_ext::cpu {
namespace {

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
         IntV::broadcast(static_cast<typename IntV::Lane>((kSize - num_classes % kSize) % kSize));
}

constexpr int64_t kCacheLine = 64;

// What is soon to be read and written, in the row that a walk has now come to. The processor's own
// prefetching ends with a page, which may be one row.
template <typename scalar_t, typename acc_t>
struct Ahead {
  const scalar_t* logits;
  acc_t* exps;
};

// The sums of one row, and where its exponentials go (kKeepExp).
template <bool kKeepExp, typename scalar_t, typename acc_t>
class RowSums {
  using V = Vec<acc_t>;

 public:
  OE_EXT_INLINE RowSums(const scalar_t* logits, int64_t num_classes, acc_t max, acc_t* exps,
                        Ahead<scalar_t, acc_t> ahead)
      : logits_(logits), num_classes_(num_classes), max_(max), exps_(exps), ahead_(ahead) {}

  // In chains of kClassBlock blocks, which join sums in double.
  OE_EXT_INLINE void add_all() {
    constexpr int64_t kChain = kClassBlock * kBlockSize;
    int64_t i = 0;
    for (; num_classes_ - i > kChain; i += kChain) {
      add_blocks(i, i + kChain);
      end_chain();
    }
    add_last<kBlock>(add_blocks(i, num_classes_));
    end_chain();
  }

  acc_t sum_exp() const { return static_cast<acc_t>(sum_exp_); }
  acc_t sum_shifted() const { return static_cast<acc_t>(sum_shifted_); }

 private:
  static constexpr int64_t kBlockSize = kBlock * V::kSize;

  OE_EXT_INLINE int64_t add_blocks(int64_t i, int64_t end) {
    for (; i + kBlockSize <= end; i += kBlockSize) {
      V shifted[kBlock];
      V exp_shifted[kBlock];
      fetch_ahead(i);
      read</*kMayOverlap=*/false>(i, shifted, exp_shifted);
      for (int width = kBlock / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; ++j) {
          shifted[j] += shifted[j + width];
          exp_shifted[j] += exp_shifted[j + width];
        }
      }
      chain_.add_terms(shifted[0], exp_shifted[0]);
    }
    return i;
  }

  OE_EXT_INLINE void fetch_ahead(int64_t i) const {
    for (int64_t j = 0; j < kBlockSize; j += kCacheLine / sizeof(scalar_t)) {
      __builtin_prefetch(ahead_.logits + i + j);
    }
    for (int64_t j = 0; kKeepExp && j < kBlockSize; j += kCacheLine / sizeof(acc_t)) {
      __builtin_prefetch(ahead_.exps + i + j, /*rw=*/1);
    }
  }

  // What is left of the row, at most kCount vectors, of which the last may overlap the one before.
  template <int kCount>
  OE_EXT_INLINE void add_last(int64_t i) {
    if (num_classes_ - i <= (kCount - 1) * V::kSize) {
      if constexpr (kCount > 1) {
        add_last<kCount - 1>(i);
      }
      return;
    }
    V shifted[kCount];
    V exp_shifted[kCount];
    read</*kMayOverlap=*/true>(i, shifted, exp_shifted);
    const Mask<acc_t> is_new = lanes_of_tail<acc_t>(num_classes_);
    const V zero = acc_t(0);
    shifted[kCount - 1] = select(is_new, shifted[kCount - 1], zero);
    exp_shifted[kCount - 1] = select(is_new, exp_shifted[kCount - 1], zero);
    for (int j = 0; j < kCount; ++j) {
      chain_.add_terms(shifted[j], exp_shifted[j]);
    }
  }

  template <bool kMayOverlap, int kCount>
  OE_EXT_INLINE void read(int64_t i, V (&shifted)[kCount], V (&exp_shifted)[kCount]) const {
    const auto at = [&](int j) {
      const int64_t begin = i + j * V::kSize;
      return kMayOverlap ? std::min(begin, num_classes_ - V::kSize) : begin;
    };
    for (int j = 0; j < kCount; ++j) {
      exp_shifted[j] = shifted[j] = Packed<scalar_t, acc_t>::load(logits_ + at(j)) - max_;
    }
    exp_in_place(exp_shifted);
    for (int j = 0; j < kCount; ++j) {
      if (kKeepExp) {
        exp_shifted[j].store(exps_ + at(j));
      }
    }
  }

  OE_EXT_INLINE void end_chain() {
    sum_exp_ += sum_of_lanes(chain_.sum_exp);
    sum_shifted_ += sum_of_lanes(chain_.sum_shifted);
    chain_ = RowStats<V>::below(max_);
  }

  const scalar_t* logits_;
  int64_t num_classes_;
  V max_;
  acc_t* exps_;
  Ahead<scalar_t, acc_t> ahead_;
  RowStats<V> chain_ = RowStats<V>::below(max_);
  double sum_exp_ = 0;
  double sum_shifted_ = 0;
};

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
