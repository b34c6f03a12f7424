// The kernels of one tile, for the instruction set of the file that includes this.
//
// Contiguous rows of many classes are walked one by one, along the classes ("long rows"). All
// others are walked along the rows. The forward reads pixels where they stand; whatever else comes
// (channels_last, few classes, any strides), and all that the backward reads, is laid out in
// scratch memory as [class][row] first, in the type of the arithmetic. Either way a tile is read
// from memory once, and its exponentials are computed once: they wait in cache for the sum that
// they are divided by. Only classes that do not fit (chunk_classes) are read again.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace oe_ext::cpu {
namespace {

// Labels in lanes: a class, or one of these.
constexpr int kOutlierLane = -1;
constexpr int kInactiveLane = -2;  // ignored, or of no weight, or no row at all

// What is known of each row of a tile. Beyond its rows, up to a whole vector, stand inactive ones.
template <typename acc_t>
struct TileRows {
  using Lane = typename IntegerOf<acc_t>::type;

  int64_t first = 0;   // index of the first row
  int64_t size = 0;    // rows
  int64_t padded = 0;  // rows and inactive ones
  alignas(64) Lane label[kMaxTileRows];
  alignas(64) acc_t max[kMaxTileRows];
  alignas(64) acc_t sum_exp[kMaxTileRows];
  alignas(64) acc_t sum_shifted[kMaxTileRows];
  alignas(64) acc_t at_label[kMaxTileRows];      // the logit
  alignas(64) acc_t exp_at_label[kMaxTileRows];  // exp(logit - max)
  alignas(64) acc_t inverse_sum[kMaxTileRows];
  alignas(64) acc_t scale[kMaxTileRows];
  alignas(64) acc_t uniform[kMaxTileRows];
};

// The logits of a tile, or their gradients.
template <typename T>
struct TileView {
  T* data;
  int64_t row_stride;
  int64_t class_stride;

  TileView(T* tensor, const RowLayout& layout, int64_t first_row)
      : data(tensor + layout.row_offset(first_row)),
        row_stride(layout.inner_stride),
        class_stride(layout.class_stride) {}

  TileView from_class(int64_t cls) const {
    TileView view = *this;
    view.data += cls * class_stride;
    return view;
  }
};

// ---- Labels

// Calls f(labels) with a pointer of the labels' type.
#define OE_EXT_WITH_LABELS(labels, f, ...)                               \
  switch ((labels).type) {                                               \
    case LabelType::kInt32:                                              \
      return f(static_cast<const int32_t*>((labels).data), __VA_ARGS__); \
    case LabelType::kInt16:                                              \
      return f(static_cast<const int16_t*>((labels).data), __VA_ARGS__); \
    case LabelType::kInt8:                                               \
      return f(static_cast<const int8_t*>((labels).data), __VA_ARGS__);  \
    case LabelType::kUInt8:                                              \
      return f(static_cast<const uint8_t*>((labels).data), __VA_ARGS__); \
    default:                                                             \
      return f(static_cast<const int64_t*>((labels).data), __VA_ARGS__); \
  }

template <typename Label>
int64_t first_bad_row(const Label* labels, const LabelRule& rule, int64_t begin, int64_t end) {
  while (begin < end && rule.kind(labels[begin]) != RowKind::kInvalid) {
    ++begin;
  }
  return begin < end ? begin : -1;
}

// What was counted in the rows [begin, end), and the first illegal label where the kinds do not add
// up.
template <typename Label>
TaskResult counted(const Label* labels, const LabelRule& rule, int64_t begin, int64_t end,
                   int64_t inliers, int64_t outliers, int64_t ignored) {
  TaskResult result;
  result.sums.counts.inliers = inliers;
  result.sums.counts.outliers = outliers;
  const bool all_legal = inliers + outliers + ignored == end - begin;
  result.bad_row = all_legal ? -1 : first_bad_row(labels, rule, begin, end);
  return result;
}

// Fills the lanes of the labels. Returns how many rows count, or the first with an illegal label.
template <typename Label, typename acc_t>
TaskResult read_labels_of(const Label* labels, const LabelRule& rule_of_labels,
                          TileRows<acc_t>& rows) {
  using Lane = typename TileRows<acc_t>::Lane;
  const LabelRule rule = rule_of_labels;
  const int64_t size = rows.size;
  // Two simple loops, in integers: GCC vectorises either, but neither both in one nor a choice.
  int64_t wide[kMaxTileRows];
  int64_t inliers = 0;
  int64_t outliers = 0;
  int64_t num_ignored = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t label = labels[rows.first + i];
    const int64_t inlier = rule.is_inlier(label);
    const int64_t outlier = rule.is_outlier(label);
    const int64_t ignored = rule.is_ignored(label);
    static_assert(kOutlierLane == kInactiveLane + 1);
    wide[i] = (label & -inlier) | ((kInactiveLane + outlier) & (inlier - 1));
    inliers += inlier;
    outliers += outlier;
    num_ignored += ignored;
  }
  constexpr int64_t kLargest = std::numeric_limits<Lane>::max();
  for (int64_t i = 0; i < size; ++i) {
    rows.label[i] = static_cast<Lane>(wide[i] < kLargest ? wide[i] : kLargest);
  }
  for (int64_t i = rows.size; i < rows.padded; ++i) {
    rows.label[i] = kInactiveLane;
  }
  return counted(labels, rule, rows.first, rows.first + size, inliers, outliers, num_ignored);
}

