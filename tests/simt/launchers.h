// The launchers of one compiled copy of csrc/cuda, which a library of its own holds: deliberately
// wrong copies can be loaded beside the right one.
#pragma once

#include <tuple>

#include "../../csrc/cuda/launch_cuda.h"

namespace oe_ext {

template <typename scalar_t, typename acc_t>
struct LauncherPair {
  void (*forward)(const ForwardArgs<scalar_t, acc_t>&, void* scratch, cuda::Stream) = nullptr;
  void (*backward)(const BackwardArgs<scalar_t, acc_t>&, cuda::Stream) = nullptr;

  static constexpr LauncherPair compiled() {
    return {cuda::forward<scalar_t, acc_t>, cuda::backward<scalar_t, acc_t>};
  }
};

using Launchers = std::tuple<LauncherPair<double, double>, LauncherPair<float, float>,
                             LauncherPair<c10::Half, float>, LauncherPair<c10::BFloat16, float>>;

constexpr const char* kGetLaunchers = "oe_ext_get_launchers";

}  // namespace oe_ext
