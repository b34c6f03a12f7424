// Branch-free functions of one number, for vectorised loops: exp, log, and conversions of logits
// between their dtype and the type of the arithmetic.
#pragma once

#include "baseline.h"

namespace oe_ext::cpu {
namespace {

// The bit layout of a floating-point type, and constants of exp and log.
template <typename T>
struct FloatBits;
template <>
struct FloatBits<float> {
  using Int = int32_t;
  using Unsigned = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr uint32_t kBias = 127;
  static constexpr uint32_t kBitsOfSqrtHalf = 0x3f3504f3;
  // ln 2 in two parts; products of the first with an exponent are exact.
  static constexpr float kLn2High = 0x1.62ep-1F;
  static constexpr float kLn2Low = 0x1.0bfbe8p-15F;
  // Below this, exp(x) is less than the smallest normal number, and exp_of returns 0.
  static constexpr float kLowest = -87.5F;
  // exp(x) = 1 + x + x^2 (c[0] + c[1] x + ...) to 3e-9 on |x| <= ln 2 / 2: a minimax fit.
  static constexpr float kExp[] = {0.499999934125F, 0.166665201078F, 0.0416683942109F,
                                   0.00836878041118F, 0.00138144670593F};
  static constexpr int kLogTerms = 5;
};
template <>
struct FloatBits<double> {
  using Int = int64_t;
  using Unsigned = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr uint64_t kBias = 1023;
  static constexpr uint64_t kBitsOfSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kLn2High = 0x1.62e42fefa3800p-1;
  static constexpr double kLn2Low = 0x1.ef35793c76730p-45;
  static constexpr double kLowest = -708.5;
  // The same fit, to 4e-18.
  static constexpr double kExp[] = {0.5000000000000010721,      0.16666666666666410235,
                                    0.041666666666529188594,    0.0083333333334956237916,
                                    0.0013888888943922639616,   0.00019841269504765356436,
                                    0.000024801492762795647439, 2.7557587342203818353e-6,
                                    2.7630378620805180305e-7,   2.4999965343255922631e-8};
  static constexpr int kLogTerms = 11;
};

template <typename T>
using IntOf = typename FloatBits<T>::Int;

// a * b + c, rounded once where the instruction set has FMA. Calls FMA by name: whether a compiler
// fuses the operators depends on its flags.
#if defined(OE_EXT_FMA) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
OE_EXT_INLINE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
OE_EXT_INLINE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
OE_EXT_INLINE float multiply_add(float a, float b, float c) { return a * b + c; }
OE_EXT_INLINE double multiply_add(double a, double b, double c) { return a * b + c; }
#endif

// exp(r) - 1 for |r| <= ln 2 / 2.
OE_EXT_INLINE float expm1_of_remainder(float r) {
  constexpr auto& c = FloatBits<float>::kExp;
  const float r2 = r * r;
  const float low = multiply_add(r, c[1], c[0]);
  const float high = multiply_add(r2, c[4], multiply_add(r, c[3], c[2]));
  return multiply_add(multiply_add(high, r2, low), r2, r);
}
OE_EXT_INLINE double expm1_of_remainder(double r) {
  constexpr auto& c = FloatBits<double>::kExp;
  double p = multiply_add(c[9], r, c[8]);
  p = multiply_add(p, r, c[7]);
  p = multiply_add(p, r, c[6]);
  p = multiply_add(p, r, c[5]);
  p = multiply_add(p, r, c[4]);
  p = multiply_add(p, r, c[3]);
  p = multiply_add(p, r, c[2]);
  p = multiply_add(p, r, c[1]);
  p = multiply_add(p, r, c[0]);
  return multiply_add(p, r * r, r);
}

// exp(x) for x <= 0, to one unit in the last place. -inf gives 0, NaN gives NaN, and a result below
// the smallest normal number gives 0.
// x = n ln 2 + r, and exp(x) = 2^n exp(r).
template <typename T>
OE_EXT_INLINE T exp_of(T x) {
  using Bits = FloatBits<T>;
  // Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits.
  constexpr T kRound = T(3) * T(int64_t(1) << (Bits::kMantissa - 1)) + T(Bits::kBias);
  const T biased = multiply_add(x, T(1.44269504088896340736), kRound);
  const T n = biased - kRound;
  const T r = multiply_add(n, -Bits::kLn2Low, multiply_add(n, -Bits::kLn2High, x));
  const auto bits = __builtin_bit_cast(typename Bits::Unsigned, biased);
  const T power = __builtin_bit_cast(T, bits << Bits::kMantissa);
  const T result = multiply_add(power, expm1_of_remainder(r), power);
  return x < Bits::kLowest ? T(0) : result;
}

// log(x) for 0, positive normal numbers and NaN, to about one unit in the last place.
// With x = 2^e m and s = (m - 1) / (m + 1), log(m) is the series 2 (s + s^3 / 3 + s^5 / 5 + ...).
template <typename T>
OE_EXT_INLINE T log_of(T x) {
  using Bits = FloatBits<T>;
  using Unsigned = typename Bits::Unsigned;
  constexpr Unsigned kOne = Unsigned(Bits::kBias) << Bits::kMantissa;
  constexpr T kExact = T(int64_t(1) << Bits::kMantissa);
  const auto bits = __builtin_bit_cast(Unsigned, x);
  // Unsigned, and converted to floating point by its bits: few instruction sets shift or convert
  // 64-bit integers.
  const Unsigned biased_e = (bits - Bits::kBitsOfSqrtHalf + kOne) >> Bits::kMantissa;
  const T exponent = __builtin_bit_cast(T, biased_e | __builtin_bit_cast(Unsigned, kExact)) -
                     (kExact + T(Bits::kBias));
  const T m = __builtin_bit_cast(T, bits - (biased_e << Bits::kMantissa) + kOne);
  const T s = (m - T(1)) / (m + T(1));
  const T s2 = s * s;
  T p = T(2) / T(2 * Bits::kLogTerms + 1);
#pragma GCC unroll 16
  for (int i = Bits::kLogTerms - 1; i > 0; --i) {
    p = multiply_add(p, s2, T(2) / T(2 * i + 1));
  }
  const T log_m = multiply_add(s * s2, p, s * T(2));
  const T result =
      multiply_add(exponent, Bits::kLn2High, multiply_add(exponent, Bits::kLn2Low, log_m));
  const T of_no_number = x - std::numeric_limits<T>::infinity();  // -inf, or NaN
  return select(x > T(0), result, of_no_number);
}

// ---- Conversions of stored logits

OE_EXT_INLINE float to_float(c10::BFloat16 x) {
  return __builtin_bit_cast(float, uint32_t(x.x) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
OE_EXT_INLINE void store_as(float x, c10::BFloat16& stored) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  stored.x = static_cast<uint16_t>(x == x ? rounded : 0x7fc0U);
}

OE_EXT_INLINE float to_float(c10::Half x) {
  const uint32_t half = x.x;
  const uint32_t sign = (half & 0x8000U) << 16;
  const uint32_t magnitude = (half & 0x7fffU) << 13;
  // The exponent's bias is 15 in half and 127 in float. A product with 2^112 corrects it, also for
  // subnormal numbers; infinity and NaN get their exponent set instead.
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112F;
  const uint32_t special = magnitude | 0x7f800000U;
  const uint32_t bits = magnitude >= 0x0f800000U ? special : __builtin_bit_cast(uint32_t, scaled);
  return __builtin_bit_cast(float, bits | sign);
}

OE_EXT_INLINE void store_as(float x, c10::Half& stored) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = bits & 0x80000000U;
  const uint32_t magnitude = bits ^ sign;
  // A subnormal half: the last bit of the sum is worth 2^-24, so the addition rounds.
  const uint32_t subnormal =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5F) - 0x3f000000U;
  const uint32_t normal = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  uint32_t result = magnitude < 0x38800000U ? subnormal : normal;
  result = magnitude >= 0x477ff000U ? 0x7c00U : result;
  result = magnitude > 0x7f800000U ? 0x7e00U : result;
  stored.x = static_cast<uint16_t>(result | sign >> 16);
}

OE_EXT_INLINE float to_float(float x) { return x; }
OE_EXT_INLINE double to_float(double x) { return x; }
OE_EXT_INLINE void store_as(float x, float& stored) { stored = x; }
OE_EXT_INLINE void store_as(double x, double& stored) { stored = x; }

// Converts neighbouring logits to the type of the arithmetic.
template <typename scalar_t, typename acc_t>
OE_EXT_INLINE void widen(const scalar_t* from, int64_t size, acc_t* to) {
  int64_t begin = 0;
#if defined(OE_EXT_F16C)  // one instruction instead of the twelve above
  if constexpr (std::is_same_v<scalar_t, c10::Half>) {
    begin = size & ~int64_t(7);
    for (int64_t i = 0; i < begin; i += 8) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
    }
  }
#endif
#pragma omp simd
  for (int64_t i = begin; i < size; ++i) {
    to[i] = to_float(from[i]);
  }
}

// Converts them back.
template <typename acc_t, typename scalar_t>
OE_EXT_INLINE void narrow(const acc_t* from, int64_t size, scalar_t* to) {
  int64_t begin = 0;
#if defined(OE_EXT_F16C)  // one instruction instead of the twelve above
  if constexpr (std::is_same_v<scalar_t, c10::Half>) {
    begin = size & ~int64_t(7);
    for (int64_t i = 0; i < begin; i += 8) {
      const __m256 x = _mm256_loadu_ps(from + i);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
#pragma omp simd
  for (int64_t i = begin; i < size; ++i) {
    store_as(from[i], to[i]);
  }
}

}  // namespace
}  // namespace oe_ext::cpu
