"""Deliberate bugs in the CUDA kernels of upsampled logits; see mutants.py."""

from __future__ import annotations

from mutants import Mutant

CELLS = "csrc/cuda/upsampled_cells.cuh"
PATCHES = "csrc/cuda/upsampled_patches.cuh"
UPSAMPLED = "csrc/cuda/upsampled.cuh"
LAUNCH = "csrc/cuda/launch_upsampled_cuda.cu"
RESIZE = "csrc/core/resize.h"

MUTANTS_OF_UPSAMPLED = [
    # Synchronisation and shared memory
    Mutant(
        "upsampled: warps read each other's values before they are there",
        CELLS,
        "    __syncthreads();\n    for (int r = 0; r < kCount / kSize; ++r) {\n      Vector",
        "    for (int r = 0; r < kCount / kSize; ++r) {\n      Vector",
    ),
    Mutant(
        "upsampled: warps write the next values while others read",
        CELLS,
        "    __syncthreads();\n  }\n\n  int warp;",
        "  }\n\n  int warp;",
    ),
    Mutant(
        "upsampled: gradients are added before all rows are finished",
        UPSAMPLED,
        "  __syncthreads();\n}\n\n// One patch",
        "}\n\n// One patch",
    ),
    Mutant(
        "upsampled: every warp finishes every row",
        CELLS,
        "return r % num_warps == warp;",
        "return r < kSize;",
    ),
    Mutant(
        "upsampled: memory for a class too few",
        CELLS,
        "kPatchBytes + num_classes * of_class;",
        "kPatchBytes + (num_classes - 1) * of_class;",
    ),
    Mutant(
        "upsampled: a band's first rows have room for a band too few",
        LAUNCH,
        "args.num_images * plan.num_bands * args.num_classes()",
        "args.num_images * (plan.num_bands - 1) * args.num_classes()",
    ),
    # Columns, bands and elements
    Mutant(
        "upsampled: a warp counts its neighbour's column, too",
        UPSAMPLED,
        "is_own(exists && lane < kOwnColumns)",
        "is_own(exists)",
    ),
    Mutant(
        "upsampled: the last column of a warp is not the next one's first",
        CELLS,
        "kOwnColumns = kWarpSize - 1",
        "kOwnColumns = kWarpSize",
    ),
    Mutant(
        "upsampled: an element lacks the cells on its right",
        PATCHES,
        "return right + __shfl_down_sync(kFullMask, all - right, 1);",
        "return right + 0 * __shfl_down_sync(kFullMask, all - right, 1);",
    ),
    Mutant(
        "upsampled: bands overwrite the rows that they share",
        UPSAMPLED,
        "if (i == 0 && column.band > 0) {",
        "if (false) {",
    ),
    Mutant(
        "upsampled: shared rows are added one too low",
        UPSAMPLED,
        "band * plan.band_cells - 1)[cls",
        "band * plan.band_cells)[cls",
    ),
    Mutant(
        "upsampled: the last row of a band is not written",
        UPSAMPLED,
        "      write_row(element(first_cell + band_cells - 1), args.grad.class_stride);",
        "      write_row(nullptr, 0);",
    ),
    Mutant(
        "upsampled: the uniform gradient below is forgotten at the next cell",
        UPSAMPLED,
        "uniform = {uniform.below, 0};",
        "uniform = {0, 0};",
    ),
    Mutant(
        "upsampled: the first element's pixels weigh the one before it",
        CELLS,
        "return is_first ? acc_t(1)",
        "return is_first ? acc_t(0)",
    ),
    Mutant(
        "upsampled: a cell begins a pixel late",
        RESIZE,
        "(distance + step() - 1) / step();",
        "distance / step() + 1;",
    ),
    # What is computed
    Mutant(
        "upsampled: no guard against small sums",
        PATCHES,
        "sum_exp[i] >= kMinSum<acc_t> ? 0u : 1u;",
        "sum_exp[i] >= acc_t(0) ? 0u : 1u;",
    ),
    Mutant(
        "upsampled: the guard sees one lane",
        PATCHES,
        "merge_lanes(is_small, kWarpSize).any",
        "is_small.any",
    ),
    Mutant(
        "upsampled: warps have maxima of their own",
        CELLS,
        "    memory.merge_warps(largest, [](acc_t a, acc_t b) { return std::fmax(a, b); });\n",
        "",
    ),
    Mutant(
        "upsampled: logits are not shifted",
        UPSAMPLED,
        "corners.max = std::fmax(max_above, max_below);",
        "corners.max = 0;",
    ),
    Mutant(
        "upsampled: what is more than both steps is left out",
        PATCHES,
        "terms[3] = std::fma(x[3] - x[2], kUnit, -terms[1]);",
        "terms[3] = 0;",
    ),
    Mutant(
        "upsampled: the mean is the sum",
        UPSAMPLED,
        "acc_t(1) / (args.rows.num_classes() * Pixels::kUnit)",
        "acc_t(1) / Pixels::kUnit",
    ),
    Mutant(
        "upsampled: the logit at the label has another unit",
        UPSAMPLED,
        "Pixels::at(below, right, pixels.terms) / Pixels::kUnit - pixel.max",
        "Pixels::at(below, right, pixels.terms) - pixel.max",
    ),
    Mutant(
        "upsampled: a row's gradient lies a row too low",
        PATCHES,
        "static_cast<acc_t>(kSize - 1 - r) * value",
        "static_cast<acc_t>(kSize - r) * value",
    ),
    Mutant(
        "upsampled: labels beyond 15 are not looked for",
        PATCHES,
        "1u << (labels.values[k] % 32)",
        "1u << (labels.values[k] % 16)",
    ),
    Mutant(
        "upsampled: NaN reaches the neighbours of a pixel that does not count",
        PATCHES,
        "return factor != acc_t(0) ? exp : acc_t(0);",
        "return exp;",
    ),
    Mutant(
        "upsampled: an element without weight may make its pixel NaN",
        PATCHES,
        "return weight == acc_t(0) ? first : weight == acc_t(1) ? second : both;",
        "return both;",
    ),
    Mutant(
        "upsampled: the last of the largest classes",
        PATCHES,
        "logit < max.values[k] ? argmax.values[k] : std::fmin(argmax.values[k], number);",
        "logit < max.values[k] ? argmax.values[k] : number;",
    ),
    Mutant(
        "upsampled: a single class has the loss of its roundings",
        UPSAMPLED,
        "wants_max || num_classes == 1",
        "wants_max",
    ),
    Mutant(
        "upsampled: the backward takes an upstream gradient of 1",
        UPSAMPLED,
        "pixel.sum_exp, rows.grad[pixel.row],",
        "pixel.sum_exp, acc_t(1),",
    ),
    # Exponentials that are kept
    Mutant(
        "upsampled: kept exponentials lack the label's part",
        UPSAMPLED,
        "memory.exps.at(cls * kSize + r, k) -= gradient.at_label;",
        "",
    ),
    Mutant(
        "upsampled: the label's part goes to the pixel's neighbour",
        UPSAMPLED,
        "memory.exps.at(cls * kSize + r, k) -=",
        "memory.exps.at(cls * kSize + r, kSize - 1 - k) -=",
    ),
    Mutant(
        "upsampled: kept exponentials lie over the gradients of the last class",
        CELLS,
        "exps(shared + bytes(num_warps, num_classes, /*keeps_exps=*/false), kSize, 0),",
        "exps(shared + bytes(num_warps, num_classes - 1, /*keeps_exps=*/false), kSize, 0),",
    ),
    Mutant(
        "upsampled: classes keep their exponentials in one place",
        PATCHES,
        "memory.exps.put(cls * kSize + r, exps[r]);",
        "memory.exps.put(memory.warp * kSize + r, exps[r]);",
    ),
    Mutant(
        "upsampled: exponentials are kept where there is no room",
        LAUNCH,
        "kMinKeepingBlocks * kept_bytes <= max_stage_bytes() + kOtherSharedBytes",
        "true",
    ),
    # The launcher
    Mutant(
        "upsampled: a block of twice the threads",
        LAUNCH,
        "wanted, 1, kMaxUpsampledThreads / kWarpSize);",
        "wanted, 1, 2 * kMaxUpsampledThreads / kWarpSize);",
    ),
    Mutant(
        "upsampled: the loss is not written without bands",
        LAUNCH,
        "if (plan.first_rows == 0 && output.loss == nullptr) {",
        "if (plan.first_rows == 0) {",
    ),
]
