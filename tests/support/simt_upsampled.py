"""Small cases of upsampled logits, for simt_cases.py: together they take every way through their
kernels and launchers."""

from __future__ import annotations

from typing import Any

import torch
from inputs import DTYPES

# Shapes of the logits, and the size of the target.
MAPS: list[dict[str, Any]] = [
    # patches of 4 x 4: one a cell, four a cell with two warps, several and four warps
    {"shape": (2, 5, 3, 4), "size": (12, 16)},
    {"shape": (1, 17, 2, 3), "size": (9, 13), "align_corners": True},
    {"shape": (1, 33, 4, 3), "size": (14, 14)},
    # of 2 x 2
    {"shape": (1, 17, 4, 3), "size": (8, 6)},
    {"shape": (1, 18, 3, 2), "size": (4, 12), "align_corners": True},
    # several bands, and more columns than a warp has
    {"shape": (1, 3, 5, 20), "size": (20, 80)},
    # edges alone; a single class
    {"shape": (1, 3, 1, 1), "size": (5, 3)},
    {"shape": (1, 3, 1, 2), "size": (1, 7), "align_corners": True},
    {"shape": (1, 1, 3, 2), "size": (9, 8)},
    {"shape": (1, 1, 3, 2), "size": (6, 4)},
]
ONE_WARP, WARPS, FINE, BANDS = MAPS[0], MAPS[2], MAPS[3], MAPS[5]

# Enough for the least that a patch of these needs, and too little to keep exponentials.
LITTLE_MEMORY = {"max_stage_bytes": 28 * 1024}


def make_upsampled_cases() -> list[dict[str, Any]]:
    """The arguments of each."""
    cases = []
    for number, walk in enumerate(MAPS):
        for index, dtype in enumerate(DTYPES):
            unit = {**walk, "dtype": dtype, "upstream": 1.0, "direct": dtype == torch.float16}
            both = [
                {**unit, "reduction": ["mean", "group_mean", "sum"][number % 3]},
                {**walk, "dtype": dtype, "reduction": "none"},
            ]
            # in other dtypes than float32 they take turns, but of a single class
            takes_both = dtype == torch.float32 or walk["shape"][1] == 1
            cases += both if takes_both else [both[(number + index) % 2]]
    for walk in (ONE_WARP, WARPS):
        one = {**walk, "upstream": 1.0}
        # what pixels are, and what they weigh
        cases += [{**one, "mix": mix} for mix in ("inliers", "outliers", "ignored")]
        cases += [{**one, "alpha": alpha} for alpha in ("zero", "scalar", "rows")]
        cases += [{**walk, "alpha": alpha, "reduction": "none"} for alpha in ("zero", "rows")]
        cases += [{**one, "weighted": True}, {**one, "smoothing": 0.1}]
        cases += [{**walk, "weighted": True, "reduction": "none"}]
        cases += [{**one, "blocks": True}, {**one, "layout": "channels_last"}]
        cases += [{**one, "label_dtype": torch.uint8, "mix": "inliers"}]
        # counts and the backward's ways
        cases += [{**one, "counts": (7.5, 4)}, {**walk, "upstream": 0.3, "retain": True}]
        # offsets, which cancel; both sides of the guard
        cases += [{**one, "offset": 1e4}]
        for steep in (54.0, 62.0, 100.0):
            cases += [{**one, "steep": steep}, {**walk, "steep": steep, "reduction": "none"}]
        cases += [{**one, "statistics": True, "huge": huge} for huge in (0.0, 60.0)]
        cases += [{**one, "statistics": True, "poison": True}]
    for walk in (ONE_WARP, WARPS, FINE, BANDS):
        one = {**walk, "upstream": 1.0}
        cases += [{**one, "forward": True}, {**one, "limits": {"max_blocks": 1}}]
        cases += [{**walk, "reduction": "none", "limits": {"max_blocks": 1}}]
    # exponentials that are computed once more
    for walk in (ONE_WARP, WARPS, FINE):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            one = {**walk, "dtype": dtype, "limits": LITTLE_MEMORY}
            cases.append({**one, "upstream": 1.0, "direct": dtype == torch.float16})
            cases.append({**one, "reduction": "none"})
        one = {**walk, "upstream": 1.0, "limits": LITTLE_MEMORY}
        cases += [{**one, "blocks": True}, {**one, "weighted": True}, {**one, "huge": 60.0}]
    # the careful way
    for walk in (ONE_WARP, WARPS, FINE):
        for dtype in DTYPES:
            one = {**walk, "upstream": 1.0, "dtype": dtype, "direct": dtype == torch.float16}
            of_each = {**walk, "dtype": dtype, "reduction": "none"}
            cases += [{**one, "huge": 60.0, "reduction": "group_mean"}, {**of_each, "huge": 60.0}]
            if walk == ONE_WARP or dtype == torch.float32:
                cases.append({**one, "statistics": True})
            if dtype == torch.float32:
                cases += [{**one, "poison": True, "alpha": "zero"}, {**of_each, "poison": True}]
    # offsets beyond 32 bits
    far = {"dtype": torch.bfloat16, "layout": "far_classes", "mix": "inliers", "upstream": 1.0}
    cases.append({"shape": (1, 2, 2, 3), "size": (8, 12), **far})
    # as many warps as a block may have
    cases.append({"shape": (1, 70, 2, 2), "size": (7, 8), "upstream": 1.0})
    return cases
