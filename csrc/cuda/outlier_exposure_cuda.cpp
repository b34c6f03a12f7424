// The operators of the CUDA backend. They run on the current stream of the logits' device and do
// not synchronise.
#include <c10/cuda/CUDAStream.h>

#include "../ops/upsampled_outlier_exposure_backend.h"
#include "launch_cuda.h"

namespace oe_ext {
namespace {

// The kernels assert that labels are legal: to report it here would take a synchronisation.
constexpr int64_t kNoBadRow = -1;

struct CudaBackend {
  static constexpr bool kSpreadsSmoothing = false;

  static at::Tensor scratch_of(int64_t bytes) {
    return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(at::kCUDA));
  }

  template <typename scalar_t, typename acc_t>
  static int64_t forward(const ForwardArgs<scalar_t, acc_t>& args) {
    at::Tensor scratch;
    if (args.output.loss != nullptr) {
      scratch = scratch_of(cuda::kScratchBytes);
    }
    cuda::forward(args, scratch.defined() ? scratch.mutable_data_ptr() : nullptr,
                  c10::cuda::getCurrentCUDAStream());
    return kNoBadRow;
  }

  template <typename scalar_t, typename acc_t>
  static int64_t backward(const BackwardArgs<scalar_t, acc_t>& args) {
    cuda::backward(args, c10::cuda::getCurrentCUDAStream());
    return kNoBadRow;
  }

  static bool fits(const UpsampledInputs& inputs) {
    const auto& [logits, target, alpha, weight, options] = inputs.loss;
    return cuda::fits_upsampled(logits.size(1), target.size(1), target.size(2),
                                logits.scalar_type() == at::kDouble);
  }

  template <typename scalar_t, typename acc_t>
  static int64_t forward(const UpsampledForwardArgs<scalar_t, acc_t>& args) {
    const at::Tensor scratch = scratch_of(cuda::scratch_bytes(args));
    cuda::forward(args, scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    return kNoBadRow;
  }

  template <typename scalar_t, typename acc_t>
  static int64_t backward(const UpsampledBackwardArgs<scalar_t, acc_t>& args) {
    const at::Tensor scratch = scratch_of(cuda::scratch_bytes(args));
    cuda::backward(args, scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
    return kNoBadRow;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(oe_ext, CUDA, m) {
  register_backend<CudaBackend>(m);
  register_upsampled_backend<CudaBackend>(m);
}

}  // namespace oe_ext
