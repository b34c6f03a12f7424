// The kernels and launchers of csrc/cuda on the fibers of tests/simt, without its checker: their
// accesses are AddressSanitizer's here.
#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <vector>
// c10 before CUDA's names
#include "../simt/simt.h"
// the launchers, and the kernels with them
#include "../../csrc/cuda/launch.cu"
#include "kernels.h"

namespace oe_ext::testing {

template <typename scalar_t, typename acc_t>
int64_t run(const ForwardArgs<scalar_t, acc_t>& args) {
  std::vector<uint64_t> scratch(cuda::kScratchBytes / sizeof(uint64_t), ~uint64_t(0));  // NaN
  cuda::forward(args, scratch.data(), nullptr);
  return -1;
}

template <typename scalar_t, typename acc_t>
int64_t run(const BackwardArgs<scalar_t, acc_t>& args) {
  cuda::backward(args, nullptr);
  return -1;
}

#define OE_EXT_INSTANTIATE(scalar_t, acc_t)                  \
  template int64_t run(const ForwardArgs<scalar_t, acc_t>&); \
  template int64_t run(const BackwardArgs<scalar_t, acc_t>&)
OE_EXT_INSTANTIATE(double, double);
OE_EXT_INSTANTIATE(float, float);
OE_EXT_INSTANTIATE(c10::Half, float);
OE_EXT_INSTANTIATE(c10::BFloat16, float);
#undef OE_EXT_INSTANTIATE

}  // namespace oe_ext::testing
