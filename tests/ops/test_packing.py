import numpy as np
import pytest
import torch
from oracles import packed_bytes

import kmq_kernels as kmq
from kmq_kernels import packing, reference

BITS = range(1, 9)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (2, 128), (5, 129), (7, 400), (1, 768)])
def test_pack_matches_the_drawing_and_unpack_inverts_it(bits, shape):
    generator = torch.Generator().manual_seed(bits)
    assignments = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    expected = torch.from_numpy(packed_bytes(assignments.numpy(), bits))
    for op in (kmq, reference):
        packed = op.pack(assignments, bits)
        assert torch.equal(packed, expected)
        assert torch.equal(op.unpack(packed, bits, shape[1]), assignments)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0), (37,), (2, 3, 130)])
def test_any_leading_shape(bits, shape):
    assignments = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = kmq.pack(assignments, bits)
    assert packed.shape == (*shape[:-1], packing.row_bytes(shape[-1], bits))
    assert torch.equal(packed, reference.pack(assignments, bits))
    assert torch.equal(kmq.unpack(packed, bits, shape[-1]), assignments)


def test_not_contiguous():
    assignments = torch.randint(0, 8, (140, 6), dtype=torch.uint8).T
    packed = kmq.pack(assignments, 3)
    assert torch.equal(packed, kmq.pack(assignments.contiguous(), 3))
    wide = torch.stack([packed, packed], 1)[:, 0]
    assert torch.equal(kmq.unpack(wide, 3, 140), assignments)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"assignments: expected values below 4 for 2 bits, got 4"):
        kmq.pack(torch.tensor([4], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"bits: expected 1 to 8, got 9"):
        kmq.pack(torch.zeros(3, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=r"packed: expected 64 bytes a row"):
        kmq.unpack(torch.zeros(63, dtype=torch.uint8), 4, 100)
    with pytest.raises(TypeError, match=r"assignments: expected uint8"):
        kmq.pack(torch.zeros(3), 4)


def test_opcheck():
    assignments = torch.randint(0, 8, (3, 130), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.kmq.pack, (assignments, 3))
    torch.library.opcheck(torch.ops.kmq.unpack, (kmq.pack(assignments, 3), 3, 130))


def test_row_bytes_has_no_waste_beyond_the_block():
    assert [packing.row_bytes(768, bits) for bits in BITS] == [96 * bits for bits in BITS]
    assert np.prod(kmq.pack(torch.zeros(1, 129, dtype=torch.uint8), 5).shape) == 2 * 80


@pytest.mark.parametrize("bits", range(1, 9))
def test_take_is_unpack_at_single_places(bits):
    assignments = torch.randint(0, 2**bits, (7, 300), dtype=torch.uint8)
    row, col = torch.randint(0, 7, (90,)), torch.randint(0, 300, (90,))
    assert torch.equal(packing.take(packing.pack(assignments, bits), bits, row, col), assignments[row, col].long())