template <typename acc_t>
TaskResult read_labels(const Labels& labels, TileRows<acc_t>& rows) {
  OE_EXT_WITH_LABELS(labels, read_labels_of, labels.rule, rows);
}

template <typename Label>
TaskResult count_rows_of(const Label* labels, const LabelRule& rule_of_labels, int64_t begin,
                         int64_t end) {
  const LabelRule rule = rule_of_labels;
  int64_t inliers = 0;
  int64_t outliers = 0;
  int64_t ignored = 0;
  for (int64_t row = begin; row < end; ++row) {
    inliers += rule.is_inlier(labels[row]);
    outliers += rule.is_outlier(labels[row]);
    ignored += rule.is_ignored(labels[row]);
  }
  return counted(labels, rule, begin, end, inliers, outliers, ignored);
}

TaskResult count_rows(const Labels& labels, int64_t begin, int64_t end) {
  OE_EXT_WITH_LABELS(labels, count_rows_of, labels.rule, begin, end);
}
#undef OE_EXT_WITH_LABELS

// ---- Tiles in scratch memory, [class][row], rows.padded elements a class

// Contiguous rows to [class][row].
template <typename scalar_t, typename acc_t>
void gather_rows(TileView<const scalar_t> logits, int64_t num_classes, const TileRows<acc_t>& rows,
                 acc_t* scratch) {
  using V = Vec<acc_t>;
  const int64_t end_of_tile = (rows.size - 1) * logits.row_stride + num_classes;
  for (int64_t row = 0; row < rows.padded; row += V::kSize) {
    for (int64_t begin = 0; begin < num_classes; begin += V::kSize) {
      // The last square of a row overlaps the one before.
      const int64_t cls = std::max<int64_t>(0, std::min(begin, num_classes - V::kSize));
      V square[V::kSize];
      for (int64_t j = 0; j < V::kSize; ++j) {
        const int64_t offset = std::min(row + j, rows.size - 1) * logits.row_stride + cls;
        square[j] = offset + V::kSize <= end_of_tile
                        ? Packed<scalar_t, acc_t>::load(logits.data + offset)
                        : load_part<acc_t>(logits.data + offset, num_classes - cls);
      }
      transpose(square);
      const int64_t width = std::min<int64_t>(V::kSize, num_classes - cls);
      acc_t* column = scratch + cls * rows.padded + row;
      for (int64_t k = 0; k < width; ++k) {
        square[k].store(column + k * rows.padded);
      }
    }
  }
}

