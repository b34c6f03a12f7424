#include "launch.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <vector>

#include "tiles.h"

namespace oe_ext::cpu {
namespace {

// Below this many logits a second thread costs more than it brings.
constexpr int64_t kGrainElements = 32768;

// Runs body(tile) for every tile; returns the first row with an illegal label, or -1.
template <typename Args, typename Body>
int64_t for_each_tile(const Args& args, const Body& body) {
  const Tiling tiling(args.layout);
  const int64_t tile_elements = tiling.tile_rows * args.layout.num_classes;
  std::vector<int64_t> bad_rows(tiling.num_tiles, -1);
  at::parallel_for(0, tiling.num_tiles, std::max<int64_t>(1, kGrainElements / tile_elements),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t index = begin; index < end; ++index) {
                       Tile tile(args, tiling, index);
                       bad_rows[index] = tile.bad_row;
                       if (tile.bad_row < 0) {
                         body(tile);
                       }
                     }
                   });
  const auto bad = std::find_if(bad_rows.begin(), bad_rows.end(), [](int64_t r) { return r >= 0; });
  return bad == bad_rows.end() ? -1 : *bad;
}

}  // namespace

template <typename scalar_t, typename acc_t>
int64_t forward(const ForwardArgs<scalar_t, acc_t>& args) {
  return for_each_tile(args, [&](Tile& tile) { forward_tile(args, tile); });
}

template <typename scalar_t, typename acc_t>
int64_t backward(const BackwardArgs<scalar_t, acc_t>& args) {
  return for_each_tile(args, [&](Tile& tile) { backward_tile(args, tile); });
}

// Blocks of a fixed size, whose sums are added in their order.
template <typename acc_t>
void reduce(const ReduceArgs<acc_t>& args) {
  constexpr int64_t kBlockRows = 4096;
  const int64_t num_blocks = (args.num_rows + kBlockRows - 1) / kBlockRows;
  std::vector<GroupSums> blocks(num_blocks);
  at::parallel_for(0, num_blocks, kGrainElements / kBlockRows, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min((block + 1) * kBlockRows, args.num_rows);
      for (int64_t row = block * kBlockRows; row < last; ++row) {
        args.add_row(blocks[block], row);
      }
    }
  });
  GroupSums total;
  for (const GroupSums& block : blocks) {
    total.merge(block);
  }
  args.write(total);
}

#define OE_EXT_INSTANTIATE(scalar_t, acc_t)                           \
  template int64_t forward(const ForwardArgs<scalar_t, acc_t>& args); \
  template int64_t backward(const BackwardArgs<scalar_t, acc_t>& args)
OE_EXT_INSTANTIATE(double, double);
OE_EXT_INSTANTIATE(float, float);
OE_EXT_INSTANTIATE(c10::Half, float);
OE_EXT_INSTANTIATE(c10::BFloat16, float);
#undef OE_EXT_INSTANTIATE

template void reduce(const ReduceArgs<double>& args);
template void reduce(const ReduceArgs<float>& args);

}  // namespace oe_ext::cpu
