"""pack and unpack: assignments <-> packed, blocks of 128 columns one after the other, whatever the rows."""

import triton
import triton.language as tl
from torch import Tensor

from ..packing import row_bytes
from .decode import LANES, index, load_planes
from .dequantize import UNITS, aligned, on_device, programs


@triton.jit
def _plane(fields, WIDTH: tl.constexpr, SHIFT: tl.constexpr):
    """Lanes [R, 16] of a plane WIDTH bits wide, int32, from the bits above SHIFT of the fields."""
    word = tl.zeros(fields[0].shape, tl.int32)
    for j in tl.static_range(8):
        word |= ((fields[j] >> SHIFT) & (2**WIDTH - 1)) << (j * WIDTH)
    return word


@triton.jit
def _store_plane(block, lanes, inside, WIDTH: tl.constexpr):
    lane = tl.arange(0, LANES)[None, :]
    if WIDTH == 4:
        tl.store(block.to(tl.pointer_type(tl.int32)) + lane, lanes, mask=inside)
    elif WIDTH == 2:
        tl.store(block.to(tl.pointer_type(tl.int16)) + lane, lanes.to(tl.int16), mask=inside)
    else:
        tl.store(block.to(tl.pointer_type(tl.int8)) + lane, lanes.to(tl.int8), mask=inside)


@triton.jit
def _load_field(block, column, inside, cols, j: tl.constexpr):
    lane = j * LANES + tl.arange(0, LANES)[None, :]
    return tl.load(block + lane, mask=inside & (column + lane < cols), other=0).to(tl.int32)


@triton.jit
def _place(rows, cols, UNITS: tl.constexpr):
    """The blocks of a program: number [U, 1], where its first index lies in the assignments, and its first column."""
    blocks = tl.cdiv(cols, 128)
    unit = (tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS))[:, None]
    column = unit % blocks * 128
    return unit, unit // blocks * cols + column, column, unit < rows * blocks


@triton.jit
def pack_kernel(assignments, packed, rows, cols, BITS: tl.constexpr, UNITS: tl.constexpr):
    """packed (rows, row_bytes) from assignments (rows, cols); columns past the end are index 0."""
    unit, start, column, inside = _place(rows, cols, UNITS)
    fields = (
        _load_field(assignments + start, column, inside, cols, 0),
        _load_field(assignments + start, column, inside, cols, 1),
        _load_field(assignments + start, column, inside, cols, 2),
        _load_field(assignments + start, column, inside, cols, 3),
        _load_field(assignments + start, column, inside, cols, 4),
        _load_field(assignments + start, column, inside, cols, 5),
        _load_field(assignments + start, column, inside, cols, 6),
        _load_field(assignments + start, column, inside, cols, 7),
    )
    to = packed + unit * (16 * BITS)
    if BITS >= 4:
        _store_plane(to, _plane(fields, 4, 0), inside, 4)
        to += 64
    if BITS == 8:
        _store_plane(to, _plane(fields, 4, 4), inside, 4)
    HIGH: tl.constexpr = BITS // 4 * 4  # where the bits of the 2-bit plane begin
    if BITS % 4 >= 2:
        _store_plane(to, _plane(fields, 2, HIGH), inside, 2)
        to += 32
    if BITS % 2 == 1:
        _store_plane(to, _plane(fields, 1, BITS - 1), inside, 1)


@triton.jit
def unpack_kernel(packed, assignments, rows, cols, BITS: tl.constexpr, UNITS: tl.constexpr):
    """assignments (rows, cols) from packed (rows, row_bytes)."""
    unit, start, column, inside = _place(rows, cols, UNITS)
    planes = load_planes(packed + tl.where(inside, unit, 0) * (16 * BITS), BITS, False)
    for j in tl.static_range(8):
        lane = j * LANES + tl.arange(0, LANES)[None, :]
        tl.store(assignments + start + lane, index(planes, j, BITS).to(tl.uint8), mask=inside & (column + lane < cols))


def pack(assignments: Tensor, bits: int) -> Tensor:
    """uint8 (..., cols) -> packed uint8 (..., row_bytes); see `kmq_kernels.ops.pack`."""
    assignments = assignments.contiguous()
    *batch, cols = assignments.shape
    out = assignments.new_empty((*batch, row_bytes(cols, bits)))
    if out.numel():
        rows = assignments.numel() // cols
        with on_device(assignments):
            pack_kernel[(programs(rows, cols),)](assignments, out, rows, cols, BITS=bits, UNITS=UNITS)
    return out


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """packed uint8 (..., row_bytes) -> uint8 (..., numel); see `kmq_kernels.ops.unpack`."""
    packed = aligned(packed)
    out = packed.new_empty((*packed.shape[:-1], numel))
    if out.numel():
        rows = out.numel() // numel
        with on_device(packed):
            unpack_kernel[(programs(rows, numel),)](packed, out, rows, numel, BITS=bits, UNITS=UNITS)
    return out
