// The sources that nvcc compiles, for the CPU. This file alone is compiled with -fsanitize=thread.
#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
// c10 before CUDA's names
#include "simt.h"
// the launchers, and the kernels with them
#include "../../csrc/cuda/launch_cuda.cu"
#include "../../csrc/cuda/launch_upsampled_cuda.cu"
#include "launchers.h"

namespace {

using namespace oe_ext;

// A part of the time to compile, for the wrong copies: two dtypes of one kind of kernels.
#if defined(OE_EXT_SIMT_ROWS) || defined(OE_EXT_SIMT_UPSAMPLED)
constexpr bool kEveryDtype = false;
#else
constexpr bool kEveryDtype = true;
#endif
#ifdef OE_EXT_SIMT_ROWS
constexpr bool kUpsampled = false;
#else
constexpr bool kUpsampled = true;
#endif
#ifdef OE_EXT_SIMT_UPSAMPLED
constexpr bool kRows = false;
#else
constexpr bool kRows = true;
#endif

template <typename scalar_t, typename acc_t, bool kCompiled>
constexpr auto launchers_of() {
  return LaunchersOf<scalar_t, acc_t>::template compiled<kCompiled && kRows,
                                                         kCompiled && kUpsampled>();
}

constexpr Launchers kLaunchers = {
    {launchers_of<double, double, kEveryDtype>(), launchers_of<float, float, true>(),
     launchers_of<c10::Half, float, kEveryDtype>(), launchers_of<c10::BFloat16, float, true>()},
    cuda::fits_upsampled};

}  // namespace

extern "C" __attribute__((visibility("default"))) const Launchers* oe_ext_get_launchers() {
  return &kLaunchers;
}
