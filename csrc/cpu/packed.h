// Logits of every dtype, as memory holds them, to and from vectors of the arithmetic's type.
#pragma once

#include "vec.h"

namespace oe_ext::cpu {
namespace {

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

}  // namespace
}  // namespace oe_ext::cpu
