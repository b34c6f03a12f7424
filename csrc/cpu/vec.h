// One vector register of floats or doubles, as wide as kVectorBytes, in the vector extensions that
// GCC and clang share: the same source becomes SSE2, AVX2 or AVX-512.
//
// Included once in each file of kernels, after its instruction set was chosen (levels.h), and all
// of it internal to that file: two files' Vec<float> are not the same type.
#pragma once

#include "levels.h"

namespace oe_ext::cpu {
namespace {

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
};

// Lanes that are all ones or all zeros.
template <typename T>
struct Mask {
  typename IntVec<T>::Raw raw;

  OE_EXT_INLINE friend Mask operator&(Mask a, Mask b) { return {a.raw & b.raw}; }
  OE_EXT_INLINE friend Mask operator|(Mask a, Mask b) { return {a.raw | b.raw}; }
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

// The larger, or smaller, one; b where either is NaN. One instruction on x86, by this very rule.
template <typename T>
OE_EXT_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return select(a > b, a, b);
}

template <typename T>
OE_EXT_INLINE Vec<T> smaller(Vec<T> a, Vec<T> b) {
  return select(a < b, a, b);
}

// Folds the upper half of a vector onto the lower one, until one lane is left.
template <bool kLargest, typename T, int kBytes>
OE_EXT_INLINE T fold_lanes(typename VectorType<T, kBytes>::type x) {
  if constexpr (kBytes == sizeof(T)) {
    return x[0];
  } else {
    using Half = typename VectorType<T, kBytes / 2>::type;
    Half low;
    Half high;
    __builtin_memcpy(&low, &x, sizeof(Half));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(Half), sizeof(Half));
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

// Bits of IEEE 754 numbers, and the constants of their exponentials and logarithms.
template <typename T>
struct FloatBits;

template <>
struct FloatBits<float> {
  static constexpr int kMantissa = 23;
  static constexpr int32_t kBias = 127;
  // ln 2 in two parts; products of the first with an exponent are exact.
  static constexpr float kLn2High = 0x1.62ep-1F;
  static constexpr float kLn2Low = 0x1.0bfbe8p-15F;
  // Below kLowest the exponential is 0 (and was less than the smallest normal number); above
  // kHighest it is infinite.
  static constexpr float kLowest = -88;
  static constexpr float kHighest = 89;
  static constexpr int32_t kBitsOfSqrtHalf = 0x3f3504f3;
  // exp(x) = 1 + x + x^2 (c[0] + c[1] x + ...) to 3e-9 on |x| <= ln 2 / 2: a minimax fit.
  static constexpr float kExp[] = {0.499999934125F, 0.166665201078F, 0.0416683942109F,
                                   0.00836878041118F, 0.00138144670593F};
  static constexpr int kLogTerms = 5;
};

template <>
struct FloatBits<double> {
  static constexpr int kMantissa = 52;
  static constexpr int64_t kBias = 1023;
  static constexpr double kLn2High = 0x1.62e42fefa3800p-1;
  static constexpr double kLn2Low = 0x1.ef35793c76730p-45;
  static constexpr double kLowest = -709;
  static constexpr double kHighest = 710;
  static constexpr int64_t kBitsOfSqrtHalf = 0x3fe6a09e667f3bcd;
  // As above, to 4e-18.
  static constexpr double kExp[] = {0.5000000000000010721,      0.16666666666666410235,
                                    0.041666666666529188594,    0.0083333333334956237916,
                                    0.0013888888943922639616,   0.00019841269504765356436,
                                    0.000024801492762795647439, 2.7557587342203818353e-6,
                                    2.7630378620805180305e-7,   2.4999965343255922631e-8};
  static constexpr int kLogTerms = 11;
};

// exp(x) = 2^n exp(r) in two steps: n, then how to multiply by 2^n.
#if defined(OE_EXT_AVX512)
// Two instructions, which leave infinite and subnormal results right.
template <typename T>
class PowerOfTwo {
 public:
  OE_EXT_INLINE explicit PowerOfTwo(Vec<T> exponent) : exponent_(round(exponent.raw)) {}

  OE_EXT_INLINE static Vec<T> clamp(Vec<T> x) {
    return larger(Vec<T>(FloatBits<T>::kLowest * T(1.25)), x);  // exp(-inf) without inf - inf
  }
  OE_EXT_INLINE Vec<T> exponent() const { return exponent_; }
  OE_EXT_INLINE Vec<T> times(Vec<T> x) const { return scale(x.raw, exponent_.raw); }

 private:
  using Raw = typename Vec<T>::Raw;

  OE_EXT_INLINE static Raw round(Raw x) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    if constexpr (std::is_same_v<T, float>) {
      return (Raw)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, kMode);
    } else {
      return (Raw)_mm512_maskz_roundscale_pd(0xff, (__m512d)x, kMode);
    }
  }
  OE_EXT_INLINE static Raw scale(Raw x, Raw exponent) {
    if constexpr (std::is_same_v<T, float>) {
      return (Raw)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)exponent);
    } else {
      return (Raw)_mm512_maskz_scalef_pd(0xff, (__m512d)x, (__m512d)exponent);
    }
  }

  Vec<T> exponent_;
};
#else
template <typename T>
class PowerOfTwo {
 public:
  // Adding 1.5 * 2^mantissa rounds to an integer, which then stands in the low bits.
  OE_EXT_INLINE explicit PowerOfTwo(Vec<T> exponent) : biased_(exponent + Vec<T>(kRound)) {}

