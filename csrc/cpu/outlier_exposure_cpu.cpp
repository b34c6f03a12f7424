// The operators of the CPU backend.
#include "../ops/outlier_exposure_backend.h"
#include "launch_cpu.h"

namespace oe_ext {
namespace {

struct CpuBackend {
  static constexpr bool kSpreadsSmoothing = true;

  template <typename scalar_t, typename acc_t>
  static int64_t forward(const ForwardArgs<scalar_t, acc_t>& args) {
    return cpu::forward(args);
  }

  template <typename scalar_t, typename acc_t>
  static int64_t backward(const BackwardArgs<scalar_t, acc_t>& args) {
    return cpu::backward(args);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(oe_ext, CPU, m) { register_backend<CpuBackend>(m); }

}  // namespace oe_ext
