// The operators of the CPU backend.
#include "../ops/upsampled_outlier_exposure_backend.h"
#include "launch_cpu.h"

namespace oe_ext {
namespace {

struct CpuBackend {
  static constexpr bool kSpreadsSmoothing = true;

  static bool fits(const UpsampledInputs&) { return true; }

  template <typename Args>
  static int64_t forward(const Args& args) {
    return cpu::forward(args);
  }

  template <typename Args>
  static int64_t backward(const Args& args) {
    return cpu::backward(args);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(oe_ext, CPU, m) {
  register_backend<CpuBackend>(m);
  register_upsampled_backend<CpuBackend>(m);
}

}  // namespace oe_ext
