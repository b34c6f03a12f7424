// Walks along the rows of a tile: a vector holds as many rows as it has lanes.
#pragma once

#include "scratch.h"

namespace oe_ext::cpu {
namespace {

// Vectors that are worked on at once, so that their chains of additions overlap.
constexpr int kBlock = kVectorBytes == 64 ? 4 : 2;

// Runs walk.run<count>(row) for the rows of whole vectors, with count vectors at once.
template <typename acc_t, typename Walk>
void for_each_block(int64_t num_rows, const Walk& walk) {
  constexpr int64_t kRows = Vec<acc_t>::kSize;
  int64_t row = 0;
  for (; row + kBlock * kRows <= num_rows; row += kBlock * kRows) {
    walk.template run<kBlock>(row);
  }
  for (; row + kRows <= num_rows; row += kRows) {
    walk.template run<1>(row);
  }
}

// Logits [class][row]: of a tensor whose rows are neighbours, or in scratch memory.
template <typename source_t>
struct Planes {
  const source_t* data;
  int64_t class_stride;

  template <typename acc_t>
  OE_EXT_INLINE Vec<acc_t> load(int64_t cls, int64_t row) const {
    return Packed<source_t, acc_t>::load(data + cls * class_stride + row);
  }
};

// The maxima of rows, and their logits at the label.
template <typename source_t, typename acc_t>
struct RaiseMaxima {
  using V = Vec<acc_t>;
  using IntV = IntVec<acc_t>;
  TileRows<acc_t>& rows;
  Planes<source_t> logits;
  int64_t first_class;
  int64_t num_classes;

  template <int kCount>
  OE_EXT_INLINE void run(int64_t row) const {
    const Planes<source_t> from = logits;
    V max[kCount];
    V at_label[kCount];
    IntV label[kCount];
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = row + j * V::kSize;
      max[j] = V::load(rows.max + i);
      at_label[j] = V::load(rows.at_label + i);
      label[j] = IntV::load(rows.label + i);
    }
    for (int64_t k = 0; k < num_classes; ++k) {
      const auto cls = IntV::broadcast(static_cast<typename IntV::Lane>(first_class + k));
      for (int j = 0; j < kCount; ++j) {
        const V x = from.template load<acc_t>(k, row + j * V::kSize);
        max[j] = larger(x, max[j]);
        at_label[j] = select(label[j] == cls, x, at_label[j]);
      }
    }
    for (int j = 0; j < kCount; ++j) {
      max[j].store(rows.max + row + j * V::kSize);
      at_label[j].store(rows.at_label + row + j * V::kSize);
    }
  }
};

// Adds classes to the sums of rows whose maxima are known, in short chains of additions: the error
// of a sum grows with the longest. kKeepExp leaves the exponentials in scratch, where the logits
// may stand.
template <typename source_t, typename acc_t, bool kKeepExp>
struct AddClasses {
  using V = Vec<acc_t>;
  TileRows<acc_t>& rows;
  Planes<source_t> logits;
  acc_t* scratch;
  int64_t num_classes;

  template <int kCount>
  OE_EXT_INLINE void run(int64_t row) const {
    RowStats<V> total[kCount];
    for (int j = 0; j < kCount; ++j) {
      total[j].max = V::load(rows.max + row + j * V::kSize);
      total[j].sum_exp = V::load(rows.sum_exp + row + j * V::kSize);
      total[j].sum_shifted = V::load(rows.sum_shifted + row + j * V::kSize);
    }
    // Copies: for all the compiler knows, the stores below change the members.
    const Planes<source_t> from = logits;
    acc_t* const exps = scratch;
    const int64_t padded = rows.padded;
    for (int64_t begin = 0; begin < num_classes; begin += kClassBlock) {
      const int64_t end = std::min(begin + kClassBlock, num_classes);
      RowStats<V> part[kCount];
      for (int j = 0; j < kCount; ++j) {
        part[j] = RowStats<V>::below(total[j].max);
      }
      for (int64_t cls = begin; cls < end; ++cls) {
        for (int j = 0; j < kCount; ++j) {
          const int64_t i = row + j * V::kSize;
          const V exp_shifted = part[j].add(from.template load<acc_t>(cls, i));
          if (kKeepExp) {
            exp_shifted.store(exps + cls * padded + i);
          }
        }
      }
      for (int j = 0; j < kCount; ++j) {
        total[j].sum_exp += part[j].sum_exp;
        total[j].sum_shifted += part[j].sum_shifted;
      }
    }
    for (int j = 0; j < kCount; ++j) {
      total[j].sum_exp.store(rows.sum_exp + row + j * V::kSize);
      total[j].sum_shifted.store(rows.sum_shifted + row + j * V::kSize);
    }
  }
};

// From exponentials (kFromExp) or logits in scratch to gradients: into the tensor, where its rows
// are neighbours (kToPlanes), or else in place.
template <typename scalar_t, typename acc_t, bool kFromExp, bool kToPlanes>
struct MakeGradients {
  using V = Vec<acc_t>;
  using IntV = IntVec<acc_t>;
  const TileRows<acc_t>& rows;
  acc_t* scratch;
  int64_t first_class;
  int64_t num_classes;
  TileView<scalar_t> grad;

