// The exponential and the logarithm of a vector.
#pragma once

#include "vec.h"

namespace oe_ext::cpu {
namespace {

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
  p = p * r + Vec<T>(T(1));
  return power.times(p * r + Vec<T>(T(1)));
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
