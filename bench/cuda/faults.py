"""What no CUDA kernel may have in its machine code, and the instructions that each may take."""

from __future__ import annotations

from machine_code import Kernel

# Instructions an element: the goal of a kernel, or, where there is none, what it took plus a tenth.
# By kernel, dtype, and whether it moves 16 bytes at once.
BUDGETS = {
    ("forward_rows", "float", True): 14,
    ("forward_rows", "half", True): 14,
    ("forward_rows", "double", True): 84,
    ("forward_rows", "float", False): 20,
    ("forward_rows", "half", False): 23,
    ("forward_rows", "double", False): 75,
    ("forward_pixels", "float", True): 14,
    ("forward_pixels", "half", True): 14,
    ("forward_pixels", "double", True): 73,
    ("forward_pixels", "float", False): 20,
    ("forward_pixels", "half", False): 23,
    ("forward_pixels", "double", False): 76,
    ("backward_rows", "float", True): 14,
    ("backward_rows", "half", True): 14,
    ("backward_rows", "double", True): 86,
    ("backward_rows", "float", False): 19,
    ("backward_rows", "half", False): 22,
    ("backward_rows", "double", False): 75,
    ("backward_pixels", "float", True): 12,
    ("backward_pixels", "half", True): 13,
    ("backward_pixels", "double", True): 72,
    ("backward_pixels", "float", False): 18,
    ("backward_pixels", "half", False): 21,
    ("backward_pixels", "double", False): 73,
}

# Of upsampled logits: instructions of a pixel and class for the sum and the gradient together, by
# the side of a patch: with exponentials that are kept, and with those that are computed again; and
# how many more where every class is a pixel's label.
PATCH_BUDGETS = {4: {"kept": (12, 0), "again": (16.5, 5)}, 2: {"kept": (27, 0), "again": (39, 5)}}


def budget(kernel: Kernel) -> float:
    """Instructions an element that a kernel may take. sm_75 has neither bfloat16 nor registers
    enough, and sm_120 computes exponentials of doubles at length."""
    dtype = "half" if kernel.dtype == "bfloat16" else kernel.dtype
    factor = {("75", dtype): 1.6, ("120", "double"): 2.1}.get((kernel.architecture, dtype), 1)
    return factor * BUDGETS[kernel.name, dtype, kernel.width > 1]


def faults(kernels: list[Kernel]) -> list[str]:
    """Faults that no kernel may have: missing launch bounds, or a largest block that does not fit;
    spills or a stack; a loop over logits that is missing, or there twice; in a vector kernel, one
    that does not move 16 bytes at once; more instructions an element than the budget."""
    found = []
    for kernel in kernels:
        if kernel.max_threads == 0:
            found.append(f"{kernel}: no launch bounds")
        elif kernel.occupancy == 0:
            found.append(
                f"{kernel}: cannot be launched with {kernel.max_threads} threads of "
                f"{kernel.registers} registers"
            )
        if kernel.spills or kernel.stack:
            found.append(f"{kernel}: {kernel.spills} bytes spilled, {kernel.stack} of stack")
        found += [f"{kernel}: {fault}" for fault in _loop_faults(kernel)]
    return found


def _patch_faults(kernel: Kernel) -> list[str]:
    if kernel.dtype == "double":
        return []
    if kernel.patch is None:
        return ["no loops over the classes of a patch"]
    factor = 1.1 if kernel.architecture == "75" else 1
    found = []
    for kind, (allowed, of_label) in PATCH_BUDGETS[kernel.width].items():
        loops = getattr(kernel.patch, kind)
        count = (loops.sum + loops.gradient) / kernel.patch.pixels
        more = loops.label / kernel.patch.pixels
        if count > factor * allowed or more > factor * of_label:
            found.append(
                f"exponentials {kind}: {count:.1f} instructions a pixel and {more:.1f} more at a "
                f"label, of {factor * allowed:.1f} and {factor * of_label:.1f}"
            )
    return found


def _loop_faults(kernel: Kernel) -> list[str]:
    if kernel.is_upsampled:
        return _patch_faults(kernel)
    unexpected = [
        f"{len(loops)} loops that {kind}"
        for kind, loops in kernel.loops.items()
        if len(loops) != (kind in kernel.loop_kinds)
    ]
    if unexpected:
        return unexpected
    found = [
        f"the loop that {kind}s does not move 128 bits at once"
        for kind, loops in kernel.loops.items()
        if loops and kernel.width > 1 and not loops[0].is_wide
    ]
    if kernel.width and kernel.per_element() > budget(kernel):
        found.append(
            f"{kernel.per_element():.1f} instructions an element, of {budget(kernel):.1f} allowed"
        )
    return found
