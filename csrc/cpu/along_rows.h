// Walks along the rows of a tile: a vector holds as many rows as it has lanes.
#pragma once

#include "finish_rows.h"
#include "scratch.h"

namespace oe_ext::cpu {
namespace {

// Runs walk.run<count>(row) for the rows of whole vectors, with count vectors at once.
template <typename acc_t, typename Walk>
void for_each_block(int64_t num_rows, Walk& walk) {
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

// Raises the maxima of a block of rows, and finds their logits at the label.
template <int kCount, typename source_t, typename acc_t>
OE_EXT_INLINE void raise_maxima(Planes<source_t> logits, int64_t first_class, int64_t num_classes,
                                int64_t row, const IntVec<acc_t> (&label)[kCount],
                                Vec<acc_t> (&max)[kCount], Vec<acc_t> (&at_label)[kCount]) {
  using Lane = typename IntVec<acc_t>::Lane;
  for (int64_t k = 0; k < num_classes; ++k) {
    const auto cls = IntVec<acc_t>::broadcast(static_cast<Lane>(first_class + k));
    for (int j = 0; j < kCount; ++j) {
      const auto x = logits.template load<acc_t>(k, row + j * Vec<acc_t>::kSize);
      max[j] = larger(x, max[j]);
      at_label[j] = select(label[j] == cls, x, at_label[j]);
    }
  }
}

// Adds classes to the sums of a block of rows whose maxima are known, in short chains of additions:
// the error of a sum grows with the longest. kKeepExp leaves the exponentials in `exps`
// ([class][row], `padded` a class), where the logits may stand.
template <bool kKeepExp, int kCount, typename source_t, typename acc_t>
OE_EXT_INLINE void add_classes(Planes<source_t> logits, int64_t num_classes, int64_t row,
                               acc_t* exps, int64_t padded, RowStats<Vec<acc_t>> (&total)[kCount]) {
  using V = Vec<acc_t>;
  for (int64_t begin = 0; begin < num_classes; begin += kClassBlock) {
    const int64_t end = std::min(begin + kClassBlock, num_classes);
    RowStats<V> part[kCount];
    for (int j = 0; j < kCount; ++j) {
      part[j] = RowStats<V>::below(total[j].max);
    }
    for (int64_t cls = begin; cls < end; ++cls) {
      V shifted[kCount];
      V exp_shifted[kCount];
      for (int j = 0; j < kCount; ++j) {
        exp_shifted[j] = shifted[j] =
            logits.template load<acc_t>(cls, row + j * V::kSize) - part[j].max;
      }
      exp_in_place(exp_shifted);
      for (int j = 0; j < kCount; ++j) {
        part[j].add_terms(shifted[j], exp_shifted[j]);
        if (kKeepExp) {
          exp_shifted[j].store(exps + cls * padded + row + j * V::kSize);
        }
      }
    }
    for (int j = 0; j < kCount; ++j) {
      total[j].sum_exp += part[j].sum_exp;
      total[j].sum_shifted += part[j].sum_shifted;
    }
  }
}

// Where the gradients of a tile go.
template <typename scalar_t, typename acc_t>
struct GradientPlanes {
  acc_t* scratch;  // [class][row]
  int64_t padded;
  TileView<scalar_t> tensor;
};

// From exponentials (kFromExp) or logits in scratch to the gradients of a block of rows: into the
// tensor, where its rows are neighbours (kToPlanes), or else in place.
template <bool kFromExp, bool kToPlanes, bool kMasked, int kCount, typename scalar_t,
          typename acc_t>
OE_EXT_INLINE void write_block(const GradientPlanes<scalar_t, acc_t>& planes, int64_t first_class,
                               int64_t num_classes, int64_t row, const acc_t* maxima,
                               const GradientLanes<acc_t> (&lanes)[kCount]) {
  using V = Vec<acc_t>;
  using IntV = IntVec<acc_t>;
  // A copy: for all the compiler knows, the stores below change the members.
  const GradientPlanes<scalar_t, acc_t> to = planes;
  for (int64_t k = 0; k < num_classes; ++k) {
    const auto cls = IntV::broadcast(static_cast<typename IntV::Lane>(first_class + k));
    acc_t* const at = to.scratch + k * to.padded + row;
    V exp_shifted[kCount];
    for (int j = 0; j < kCount; ++j) {
      exp_shifted[j] = V::load(at + j * V::kSize);
      if (!kFromExp) {
        exp_shifted[j] = exp_shifted[j] - V::load(maxima + row + j * V::kSize);
      }
    }
    if (!kFromExp) {
      exp_in_place(exp_shifted);
    }
    for (int j = 0; j < kCount; ++j) {
      const V q = select(lanes[j].label == cls, V(acc_t(1)), lanes[j].uniform);
      V gradient = logit_gradient(exp_shifted[j], lanes[j].inverse_sum, q, lanes[j].scale);
      if (kMasked) {
        gradient = zero_unless(lanes[j].label != IntV::broadcast(kInactiveLane), gradient);
      }
      if (kToPlanes) {
        Packed<scalar_t, acc_t>::store(
            to.tensor.data + k * to.tensor.class_stride + row + j * V::kSize, gradient);
      } else {
        gradient.store(at + j * V::kSize);
      }
    }
  }
}

// In most blocks every row counts, and the mask is an eighth of the work.
template <bool kFromExp, bool kToPlanes, int kCount, typename scalar_t, typename acc_t>
OE_EXT_INLINE void write_gradients_of(const GradientPlanes<scalar_t, acc_t>& planes,
                                      int64_t first_class, int64_t num_classes, int64_t row,
                                      const acc_t* maxima,
                                      const GradientLanes<acc_t> (&lanes)[kCount]) {
  const auto inactive = IntVec<acc_t>::broadcast(kInactiveLane);
  Mask<acc_t> is_inactive = lanes[0].label == inactive;
  for (int j = 1; j < kCount; ++j) {
    is_inactive = is_inactive | (lanes[j].label == inactive);
  }
  if (any_lane(is_inactive)) {
    write_block<kFromExp, kToPlanes, true>(planes, first_class, num_classes, row, maxima, lanes);
  } else {
    write_block<kFromExp, kToPlanes, false>(planes, first_class, num_classes, row, maxima, lanes);
  }
}

// ---- Tiles whose classes all fit in scratch: a block of rows goes through everything at once, and
// what is known of it stays in registers.

enum class GradientTo { kNowhere, kScratch, kPlanes };

template <GradientTo kTo, typename source_t, typename scalar_t, typename acc_t>
struct WalkAll {
  using V = Vec<acc_t>;
  const TileRows<acc_t>& rows;
  Planes<source_t> logits;
  int64_t num_classes;
  bool maxima_are_known;  // and with them the logits at the labels
  GradientPlanes<scalar_t, acc_t> gradients;
  RowFinisher<scalar_t, acc_t>& finisher;

  template <int kCount>
  OE_EXT_INLINE void run(int64_t row) {
    constexpr bool kGradient = kTo != GradientTo::kNowhere;
    V max[kCount];
    V at_label[kCount];
    if (maxima_are_known) {
      for (int j = 0; j < kCount; ++j) {
        max[j] = V::load(rows.max + row + j * V::kSize);
        at_label[j] = V::load(rows.at_label + row + j * V::kSize);
      }
    } else {
      IntVec<acc_t> label[kCount];
      for (int j = 0; j < kCount; ++j) {
        label[j] = IntVec<acc_t>::load(rows.label + row + j * V::kSize);
        max[j] = std::numeric_limits<acc_t>::lowest();
        at_label[j] = acc_t(0);
      }
      raise_maxima(logits, 0, num_classes, row, label, max, at_label);
    }
    RowStats<V> stats[kCount];
    for (int j = 0; j < kCount; ++j) {
      stats[j] = RowStats<V>::below(max[j]);
    }
    add_classes<kGradient>(logits, num_classes, row, gradients.scratch, gradients.padded, stats);
    GradientLanes<acc_t> lanes[kCount];
    for (int j = 0; j < kCount; ++j) {
      lanes[j] = finisher.finish(row + j * V::kSize, stats[j], at_label[j]);
    }
    if constexpr (kGradient) {
      write_gradients_of<true, kTo == GradientTo::kPlanes>(gradients, 0, num_classes, row, rows.max,
                                                           lanes);
    }
  }
};

// ---- Tiles with more classes than that: chunk by chunk, and what is known of the rows waits in
// memory.

template <typename source_t, typename acc_t>
struct RaiseMaxima {
  using V = Vec<acc_t>;
  TileRows<acc_t>& rows;
  Planes<source_t> logits;
  int64_t first_class;
  int64_t num_classes;

  template <int kCount>
  OE_EXT_INLINE void run(int64_t row) const {
    IntVec<acc_t> label[kCount];
    V max[kCount];
    V at_label[kCount];
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = row + j * V::kSize;
      label[j] = IntVec<acc_t>::load(rows.label + i);
      max[j] = V::load(rows.max + i);
      at_label[j] = V::load(rows.at_label + i);
    }
    raise_maxima(logits, first_class, num_classes, row, label, max, at_label);
    for (int j = 0; j < kCount; ++j) {
      max[j].store(rows.max + row + j * V::kSize);
      at_label[j].store(rows.at_label + row + j * V::kSize);
    }
  }
};

template <typename source_t, typename acc_t>
struct AddClasses {
  using V = Vec<acc_t>;
  TileRows<acc_t>& rows;
  Planes<source_t> logits;
  int64_t num_classes;

