// The kernels for long rows, whose classes are neighbours in memory. They process one row at a
// time.
#pragma once

#include "finish_rows.h"
#include "tile_memory.h"

namespace oe_ext::cpu {
namespace {

// Each sum over a row runs in kLanes lanes, folded at the end: as many as the widest vector has, or
// several vectors. A step of a maximum waits only for the step before, so maxima run in kMaxLanes
// lanes: in 16 lanes, (384, 1000) float32 takes 1.05 times as long with AVX-512. No block of a row
// is shorter. Its last step overlaps the step before.
constexpr int kLanes = 16;
constexpr int kMaxLanes = 32;
static_assert(kMinLongRow >= kMaxLanes);

// Calls use(begin, size) for each block of a row.
template <typename Use>
OE_EXT_INLINE void for_each_block(int64_t num_classes, const Use& use) {
  int64_t size = 0;
  for (int64_t begin = 0; begin < num_classes; begin += size) {
    const int64_t rest = num_classes - begin;
    size = rest <= kRowBlock ? rest : kRowBlock - kMaxLanes;
    use(begin, size);
  }
}

// A block's logits in the type of the arithmetic: in place, or widened into a buffer. (If they were
// widened in steps of kLanes, their loads would wait for stores that are still under way.)
template <typename scalar_t, typename acc_t>
OE_EXT_INLINE const acc_t* widened(const scalar_t* logits, int64_t size, acc_t* buffer) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    return logits;
  } else {
    widen(logits, size, buffer);
    return buffer;
  }
}

template <int kSize, typename acc_t, typename Merge>
OE_EXT_INLINE acc_t fold(acc_t (&lanes)[kSize], const Merge& merge) {
#pragma GCC unroll 8
  for (int width = kSize / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) {
      lanes[j] = merge(lanes[j], lanes[j + width]);
    }
  }
  return lanes[0];
}

// The largest make(logit), of type T.
template <typename T, typename scalar_t, typename Make>
OE_EXT_INLINE T max_of(const scalar_t* logits, int64_t size, const Make& make) {
  T lanes[kMaxLanes];
  std::fill_n(lanes, kMaxLanes, std::numeric_limits<T>::lowest());
  const auto raise = [&](const scalar_t* part) {
#pragma omp simd
    for (int j = 0; j < kMaxLanes; ++j) {
      const T x = make(part[j]);
      lanes[j] = x > lanes[j] ? x : lanes[j];
    }
  };
  for (int64_t i = 0; i + kMaxLanes <= size; i += kMaxLanes) {
    raise(logits + i);
  }
  raise(logits + size - kMaxLanes);
  return fold(lanes, [](T a, T b) { return b > a ? b : a; });
}

// The largest logit. A NaN is either skipped or the result.
template <typename scalar_t>
OE_EXT_INLINE auto max_logit(const scalar_t* logits, int64_t size) {
  if constexpr (sizeof(scalar_t) == 2) {
    // Integers in the order of the numbers; they are cheaper to get than floats.
    const auto ordered = [](int16_t bits) { return int16_t(bits ^ ((bits >> 15) & 0x7fff)); };
    const int16_t max =
        max_of<int16_t>(logits, size, [&](scalar_t x) { return ordered(int16_t(x.x)); });
    return to_float(scalar_t(uint16_t(ordered(max)), scalar_t::from_bits()));
  } else {
    return max_of<scalar_t>(logits, size, [](scalar_t x) { return x; });
  }
}

// The sum of (x - shift), each times its spread if kSpread.
template <bool kSpread = false, typename acc_t>
OE_EXT_INLINE acc_t sum_of(const acc_t* x, int64_t size, acc_t shift,
                           const acc_t* spread = nullptr) {
  acc_t lanes[kLanes] = {};
  for (int64_t i = 0; i + kLanes <= size; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] += (kSpread ? spread[i + j] : acc_t(1)) * (x[i + j] - shift);
    }
  }
  const int64_t last = size - kLanes;
  const int first = kLanes - static_cast<int>(size % kLanes);  // lane not yet summed
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    const acc_t term = (kSpread ? spread[last + j] : acc_t(1)) * (x[last + j] - shift);
    lanes[j] += select(j >= first, term, acc_t(0));
  }
  return fold(lanes, [](acc_t a, acc_t b) { return a + b; });
}

// Writes exp(x - max) of kCount logits, and adds those from lane `first` on to `lanes`.
template <int kCount, typename acc_t>
OE_EXT_INLINE void add_exponentials(const acc_t* __restrict x, acc_t max, acc_t* __restrict exps,
                                    int first, acc_t* __restrict lanes) {
#pragma omp simd
  for (int j = 0; j < kCount; ++j) {
    const acc_t exp_shifted = exp_of(x[j] - max);
    exps[j] = exp_shifted;
    lanes[j] += first == 0 ? exp_shifted : select(j >= first, exp_shifted, acc_t(0));
  }
}

