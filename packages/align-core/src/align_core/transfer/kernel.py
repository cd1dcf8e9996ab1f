"""The Triton kernel of `checksums`. Importing it needs Triton, which comes with CUDA builds of torch."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def row_hashes(matrix, rows, hashes, totals, width, stride, step, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    """One program a row: sum of (e + 1)(step c + start) over its columns c, and sum of (e + 1), both int64.

    Args:
        matrix: signed integers, rows `stride` elements apart, `width` of them each.
        rows: int64 [R], the rows to read.
        hashes, totals: int64 [R], the results.
    """
    program = tl.program_id(0)
    base = matrix + tl.load(rows + program) * stride
    lanes = tl.arange(0, BLOCK)
    hashed = tl.zeros([BLOCK], tl.int64)
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, width, BLOCK):
        column = first + lanes
        element = tl.load(base + column, mask=column < width, other=-1).to(tl.int64) + 1
        hashed += element * (column.to(tl.int64) * step + start)
        total += element
    tl.store(hashes + program, tl.sum(hashed, axis=0))
    tl.store(totals + program, tl.sum(total, axis=0))