  template <int kCount>
  OE_EXT_INLINE void run(int64_t row) const {
    // In most blocks every row counts, and the mask is an eighth of the work.
    Mask<acc_t> is_inactive = IntV::load(rows.label + row) == IntV::broadcast(kInactiveLane);
    for (int j = 1; j < kCount; ++j) {
      is_inactive = is_inactive |
                    (IntV::load(rows.label + row + j * V::kSize) == IntV::broadcast(kInactiveLane));
    }
    if (any_lane(is_inactive)) {
      run_block<kCount, true>(row);
    } else {
      run_block<kCount, false>(row);
    }
  }

 private:
  template <int kCount, bool kMasked>
  OE_EXT_INLINE void run_block(int64_t row) const {
    V max[kCount];
    V inverse_sum[kCount];
    V scale[kCount];
    V uniform[kCount];
    IntV label[kCount];
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = row + j * V::kSize;
      max[j] = V::load(rows.max + i);
      inverse_sum[j] = V::load(rows.inverse_sum + i);
      scale[j] = V::load(rows.scale + i);
      uniform[j] = V::load(rows.uniform + i);
      label[j] = IntV::load(rows.label + i);
    }
    // Copies: for all the compiler knows, the stores below change the members.
    const TileView<scalar_t> to = grad;
    acc_t* const from = scratch;
    const int64_t padded = rows.padded;
    const int64_t end = num_classes;
    const auto offset = static_cast<typename IntV::Lane>(first_class);
    for (int64_t k = 0; k < end; ++k) {
      const auto cls = IntV::broadcast(offset + static_cast<typename IntV::Lane>(k));
      for (int j = 0; j < kCount; ++j) {
        const int64_t i = row + j * V::kSize;
        acc_t* at = from + k * padded + i;
        const V stored = V::load(at);
        const V exp_shifted = kFromExp ? stored : exp(stored - max[j]);
        const V q = select(label[j] == cls, V(acc_t(1)), uniform[j]);
        V gradient = logit_gradient(exp_shifted, inverse_sum[j], q, scale[j]);
        if (kMasked) {
          gradient = zero_unless(label[j] != IntV::broadcast(kInactiveLane), gradient);
        }
        if (kToPlanes) {
          Packed<scalar_t, acc_t>::store(to.data + k * to.class_stride + i, gradient);
        } else {
          gradient.store(at);
        }
      }
    }
  }
};

template <bool kFromExp, typename scalar_t, typename acc_t>
void write_gradients(const TileRows<acc_t>& rows, acc_t* scratch, int64_t first_class,
                     int64_t num_classes, TileView<scalar_t> grad) {
  grad = grad.from_class(first_class);
  const MakeGradients<scalar_t, acc_t, kFromExp, false> in_scratch{rows, scratch, first_class,
                                                                   num_classes, grad};
  if (grad.row_stride != 1) {
    for_each_block<acc_t>(rows.padded, in_scratch);
    if (grad.class_stride == 1) {
      scatter_rows(grad, num_classes, rows, scratch);
    } else {
      scatter_by_element(grad, 0, num_classes, rows, scratch);
    }
    return;
  }
  for_each_block<acc_t>(rows.size, MakeGradients<scalar_t, acc_t, kFromExp, true>{
                                       rows, scratch, first_class, num_classes, grad});
  if (rows.size < rows.padded) {
    const int64_t last = rows.padded - Vec<acc_t>::kSize;
    in_scratch.template run<1>(last);
    scatter_by_element(grad, last, num_classes, rows, scratch);
  }
}

}  // namespace
}  // namespace oe_ext::cpu
