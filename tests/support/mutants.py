"""Deliberate bugs in the CUDA kernels: how work is split and synchronised.

mutants_of_launch.py has those in the counts and the launchers, mutants_of_meaning.py those in what
is computed.

Each is a text that occurs once in its file and what replaces it. None is in any build but the one
that the tests make, to see it die.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str

    def plant(self, tree: Path) -> None:
        """Puts the bug into a copy of the sources."""
        file = tree / self.file
        text = file.read_text()
        assert text.count(self.old) == 1, f"{self.name}: its place in {self.file} has changed"
        file.write_text(text.replace(self.old, self.new))


DEVICE = "csrc/cuda/device.cuh"
UNITS = "csrc/cuda/units.cuh"
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
        "rows: two merges of one kind follow each other",
        ROWS,
        "max = team.merge(RowMax<acc_t>{max}).value;",
        "max = team.merge(team.merge(RowMax<acc_t>{max})).value;",
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
        UNITS,
        "* kWarpSize + lane;",
        "* kWarpSize + lane / 2;",
    ),
    Mutant(
        "stage: warps share their slots",
        UNITS,
        "reinterpret_cast<Piece*>(shared) + warp * capacity",
        "reinterpret_cast<Piece*>(shared) + warp * (capacity - 1)",
    ),
    Mutant(
        "rows: threads without a row leave before the barrier",
        ROWS,
        "    const bool exists = row < num_rows;\n",
        "    const bool exists = row < num_rows;\n    if (!exists) return;\n",
    ),
    Mutant(
        "rows: a team ends with its own last row",
        ROWS,
        "(row - team.index) < num_rows;",
        "row < num_rows;",
    ),
    Mutant(
        "rows: only active rows are merged",
        ROWS,
        "max = team.merge(RowMax<acc_t>{max}).value;",
        "max = active ? team.merge(RowMax<acc_t>{max}).value : max;",
    ),
    Mutant(
        "rows: the label is that of the row before",
        ROWS,
        "next_label = args.labels[row + team.row_step()];",
        "next_label = args.labels[row];",
    ),
    # Walks
    Mutant(
        "units: those that fill no group are dropped",
        UNITS,
        "    in_halves<kAtOnce / 2>(first, count, body);",
        "",
    ),
    Mutant(
        "units: a group too many",
        UNITS,
        "for (; first + kAtOnce <= count; first += kAtOnce)",
        "for (; first < count; first += kAtOnce)",
    ),
    Mutant(
        "units: the second part of a row overwrites the first one's sums",
        UNITS,
        "        rows[r].raise_to(max[r], first * (kSize / kRows));",
        "        rows[r] = RowSums<acc_t>();",
    ),
    Mutant(
        "units: the second part of a row keeps the first one's maximum",
        UNITS,
        "        rows[r].raise_to(max[r], first * (kSize / kRows));",
        "",
    ),
    Mutant(
        "units: as many classes as units",
        UNITS,
        "first * (kSize / kRows)",
        "first",
    ),
    Mutant(
        "units: the label is looked for in the first part alone",
        UNITS,
        "if (slot >= 0 && slot < n) {",
        "if (first == 0 && slot >= 0 && slot < n) {",
    ),
    Mutant(
        "rows: the classes that fill no vector are dropped",
        ROWS,
        "has_rest(kSize > 1 && rest < num_classes)",
        "has_rest(false)",
    ),
    Mutant(
        "rows: all begin at a 16-byte boundary",
        ROWS,
        "return static_cast<int>(-elements & (kSize - 1));",
        "return 0;",
    ),
    Mutant(
        "rows: the classes before the first unit are left to those after the last one",
        ROWS,
        "rest(team.lane < head ? team.lane : num_units * kSize + team.lane)",
        "rest(num_units * kSize + team.lane)",
    ),
    Mutant(
        "rows: a unit too many",
        ROWS,
        "(num_units - team.lane + team.lanes - 1) >> team.log_lanes",
        "(num_units - team.lane + team.lanes) >> team.log_lanes",
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
        "static_cast<int64_t>(blockIdx.x) * teams + index; }",
        "static_cast<int64_t>(blockIdx.x) * teams + index + 1; }",
    ),
    Mutant(
        "rows: the gradient goes where the logits' strides say",
        ROWS,
        "      scalar_t* grad = args.grad_logits + args.grad_layout.row_offset(row);",
        "      scalar_t* grad = args.grad_logits + args.layout.row_offset(row);",
    ),
    Mutant(
        "rows: a class that fills no unit is taken for the label",
        ROWS,
        "static_cast<scalar_t>(gradient(logit, rest == label));",
        "static_cast<scalar_t>(gradient(logit, true));",
    ),
    Mutant(
        "rows: every lane writes the row's sums",
        ROWS,
        "if (exists && team.lane == owner) {",
        "if (exists) {",
    ),
    Mutant(
        "rows: the first lane has every label",
        ROWS,
        "const int owner = cls >= 0 ? walk.owner(cls) : 0;",
        "const int owner = 0;",
    ),
    Mutant(
        "rows: the stage is not used",
        ROWS,
        "      } else if (fits) {",
        "      } else if (fits && row < 0) {",
    ),
    Mutant(
        "rows: neighbouring lanes are not on neighbouring units",
        ROWS,
        "layout.class_offset(head + static_cast<int64_t>(team.lane) * kSize),\n"
        "            layout.class_offset(static_cast<int64_t>(team.lanes) * kSize)};",
        "layout.class_offset(head + (num_units >> team.log_lanes) * team.lane * kSize +\n"
        "                std::min<int64_t>(num_units & (team.lanes - 1), team.lane) * kSize),\n"
        "            layout.class_offset(kSize)};",
    ),
    Mutant(
        "pixels: a lane's units are as far apart as its rows",
        PIXELS,
        "args.logits + layout.row_offset(first),\n"
        "                                         layout.class_stride};",
        "args.logits + layout.row_offset(first),\n"
        "                                         layout.inner_stride};",
    ),
    Mutant(
        "pixels: the grid's stride forgets the width",
        PIXELS,
        "    LabelPlace places[kSize];\n    bool any_read = false;",
        "    if (first / kSize >= grid_threads()) break;\n"
        "    LabelPlace places[kSize];\n    bool any_read = false;",
    ),
    Mutant(
        "pixels: the label of the first row for all of a vector",
        PIXELS,
        "args.labels.read(first, row_labels);  // again",
        "std::fill_n(row_labels, kSize, args.labels[first]);  // again",
    ),
    Mutant(
        "pixels: the place of the first row's label for all of a vector",
        PIXELS,
        "args.labels.read(first, row_labels);\n",
        "std::fill_n(row_labels, kSize, args.labels[first]);\n",
    ),
    Mutant(
        "pixels: statistics of the first row for all of a vector",
        PIXELS,
        "const auto sum_exp = static_cast<acc_t>(rows[k].sum_exp);",
        "const auto sum_exp = static_cast<acc_t>(rows[0].sum_exp);",
    ),
    Mutant(
        "pixels: the last row decides for all whether to look",
        PIXELS,
        "any_read |= kind ==",
        "any_read = kind ==",
    ),
    Mutant(
        "the label's part stays in the stage",
        UNITS,
        "if (gradients[r].counts() && labels[r].unit >= 0) {",
        "if (false) {",
    ),
    Mutant(
        "pixels: a NaN stays in the stage",
        PIXELS,
        "!gradients[k].counts() && std::isnan(rows[k].sum_exp);",
        "false;",
    ),
    Mutant(
        "sums: the last warp leaves none",
        DEVICE,
        "    if (partials.sums != nullptr) {",
        "    if (partials.sums != nullptr && threadIdx.x + kWarpSize < blockDim.x) {",
    ),
    Mutant(
        "offsets of rows in 32 bits",
        ARGS,
        "    if (num_outer == 1) {\n      return row * inner_stride;",
        "    if (num_outer == 1) {\n      return static_cast<int>(row * inner_stride);",
    ),
    Mutant(
        "offsets of classes in 32 bits",
        UNITS,
        "return data + unit * stride; }",
        "return data + static_cast<int>(unit * stride); }",
    ),
    Mutant(
        "offsets of images in 32 bits",
        ARGS,
        "return outer * outer_stride + (row - outer * num_inner) * inner_stride;",
        "return static_cast<int>(outer * outer_stride) + (row - outer * num_inner) * inner_stride;",
    ),
]
