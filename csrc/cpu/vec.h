// One vector register of floats or doubles, as wide as kVectorBytes, in the vector extensions that
// GCC and clang share: the same source becomes SSE2, AVX2 or AVX-512.
//
// Included once in each file of kernels, after its instruction set was chosen (levels.h), and all
// of it internal to that file: two files' Vec<float> are not the same type.
#pragma once

#include "levels.h"

namespace oe_ext::cpu {
namespace {

// Vectors that are worked on at once, so that their chains of operations overlap: as many as there
// are registers for.
constexpr int kBlock = kVectorBytes == 64 ? 4 : 2;

template <typename T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

template <typename T, int kBytes>
struct VectorType {
  typedef T type __attribute__((vector_size(kBytes)));
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};

template <typename T>
struct Mask;

// Integers in lanes of the size of T.
template <typename T>
struct IntVec {
  using Lane = typename IntegerOf<T>::type;
  using Raw = typename VectorType<Lane, kVectorBytes>::type;
  Raw raw;

  OE_EXT_INLINE static IntVec broadcast(Lane x) { return {Raw{} + x}; }
  OE_EXT_INLINE static IntVec load(const Lane* p) {
    return {*reinterpret_cast<const typename VectorType<Lane, kVectorBytes>::unaligned*>(p)};
  }
  OE_EXT_INLINE void store(Lane* p) const {
    *reinterpret_cast<typename VectorType<Lane, kVectorBytes>::unaligned*>(p) = raw;
  }

  OE_EXT_INLINE friend Mask<T> operator==(IntVec a, IntVec b) { return {a.raw == b.raw}; }
  OE_EXT_INLINE friend Mask<T> operator!=(IntVec a, IntVec b) { return {a.raw != b.raw}; }
  OE_EXT_INLINE friend Mask<T> operator>=(IntVec a, IntVec b) { return {a.raw >= b.raw}; }
  OE_EXT_INLINE friend Mask<T> operator<(IntVec a, IntVec b) { return {a.raw < b.raw}; }
};

// Lanes that are all ones or all zeros.
template <typename T>
struct Mask {
  typename IntVec<T>::Raw raw;

  OE_EXT_INLINE friend Mask operator&(Mask a, Mask b) { return {a.raw & b.raw}; }
  OE_EXT_INLINE friend Mask operator|(Mask a, Mask b) { return {a.raw | b.raw}; }
  OE_EXT_INLINE friend Mask operator~(Mask a) { return {~a.raw}; }
};

template <typename T>
struct Vec {
  static constexpr int kSize = kVectorBytes / sizeof(T);
  using Raw = typename VectorType<T, kVectorBytes>::type;
  Raw raw;

  Vec() = default;
  OE_EXT_INLINE Vec(Raw values) : raw(values) {}
  OE_EXT_INLINE Vec(T value) : raw(Raw{} + value) {}

  OE_EXT_INLINE static Vec load(const T* p) {
    return {*reinterpret_cast<const typename VectorType<T, kVectorBytes>::unaligned*>(p)};
  }
  OE_EXT_INLINE void store(T* p) const {
    *reinterpret_cast<typename VectorType<T, kVectorBytes>::unaligned*>(p) = raw;
  }

  OE_EXT_INLINE friend Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  OE_EXT_INLINE friend Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  OE_EXT_INLINE friend Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  OE_EXT_INLINE friend Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
  OE_EXT_INLINE Vec& operator+=(Vec other) { return *this = *this + other; }
  OE_EXT_INLINE Vec& operator*=(Vec other) { return *this = *this * other; }

  OE_EXT_INLINE friend Mask<T> operator<(Vec a, Vec b) { return {a.raw < b.raw}; }
  OE_EXT_INLINE friend Mask<T> operator>(Vec a, Vec b) { return {a.raw > b.raw}; }
  OE_EXT_INLINE friend Mask<T> operator!=(Vec a, Vec b) { return {a.raw != b.raw}; }
};

template <typename T>
OE_EXT_INLINE Vec<T> select(Mask<T> mask, Vec<T> if_true, Vec<T> if_false) {
  return mask.raw ? if_true.raw : if_false.raw;
}

// x where the mask is set, else 0. With AVX2 the mask of a select in a loop would be made anew.
template <typename T>
OE_EXT_INLINE Vec<T> zero_unless(Mask<T> mask, Vec<T> x) {
  return Vec<T>((typename Vec<T>::Raw)(mask.raw & (typename IntVec<T>::Raw)x.raw));
}

template <typename T>
OE_EXT_INLINE IntVec<T> select(Mask<T> mask, IntVec<T> if_true, IntVec<T> if_false) {
  return {mask.raw ? if_true.raw : if_false.raw};
}

template <typename T>
OE_EXT_INLINE bool any_lane(Mask<T> mask) {
  typename IntVec<T>::Lane any = 0;
  for (int i = 0; i < Vec<T>::kSize; ++i) {
    any |= mask.raw[i];
  }
  return any != 0;
}

// The larger one; b where either is NaN. That is how x86 defines its instruction, but
// GCC compares and blends.
#if defined(__x86_64__)
#if defined(OE_EXT_AVX512)
#define OE_EXT_X86(operation, suffix, a, b) _mm512_maskz_##operation##_##suffix(-1, a, b)
#elif defined(OE_EXT_AVX2)
#define OE_EXT_X86(operation, suffix, a, b) _mm256_##operation##_##suffix(a, b)
#else
#define OE_EXT_X86(operation, suffix, a, b) _mm_##operation##_##suffix(a, b)
#endif
OE_EXT_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) {
  return OE_EXT_X86(max, ps, a.raw, b.raw);
}
OE_EXT_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) {
  return OE_EXT_X86(max, pd, a.raw, b.raw);
}
#undef OE_EXT_X86
#else
template <typename T>
OE_EXT_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return select(a > b, a, b);
}
#endif

