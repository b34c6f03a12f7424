// The source that nvcc compiles, for the CPU. This file alone is compiled with -fsanitize=thread.
#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
// c10 before CUDA's names
#include "simt.h"
// the launchers, and the kernels with them
#include "../../csrc/cuda/launch.cu"
#include "launchers.h"

extern "C" __attribute__((visibility("default"))) const oe_ext::Launchers* oe_ext_get_launchers() {
  static const oe_ext::Launchers launchers;
  return &launchers;
}
