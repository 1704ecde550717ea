"""Many problems in one launch: a table of problems, and a list of tiles (problem, tile of it), both on the device.

A row of the table describes one problem, a contiguous run of values, by integers; an address is where its data starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of the table.
VALUES: tl.constexpr = tl.constexpr(0)  # address of the values
WEIGHT: tl.constexpr = tl.constexpr(1)  # address of the sample weights, fp32
OUT: tl.constexpr = tl.constexpr(2)  # address of the assignments, or of the packed rows
COUNT: tl.constexpr = tl.constexpr(3)  # values
COLS: tl.constexpr = tl.constexpr(4)  # columns of the matrix that the values are rows of
ALIGNED: tl.constexpr = tl.constexpr(5)  # 1 where whole blocks can be read and written in pieces of 16 bytes
FIRST: tl.constexpr = tl.constexpr(6)  # the first tile of the problem
FIELDS: tl.constexpr = tl.constexpr(8)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def address(table_ptr, problem, column: tl.constexpr, dtype: tl.constexpr, WHOLE: tl.constexpr = False):
    """The pointer in one column of the table; WHOLE: it is a multiple of 16."""
    pointer = tl.load(table_ptr + problem * FIELDS + column).to(tl.pointer_type(dtype))
    if WHOLE:  # said here: a hint on what a function returned is lost
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def number(table_ptr, problem, column: tl.constexpr):
    """The integer in one column of the table."""
    return tl.load(table_ptr + problem * FIELDS + column)


@dataclass(frozen=True)
class WorkList:
    """table (P, FIELDS) int64; problem, tile (T,) int32: which tile of which problem a program works on."""

    table: Tensor
    problem: Tensor
    tile: Tensor

    @property
    def tiles(self) -> int:
        return len(self.problem)


def tile_list(tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the number of tiles of each problem (P,): problem and tile of each program, and the first program of each problem."""
    first = torch.cumsum(tiles, 0) - tiles
    problem = torch.repeat_interleave(torch.arange(len(tiles)), tiles)
    return problem.int(), (torch.arange(len(problem)) - first[problem]).int(), first


def build(
    values: Sequence[Tensor],
    outs: Sequence[Tensor] | None,
    weights: Sequence[Tensor | None] | None,
    counts: Tensor,
    cols: Tensor,
    owner: Tensor,
    start: Tensor,
    out_start: Tensor,
    tiles: Tensor,
) -> WorkList:
    """The table of problems that start at element `start` of tensor `owner`, and their tiles, on the tensors' device.

    values: contiguous tensors; outs: uint8 tensors written, problem p from byte out_start[p] on. All others are int64 (P,).
    """
    table = torch.zeros(len(owner), FIELDS.value, dtype=torch.int64)
    item = values[0].element_size() if len(values) else 4
    pointers = torch.tensor([tensor.data_ptr() for tensor in values], dtype=torch.int64)
    table[:, VALUES.value] = pointers[owner] + start * item
    if weights is not None:
        pointers = torch.tensor([0 if w is None else w.data_ptr() for w in weights], dtype=torch.int64)
        table[:, WEIGHT.value] = pointers[owner] + start * 4
    if outs is not None:
        pointers = torch.tensor([tensor.data_ptr() for tensor in outs], dtype=torch.int64)
        table[:, OUT.value] = pointers[owner] + out_start
    table[:, COUNT.value], table[:, COLS.value] = counts, cols
    # Packed rows are read in blocks of 128 columns; bytes need no more than aligned ends.
    whole = (table[:, VALUES.value] | table[:, WEIGHT.value] | table[:, OUT.value]) % 16 == 0
    table[:, ALIGNED.value] = whole
    problem, tile, first = tile_list(tiles)
    table[:, FIRST.value] = first
    device = values[0].device if len(values) else torch.device("cpu")
    return WorkList(table.to(device), problem.to(device), tile.to(device))


def build_batch(values: Tensor, out: Tensor, weight: Tensor | None, tile: int) -> WorkList:
    """The work list of B contiguous rows (B, N) of equal length, made on their device: nothing is copied to it."""
    batch, n = values.shape
    row = torch.arange(batch, device=values.device)
    tiles = -(-n // tile)
    table = torch.zeros(batch, FIELDS.value, dtype=torch.int64, device=values.device)
    table[:, VALUES.value] = row * (n * values.element_size()) + values.data_ptr()
    table[:, OUT.value] = row * n + out.data_ptr()
    if weight is not None:
        table[:, WEIGHT.value] = row * (n * 4) + weight.data_ptr()
    table[:, COUNT.value] = table[:, COLS.value] = n
    whole = (table[:, VALUES.value] | table[:, OUT.value] | table[:, WEIGHT.value]) % 16 == 0
    table[:, ALIGNED.value] = whole
    table[:, FIRST.value] = row * tiles
    program = torch.arange(batch * tiles, device=values.device)
    return WorkList(table, (program // max(tiles, 1)).int(), (program % max(tiles, 1)).int())
