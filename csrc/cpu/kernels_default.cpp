// The kernels for every processor of the architecture: SSE2 on x86-64.
#include "levels.h"

namespace oe_ext::cpu {
constexpr int kVectorBytes = 16;
}

#include "tile_kernels.h"

namespace oe_ext::cpu {
const Kernels kKernelsDefault = make_kernels();
}
