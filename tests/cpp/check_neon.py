"""Fails if a loop of the CPU kernels has lost its NEON vectors.

    aarch64-linux-gnu-objdump -dC PROGRAM | python check_neon.py

They are counted by their fused multiply-adds, in float or double, of which an exponential has 9 or
14, a logarithm 7 or 13, and a gradient 1. The remainders of loops, and a compiler's further copies,
only add to them.
"""

import re
import sys

LEAST = {
    # A long row: 16 logits at once, then 8, and the last 8.
    "forward_tile<.*float>": ("4s", 32 // 4 * 9),
    "forward_tile<double, double>": ("2d", 32 // 2 * 14),
    "backward_tile<.*float>": ("4s", 9 + 1),
    "backward_tile<double, double>": ("2d", 14 + 1),
    # Classes of a tile, with a spread of the smoothing and without: two at once, and the last.
    r"add_exponentials<\w+, float>": ("4s", 3 * 9),
    r"add_exponentials<\w+, double>": ("2d", 3 * 14),
    "finish_rows<.*float>": ("4s", 7),
    "finish_rows<double, double>": ("2d", 13),
    "finish_gradients<.*float>": ("4s", 1),
    "finish_gradients<double, double>": ("2d", 1),
}

functions = re.findall(r"^\w+ <(.*)>:\n((?:.+\n)*)", sys.stdin.read(), re.MULTILINE)
for pattern, (lanes, least) in LEAST.items():
    vectors = {
        name: len(re.findall(rf"\tfmla\tv\d+\.{lanes},", code))
        for name, code in functions
        if re.search(rf"::{pattern}\(", name)
    }
    if not vectors or min(vectors.values()) < least:
        sys.exit(f"fewer than {least} times fmla .{lanes} in {pattern}: {vectors}")
