// The operators of the CUDA backend. They run on the current stream of the logits' device and do
// not synchronise.
#include <c10/cuda/CUDAStream.h>

#include "../ops/outlier_exposure_backend.h"
#include "../ops/upsampled_outlier_exposure_composed.h"
#include "launch_cuda.h"

namespace oe_ext {
namespace {

// The kernels assert that labels are legal: to report it here would take a synchronisation.
constexpr int64_t kNoBadRow = -1;

struct CudaBackend {
  static constexpr bool kSpreadsSmoothing = false;

  template <typename scalar_t, typename acc_t>
  static int64_t forward(const ForwardArgs<scalar_t, acc_t>& args) {
    at::Tensor scratch;
    if (args.output.loss != nullptr) {
      scratch =
          at::empty({cuda::kScratchBytes}, at::TensorOptions().dtype(at::kByte).device(at::kCUDA));
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
};

}  // namespace

TORCH_LIBRARY_IMPL(oe_ext, CUDA, m) {
  register_backend<CudaBackend>(m);
  UpsampledKernels<ComposedUpsampling>::register_for(m);
}

}  // namespace oe_ext
