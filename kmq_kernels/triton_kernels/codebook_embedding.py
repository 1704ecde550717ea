"""codebook_embedding: gathers and decodes the rows asked for, and no others."""

from torch import Tensor

from .dequantize import decode_rows


def codebook_embedding(ids: Tensor, packed: Tensor, codebook: Tensor, cols: int, group_rows: int, padding_idx: int) -> Tensor:
    """Rows `ids` of the weight, (*ids.shape, cols); see `kmq_kernels.ops.codebook_embedding`.

    An id out of range is told as torch.nn.functional.embedding tells it on CUDA: by an assertion on the device, without waiting
    for it here. Nothing outside `packed` is read.
    """
    flat = ids.reshape(-1).contiguous()
    return decode_rows(flat, packed, codebook, cols, group_rows, codebook.dtype).view(*ids.shape, cols)
