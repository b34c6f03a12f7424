"""Deliberate bugs in what the CUDA kernels compute; see mutants.py."""

from mutants import ARGS, DEVICE, LABELS, MATHS, PIXELS, REDUCE, REDUCTION, ROWS, Mutant

MUTANTS_OF_MEANING = [
    Mutant(
        "the maximum is not subtracted",
        ROWS,
        "auto block = RowStats<acc_t>::with_max(max);",
        "auto block = RowStats<acc_t>::with_max(acc_t(0));",
    ),
    Mutant(
        "the uniform term is dropped",
        MATHS,
        "select(has_uniform, scale * row.uniform / num_classes, acc_t(0)),",
        "acc_t(0),",
    ),
    Mutant(
        "the label's exponential is as any other",
        MATHS,
        "cls == label ? exp_shifted - coefficients.at_label : exp_shifted;",
        "exp_shifted;",
    ),
    Mutant(
        "alpha weighs the inliers",
        ARGS,
        "weight_of(inlier, outlier, outlier ? alpha[row] : acc_t(0));",
        "weight_of(outlier, inlier, inlier ? alpha[row] : acc_t(0));",
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
        "+ (by_outliers ? num_outliers : 0);",
        ";",
    ),
    Mutant(
        "the groups' means share a count",
        ARGS,
        "kind == RowKind::kOutlier ? divisors.outliers : divisors.inliers);",
        "divisors.outliers);",
    ),
    Mutant(
        "rows that do not count leave what was there",
        PIXELS,
        "        store_vector(grad + grad_layout.class_offset(cls), result);",
        "        if (any_active) store_vector(grad + grad_layout.class_offset(cls), result);",
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
        "return this->grad_logits != nullptr && this->counts == nullptr &&",
        "return this->grad_logits != nullptr &&",
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
        DEVICE,
        "args.row_sum_exp[row], args.grad[row], args.divisors());",
        "args.row_sum_exp[row], args.grad[0], args.divisors());",
    ),
]
