// Transposes squares of numbers: the one step that compilers do not vectorise. Their scalar code
// takes two to three times the instructions.
#pragma once

#include "baseline.h"

namespace oe_ext::cpu {
namespace {

// The instruction set determines kSquareBytes, the bytes of one row of a square.
template <typename T>
struct Square {
  static constexpr int kSize = kSquareBytes / sizeof(T);
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Row __attribute__((vector_size(kSquareBytes)));
  typedef T Unaligned __attribute__((vector_size(kSquareBytes), aligned(alignof(T)), may_alias));
  typedef Int Lanes __attribute__((vector_size(kSquareBytes)));
};

// Swaps the off-diagonal blocks of kStep lanes in two rows.
template <typename T, int kStep, int... kLane>
OE_EXT_INLINE void swap_blocks(typename Square<T>::Row& a, typename Square<T>::Row& b,
                               std::integer_sequence<int, kLane...>) {
  constexpr int kSize = Square<T>::kSize;
#if defined(__clang__)
  const auto low =
      __builtin_shufflevector(a, b, ((kLane & kStep) ? kLane - kStep + kSize : kLane)...);
  const auto high =
      __builtin_shufflevector(a, b, ((kLane & kStep) ? kLane + kSize : kLane + kStep)...);
#else
  using Lanes = typename Square<T>::Lanes;
  const auto low =
      __builtin_shuffle(a, b, Lanes{((kLane & kStep) ? kLane - kStep + kSize : kLane)...});
  const auto high =
      __builtin_shuffle(a, b, Lanes{((kLane & kStep) ? kLane + kSize : kLane + kStep)...});
#endif
  a = low;
  b = high;
}

template <typename T, int kStep>
OE_EXT_INLINE void swap_all_blocks(typename Square<T>::Row (&rows)[Square<T>::kSize]) {
  if constexpr (kStep < Square<T>::kSize) {
#pragma GCC unroll 16
    for (int i = 0; i < Square<T>::kSize; ++i) {
      if ((i & kStep) == 0) {
        swap_blocks<T, kStep>(rows[i], rows[i + kStep],
                              std::make_integer_sequence<int, Square<T>::kSize>());
      }
    }
    swap_all_blocks<T, 2 * kStep>(rows);
  }
}

// to[j][i] = from[i][j] for one square.
template <typename T>
OE_EXT_INLINE void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  typename Square<T>::Row rows[Square<T>::kSize];
#pragma GCC unroll 16
  for (int i = 0; i < Square<T>::kSize; ++i) {
    rows[i] = *reinterpret_cast<const typename Square<T>::Unaligned*>(from + i * from_stride);
  }
  swap_all_blocks<T, 1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < Square<T>::kSize; ++i) {
    *reinterpret_cast<typename Square<T>::Unaligned*>(to + i * to_stride) = rows[i];
  }
}

}  // namespace
}  // namespace oe_ext::cpu
