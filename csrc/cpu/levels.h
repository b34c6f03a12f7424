// What a file of kernels includes before it chooses an instruction set: nothing of these headers
// may be compiled for a processor that the program does not run on.
#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The kernels' own functions: they are to become part of those that call them.
#define OE_EXT_INLINE inline __attribute__((always_inline))
