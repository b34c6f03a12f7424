// Conversions of the CPU kernels, in the version for every processor of the architecture, compared
// with those of torch, which are instructions for Half on aarch64.
#include "cpu/elementwise.h"

#include <gtest/gtest.h>

#include <cmath>

namespace oe_ext::cpu {
namespace {

template <typename scalar_t>
class Conversions : public ::testing::Test {};
using Dtypes = ::testing::Types<c10::Half, c10::BFloat16>;
TYPED_TEST_SUITE(Conversions, Dtypes);

TYPED_TEST(Conversions, FromEveryNumber) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const TypeParam stored(static_cast<uint16_t>(bits), TypeParam::from_bits());
    const auto expected = static_cast<float>(stored);
    const float actual = to_float(stored);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(actual)) << bits;
    } else {
      ASSERT_EQ(__builtin_bit_cast(uint32_t, actual), __builtin_bit_cast(uint32_t, expected));
    }
  }
}

// Ties, the floats on both sides of them, and every kind of number in between.
TYPED_TEST(Conversions, ToTheNearestNumber) {
  for (uint32_t high = 0; high < 0x100000; ++high) {
    for (const uint32_t low : {0U, 1U, 0xfffU}) {
      const auto x = __builtin_bit_cast(float, high << 12 | low);
      const TypeParam expected(x);
      TypeParam actual;
      store_as(x, actual);
      if (std::isnan(x)) {
        ASSERT_TRUE(std::isnan(static_cast<float>(actual))) << high << ", " << low;
      } else {
        ASSERT_EQ(actual.x, expected.x) << std::hexfloat << x;
      }
    }
  }
}

#if defined(__aarch64__)
TEST(MultiplyAdd, RoundsOnce) {
  const volatile float a = 1 + 0x1p-20F;
  const volatile double b = 1 + 0x1p-40;
  EXPECT_EQ(multiply_add(float(a), float(a), -1 - 0x1p-19F), 0x1p-40F);
  EXPECT_EQ(multiply_add(double(b), double(b), -1 - 0x1p-39), 0x1p-80);
}
#endif

}  // namespace
}  // namespace oe_ext::cpu