  OE_EXT_INLINE static Vec<T> clamp(Vec<T> x) {
    return smaller(Vec<T>(FloatBits<T>::kHighest), larger(Vec<T>(FloatBits<T>::kLowest), x));
  }
  OE_EXT_INLINE Vec<T> exponent() const { return biased_ - Vec<T>(kRound); }
  OE_EXT_INLINE Vec<T> times(Vec<T> x) const {
    const auto bits = (typename IntVec<T>::Raw)biased_.raw << FloatBits<T>::kMantissa;
    return x * Vec<T>((typename Vec<T>::Raw)bits);
  }

 private:
  static constexpr T kRound =
      T(3) * T(int64_t(1) << (FloatBits<T>::kMantissa - 1)) + T(FloatBits<T>::kBias);

  Vec<T> biased_;
};
#endif

// exp(x), to about one unit in the last place. exp(-inf) is 0, exp(NaN) is NaN; a result below the
// smallest normal number may be 0.
template <typename T>
OE_EXT_INLINE Vec<T> exp(Vec<T> x) {
  using Bits = FloatBits<T>;
  x = PowerOfTwo<T>::clamp(x);
  const PowerOfTwo<T> power(x * Vec<T>(T(1.44269504088896340736)));
  const Vec<T> n = power.exponent();
  const Vec<T> r = x - n * Vec<T>(Bits::kLn2High) - n * Vec<T>(Bits::kLn2Low);
  constexpr int kTerms = sizeof(Bits::kExp) / sizeof(T);
  Vec<T> p = Bits::kExp[kTerms - 1];
  for (int i = kTerms - 2; i >= 0; --i) {
    p = p * r + Vec<T>(Bits::kExp[i]);
  }
  return power.times((p * r) * r + r + Vec<T>(T(1)));
}

// log(x) of 0, of a positive normal number, or of NaN, to about one unit in the last place.
// With x = 2^e m and s = (m - 1) / (m + 1), log(m) is the series 2 (s + s^3 / 3 + s^5 / 5 + ...).
template <typename T>
OE_EXT_INLINE Vec<T> log(Vec<T> x) {
  using Bits = FloatBits<T>;
  using IntRaw = typename IntVec<T>::Raw;
  const IntRaw bits = (IntRaw)x.raw;
  const IntRaw e = (bits - Bits::kBitsOfSqrtHalf) >> Bits::kMantissa;
  const Vec<T> m = (typename Vec<T>::Raw)(bits - (e << Bits::kMantissa));
  const Vec<T> exponent = __builtin_convertvector(e, typename Vec<T>::Raw);
  const Vec<T> s = (m - Vec<T>(T(1))) / (m + Vec<T>(T(1)));
  const Vec<T> s2 = s * s;
  Vec<T> p = T(2) / T(2 * Bits::kLogTerms + 1);
  for (int i = Bits::kLogTerms - 1; i > 0; --i) {
    p = p * s2 + Vec<T>(T(2) / T(2 * i + 1));
  }
  const Vec<T> log_m = s * Vec<T>(T(2)) + s * s2 * p;
  const Vec<T> result =
      exponent * Vec<T>(Bits::kLn2High) + (log_m + exponent * Vec<T>(Bits::kLn2Low));
  const Vec<T> of_no_number = select(x != x, x, Vec<T>(-std::numeric_limits<T>::infinity()));
  return select(x > Vec<T>(T(0)), result, of_no_number);
}

// How logits are stored: Packed<scalar_t, acc_t> reads and writes as many as a Vec<acc_t> has
// lanes.
template <typename scalar_t, typename acc_t>
struct Packed;

template <typename T>
struct Packed<T, T> {
  OE_EXT_INLINE static Vec<T> load(const T* p) { return Vec<T>::load(p); }
  OE_EXT_INLINE static void store(T* p, Vec<T> x) { x.store(p); }
};

template <>
struct Packed<c10::BFloat16, float> {
  static constexpr int kBytes = kVectorBytes / 2;
  using Raw16 = VectorType<uint16_t, kBytes>::unaligned;
  using Raw32 = VectorType<uint32_t, kVectorBytes>::type;

  OE_EXT_INLINE static Vec<float> load(const c10::BFloat16* p) {
    const Raw32 wide = __builtin_convertvector(*reinterpret_cast<const Raw16*>(p), Raw32);
    return (Vec<float>::Raw)(wide << 16);
  }
  // To nearest, ties to even; a NaN stays one.
  OE_EXT_INLINE static void store(c10::BFloat16* p, Vec<float> x) {
    const auto bits = (Raw32)x.raw;
    const Raw32 rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    const Raw32 nan = Raw32{} + 0x7fc0U;
    const Raw32 result = x.raw == x.raw ? rounded : nan;
    *reinterpret_cast<Raw16*>(p) = __builtin_convertvector(result, Raw16);
  }
};

