// The CPU kernels. Each works on one tile of rows. A tile lies within one `outer` index, and its
// size depends only on the layout and the dtype: therefore the bits of a result do not depend on
// the number of threads.
//
// The kernels are compiled once per instruction set (kernels_*.cpp); launch_cpu.cpp chooses one.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../core/upsampled_args.h"
#include "tiling.h"
#include "upsampling.h"

namespace oe_ext::cpu {

// The result of one task. The shape alone determines the tasks; their results are merged in order.
struct TaskResult {
  int64_t bad_row = -1;  // the first row with an illegal label
  GroupSums sums;
};

template <typename scalar_t, typename acc_t>
struct TileKernels {
  TaskResult (*count_rows)(const Labels& labels, const ClassWeights<acc_t>& class_weights,
                           int64_t begin, int64_t end);
  // `scratch` is aligned to 64 bytes and holds Tiling::scratch_size() elements.
  TaskResult (*forward)(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                        int64_t tile, const GroupDivisors& divisors, acc_t* scratch);
  TaskResult (*backward)(const BackwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                         int64_t tile, acc_t* scratch);
  // The bands of upsampled maps. `partial` is a row [class][column], for the gradient of the row of
  // elements that a band shares with the band before. `scratch` is as large as BandMemory, and
  // holds zeros, but for what other bands of the same map left of it.
  TaskResult (*upsampled_forward)(const UpsampledForwardArgs<scalar_t, acc_t>& args,
                                  const Upsampling<acc_t>& cuts, int64_t task,
                                  const GroupDivisors& divisors, acc_t* partial, acc_t* scratch);
  TaskResult (*upsampled_backward)(const UpsampledBackwardArgs<scalar_t, acc_t>& args,
                                   const Upsampling<acc_t>& cuts, int64_t task,
                                   const GroupDivisors& divisors, acc_t* partial, acc_t* scratch);
};

struct Kernels {
  TileKernels<float, float> of_float;
  TileKernels<double, double> of_double;
  TileKernels<c10::Half, float> of_half;
  TileKernels<c10::BFloat16, float> of_bfloat16;

  template <typename scalar_t>
  const auto& of() const {
    if constexpr (std::is_same_v<scalar_t, double>) {
      return of_double;
    } else if constexpr (std::is_same_v<scalar_t, c10::Half>) {
      return of_half;
    } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      return of_bfloat16;
    } else {
      return of_float;
    }
  }
};

extern const Kernels kKernelsDefault;  // for every processor of the architecture
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

}  // namespace oe_ext::cpu
