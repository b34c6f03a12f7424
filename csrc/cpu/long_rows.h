// Loops along one long row, whose classes are neighbours in memory.
#pragma once

#include "labels.h"

namespace oe_ext::cpu {
namespace {

// Numbers of the arithmetic's type: logits as they stand, or widened into the buffer.
template <typename scalar_t, typename acc_t>
const acc_t* widened(const scalar_t* logits, int64_t size, acc_t* buffer) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    return logits;
  } else {
    widen(logits, size, buffer);
    return buffer;
  }
}

// Sums and maxima of a row are those of so many lanes, folded at the end: as many as the widest
// vector has, or several vectors, which need not wait for each other. A row is not shorter. What is
// left of it behind the last full lanes is done with some that were done already (kLanes - 1 of
// them at most).
constexpr int kLanes = 16;

template <typename acc_t, typename Merge>
OE_EXT_INLINE acc_t fold(acc_t (&lanes)[kLanes], const Merge& merge) {
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) {
      lanes[j] = merge(lanes[j], lanes[j + width]);
    }
  }
  return lanes[0];
}

// The largest number; NaN is never larger.
template <typename acc_t>
OE_EXT_INLINE acc_t max_of(const acc_t* x, int64_t size) {
  acc_t lanes[kLanes];
  std::fill_n(lanes, kLanes, std::numeric_limits<acc_t>::lowest());
  const auto raise = [&](const acc_t* part) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] = part[j] > lanes[j] ? part[j] : lanes[j];
    }
  };
  for (int64_t i = 0; i + kLanes <= size; i += kLanes) {
    raise(x + i);
  }
  raise(x + size - kLanes);
  return fold(lanes, [](acc_t a, acc_t b) { return b > a ? b : a; });
}

// The sum of x - shift.
template <typename acc_t>
OE_EXT_INLINE acc_t sum_of(const acc_t* x, int64_t size, acc_t shift) {
  acc_t lanes[kLanes] = {};
  for (int64_t i = 0; i + kLanes <= size; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] += x[i + j] - shift;
    }
  }
  const int first = kLanes - static_cast<int>(size % kLanes);
  const acc_t* last = x + size - kLanes;
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    lanes[j] += select(j >= first, last[j] - shift, acc_t(0));
  }
  return fold(lanes, [](acc_t a, acc_t b) { return a + b; });
}

// exp(x - max), which may go where x stands.
template <typename acc_t>
OE_EXT_INLINE void exponentials(const acc_t* x, int64_t size, acc_t max, acc_t* exps) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    exps[i] = exp_of(x[i] - max);
  }
}

// From exponentials, which may stand there, to gradients. `buffer` has room for a block, where the
// gradients need one.
template <typename acc_t, typename scalar_t>
void write_gradients(const acc_t* exps, int64_t size, acc_t factor, acc_t offset, acc_t* buffer,
                     scalar_t* grad) {
  acc_t* to = buffer;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    to = grad;
  }
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    to[i] = multiply_add(exps[i], factor, -offset);
  }
  if constexpr (!std::is_same_v<scalar_t, acc_t>) {
    narrow(to, size, grad);
  }
}

// Calls use(begin, size) for the blocks of a row, none of which is shorter than kLanes.
template <typename Use>
OE_EXT_INLINE void for_each_block(int64_t num_classes, const Use& use) {
  int64_t begin = 0;
  for (; num_classes - begin >= kRowBlock + kLanes; begin += kRowBlock) {
    use(begin, kRowBlock);
  }
  if (num_classes - begin > kRowBlock) {
    use(begin, kRowBlock / 2);
    begin += kRowBlock / 2;
  }
  use(begin, num_classes - begin);
}

// From logits and statistics to the gradient of one row, which may be where the logits are.
template <typename scalar_t, typename acc_t>
void write_row_gradient(const scalar_t* logits, scalar_t* grad, int64_t num_classes, int64_t label,
                        acc_t max, acc_t sum_exp, acc_t factor, acc_t offset, acc_t* buffer) {
  for_each_block(num_classes, [&](int64_t begin, int64_t size) {
    const acc_t* x = widened(logits + begin, size, buffer);
    exponentials(x, size, max, buffer);
    if (label >= begin && label < begin + size) {
      buffer[label - begin] -= sum_exp;
    }
    write_gradients(buffer, size, factor, offset, buffer, grad + begin);
  });
}

}  // namespace
}  // namespace oe_ext::cpu
