// The kernels and launchers of csrc/cuda on the fibers of tests/simt, without its checker: here
// AddressSanitizer checks their accesses.
#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <vector>
// c10 before CUDA's names
#include "../simt/simt.h"
// the launchers, and the kernels with them
#include "../../csrc/cuda/launch_cuda.cu"
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

OE_EXT_INSTANTIATE_RUN();

}  // namespace oe_ext::testing
