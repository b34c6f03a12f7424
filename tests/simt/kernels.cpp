// The source that nvcc compiles, for the CPU. This file alone is compiled with -fsanitize=thread.
#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
// c10 before CUDA's names
#include "simt.h"
// the launchers, and the kernels with them
#include "../../csrc/cuda/launch_cuda.cu"
#include "launchers.h"

namespace {

using namespace oe_ext;

constexpr Launchers kLaunchers = {
#ifdef OE_EXT_SIMT_TWO_DTYPES  // half of the time to compile, for the wrong copies
    {},
    LauncherPair<float, float>::compiled(),
    {},
#else
    LauncherPair<double, double>::compiled(),
    LauncherPair<float, float>::compiled(),
    LauncherPair<c10::Half, float>::compiled(),
#endif
    LauncherPair<c10::BFloat16, float>::compiled(),
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const Launchers* oe_ext_get_launchers() {
  return &kLaunchers;
}