// Writes exp(x - max), and returns their sum. Prefetches the logits and the memory that come next:
// the processor's own prefetching stops at the end of a page, which may be one row. (Without
// prefetching, (384, 1000) and (64, 32000) float32 take 1.04 to 1.14 times as long.)
template <typename acc_t, typename scalar_t>
OE_EXT_INLINE acc_t add_exponentials(const acc_t* x, int64_t size, acc_t max, acc_t* exps,
                                     const scalar_t* next_logits, const acc_t* next_exps) {
  acc_t lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    __builtin_prefetch(next_logits + i);
    __builtin_prefetch(next_exps + i, /*rw=*/1);
    add_exponentials<kLanes>(x + i, max, exps + i, 0, lanes);
  }
  if (i + kLanes / 2 <= size) {
    add_exponentials<kLanes / 2>(x + i, max, exps + i, 0, lanes);
    i += kLanes / 2;
  }
  if (i < size) {
    const int64_t last = size - kLanes / 2;
    add_exponentials<kLanes / 2>(x + last, max, exps + last, static_cast<int>(i - last), lanes);
  }
  return fold(lanes, [](acc_t a, acc_t b) { return a + b; });
}

// Gradients from exponentials, or from logits. Input and output may be the same memory.
template <typename acc_t>
OE_EXT_INLINE void gradients_from_exps(const acc_t* exps, int64_t size, acc_t factor, acc_t offset,
                                       acc_t* grad) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    grad[i] = multiply_add(exps[i], factor, -offset);
  }
}

template <typename acc_t>
OE_EXT_INLINE void gradients_from_logits(const acc_t* x, int64_t size, acc_t max, acc_t factor,
                                         acc_t offset, acc_t* grad) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    grad[i] = multiply_add(exp_of(x[i] - max), factor, -offset);
  }
}

// Logits of a group of rows. They stay in the nearest cache from the maximum to the exponentials,
// and the rows of a group give the processor independent work.
constexpr int64_t kLogitsOfGroup = 4096;

// The class of a long row's label; negative if it is not among the classes here. rows.label holds
// its highest number for a class that does not fit, and the label is read again.
template <typename Args, typename acc_t>
int64_t class_of(const Args& args, const TileRows<acc_t>& rows, int64_t i) {
  int64_t cls = rows.label[i];
  if (cls == std::numeric_limits<IntOf<acc_t>>::max()) {
    cls = args.labels.rule.class_here(args.labels[rows.first + i]);
  }
  return cls < args.layout.num_classes ? cls : int64_t(-1);
}

// Subtracts each class's part of the smoothing from a block of gradients.
template <typename Args, typename acc_t>
OE_EXT_INLINE void subtract_at_classes(const Args& args, const TileRows<acc_t>& rows, int64_t i,
                                       int64_t begin, int64_t size, acc_t* grad) {
  if (args.class_spread == nullptr) {
    return;
  }
  const acc_t* spread = args.class_spread + begin;
  const acc_t at_classes = rows.at_classes[i] * rows.factor[i];
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    grad[j] -= spread[j] * at_classes;
  }
}

// Writes the gradients of rows. compute(row, logits, begin, size, to) computes those of one block.
template <typename Args, typename acc_t, typename Compute>
void write_row_gradients(const Args& args, const TileRows<acc_t>& rows, acc_t* buffer,
                         const Compute& compute) {
  const int64_t num_classes = args.layout.num_classes;
  const TileView logits(args.logits, args.layout, rows.first);
  const TileView grad(args.grad_logits, args.grad_layout, rows.first);
  constexpr bool kWidens = !std::is_same_v<decltype(grad.data), acc_t*>;
  for (int64_t i = 0; i < rows.size; ++i) {
    const auto* row = logits.data + i * logits.row_stride;
    auto* to = grad.data + i * grad.row_stride;
    if (rows.active[i] == acc_t(0)) {
      std::fill_n(to, num_classes, 0);
      continue;
    }
    const int64_t label = class_of(args, rows, i);
    const acc_t exp_at_label =
        label >= 0 ? exp_of(static_cast<acc_t>(row[label]) - rows.max[i]) : acc_t(0);
    for_each_block(num_classes, [&](int64_t begin, int64_t size) {
      if constexpr (kWidens) {
        compute(i, row + begin, begin, size, buffer);
        narrow(buffer, size, to + begin);
      } else {
        compute(i, row + begin, begin, size, to + begin);
      }
    });
    if (label >= 0) {
      acc_t from_label = exp_at_label - rows.at_label[i];
      if (args.class_spread != nullptr) {
        from_label -= args.class_spread[label] * rows.at_classes[i];
      }
      store_as(multiply_add(from_label, rows.factor[i], -rows.offset[i]), to[label]);
    }
  }
}

