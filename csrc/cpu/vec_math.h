// The exponential and the logarithm of a vector.
#pragma once

#include "vec.h"

namespace oe_ext::cpu {
namespace {

// Is a product that is added rounded once, with its sum?
#if defined(OE_EXT_AVX512) || defined(OE_EXT_AVX2) || defined(__aarch64__)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

// Bits of IEEE 754 numbers, and the constants of their exponentials and logarithms.
template <typename T>
struct FloatBits;

template <>
struct FloatBits<float> {
  static constexpr int kMantissa = 23;
  static constexpr int32_t kBias = 127;
  static constexpr float kLog2E = 1.44269504088896340736F;
  // ln 2 in two parts; products of the first with an exponent are exact.
  static constexpr float kLn2High = 0x1.62ep-1F;
  static constexpr float kLn2Low = 0x1.0bfbe8p-15F;
  // ln 2 as one number is off by 2.7e-9 of it, a twentieth of a rounding: enough where the product
  // is not rounded.
  static constexpr float kLn2 = 0x1.62e43p-1F;
  static constexpr bool kOneStep = kHasFma;
  // Below it the exponential is 0, and was less than the smallest normal number.
  static constexpr float kLowest = -88;
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
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2High = 0x1.62e42fefa3800p-1;
  static constexpr double kLn2Low = 0x1.ef35793c76730p-45;
  static constexpr double kLn2 = kLn2High + kLn2Low;
  static constexpr bool kOneStep = false;  // this one is off by a third of a rounding
  static constexpr double kLowest = -709;
  static constexpr int64_t kBitsOfSqrtHalf = 0x3fe6a09e667f3bcd;
  // As above, to 4e-18.
  static constexpr double kExp[] = {0.5000000000000010721,      0.16666666666666410235,
                                    0.041666666666529188594,    0.0083333333334956237916,
                                    0.0013888888943922639616,   0.00019841269504765356436,
                                    0.000024801492762795647439, 2.7557587342203818353e-6,
                                    2.7630378620805180305e-7,   2.4999965343255922631e-8};
  static constexpr int kLogTerms = 11;
};

// exp(x) = 2^n exp(r): how n is found, and how to multiply by 2^n.
#if defined(OE_EXT_AVX512)
// One instruction each, which leave subnormal results right.
template <typename T>
class PowerOfTwo {
 public:
  OE_EXT_INLINE static Vec<T> clamp(Vec<T> x) {
    return larger(Vec<T>(FloatBits<T>::kLowest * T(1.25)), x);  // exp(-inf) without inf - inf
  }

  PowerOfTwo() = default;
  OE_EXT_INLINE explicit PowerOfTwo(Vec<T> x)
      : exponent_(round((x * Vec<T>(FloatBits<T>::kLog2E)).raw)) {}

  OE_EXT_INLINE Vec<T> exponent() const { return exponent_; }
  // 2^n (1 + x)
  OE_EXT_INLINE Vec<T> times_one_plus(Vec<T> x) const {
    return scale((x + Vec<T>(T(1))).raw, exponent_.raw);
  }

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
  OE_EXT_INLINE static Vec<T> clamp(Vec<T> x) { return larger(Vec<T>(FloatBits<T>::kLowest), x); }

  PowerOfTwo() = default;
  // Adding 1.5 * 2^mantissa rounds to an integer, which then stands in the low bits.
  OE_EXT_INLINE explicit PowerOfTwo(Vec<T> x)
      : biased_(x * Vec<T>(FloatBits<T>::kLog2E) + Vec<T>(kRound)) {}

  OE_EXT_INLINE Vec<T> exponent() const { return biased_ - Vec<T>(kRound); }
  // 2^n (1 + x)
  OE_EXT_INLINE Vec<T> times_one_plus(Vec<T> x) const {
    const auto bits = (typename IntVec<T>::Raw)biased_.raw << FloatBits<T>::kMantissa;
    const Vec<T> power = (typename Vec<T>::Raw)bits;
    return power * x + power;
  }

 private:
  static constexpr T kRound =
      T(3) * T(int64_t(1) << (FloatBits<T>::kMantissa - 1)) + T(FloatBits<T>::kBias);

  Vec<T> biased_;
};
#endif

// exp(r) - 1 of small numbers, step by step in all vectors: a step waits for the one before, and
// what the processor has to do meanwhile are the same steps of the other vectors.
template <int kCount>
OE_EXT_INLINE void expm1_of_remainder(Vec<float> (&r)[kCount]) {
  using V = Vec<float>;
  constexpr auto& c = FloatBits<float>::kExp;
  V r2[kCount];
  V low[kCount];
  V high[kCount];
  for (int j = 0; j < kCount; ++j) {
    r2[j] = r[j] * r[j];
  }
  for (int j = 0; j < kCount; ++j) {
    high[j] = r[j] * V(c[3]) + V(c[2]);
  }
  for (int j = 0; j < kCount; ++j) {
    low[j] = r[j] * V(c[1]) + V(c[0]);
  }
  for (int j = 0; j < kCount; ++j) {
    high[j] = r2[j] * V(c[4]) + high[j];
  }
  for (int j = 0; j < kCount; ++j) {
    low[j] = high[j] * r2[j] + low[j];
  }
  for (int j = 0; j < kCount; ++j) {
    r[j] = low[j] * r2[j] + r[j];
  }
}

template <int kCount>
OE_EXT_INLINE void expm1_of_remainder(Vec<double> (&r)[kCount]) {
  using V = Vec<double>;
  constexpr auto& c = FloatBits<double>::kExp;
  constexpr int kTerms = sizeof(c) / sizeof(c[0]);
  V p[kCount];
  for (int j = 0; j < kCount; ++j) {
    p[j] = c[kTerms - 1];
  }
  for (int i = kTerms - 2; i >= 0; --i) {
    for (int j = 0; j < kCount; ++j) {
      p[j] = p[j] * r[j] + V(c[i]);
    }
  }
  for (int j = 0; j < kCount; ++j) {
    r[j] = p[j] * (r[j] * r[j]) + r[j];
  }
}

// x becomes exp(x), to about one unit in the last place, of numbers that are not above 0: -inf
// gives 0, NaN gives NaN, and a result below the smallest normal number may be 0.
template <typename T, int kCount>
OE_EXT_INLINE void exp_in_place(Vec<T> (&x)[kCount]) {
  using Bits = FloatBits<T>;
  PowerOfTwo<T> power[kCount];
  for (int j = 0; j < kCount; ++j) {
    x[j] = PowerOfTwo<T>::clamp(x[j]);
  }
  for (int j = 0; j < kCount; ++j) {
    power[j] = PowerOfTwo<T>(x[j]);
  }
  for (int j = 0; j < kCount; ++j) {
    const Vec<T> n = power[j].exponent();
    x[j] = Bits::kOneStep ? x[j] - n * Vec<T>(Bits::kLn2)
                          : x[j] - n * Vec<T>(Bits::kLn2High) - n * Vec<T>(Bits::kLn2Low);
  }
  expm1_of_remainder(x);
  for (int j = 0; j < kCount; ++j) {
    x[j] = power[j].times_one_plus(x[j]);
  }
}

template <typename T>
OE_EXT_INLINE Vec<T> exp(Vec<T> x) {
  Vec<T> values[1] = {x};
  exp_in_place(values);
  return values[0];
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

}  // namespace
}  // namespace oe_ext::cpu
