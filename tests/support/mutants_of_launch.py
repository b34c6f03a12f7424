"""Deliberate bugs in the counts, the reduction and the launchers; see mutants.py."""

from mutants import DEVICE, LAUNCH, REDUCE, Mutant

MUTANTS_OF_LAUNCH = [
    # Reduction
    Mutant(
        "counts: a block counts every row",
        REDUCE,
        "count_labels(labels, class_weights, num_rows, grid_thread(), grid_threads());",
        "count_labels(labels, class_weights, num_rows, threadIdx.x, blockDim.x);",
    ),
    Mutant(
        "counts: rows beyond the grid are not counted",
        DEVICE,
        "row < num_rows; row += threads)",
        "row < num_rows; row += num_rows)",
    ),
    Mutant(
        "counts: labels that fill no 16 bytes are not counted",
        DEVICE,
        "int64_t row = num_units * labels_per_unit + thread;",
        "int64_t row = num_rows / labels_per_unit * labels_per_unit + thread;",
    ),
    Mutant(
        "counts: labels begin at a 16-byte boundary",
        DEVICE,
        "const int64_t num_units = aligned ? num_rows / labels_per_unit : 0;",
        "const int64_t num_units = num_rows / labels_per_unit;",
    ),
    Mutant(
        "counts: narrow labels lose their sign",
        DEVICE,
        "return is_unsigned ? static_cast<int64_t>(top >> (64 - bits))",
        "return true ? static_cast<int64_t>(top >> (64 - bits))",
    ),
    Mutant(
        "counts: the second half of 16 bytes is the first",
        DEVICE,
        "position < 64 ? unit.values[0] : unit.values[1];",
        "unit.values[0];",
    ),
    Mutant(
        "counts: one of four loads is counted",
        DEVICE,
        "bit < 8 * kVectorBytes && first + i * threads < num_units;",
        "bit < 8 * kVectorBytes && i == 0;",
    ),
    Mutant(
        "counts: no block leaves those that all have counted",
        DEVICE,
        "  if (is_first && threadIdx.x == 0) {",
        "  if (false) {",
    ),
    Mutant(
        "counts: every block leaves them",
        DEVICE,
        "  if (is_first && threadIdx.x == 0) {",
        "  if (threadIdx.x == 0) {",
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
        "launch: rows are taken for aligned alike whatever their strides",
        LAUNCH,
        "return size > 1 && (stride - other) % kSize != 0;",
        "return false;",
    ),
    Mutant(
        "launch: the rows' base pointers are not looked at",
        LAUNCH,
        "distance % kVectorBytes == 0 &&",
        "",
    ),
    Mutant(
        "launch: the pixels' base pointer is not looked at",
        LAUNCH,
        "reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0;",
        "reinterpret_cast<std::uintptr_t>(data) % sizeof(scalar_t) == 0;",
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
        "return x.class_stride == 1;",
        "return true;",
    ),
    Mutant(
        "launch: the stage of rows is half as large as needed",
        LAUNCH,
        "plan.blocks, plan.threads, capacity * plan.threads * kUnitBytes,",
        "plan.blocks, plan.threads, capacity * plan.threads * kUnitBytes / 2,",
    ),
    Mutant(
        "launch: the stage of pixels is half as large as needed",
        LAUNCH,
        "blocks, threads, capacity * threads * kUnitBytes,",
        "blocks, threads, capacity * threads * kUnitBytes / 2,",
    ),
    Mutant(
        "launch: the stage never holds a whole row",
        LAUNCH,
        "wants && units_per_thread <= room",
        "false",
    ),
    Mutant(
        "launch: wide pixels whose classes do not fit the stage",
        LAUNCH,
        "(args.grad_logits == nullptr || 2 * wide_bytes <= stage_bytes);",
        "true;",
    ),
    Mutant(
        "launch: too few lanes for the classes that fill no vector",
        LAUNCH,
        "lanes() < 2 * (unit_size - 1) ||",
        "",
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
        "return rows_are_aligned_alike(args) &&",
        "return false && rows_are_aligned_alike(args) &&",
    ),
    Mutant(
        "launch: a launcher looks at the counts",
        LAUNCH,
        "  if (num_rows > 0) {\n    partials.num_sums",
        "  if (args.output.counts != nullptr) args.output.counts[0] = 0;\n"
        "  if (num_rows > 0) {\n    partials.num_sums",
    ),
    Mutant(
        "launch: a block is larger than its team",
        LAUNCH,
        "      threads = lanes();",
        "      threads = 2 * lanes();",
    ),
    Mutant(
        "launch: long rows get more threads than the launch bounds",
        LAUNCH,
        "log_lanes = layout.num_classes <= kMaxBlockClasses ? kLogBlockTeam : kLogMaxRowsThreads;",
        "log_lanes = kLogMaxRowsThreads + 1;",
    ),
]
