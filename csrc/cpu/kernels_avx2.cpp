// The kernels with AVX2, FMA and F16C.
#include "levels.h"

#if defined(__x86_64__)

// From here on, and for templates that are defined from here on.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx,avx2,fma,f16c")
#endif

#define OE_EXT_AVX2 1

namespace oe_ext::cpu {
constexpr int kVectorBytes = 32;
}

#include "tile_kernels.h"

namespace oe_ext::cpu {
const Kernels kKernelsAvx2 = make_kernels();
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
