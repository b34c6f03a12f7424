"""The tables of bench/RESULTS.md and README.md, from the CSV files."""

from __future__ import annotations

import math
import re
from itertools import groupby
from pathlib import Path

import traffic
import upsampled
from cases import GOALS
from measured import Measured, group_cases
from results import (
    AVX2_CSV,
    MEMORY_CSV,
    ROOT,
    SECTION_CSVS,
    TIMES_CSV,
    MemoryRow,
    TimeRow,
    parse_shape,
    read,
)
from tables import Score, markdown, marked, number, shape_label, spread, variant

PAGE = ROOT / "bench" / "RESULTS.md"
README = ROOT / "README.md"

OTHERS = ("dtypes", "layouts", "targets", "reductions")


def plain_table(rows: list[TimeRow]) -> str:
    """The output of a run: each rival's time over ours, with half the interquartile range."""
    cases = group_cases(rows)
    names = list(dict.fromkeys(row.rival for row in rows if row.rival != "ours"))
    header = ["section", "shape", "dtype", "variant", *(f"{name} / ours" for name in names)]
    lines = [header]
    for case in cases:
        first = case.case
        label = [first.section, first.shape, first.dtype, variant(case)]
        lines.append(label + [spread(case, name) for name in names])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def goal_table(cases: list[Measured]) -> str:
    score = Score()
    lines = []
    for case in cases:
        goals = GOALS[case.shape]
        line = [
            shape_label(case),
            score.at_least(case, "pytorch-ood", goals.pytorch_ood),
            score.at_least(case, "compiled", goals.compiled),
            score.at_least(case, "cross_entropy", goals.cross_entropy),
        ]
        for name, goal in [("clone", goals.clone), ("sum", goals.sum)]:
            ratio = case.ours_over(name)
            line.append(score.at_most(number(ratio), ratio, goal))
        lines.append(line)
    header = ["shape", *(f"{name} / ours" for name in ("pytorch-ood", "compiled", "cross_entropy"))]
    return score.table([*header, "ours / clone", "ours / sum"], lines)


def other_table(cases: list[Measured]) -> str:
    lines = [
        [
            shape_label(case),
            case.case.dtype,
            case.case.layout,
            case.case.target_dtype,
            case.case.reduction,
            marked(case, "cross_entropy"),
            marked(case, "pytorch-ood"),
            marked(case, "compiled"),
            number(case.ours_over("clone")),
            number(case.ours_over("sum")),
        ]
        for case in cases
    ]
    header = ["shape", "dtype", "layout", "target", "reduction", "cross_entropy / ours"]
    header += ["pytorch-ood / ours", "compiled / ours", "ours / clone", "ours / sum"]
    return markdown(header, lines)


def options_table(cases: list[Measured]) -> str:
    """Class weights and label smoothing, on and off."""

    def over(case: Measured, name: str, floor: str) -> str:
        row, base = case.find(name), case.find(floor)
        return number(row.median_us / base.median_us) if row and base else ""

    lines = [
        [
            shape_label(case),
            over(case, "weight", "off"),
            over(case, "label_smoothing", "off"),
            over(case, "ours", "off"),
            over(case, "cross_entropy off", "off"),
            over(case, "cross_entropy", "ours"),
        ]
        for case in cases
    ]
    header = ["shape", "weight / off", "label_smoothing / off", "both / off"]
    header += ["cross_entropy / ours, off", "cross_entropy / ours, both"]
    return markdown(header, lines)


def inference_table(cases: list[Measured]) -> str:
    lines = [
        [
            shape_label(case),
            marked(case, "pytorch-ood"),
            marked(case, "cross_entropy"),
            number(case.ours_over("sum")),
        ]
        for case in cases
    ]
    return markdown(["shape", "pytorch-ood / ours", "cross_entropy / ours", "ours / sum"], lines)


def thread_table(cases: list[Measured]) -> str:
    counts = sorted({row.threads for case in cases for row in case.rows})
    lines = []
    for case in cases:
        line = [shape_label(case)]
        for count in counts[1:]:
            for name in ("ours", "clone"):
                alone, together = (case.find(name, threads) for threads in (counts[0], count))
                assert alone is not None
                assert together is not None
                line.append(number(alone.median_us / together.median_us))
        lines.append(line)
    header = [f"{name}, {count} threads" for count in counts[1:] for name in ("ours", "clone")]
    return markdown(["shape", *header], lines)


def memory_table(rows: list[MemoryRow]) -> str:
    def label(row: MemoryRow) -> str:
        size = f" to {parse_shape(row.size)}" if row.size else ""
        return f"{parse_shape(row.shape)}{size}"

    names = list(dict.fromkeys(row.rival for row in rows))
    groups = groupby(rows, label)
    lines = [[name, *(f"{row.ratio:.2f}" for row in group)] for name, group in groups]
    return markdown(["shape", *names], lines)


