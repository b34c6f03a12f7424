// The launchers of one compiled copy of csrc/cuda, which a library of its own holds: deliberately
// wrong copies can be loaded beside the right one.
#pragma once

#include <tuple>

#include "../../csrc/cuda/launch_cuda.h"

namespace oe_ext {

template <typename scalar_t, typename acc_t>
struct LaunchersOf {
  using UpsampledForward = UpsampledForwardArgs<scalar_t, acc_t>;
  using UpsampledBackward = UpsampledBackwardArgs<scalar_t, acc_t>;

  void (*forward)(const ForwardArgs<scalar_t, acc_t>&, void* scratch, cuda::Stream) = nullptr;
  void (*backward)(const BackwardArgs<scalar_t, acc_t>&, cuda::Stream) = nullptr;
  void (*upsampled_forward)(const UpsampledForward&, void* scratch, cuda::Stream) = nullptr;
  void (*upsampled_backward)(const UpsampledBackward&, void* scratch, cuda::Stream) = nullptr;
  int64_t (*forward_scratch)(const UpsampledForward&) = nullptr;
  int64_t (*backward_scratch)(const UpsampledBackward&) = nullptr;

  // What is not compiled stays null.
  template <bool kRows, bool kUpsampled>
  static constexpr LaunchersOf compiled() {
    LaunchersOf launchers;
    if constexpr (kRows) {
      launchers.forward = cuda::forward<scalar_t, acc_t>;
      launchers.backward = cuda::backward<scalar_t, acc_t>;
    }
    if constexpr (kUpsampled) {
      launchers.upsampled_forward = cuda::forward<scalar_t, acc_t>;
      launchers.upsampled_backward = cuda::backward<scalar_t, acc_t>;
      launchers.forward_scratch = cuda::scratch_bytes<UpsampledForward>;
      launchers.backward_scratch = cuda::scratch_bytes<UpsampledBackward>;
    }
    return launchers;
  }
};

struct Launchers {
  std::tuple<LaunchersOf<double, double>, LaunchersOf<float, float>, LaunchersOf<c10::Half, float>,
             LaunchersOf<c10::BFloat16, float>>
      of_dtypes;
  bool (*fits_upsampled)(int64_t num_classes, int64_t height, int64_t width,
                         bool is_double) = nullptr;
};

constexpr const char* kGetLaunchers = "oe_ext_get_launchers";

}  // namespace oe_ext
