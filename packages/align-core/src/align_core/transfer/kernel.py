"""The Triton kernel of `checksums`. Importing it needs Triton, which comes with CUDA builds of torch."""

import triton
import triton.language as tl

_NUMBERS = tl.constexpr(10)  # of a run; see checksums._row


@triton.jit(do_not_specialize=["first", "every"])  # type: ignore[untyped-decorator]  # else samples 0 and 1 compile anew
def add_rows(  # type: ignore[no-untyped-def]  # noqa: PLR0917
    run_of_program, turn_of_program, runs, addresses, sums, first, every, step, start,
    NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: adds its share of the weight's checksum, see `checksums`, to the weight's sum.

    Args:
        run_of_program, turn_of_program: int32 [P], the run and the how manieth of its chosen rows each program adds.
        runs: int64 [R, 10] tensor, slot, local row and column, row and column in the weight, rows, width, columns of
            the weight, whether only rows r with r % every == first are chosen.
        addresses: int64 [T, 2], address and elements a row of each tensor.
        sums: int64 [S], added to.
        NARROW: elements have 2 bytes, else 4.
    """
    program = tl.program_id(0)
    run = runs + tl.load(run_of_program + program).to(tl.int64) * _NUMBERS
    turn = tl.load(turn_of_program + program).to(tl.int64)
    tensor, slot = tl.load(run), tl.load(run + 1)
    local_row, local_column = tl.load(run + 2), tl.load(run + 3)
    top, left = tl.load(run + 4), tl.load(run + 5)
    rows, width, columns = tl.load(run + 6), tl.load(run + 7), tl.load(run + 8)
    if tl.load(run + 9) != 0:
        turn = turn * every + ((first - top) % every + every) % every  # % keeps the sign of its first operand
    if turn < rows:
        address = tl.load(addresses + 2 * tensor)
        offset = (local_row + turn) * tl.load(addresses + 2 * tensor + 1) + local_column
        if NARROW:
            base = address.to(tl.pointer_type(tl.int16)) + offset
        else:
            base = address.to(tl.pointer_type(tl.int32)) + offset
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        hashed = tl.zeros([BLOCK], tl.int64)
        total = tl.zeros([BLOCK], tl.int64)
        for done in range(0, width, BLOCK):
            column = done + lanes
            element = tl.load(base + column, mask=column < width, other=-1).to(tl.int64) + 1
            hashed += element * (column * step + start)
            total += element
        place = (columns * (top + turn) + left) * step
        tl.atomic_add(sums + slot, tl.sum(hashed, axis=0) + place * tl.sum(total, axis=0))
