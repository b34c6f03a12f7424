"""Deliberate bugs in what the CUDA kernels compute; see mutants.py."""

from mutants import (
    ARGS,
    DEVICE,
    LABELS,
    MATHS,
    PIXELS,
    REDUCE,
    REDUCTION,
    ROWS,
    UNITS,
    Mutant,
)

MUTANTS_OF_MEANING = [
    Mutant(
        "the maximum is not subtracted",
        UNITS,
        "const acc_t shifted = unit.values[k] - rows[k % kRows].max;",
        "const acc_t shifted = unit.values[k];",
    ),
    Mutant(
        "the exponential has another base",
        DEVICE,
        "return power(x * kLogOfE<acc_t>);",
        "return power(x);",
    ),
    Mutant(
        "exponentials in the stage are relative to the lane's maximum",
        ROWS,
        "            merge_max(max[0]);\n",
        "",
    ),
    Mutant(
        "the sum of shifted logits is a float",
        UNITS,
        "  double sum_shifted = 0;",
        "  acc_t sum_shifted = 0;",
    ),
    Mutant(
        "NaN counts in rows that do not",
        UNITS,
        "counts ? std::numeric_limits<acc_t>::infinity() : acc_t(0)};",
        "std::numeric_limits<acc_t>::infinity()};",
    ),
    Mutant(
        "the uniform term is dropped",
        MATHS,
        "select(has_uniform, uniform, acc_t(0)),",
        "acc_t(0),",
    ),
    Mutant(
        "the label's exponential is as any other",
        MATHS,
        "(is_label ? exp_shifted - at_label : exp_shifted)",
        "exp_shifted",
    ),
    Mutant(
        "alpha weighs the inliers",
        ARGS,
        "inlier ? class_weights[label] : acc_t(0), outlier ? alpha[row] : acc_t(0));",
        "inlier ? alpha[row] : acc_t(0), outlier ? acc_t(1) : acc_t(0));",
    ),
    Mutant(
        "outliers are looked for before ignored rows",
        LABELS,
        "return has_ignore_index & (label == ignore_index);",
        "return has_ignore_index & (label == ignore_index) & (label >= 0);",
    ),
    Mutant(
        "the mean counts the inliers alone",
        REDUCTION,
        "+ (by_outliers ? group.outliers : 0);",
        ";",
    ),
    Mutant(
        "a mean of nothing stays a sum",
        REDUCTION,
        "return members != 0 ? members : std::numeric_limits<double>::infinity();",
        "return members != 0 ? members : 1;",
    ),
    Mutant(
        "the groups' means share a count",
        DEVICE,
        "return kind == RowKind::kOutlier ? outliers : inliers;",
        "return outliers;",
    ),
    Mutant(
        "rows that do not count leave what was there",
        PIXELS,
        "      write_zeros<kSize>(num_classes, grad_units);",
        "",
    ),
    Mutant(
        "the backward takes every upstream gradient for 1",
        ARGS,
        "return has_unit_gradient && grad[0] == acc_t(1); }",
        "return has_unit_gradient; }",
    ),
    Mutant(
        "the backward never finds itself done",
        ARGS,
        "return has_unit_gradient && grad[0] == acc_t(1); }",
        "return false; }",
    ),
    Mutant(
        "counts that were given divide the gradient alone",
        REDUCE,
        "output.write(sums, rule, counts, num_rows);",
        "output.write(sums, rule, nullptr, num_rows);",
    ),
    Mutant(
        "counts that were given divide the loss alone",
        ARGS,
        "           this->counts == nullptr && this->divisor_rule.counts();",
        "           this->divisor_rule.counts();",
    ),
    Mutant(
        "a part's labels are counted from the first of all classes",
        LABELS,
        "return label - first_class + (label < first_class ? num_classes : label_t(0));",
        "return label;",
    ),
    Mutant(
        "a label of another part is looked for here",
        ARGS,
        "return cls < layout.num_classes ? cls : int64_t(-1);",
        "return cls;",
    ),
    Mutant(
        "a part's outliers are uniform over the part",
        ARGS,
        "return static_cast<acc_t>(labels.rule.num_classes);",
        "return static_cast<acc_t>(layout.num_classes);",
    ),
    Mutant(
        "the upstream gradient is the first row's",
        UNITS,
        "args.row_sum_exp[row], args.grad[row], divisor)",
        "args.row_sum_exp[row], args.grad[0], divisor)",
    ),
    # Class weights
    Mutant(
        "class weights: not in the counts that divide the forward's gradient",
        DEVICE,
        "inlier_weight += static_cast<double>(class_weights[label]);",
        "inlier_weight += 1;",
    ),
    Mutant(
        "class weights: not in the counts that divide the loss",
        REDUCE,
        "  if (partials.counts != nullptr) {",
        "  if (false) {",
    ),
    Mutant(
        "class weights: not in the gradient",
        ARGS,
        "const acc_t scale = row.weight * upstream / divisor;",
        "const acc_t scale = (row.label == acc_t(0) ? row.weight : acc_t(1)) * upstream / divisor;",
    ),
    Mutant(
        "class weights: not in the loss",
        MATHS,
        "select(row.counts, row.weight * cross_entropy, acc_t(0))",
        "select(row.counts, (row.label != acc_t(0) ? acc_t(1) : row.weight) * cross_entropy, "
        "acc_t(0))",
    ),
    Mutant(
        "class weights: one for each row",
        ARGS,
        "inlier ? class_weights[label]",
        "inlier ? class_weights[row]",
    ),
    Mutant(
        "class weights: an inlier without weight does not count",
        MATHS,
        "inlier | (weight != acc_t(0))",
        "weight != acc_t(0)",
    ),
    Mutant(
        "class weights: without a gradient, nobody counts",
        DEVICE,
        "(partials.counted || !is_first)",
        "true",
    ),
    Mutant(
        "class weights: every label counts 1 where blocks count for themselves",
        DEVICE,
        "class_weights.data != nullptr ? counts.inlier_weight : ",
        "",
    ),
    # Label smoothing
    Mutant(
        "smoothing: of outliers, too",
        MATHS,
        "select(outlier, acc_t(1), acc_t(0))), counts};",
        "select(outlier, smoothed.label, acc_t(0))), counts};",
    ),
    Mutant(
        "smoothing: no uniform part in the gradient",
        MATHS,
        "row.counts & (row.uniform != acc_t(0));",
        "row.counts & (row.uniform == acc_t(1));",
    ),
    Mutant(
        "smoothing: no uniform part in the loss",
        MATHS,
        "select(row.uniform != acc_t(0), row.uniform * mean_shifted, acc_t(0));",
        "select(row.uniform == acc_t(1), row.uniform * mean_shifted, acc_t(0));",
    ),
    Mutant(
        "smoothing: the part at the label stays whole",
        MATHS,
        "return {acc_t(1) - label_smoothing, label_smoothing};",
        "return {acc_t(1), label_smoothing};",
    ),
    Mutant(
        "smoothing: the gradient is reduced at the label by all of the exponential",
        MATHS,
        "row.label * sum_exp};",
        "(row.label != acc_t(0) ? sum_exp : acc_t(0))};",
    ),
]