def case_bytes(case: Measured, rival: str) -> int:
    """By the byte model; 0 for a rival without one."""
    first = case.case
    return traffic.model_bytes(
        rival,
        case.shape,
        first.dtype,
        first.target_dtype,
        first.reduction,
        first.direction == "inference",
    )


def model_bytes(case: Measured) -> int:
    """Forward and backward on the CPU, which write a loss for each position, too."""
    return case_bytes(case, "ours") + 4 * (math.prod(case.shape) // case.shape[1])


def roofline_table(cases: list[Measured]) -> str:
    lines = []
    for case in cases:
        ours, clone = case.find("ours"), case.find("clone")
        assert ours is not None
        assert clone is not None
        copied = case_bytes(case, "clone") / clone.median_us  # MB/s
        moved = model_bytes(case) / ours.median_us
        lines.append(
            [
                shape_label(case),
                case.case.dtype,
                case.case.reduction,
                number(model_bytes(case) / 1e6),
                number(moved / 1e3),
                number(copied / 1e3),
                f"{100 * moved / copied:.0f} %",
            ]
        )
    header = ["shape", "dtype", "reduction", "MB by the model", "ours, GB/s", "clone, GB/s"]
    return markdown([*header, "attained"], lines)


def readme_table(cases: list[Measured], facts: dict[str, str]) -> str:
    header = ["logits, float32", "pytorch-ood", "`torch.compile`", "`F.cross_entropy`"]
    lines = [
        [
            shape_label(case),
            *(number(case.over_ours(name)) for name in ("pytorch-ood", "compiled")),
            number(case.over_ours("cross_entropy")),
        ]
        for case in cases
    ]
    machine = f"({facts['CPU']}, {facts['CPU kernels']} kernels, {facts['threads']} threads)"
    return f"{markdown(header, lines)}\n\n{machine}"


def rewrite(path: Path, section: str, text: str) -> None:
    """Replaces the text between the two comments that name a section."""
    page = path.read_text()
    begin, end = f"<!-- {section} -->", f"<!-- end {section} -->"
    pattern = re.compile(f"{begin}\n.*?{end}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise RuntimeError(f"{path} must hold the section {section!r} once")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page))


def write_pages() -> None:
    """Rewrites the tables and the plots."""
    import plots  # needs matplotlib, which printing a table does not

    facts, rows = read(TIMES_CSV, TimeRow)
    newer = {name: read(path, TimeRow) for name, path in SECTION_CSVS.items() if path.exists()}
    rows = [row for row in rows if row.section.split()[0] not in newer]
    for _, own_rows in newer.values():
        rows += own_rows
    cases = group_cases(rows)

    def of(*sections: str) -> list[Measured]:
        return [case for case in cases if case.case.section in sections]

    moved = [
        case
        for case in of("goals", "dtypes", "reductions")
        if case.case.section != "reductions" or case.case.reduction == "none"
    ]
    tables: dict[str, str] = {
        "provenance": "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "goals": goal_table(of("goals")),
        "others": other_table(of(*OTHERS)),
        "options": options_table(of("options")),
        "inference": inference_table(of("inference")),
        "threads": thread_table(of("threads")),
        "roofline": roofline_table(moved),
    }
    if of("upsampled"):
        tables["upsampled"] = upsampled.goal_table(of("upsampled"))
        tables["upsampled forms"] = upsampled.forms_table(of("upsampled forms"))
        plots.draw_upsampled(of("upsampled scales"), of("upsampled classes"))
    if AVX2_CSV.exists():
        newer["avx2"] = read(AVX2_CSV, TimeRow)
        tables["avx2"] = goal_table(group_cases(newer["avx2"][1]))
    for section, (own, _) in newer.items():
        level = f"{own['CPU']}, {own['CPU kernels']} kernels"
        tables[section] += f"\n\n`{own['command']}`, {level}, commit {own['commit']}."
    plots.draw_speed(of("goals"))
    plots.draw_curves(of("rows"), of("classes"))
    if MEMORY_CSV.exists():
        _, memory_rows = read(MEMORY_CSV, MemoryRow)
        of_loss = [row for row in memory_rows if not row.size]
        tables["memory"] = memory_table(of_loss)
        plots.draw_memory(of_loss)
        if len(of_loss) < len(memory_rows):
            tables["upsampled memory"] = memory_table([row for row in memory_rows if row.size])
    for section, table in tables.items():
        rewrite(PAGE, section, table)
    if "<!-- bench -->" in README.read_text():
        rewrite(README, "bench", readme_table(of("goals"), facts))