// The way back.
template <typename scalar_t, typename acc_t>
void scatter_rows(TileView<scalar_t> grad, int64_t num_classes, const TileRows<acc_t>& rows,
                  const acc_t* scratch) {
  using V = Vec<acc_t>;
  // A row that is narrower than a vector is written over into the next, which comes later.
  const bool dense = grad.row_stride == num_classes;
  const int64_t end_of_tile = rows.size * grad.row_stride;
  for (int64_t row = 0; row < rows.padded; row += V::kSize) {
    for (int64_t begin = 0; begin < num_classes; begin += V::kSize) {
      const int64_t cls = std::max<int64_t>(0, std::min(begin, num_classes - V::kSize));
      const int64_t width = std::min<int64_t>(V::kSize, num_classes - cls);
      const acc_t* column = scratch + cls * rows.padded + row;
      V square[V::kSize];
      for (int64_t k = 0; k < V::kSize; ++k) {
        square[k] = V::load(column + std::min(k, width - 1) * rows.padded);
      }
      transpose(square);
      for (int64_t j = 0; j < V::kSize && row + j < rows.size; ++j) {
        const int64_t offset = (row + j) * grad.row_stride + cls;
        if (width == V::kSize || (dense && offset + V::kSize <= end_of_tile)) {
          Packed<scalar_t, acc_t>::store(grad.data + offset, square[j]);
        } else {
          store_part(grad.data + offset, square[j], width);
        }
      }
    }
  }
}

template <typename scalar_t, typename acc_t>
void gather(TileView<const scalar_t> logits, int64_t num_classes, const TileRows<acc_t>& rows,
            acc_t* scratch) {
  using V = Vec<acc_t>;
  if (logits.class_stride == 1 && logits.row_stride != 1) {
    gather_rows(logits, num_classes, rows, scratch);
    return;
  }
  for (int64_t cls = 0; cls < num_classes; ++cls) {
    const scalar_t* plane = logits.data + cls * logits.class_stride;
    acc_t* column = scratch + cls * rows.padded;
    int64_t i = 0;
    if (logits.row_stride == 1) {
      for (; i + V::kSize <= rows.size; i += V::kSize) {
        Packed<scalar_t, acc_t>::load(plane + i).store(column + i);
      }
    }
    for (; i < rows.size; ++i) {
      column[i] = static_cast<acc_t>(plane[i * logits.row_stride]);
    }
    for (; i < rows.padded; ++i) {
      column[i] = 0;
    }
  }
}

// The rows from first_row on.
template <typename scalar_t, typename acc_t>
void scatter_by_element(TileView<scalar_t> grad, int64_t first_row, int64_t num_classes,
                        const TileRows<acc_t>& rows, const acc_t* scratch) {
  for (int64_t cls = 0; cls < num_classes; ++cls) {
    for (int64_t i = first_row; i < rows.size; ++i) {
      grad.data[cls * grad.class_stride + i * grad.row_stride] =
          static_cast<scalar_t>(scratch[cls * rows.padded + i]);
    }
  }
}