template <typename Args, typename acc_t>
void write_gradients_from_logits(const Args& args, const TileRows<acc_t>& rows, acc_t* buffer) {
  write_row_gradients(args, rows, buffer,
                      [&](int64_t i, const auto* logits, int64_t begin, int64_t size, acc_t* to) {
                        const acc_t* x = widened(logits, size, buffer);
                        gradients_from_logits(x, size, rows.max[i], rows.factor[i], rows.offset[i],
                                              to);
                        subtract_at_classes(args, rows, i, begin, size, to);
                      });
}

// Sets the sum_shifted of inliers, for label smoothing. A loop of its own leaves the loop that all
// calls need alone: within it, the test alone took 1 % of the instructions of 100 classes.
template <typename scalar_t, typename acc_t>
void sum_inliers(const ForwardArgs<scalar_t, acc_t>& args, int64_t begin, int64_t end,
                 acc_t* buffer, TileRows<acc_t>& rows) {
  const TileView<const scalar_t> logits(args.logits, args.layout, rows.first);
  for (int64_t i = begin; i < end; ++i) {
    double sum = 0;
    for_each_block(
        rows.label[i] >= 0 ? args.layout.num_classes : 0, [&](int64_t cls, int64_t size) {
          const acc_t* x = widened(logits.data + i * logits.row_stride + cls, size, buffer);
          sum += args.class_spread == nullptr
                     ? sum_of(x, size, rows.max[i])
                     : sum_of<true>(x, size, rows.max[i], args.class_spread + cls);
        });
    rows.sum_shifted[i] = rows.label[i] >= 0 ? static_cast<acc_t>(sum) : rows.sum_shifted[i];
  }
}

template <typename scalar_t, typename acc_t>
void forward_long_rows(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                       const GroupDivisors& divisors, acc_t* scratch, TileRows<acc_t>& rows,
                       GroupSums& sums) {
  const int64_t num_classes = args.layout.num_classes;
  const TileView<const scalar_t> logits(args.logits, args.layout, rows.first);
  acc_t* const buffer = scratch + tiling.tile_rows * tiling.chunk_classes;
  // Keeps the exponentials in the memory of the gradients if that has their type, else in scratch
  // memory if they fit. Otherwise they are computed twice.
  acc_t* exps = nullptr;
  int64_t exps_stride = 0;
  if (args.grad_logits != nullptr) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      exps = args.grad_logits + args.grad_layout.row_offset(rows.first);
      exps_stride = args.grad_layout.inner_stride;
    } else if (tiling.chunk_classes > 0) {
      exps = scratch;
      exps_stride = num_classes;
    }
  }

  const int64_t group = std::max<int64_t>(1, kLogitsOfGroup / num_classes);
  const int64_t next_group = group * logits.row_stride;
  for (int64_t first = 0; first < rows.size; first += group) {
    const int64_t end = std::min(first + group, rows.size);
    for (int64_t i = first; i < end; ++i) {
      if (rows.active[i] != acc_t(0)) {
        const scalar_t* row = logits.data + i * logits.row_stride;
        rows.max[i] = std::max<acc_t>(rows.max[i], max_logit(row, num_classes));
      }
    }
    for (int64_t i = first; i < end; ++i) {
      if (rows.active[i] == acc_t(0)) {
        continue;
      }
      const scalar_t* row = logits.data + i * logits.row_stride;
      double sum_exp = 0;
      double sum_shifted = 0;
      for_each_block(num_classes, [&](int64_t begin, int64_t size) {
        const scalar_t* part = row + begin;
        const acc_t* x = widened(part, size, buffer);
        if (rows.label[i] == kOutlier) {
          sum_shifted += sum_of(x, size, rows.max[i]);
        }
        acc_t* to = exps != nullptr ? exps + i * exps_stride + begin : buffer + kRowBlock;
        sum_exp += add_exponentials(x, size, rows.max[i], to, part + next_group, to + exps_stride);
      });
      rows.sum_exp[i] = static_cast<acc_t>(sum_exp);
      rows.sum_shifted[i] = static_cast<acc_t>(sum_shifted);
      const int64_t label = class_of(args, rows, i);
      rows.at_label[i] = label >= 0 ? static_cast<acc_t>(row[label]) : acc_t(0);
    }
    if (args.label_smoothing != acc_t(0)) {
      sum_inliers(args, first, end, buffer, rows);
    }
  }
  finish_rows(args, divisors, rows, sums);
  if (args.grad_logits != nullptr && exps == nullptr) {
    write_gradients_from_logits(args, rows, buffer);
  } else if (args.grad_logits != nullptr) {
    write_row_gradients(args, rows, buffer,
                        [&](int64_t i, const scalar_t*, int64_t begin, int64_t size, acc_t* to) {
                          gradients_from_exps(exps + i * exps_stride + begin, size, rows.factor[i],
                                              rows.offset[i], to);
                          subtract_at_classes(args, rows, i, begin, size, to);
                        });
  }
}

}  // namespace
}  // namespace oe_ext::cpu
