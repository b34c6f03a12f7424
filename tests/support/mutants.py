"""Deliberate bugs in the CUDA kernels and launchers: how work is split, synchronised and launched.
mutants_of_meaning.py has those in what is computed.

Each is a text that occurs once in its file and what replaces it. None is in any build but the one
that the tests make, to see it die.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str


DEVICE = "csrc/cuda/device.cuh"
ROWS = "csrc/cuda/rows.cuh"
PIXELS = "csrc/cuda/pixels.cuh"
REDUCE = "csrc/cuda/reduce.cuh"
LAUNCH = "csrc/cuda/launch_cuda.cu"
ARGS = "csrc/core/kernel_args.h"
MATHS = "csrc/core/row_math.h"
LABELS = "csrc/core/labels.h"
REDUCTION = "csrc/core/reduction.h"

MUTANTS_OF_WORK = [
    # Synchronisation and shared memory
    Mutant(
        "merge_block: no barrier before the results are read",
        DEVICE,
        "  __syncthreads();\n  T other;",
        "  T other;",
    ),
    Mutant(
        "merge_block: no barrier before the next call",
        DEVICE,
        "  value = merge_lanes(other, kWarpSize);\n  __syncthreads();",
        "  value = merge_lanes(other, kWarpSize);",
    ),
    Mutant(
        "merge_block: every lane writes its warp's result",
        DEVICE,
        "if (lane == 0) {\n    std::memcpy(results",
        "{\n    std::memcpy(results",
    ),
    Mutant(
        "merge_block: a result too many is read",
        DEVICE,
        "if (lane < num_warps)",
        "if (lane <= num_warps)",
    ),
    Mutant(
        "merge_block: warps overlap in shared memory",
        DEVICE,
        "results + warp * kWords, &value",
        "results + warp, &value",
    ),
    Mutant(
        "merge_lanes: the last step of the butterfly is left out",
        DEVICE,
        "for (int mask = lanes / 2; mask > 0;",
        "for (int mask = lanes / 2; mask > 1;",
    ),
    Mutant(
        "shuffle: half of the lanes in the mask",
        DEVICE,
        "kFullMask = 0xffffffffu",
        "kFullMask = 0x0000ffffu",
    ),
    Mutant(
        "stage: threads share their slots",
        DEVICE,
        "return slot * blockDim.x + threadIdx.x;",
        "return slot * blockDim.x + threadIdx.x / 2;",
    ),
    Mutant(
        "stage: its stride is a warp",
        DEVICE,
        "return slot * blockDim.x + threadIdx.x;",
        "return slot * kWarpSize + threadIdx.x;",
    ),
    Mutant(
        "rows: threads without a row leave before the barrier",
        ROWS,
        "    const bool exists = row < num_rows;\n",
        "    const bool exists = row < num_rows;\n    if (!exists) return;\n",
    ),
    Mutant(
        "rows: only active rows are merged",
        ROWS,
        "      stats = lane_stats<kSize, acc_t>(x, args.layout, walk, stage);\n    }\n"
        "    stats = team.merge(stats);",
        "      stats = lane_stats<kSize, acc_t>(x, args.layout, walk, stage);\n"
        "      stats = team.merge(stats);\n    }",
    ),
    # Walks
    Mutant(
        "rows: the classes that fill no vector are dropped",
        ROWS,
        "has_rest(rest < num_classes)",
        "has_rest(false)",
    ),
    Mutant(
        "rows: a unit too many",
        ROWS,
        "      if (walk.unit(step + i) < walk.num_units) {\n        units[i] = load_unit",
        "      if (walk.unit(step + i) <= walk.num_units) {\n        units[i] = load_unit",
    ),
    Mutant(
        "rows: blocks step by threads, not by teams",
        ROWS,
        "static_cast<int64_t>(gridDim.x) * teams; }",
        "static_cast<int64_t>(gridDim.x) * blockDim.x; }",
    ),
    Mutant(
        "rows: blocks start one row late",
        ROWS,
        "static_cast<int64_t>(blockIdx.x) * teams; }",
        "static_cast<int64_t>(blockIdx.x) * teams + 1; }",
    ),
    Mutant(
        "rows: the gradient goes where the logits' strides say",
        ROWS,
        "x, args.layout, args.grad_logits + args.grad_layout.row_offset(row), args.grad_layout,",
        "x, args.layout, args.grad_logits + args.layout.row_offset(row), args.grad_layout,",
    ),
    Mutant(
        "rows: a tail that is not scaled",
        ROWS,
        "static_cast<scalar_t>(gradient(x, walk.rest));",
        "static_cast<scalar_t>(std::exp(x - gradient.max));",
    ),
    Mutant(
        "rows: every lane writes the row's sums",
        ROWS,
        "if (exists && team.lane == 0) {",
        "if (exists) {",
    ),
    Mutant(
        "rows: each unit is read twice",
        ROWS,
        "stage.keeps() ? stage.get(step + i)\n",
        "false ? stage.get(step + i)\n",
    ),
    Mutant(
        "rows: neighbouring lanes are not on neighbouring units",
        ROWS,
        "return lane + step * lanes; }",
        "return lane * ((num_units + lanes - 1) / lanes) + step < num_units && "
        "step < (num_units + lanes - 1) / lanes ? lane * ((num_units + lanes - 1) / lanes) + step "
        ": num_units; }",
    ),
    Mutant(
        "pixels: the last class is dropped",
        PIXELS,
        "  for (int64_t begin = 0; begin < layout.num_classes; begin += kAtOnce) {\n"
        "    Vector<scalar_t, kSize> units[kAtOnce];\n    for (int i = 0; i < kAtOnce; ++i) {\n"
        "      if (begin + i < layout.num_classes) {",
        "  for (int64_t begin = 0; begin < layout.num_classes; begin += kAtOnce) {\n"
        "    Vector<scalar_t, kSize> units[kAtOnce];\n    for (int i = 0; i < kAtOnce; ++i) {\n"
        "      units[i] = {};\n      if (begin + i + 1 < layout.num_classes) {",
    ),
    Mutant(
        "pixels: the grid's stride forgets the width",
        PIXELS,
        "    int64_t cls[kSize];",
        "    if (first / kSize >= grid_threads()) break;\n    int64_t cls[kSize];",
    ),
    Mutant(
        "pixels: the label of the first row for all of a vector",
        PIXELS,
        "const int64_t label = args.labels[first + k];",
        "const int64_t label = args.labels[first];",
    ),
    Mutant(
        "pixels: statistics of the first row for all of a vector",
        PIXELS,
        "args.row_gradient(coefficients[k], cls[k], kind[k], stats[k].max,",
        "args.row_gradient(coefficients[k], cls[k], kind[k], stats[0].max,",
    ),
    Mutant(
        "pixels: the first row decides for all whether to look",
        PIXELS,
        "any_active |= args.is_active(coefficients[k], kind[k]);",
        "any_active = args.is_active(coefficients[0], kind[0]);",
    ),
    Mutant(
        "pixels: no sum is left by the last warp",
        PIXELS,
        "    sums = merge_block(sums);\n    if (threadIdx.x == 0) {\n      partials.sums",
        "    sums = merge_lanes(sums, kWarpSize);\n"
        "    if (threadIdx.x == 0) {\n      partials.sums",
    ),
    Mutant(
        "offsets of rows in 32 bits",
        ARGS,
        "    if (num_outer == 1) {\n      return row * inner_stride;",
        "    if (num_outer == 1) {\n      return static_cast<int>(row * inner_stride);",
    ),
    Mutant(
        "offsets of classes in 32 bits",
        ARGS,
        "return cls * class_stride; }",
        "return static_cast<int>(cls * class_stride); }",
    ),
    Mutant(
        "offsets of images in 32 bits",
        ARGS,
        "return outer * outer_stride + (row - outer * num_inner) * inner_stride;",
        "return static_cast<int>(outer * outer_stride) + (row - outer * num_inner) * inner_stride;",
    ),
    # Reduction
    Mutant(
        "counts: a block counts every row",
        REDUCE,
        "for (int64_t row = grid_thread(); row < num_rows; row += grid_threads())",
        "for (int64_t row = threadIdx.x; row < num_rows; row += blockDim.x)",
    ),
    Mutant(
        "counts: rows beyond the grid are not counted",
        REDUCE,
        "row < num_rows; row += grid_threads())",
        "row < num_rows; row += num_rows)",
    ),
    Mutant(
        "loss: every thread writes it",
        REDUCE,
        "  if (threadIdx.x == 0) {\n    output.write",
        "  {\n    output.write",
    ),
    Mutant(
        "partials: the last one is not added",
        DEVICE,
        "i < num_partials; i +=",
        "i < num_partials - 1; i +=",
    ),
    # Launchers
    Mutant(
        "launch: rows are taken for aligned whatever their stride",
        LAUNCH,
        "layout.num_inner == 1 || layout.inner_stride % kSize == 0;\n  return layout.class_stride",
        "true;\n  return layout.class_stride",
    ),
    Mutant(
        "launch: the base pointer's alignment is not looked at",
        LAUNCH,
        "% kVectorBytes == 0;\n}",
        "% sizeof(scalar_t) == 0;\n}",
    ),
    Mutant(
        "launch: pixels are taken for aligned whatever their number",
        LAUNCH,
        "layout.num_inner % kSize == 0 && outer &&",
        "outer &&",
    ),
    Mutant(
        "launch: strided classes are read as vectors",
        LAUNCH,
        "return layout.class_stride == 1 && outer",
        "return outer",
    ),
    Mutant(
        "launch: the stage is half as large as needed",
        LAUNCH,
        "const int64_t bytes = units_per_thread * threads * unit_bytes;",
        "const int64_t bytes = units_per_thread * threads * unit_bytes / 2;",
    ),
    Mutant(
        "launch: too few lanes for the classes that fill no vector",
        LAUNCH,
        "lanes = static_cast<int>(unit_size);",
        "lanes = 1;",
    ),
    Mutant(
        "launch: the counts of the first block stand for all",
        LAUNCH,
        "  if (num_rows > 0) {\n    partials.num_sums",
        "  partials.num_counts = partials.num_counts > 0;\n"
        "  if (num_rows > 0) {\n    partials.num_sums",
    ),
    Mutant(
        "launch: the vector kernels are never chosen",
        LAUNCH,
        "  return aligned(args.logits, args.layout) &&",
        "  return false && aligned(args.logits, args.layout) &&",
    ),
    Mutant(
        "launch: a launcher looks at the counts",
        LAUNCH,
        "  if (num_rows > 0) {\n    partials.num_sums",
        "  if (args.output.counts != nullptr) args.output.counts[0] = 0;\n"
        "  if (num_rows > 0) {\n    partials.num_sums",
    ),
    Mutant(
        "launch: no gradient in the forward's stage",
        LAUNCH,
        "const bool staged = args.grad_logits != nullptr && plan.fits_stage;",
        "const bool staged = false;",
    ),
    Mutant(
        "launch: long rows get more threads than the launch bounds",
        LAUNCH,
        "threads = lanes = kMaxRowsThreads;",
        "threads = lanes = 2 * kMaxRowsThreads;",
    ),
]
