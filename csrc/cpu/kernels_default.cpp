// The kernels for every processor of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "baseline.h"

namespace oe_ext::cpu {
constexpr int kSquareBytes = 16;
}

#include "tile_kernels.h"

namespace oe_ext::cpu {
constinit const Kernels kKernelsDefault = make_kernels();
}
