// The kernels of the CPU, one tile of rows at a time. A tile lies within one `outer` index, and
// its size depends on the shape alone: that is why the bits of a result do not depend on the
// number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "../kernel_args.h"

namespace oe_ext::cpu {

constexpr int64_t kMaxTileRows = 256;
constexpr int64_t kTileElements = 16384;  // of logits; their statistics stay in the L1 cache

struct Tiling {
  explicit Tiling(const RowLayout& layout)
      : tile_rows(std::clamp<int64_t>(kTileElements / std::max<int64_t>(layout.num_classes, 1),
                                      layout.rows_are_closest() ? 16 : 1, kMaxTileRows)),
        tiles_per_outer((layout.num_inner + tile_rows - 1) / tile_rows),
        num_tiles(layout.num_outer * tiles_per_outer),
        num_inner(layout.num_inner) {}

  int64_t begin(int64_t tile) const {
    return tile / tiles_per_outer * num_inner + tile % tiles_per_outer * tile_rows;
  }
  int64_t end(int64_t tile) const {
    return std::min(begin(tile) + tile_rows, (tile / tiles_per_outer + 1) * num_inner);
  }

  int64_t tile_rows;
  int64_t tiles_per_outer;
  int64_t num_tiles;
  int64_t num_inner;
};

// The rows of one tile, with what their labels mean.
struct Tile {
  template <typename Args>
  Tile(const Args& args, const Tiling& tiling, int64_t index)
      : first_row(tiling.begin(index)), size(tiling.end(index) - first_row) {
    for (int64_t i = 0; i < size; ++i) {
      label[i] = args.labels[first_row + i];
      kind[i] = args.labels.rule.kind(label[i]);
      if (kind[i] == RowKind::kInvalid && bad_row < 0) {
        bad_row = first_row + i;
      }
    }
  }

  int64_t first_row;
  int64_t size;
  int64_t bad_row = -1;  // the first with no legal label
  std::array<int64_t, kMaxTileRows> label;
  std::array<RowKind, kMaxTileRows> kind;
  std::array<bool, kMaxTileRows> active;  // does this row's loss depend on its logits?
};

// Calls f(i, cls) for the active rows i of a tile and the classes of a range, along memory.
template <typename Function>
void for_each_logit(const RowLayout& layout, const Tile& tile, int64_t class_begin,
                    int64_t class_end, const Function& f) {
  if (layout.rows_are_closest()) {
    for (int64_t cls = class_begin; cls < class_end; ++cls) {
      for (int64_t i = 0; i < tile.size; ++i) {
        f(i, cls);  // an inactive row costs less than a branch, and nothing reads its result
      }
    }
  } else {
    for (int64_t i = 0; i < tile.size; ++i) {
      for (int64_t cls = class_begin; tile.active[i] && cls < class_end; ++cls) {
        f(i, cls);
      }
    }
  }
}

template <typename acc_t>
using TileStats = std::array<RowStats<acc_t>, kMaxTileRows>;

// Adds the logits of a range of classes to sums that start out empty and know their maximum. The
// halves of a long range are summed apart: the error of a sum of C terms then grows with
// kClassBlock + log2(C), not with C. The walk over memory stays in its order.
template <typename acc_t, typename Load>
void add_classes(const RowLayout& layout, const Tile& tile, int64_t begin, int64_t end,
                 const Load& load, TileStats<acc_t>& stats) {
  if (end - begin <= kClassBlock) {
    for_each_logit(layout, tile, begin, end,
                   [&](int64_t i, int64_t cls) { stats[i].add(load(i, cls)); });
    return;
  }
  const int64_t middle = begin + (end - begin) / 2;
  TileStats<acc_t> second_half;
  for (int64_t i = 0; i < tile.size; ++i) {
    second_half[i] = RowStats<acc_t>::below(stats[i].max);
  }
  add_classes(layout, tile, begin, middle, load, stats);
  add_classes(layout, tile, middle, end, load, second_half);
  for (int64_t i = 0; i < tile.size; ++i) {
    stats[i].merge(second_half[i]);
  }
}

// Writes the gradients of a tile: zeros where a row does not count.
template <typename Args, typename acc_t>
void write_gradients(const Args& args, Tile& tile,
                     const std::array<RowGradient<acc_t>, kMaxTileRows>& gradients) {
  using scalar_t = std::remove_pointer_t<decltype(args.grad_logits)>;
  const RowLayout& layout = args.layout;
  const RowLayout& grad_layout = args.grad_layout;
  const scalar_t* logits = args.logits + layout.row_offset(tile.first_row);
  scalar_t* grad_logits = args.grad_logits + grad_layout.row_offset(tile.first_row);
  tile.active.fill(true);
  for_each_logit(layout, tile, 0, layout.num_classes, [&](int64_t i, int64_t cls) {
    const auto x = static_cast<acc_t>(logits[i * layout.inner_stride + layout.class_offset(cls)]);
    grad_logits[i * grad_layout.inner_stride + grad_layout.class_offset(cls)] =
        static_cast<scalar_t>(gradients[i](x, cls));
  });
}

// Reads a tile for the maxima, then, from cache, for the sums, then for the gradient if it is asked
// for.
template <typename scalar_t, typename acc_t>
void forward_tile(const ForwardArgs<scalar_t, acc_t>& args, Tile& tile, GroupCounts counts,
                  GroupSums& sums) {
  const RowLayout& layout = args.layout;
  const scalar_t* logits = args.logits + layout.row_offset(tile.first_row);
  const auto load = [&](int64_t i, int64_t cls) {
    return static_cast<acc_t>(logits[i * layout.inner_stride + layout.class_offset(cls)]);
  };
  for (int64_t i = 0; i < tile.size; ++i) {
    tile.active[i] = args.is_active(tile.first_row + i, tile.kind[i]);
  }

  TileStats<acc_t> stats;
  for_each_logit(layout, tile, 0, layout.num_classes, [&](int64_t i, int64_t cls) {
    const acc_t x = load(i, cls);
    stats[i].max = stats[i].raised_by(x) ? x : stats[i].max;
  });
  add_classes(layout, tile, 0, layout.num_classes, load, stats);
  for (int64_t i = 0; i < tile.size; ++i) {
    const int64_t row = tile.first_row + i;
    sums.add(tile.kind[i], args.write_row(row, tile.label[i], tile.kind[i], stats[i]));
  }
  if (args.grad_logits != nullptr) {
    std::array<RowGradient<acc_t>, kMaxTileRows> gradients;
    for (int64_t i = 0; i < tile.size; ++i) {
      gradients[i] =
          args.row_gradient(tile.first_row + i, tile.label[i], tile.kind[i], stats[i], counts);
    }
    write_gradients(args, tile, gradients);
  }
}

template <typename scalar_t, typename acc_t>
void backward_tile(const BackwardArgs<scalar_t, acc_t>& args, Tile& tile) {
  std::array<RowGradient<acc_t>, kMaxTileRows> gradients;
  for (int64_t i = 0; i < tile.size; ++i) {
    gradients[i] = args.row_gradient(tile.first_row + i, tile.label[i], tile.kind[i]);
  }
  write_gradients(args, tile, gradients);
}

}  // namespace oe_ext::cpu