// ---- Walks along the rows of a tile in scratch memory

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
        const V x = logits.template load<acc_t>(k, row + j * V::kSize);
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
          const V exp_shifted = part[j].add(logits.template load<acc_t>(cls, i));
          if (kKeepExp) {
            exp_shifted.store(scratch + cls * padded + i);
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
    V max[kCount];
    V inverse_sum[kCount];
    V scale[kCount];
    V uniform[kCount];
    IntV label[kCount];
    Mask<acc_t> is_active[kCount];
    for (int j = 0; j < kCount; ++j) {
      const int64_t i = row + j * V::kSize;
      max[j] = V::load(rows.max + i);
      inverse_sum[j] = V::load(rows.inverse_sum + i);
      scale[j] = V::load(rows.scale + i);
      uniform[j] = V::load(rows.uniform + i);
      label[j] = IntV::load(rows.label + i);
      is_active[j] = label[j] != IntV::broadcast(kInactiveLane);
    }
    const int64_t padded = rows.padded;
    for (int64_t k = 0; k < num_classes; ++k) {
      const auto cls = IntV::broadcast(static_cast<typename IntV::Lane>(first_class + k));
      for (int j = 0; j < kCount; ++j) {
        const int64_t i = row + j * V::kSize;
        acc_t* at = scratch + k * padded + i;
        const V stored = V::load(at);
        const V exp_shifted = kFromExp ? stored : exp(stored - max[j]);
        const V q = select(label[j] == cls, V(acc_t(1)), uniform[j]);
        const V gradient =
            zero_unless(is_active[j], logit_gradient(exp_shifted, inverse_sum[j], q, scale[j]));
        if (kToPlanes) {
          Packed<scalar_t, acc_t>::store(grad.data + k * grad.class_stride + i, gradient);
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

// ---- Walks along one long row

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

// ---- The rows of a tile, once their sums are known

// Sums of lanes, in double.
template <typename acc_t>
struct LaneSums {
  static constexpr int kParts = sizeof(double) / sizeof(acc_t);
  typedef acc_t Part __attribute__((vector_size(kVectorBytes / kParts)));
  Vec<double> parts[kParts];

  LaneSums() {
    for (Vec<double>& part : parts) {
      part = Vec<double>(0.0);
    }
  }
  OE_EXT_INLINE void add(Vec<acc_t> x) {
    Part halves[kParts];
    __builtin_memcpy(halves, &x, sizeof(x));
    for (int i = 0; i < kParts; ++i) {
      parts[i] += Vec<double>(__builtin_convertvector(halves[i], Vec<double>::Raw));
    }
  }
  double sum() const {
    double total = 0;
    for (const Vec<double>& part : parts) {
      total += sum_of_lanes(part);
    }
    return total;
  }
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

// Writes the outputs of the rows, adds their losses, and readies what their gradients need. As
// ForwardArgs::write_row and row_gradient, for many rows at once.
template <typename scalar_t, typename acc_t>
void finish_rows(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling, GroupCounts counts,
                 TileRows<acc_t>& rows, GroupSums& sums) {
  using V = Vec<acc_t>;
  using IntV = IntVec<acc_t>;
  const V zero = acc_t(0);
  const V num_classes = static_cast<acc_t>(args.layout.num_classes);
  const V inlier_divisor =
      static_cast<acc_t>(reduction_divisor(args.reduction, RowKind::kInlier, counts));
  const V outlier_divisor =
      static_cast<acc_t>(reduction_divisor(args.reduction, RowKind::kOutlier, counts));
  LaneSums<acc_t> inliers;
  LaneSums<acc_t> outliers;
  for (int64_t i = 0; i < rows.padded; i += V::kSize) {
    const IntV label = IntV::load(rows.label + i);
    const Mask<acc_t> is_inlier = label >= IntV::broadcast(0);
    const Mask<acc_t> is_outlier = label == IntV::broadcast(kOutlierLane);
    V alpha = args.alpha.value;
    if (args.alpha.values.data != nullptr) {
      acc_t lanes[V::kSize];
      for (int64_t j = 0; j < V::kSize; ++j) {
        lanes[j] = args.alpha.values[rows.first + std::min(i + j, rows.size - 1)];
      }
      alpha = V::load(lanes);
    }
    const V weight = select(is_inlier, V(acc_t(1)), select(is_outlier, alpha, zero));
    const Mask<acc_t> counts_for_loss = weight != zero;
    const Mask<acc_t> is_active =
        args.row_cross_entropy != nullptr ? counts_for_loss | is_outlier : counts_for_loss;

    RowStats<V> stats;
    stats.max = V::load(rows.max + i);
    stats.sum_exp = V::load(rows.sum_exp + i);
    stats.sum_shifted = V::load(rows.sum_shifted + i);
    stats.count = num_classes;
    const V at_label = V::load(rows.at_label + i);
    const V cross_entropy = select(
        is_active,
        select(is_inlier, inlier_cross_entropy(stats, at_label), outlier_cross_entropy(stats)),
        zero);
    const V loss = select(counts_for_loss, weight * cross_entropy, zero);
    inliers.add(select(is_inlier, loss, zero));
    outliers.add(select(is_inlier, zero, loss));
    store_rows(args.row_loss, rows, i, loss);
    store_rows(args.row_cross_entropy, rows, i, cross_entropy);
    store_rows(args.row_max, rows, i, select(is_active, stats.max, zero));
    store_rows(args.row_sum_exp, rows, i, select(is_active, stats.sum_exp, zero));

    if (args.grad_logits != nullptr) {
      select(counts_for_loss, label, IntV::broadcast(kInactiveLane)).store(rows.label + i);
      if (tiling.long_rows) {
        exp(at_label - stats.max).store(rows.exp_at_label + i);
      }
      (V(acc_t(1)) / stats.sum_exp).store(rows.inverse_sum + i);
      (weight / select(is_outlier, outlier_divisor, inlier_divisor)).store(rows.scale + i);
      select(is_outlier, V(acc_t(1)) / num_classes, zero).store(rows.uniform + i);
    }
  }
  sums.inliers = inliers.sum();
  sums.outliers = outliers.sum();
}

// ---- Tiles

template <typename acc_t>
void begin_tile(const Tiling& tiling, int64_t tile, TileRows<acc_t>& rows) {
  constexpr int64_t kSize = Vec<acc_t>::kSize;
  rows.first = tiling.begin(tile);
  rows.size = tiling.size(tile);
  rows.padded = (rows.size + kSize - 1) / kSize * kSize;
}

template <typename acc_t>
void clear_sums(TileRows<acc_t>& rows) {
  for (int64_t i = 0; i < rows.padded; ++i) {
    rows.max[i] = std::numeric_limits<acc_t>::lowest();
    rows.sum_exp[i] = 0;
    rows.sum_shifted[i] = 0;
    rows.at_label[i] = 0;
  }
}

// A row whose logits may not be looked at, or need not be.
template <typename scalar_t, typename acc_t>
bool reads_row(const ForwardArgs<scalar_t, acc_t>& args, const TileRows<acc_t>& rows, int64_t i) {
  return rows.label[i] >= 0 ||
         (rows.label[i] == kOutlierLane && args.is_active(rows.first + i, RowKind::kOutlier));
}

template <typename scalar_t, typename acc_t>
void forward_long_rows(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                       GroupCounts counts, acc_t* scratch, TileRows<acc_t>& rows, GroupSums& sums) {
  const int64_t num_classes = args.layout.num_classes;
  const TileView<const scalar_t> logits(args.logits, args.layout, rows.first);
  // The exponentials wait where the gradients will be, if that has their type, or in scratch.
  acc_t* exps = nullptr;
  int64_t exps_stride = num_classes;
  if (args.grad_logits != nullptr) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      exps = args.grad_logits + args.grad_layout.row_offset(rows.first);
      exps_stride = args.grad_layout.inner_stride;
    } else if (tiling.chunk_classes > 0) {
      exps = scratch;
    }
  }
  for (int64_t i = 0; i < rows.size; ++i) {
    if (!reads_row(args, rows, i)) {
      continue;
    }
    const scalar_t* row = logits.data + i * logits.row_stride;
    rows.max[i] = max_of_row<scalar_t, acc_t>(row, num_classes);
    if (exps != nullptr) {
      add_row<true>(row, num_classes, exps + i * exps_stride, i, rows);
    } else {
      add_row<false>(row, num_classes, exps, i, rows);
    }
    if (rows.label[i] >= 0) {
      rows.at_label[i] = static_cast<acc_t>(row[args.labels[rows.first + i]]);
    }
  }
  finish_rows(args, tiling, counts, rows, sums);
  if (args.grad_logits == nullptr) {
    return;
  }
  const TileView<scalar_t> grad(args.grad_logits, args.grad_layout, rows.first);
  for (int64_t i = 0; i < rows.size; ++i) {
    scalar_t* row = grad.data + i * grad.row_stride;
    if (exps != nullptr) {
      write_row_gradient<true>(exps + i * exps_stride, row, num_classes, i, rows);
    } else {
      write_row_gradient<false>(logits.data + i * logits.row_stride, row, num_classes, i, rows);
    }
    if (rows.label[i] >= 0) {
      row[args.labels[rows.first + i]] = static_cast<scalar_t>(
          logit_gradient(rows.exp_at_label[i], rows.inverse_sum[i], acc_t(1), rows.scale[i]));
    }
  }
}

// The maxima and the sums of a tile whose logits planes(first class, number of classes) brings.
// Where all fit in scratch, their exponentials are left there, if a gradient needs them.
template <typename scalar_t, typename acc_t, typename MakePlanes>
void add_tile(const ForwardArgs<scalar_t, acc_t>& args, int64_t chunk, const MakePlanes& planes,
              acc_t* scratch, TileRows<acc_t>& rows) {
  using source_t = typename MakePlanes::Source;
  const int64_t num_classes = args.layout.num_classes;
  for (int64_t cls = 0; cls < num_classes; cls += chunk) {
    const int64_t size = std::min(chunk, num_classes - cls);
    for_each_block<acc_t>(rows.padded,
                          RaiseMaxima<source_t, acc_t>{rows, planes(cls, size), cls, size});
  }
  const bool keep_exp = chunk == num_classes && args.grad_logits != nullptr;
  for (int64_t cls = 0; cls < num_classes; cls += chunk) {
    const int64_t size = std::min(chunk, num_classes - cls);
    const Planes<source_t> source = chunk == num_classes ? planes.again() : planes(cls, size);
    if (keep_exp) {
      for_each_block<acc_t>(rows.padded,
                            AddClasses<source_t, acc_t, true>{rows, source, scratch, size});
    } else {
      for_each_block<acc_t>(rows.padded,
                            AddClasses<source_t, acc_t, false>{rows, source, scratch, size});
    }
  }
}

// Logits where they stand.
template <typename scalar_t>
struct PlanesOfTensor {
  using Source = scalar_t;
  TileView<const scalar_t> logits;

  Planes<Source> operator()(int64_t first_class, int64_t) const {
    return {logits.from_class(first_class).data, logits.class_stride};
  }
  Planes<Source> again() const { return (*this)(0, 0); }
};

// Logits that are brought to scratch.
template <typename scalar_t, typename acc_t>
struct PlanesInScratch {
  using Source = acc_t;
  TileView<const scalar_t> logits;
  const TileRows<acc_t>& rows;
  acc_t* scratch;

  Planes<Source> operator()(int64_t first_class, int64_t num_classes) const {
    gather(logits.from_class(first_class), num_classes, rows, scratch);
    return again();
  }
  Planes<Source> again() const { return {scratch, rows.padded}; }
};

template <typename scalar_t, typename acc_t>
void forward_along_rows(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                        GroupCounts counts, acc_t* scratch, TileRows<acc_t>& rows,
                        GroupSums& sums) {
  const int64_t num_classes = args.layout.num_classes;
  const int64_t chunk = tiling.chunk_classes;
  const TileView<const scalar_t> logits(args.logits, args.layout, rows.first);
  if (logits.row_stride == 1 && rows.size == rows.padded) {
    add_tile(args, chunk, PlanesOfTensor<scalar_t>{logits}, scratch, rows);
  } else {
    add_tile(args, chunk, PlanesInScratch<scalar_t, acc_t>{logits, rows, scratch}, scratch, rows);
  }
  finish_rows(args, tiling, counts, rows, sums);
  if (args.grad_logits == nullptr) {
    return;
  }
  const TileView<scalar_t> grad(args.grad_logits, args.grad_layout, rows.first);
  for (int64_t cls = 0; cls < num_classes; cls += chunk) {
    const int64_t size = std::min(chunk, num_classes - cls);
    if (chunk == num_classes) {
      write_gradients<true>(rows, scratch, cls, size, grad);
    } else {
      gather(logits.from_class(cls), size, rows, scratch);
      write_gradients<false>(rows, scratch, cls, size, grad);
    }
  }
}

template <typename scalar_t, typename acc_t>
TaskResult forward_tile(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                        int64_t tile, GroupCounts counts, acc_t* scratch) {
  TileRows<acc_t> rows;
  begin_tile(tiling, tile, rows);
  TaskResult result = read_labels(args.labels, rows);
  if (result.bad_row >= 0) {
    return result;
  }
  clear_sums(rows);
  if (tiling.long_rows) {
    forward_long_rows(args, tiling, counts, scratch, rows, result.sums);
  } else {
    forward_along_rows(args, tiling, counts, scratch, rows, result.sums);
  }
  return result;
}

template <typename scalar_t, typename acc_t>
TaskResult backward_tile(const BackwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                         int64_t tile, acc_t* scratch) {
  TileRows<acc_t> rows;
  begin_tile(tiling, tile, rows);
  TaskResult result = read_labels(args.labels, rows);
  if (result.bad_row >= 0) {
    return result;
  }
  for (int64_t i = 0; i < rows.padded; ++i) {
    RowGradient<acc_t> gradient;
    if (rows.label[i] != kInactiveLane) {
      const RowKind kind = rows.label[i] >= 0 ? RowKind::kInlier : RowKind::kOutlier;
      gradient = args.row_gradient(rows.first + i, rows.label[i], kind);
    }
    rows.max[i] = gradient.max;
    rows.inverse_sum[i] = gradient.inverse_sum;
    rows.scale[i] = gradient.scale;
    rows.uniform[i] = gradient.uniform;
    rows.label[i] = gradient.active ? rows.label[i] : kInactiveLane;
  }

  const int64_t num_classes = args.layout.num_classes;
  const TileView<const scalar_t> logits(args.logits, args.layout, rows.first);
  const TileView<scalar_t> grad(args.grad_logits, args.grad_layout, rows.first);
  if (!tiling.long_rows) {
    for (int64_t cls = 0; cls < num_classes; cls += tiling.chunk_classes) {
      const int64_t size = std::min(tiling.chunk_classes, num_classes - cls);
      gather(logits.from_class(cls), size, rows, scratch);
      write_gradients<false>(rows, scratch, cls, size, grad);
    }
    return result;
  }
  for (int64_t i = 0; i < rows.size; ++i) {
    const scalar_t* row = logits.data + i * logits.row_stride;
    scalar_t* grad_row = grad.data + i * grad.row_stride;
    write_row_gradient<false>(row, grad_row, num_classes, i, rows);
    if (rows.label[i] >= 0) {
      const int64_t label = args.labels[rows.first + i];
      const Vec<acc_t> shifted = static_cast<acc_t>(row[label]) - rows.max[i];
      acc_t lanes[Vec<acc_t>::kSize];
      exp(shifted).store(lanes);
      grad_row[label] = static_cast<scalar_t>(
          logit_gradient(lanes[0], rows.inverse_sum[i], acc_t(1), rows.scale[i]));
    }
  }
  return result;
}

template <typename scalar_t, typename acc_t>
constexpr TileKernels<scalar_t, acc_t> tile_kernels() {
  return {&forward_tile<scalar_t, acc_t>, &backward_tile<scalar_t, acc_t>};
}

constexpr Kernels make_kernels() {
  return {&count_rows, tile_kernels<float, float>(), tile_kernels<double, double>(),
          tile_kernels<c10::Half, float>(), tile_kernels<c10::BFloat16, float>()};
}

}  // namespace
}  // namespace oe_ext::cpu