template <>
struct Packed<c10::Half, float> {
#if defined(OE_EXT_AVX512)
  // maskz with a full mask: GCC 12 warns of the other form, which starts from an undefined value.
  OE_EXT_INLINE static Vec<float> load(const c10::Half* p) {
    return (Vec<float>::Raw)_mm512_maskz_cvtph_ps(
        0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  OE_EXT_INLINE static void store(c10::Half* p, Vec<float> x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xffff, (__m512)x.raw, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(OE_EXT_AVX2)
  OE_EXT_INLINE static Vec<float> load(const c10::Half* p) {
    return (Vec<float>::Raw)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  OE_EXT_INLINE static void store(c10::Half* p, Vec<float> x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)x.raw, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static constexpr int kBytes = kVectorBytes / 2;
  using Raw16 = VectorType<uint16_t, kBytes>::unaligned;
  using Raw32 = VectorType<uint32_t, kVectorBytes>::type;
  using RawFloat = Vec<float>::Raw;

  OE_EXT_INLINE static Vec<float> load(const c10::Half* p) {
    const Raw32 half = __builtin_convertvector(*reinterpret_cast<const Raw16*>(p), Raw32);
    const Raw32 sign = (half & 0x8000U) << 16;
    const Raw32 magnitude = (half & 0x7fffU) << 13;
    // The exponent's bias is 15 there and 127 here: a product with 2^112, which is right for
    // subnormal numbers too, but for infinity and NaN, whose exponent is set instead.
    const RawFloat scaled = (RawFloat)magnitude * 0x1p112F;
    const Raw32 special = magnitude | 0x7f800000U;
    const Raw32 bits = half << 17 >= 0xf8000000U ? special : (Raw32)scaled;
    return (RawFloat)(bits | sign);
  }
  // To nearest, ties to even; a NaN stays one.
  OE_EXT_INLINE static void store(c10::Half* p, Vec<float> x) {
    const auto bits = (Raw32)x.raw;
    const Raw32 sign = bits & 0x80000000U;
    const Raw32 magnitude = bits ^ sign;
    // A subnormal half: the sum's last bit is worth 2^-24, so that the addition rounds.
    const Raw32 subnormal = (Raw32)((RawFloat)magnitude + 0.5F) - 0x3f000000U;
    const Raw32 normal = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
    const Raw32 overflow = Raw32{} + 0x7c00U;
    const Raw32 nan = Raw32{} + 0x7e00U;
    Raw32 result = magnitude < 0x38800000U ? subnormal : normal;
    result = magnitude >= 0x477ff000U ? overflow : result;
    result = magnitude > 0x7f800000U ? nan : result;
    result |= sign >> 16;
    *reinterpret_cast<Raw16*>(p) = __builtin_convertvector(result, Raw16);
  }
#endif
};

// The lanes 0..count-1; the others are 0.
template <typename acc_t, typename scalar_t>
OE_EXT_INLINE Vec<acc_t> load_part(const scalar_t* p, int64_t count) {
  scalar_t lanes[Vec<acc_t>::kSize] = {};
  for (int64_t i = 0; i < count; ++i) {
    lanes[i] = p[i];
  }
  return Packed<scalar_t, acc_t>::load(lanes);
}

template <typename acc_t, typename scalar_t>
OE_EXT_INLINE void store_part(scalar_t* p, Vec<acc_t> x, int64_t count) {
  scalar_t lanes[Vec<acc_t>::kSize];
  Packed<scalar_t, acc_t>::store(lanes, x);
  for (int64_t i = 0; i < count; ++i) {
    p[i] = lanes[i];
  }
}

// Swaps the off-diagonal blocks of kStep lanes in two rows of a square.
template <typename T, int kStep, int... kLane>
OE_EXT_INLINE void swap_blocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int kSize = Vec<T>::kSize;
#if defined(__clang__)
  const Vec<T> low = __builtin_shufflevector(
      a.raw, b.raw, ((kLane & kStep) != 0 ? kLane - kStep + kSize : kLane)...);
  const Vec<T> high = __builtin_shufflevector(
      a.raw, b.raw, ((kLane & kStep) != 0 ? kLane + kSize : kLane + kStep)...);
#else
  using IntRaw = typename IntVec<T>::Raw;
  const Vec<T> low = __builtin_shuffle(
      a.raw, b.raw, IntRaw{((kLane & kStep) != 0 ? kLane - kStep + kSize : kLane)...});
  const Vec<T> high = __builtin_shuffle(
      a.raw, b.raw, IntRaw{((kLane & kStep) != 0 ? kLane + kSize : kLane + kStep)...});
#endif
  a = low;
  b = high;
}

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