// The halves of a vector. For GCC the way of a memcpy leads through memory.
template <typename T, int kBytes>
struct Halves {
  using Whole = typename VectorType<T, kBytes>::type;
  using Half = typename VectorType<T, kBytes / 2>::type;

  OE_EXT_INLINE static Half low(Whole x) {
    Half half;
    __builtin_memcpy(&half, &x, sizeof(half));
    return half;
  }
  OE_EXT_INLINE static Half high(Whole x) {
#if defined(OE_EXT_AVX512)
    if constexpr (kBytes == 64) {
      return (Half)_mm512_maskz_extractf64x4_pd(0xf, (__m512d)x, 1);
    }
#endif
#if defined(OE_EXT_AVX512) || defined(OE_EXT_AVX2)
    if constexpr (kBytes == 32) {
      return (Half)_mm256_extractf128_pd((__m256d)x, 1);
    }
#endif
    Half half;
    __builtin_memcpy(&half, reinterpret_cast<const char*>(&x) + sizeof(half), sizeof(half));
    return half;
  }
};

// Folds the upper half of a vector onto the lower one, until one lane is left.
template <bool kLargest, typename T, int kBytes>
OE_EXT_INLINE T fold_lanes(typename VectorType<T, kBytes>::type x) {
  if constexpr (kBytes == sizeof(T)) {
    return x[0];
  } else {
    auto low = Halves<T, kBytes>::low(x);
    const auto high = Halves<T, kBytes>::high(x);
    if constexpr (kLargest) {
      low = high > low ? high : low;
    } else {
      low += high;
    }
    return fold_lanes<kLargest, T, kBytes / 2>(low);
  }
}

template <typename T>
OE_EXT_INLINE T sum_of_lanes(Vec<T> x) {
  return fold_lanes<false, T, kVectorBytes>(x.raw);
}

// The lanes must be numbers.
template <typename T>
OE_EXT_INLINE T largest_lane(Vec<T> x) {
  return fold_lanes<true, T, kVectorBytes>(x.raw);
}

// Those lanes of two vectors, one behind the other.
#if defined(__clang__)
#define OE_EXT_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define OE_EXT_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif
template <typename T, int... kLane>
OE_EXT_INLINE IntVec<T> even_lanes(IntVec<T> a, IntVec<T> b, std::integer_sequence<int, kLane...>) {
  return {OE_EXT_SHUFFLE(typename IntVec<T>::Raw, a.raw, b.raw, (2 * kLane)...)};
}
template <typename T, int... kLane>
OE_EXT_INLINE IntVec<T> odd_lanes(IntVec<T> a, IntVec<T> b, std::integer_sequence<int, kLane...>) {
  return {OE_EXT_SHUFFLE(typename IntVec<T>::Raw, a.raw, b.raw, (2 * kLane + 1)...)};
}

// Swaps the off-diagonal blocks of kStep lanes in two rows of a square.
template <typename T, int kStep, int... kLane>
OE_EXT_INLINE void swap_blocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int kSize = Vec<T>::kSize;
  using IntRaw = typename IntVec<T>::Raw;
  const Vec<T> low = OE_EXT_SHUFFLE(IntRaw, a.raw, b.raw,
                                    ((kLane & kStep) != 0 ? kLane - kStep + kSize : kLane)...);
  const Vec<T> high = OE_EXT_SHUFFLE(IntRaw, a.raw, b.raw,
                                     ((kLane & kStep) != 0 ? kLane + kSize : kLane + kStep)...);
  a = low;
  b = high;
}
#undef OE_EXT_SHUFFLE

// Transposes a square of as many rows as a row has lanes.
template <typename T, int kStep = 1>
OE_EXT_INLINE void transpose(Vec<T> (&rows)[Vec<T>::kSize]) {
  if constexpr (kStep < Vec<T>::kSize) {
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      if ((i & kStep) == 0) {
        swap_blocks<T, kStep>(rows[i], rows[i + kStep],
                              std::make_integer_sequence<int, Vec<T>::kSize>());
      }
    }
    transpose<T, 2 * kStep>(rows);
  }
}

}  // namespace
}  // namespace oe_ext::cpu