  template <int kCount>
  OE_EXT_INLINE void run(int64_t row) const {
    RowStats<V> total[kCount];
    for (int j = 0; j < kCount; ++j) {
      total[j].max = V::load(rows.max + row + j * V::kSize);
      total[j].sum_exp = V::load(rows.sum_exp + row + j * V::kSize);
      total[j].sum_shifted = V::load(rows.sum_shifted + row + j * V::kSize);
    }
    add_classes<false>(logits, num_classes, row, static_cast<acc_t*>(nullptr), 0, total);
    for (int j = 0; j < kCount; ++j) {
      total[j].sum_exp.store(rows.sum_exp + row + j * V::kSize);
      total[j].sum_shifted.store(rows.sum_shifted + row + j * V::kSize);
    }
  }
};

// From logits in scratch to gradients.
template <bool kToPlanes, typename scalar_t, typename acc_t>
struct MakeGradients {
  using V = Vec<acc_t>;
  const TileRows<acc_t>& rows;
  int64_t first_class;
  int64_t num_classes;
  GradientPlanes<scalar_t, acc_t> gradients;

  template <int kCount>
  OE_EXT_INLINE void run(int64_t row) const {
    GradientLanes<acc_t> lanes[kCount];
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = row + j * V::kSize;
      lanes[j].inverse_sum = V::load(rows.inverse_sum + i);
      lanes[j].scale = V::load(rows.scale + i);
      lanes[j].uniform = V::load(rows.uniform + i);
      lanes[j].label = IntVec<acc_t>::load(rows.label + i);
    }
    write_gradients_of<false, kToPlanes>(gradients, first_class, num_classes, row, rows.max, lanes);
  }
};

// ---- Gradients that cannot go from a register into the tensor

// Runs the walk that writes gradients into the tensor over whole vectors of rows, the one that
// leaves them in scratch over the rest, or over all; and takes those to the tensor.
template <typename scalar_t, typename acc_t, typename ToPlanes, typename InScratch>
void walk_to_tensor(const TileRows<acc_t>& rows, int64_t num_classes,
                    const GradientPlanes<scalar_t, acc_t>& gradients, ToPlanes to_planes,
                    InScratch in_scratch) {
  const TileView<scalar_t> grad = gradients.tensor;
  if (grad.row_stride != 1) {
    for_each_block<acc_t>(rows.padded, in_scratch);
    if (grad.class_stride == 1) {
      scatter_rows(grad, num_classes, rows, gradients.scratch);
    } else {
      scatter_by_element(grad, 0, num_classes, rows, gradients.scratch);
    }
    return;
  }
  for_each_block<acc_t>(rows.size, to_planes);
  if (rows.size < rows.padded) {
    const int64_t last = rows.padded - Vec<acc_t>::kSize;
    in_scratch.template run<1>(last);
    scatter_by_element(grad, last, num_classes, rows, gradients.scratch);
  }
}

// From logits in scratch to gradients in the tensor.
template <typename scalar_t, typename acc_t>
void write_gradients(const TileRows<acc_t>& rows, acc_t* scratch, int64_t first_class,
                     int64_t num_classes, const TileView<scalar_t>& grad) {
  const GradientPlanes<scalar_t, acc_t> gradients{scratch, rows.padded,
                                                  grad.from_class(first_class)};
  walk_to_tensor(rows, num_classes, gradients,
                 MakeGradients<true, scalar_t, acc_t>{rows, first_class, num_classes, gradients},
                 MakeGradients<false, scalar_t, acc_t>{rows, first_class, num_classes, gradients});
}

}  // namespace
}  // namespace oe_ext::cpu
