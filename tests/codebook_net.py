"""A small network of this package's layers, for tests of training that start processes of their own."""

import types

import torch
import torch.nn.functional as F
from torch import nn

import kmq_kernels as kmq


class Net(nn.Module):
    """Only layers of this package, and operations of torch that give the same bits for any number of threads.

    Its product of matrices (MKL) and its layer_norm's weight gradient do not.
    """

    def __init__(self):
        super().__init__()
        self.embedding = kmq.CodebookEmbedding(2000, 256, 4, padding_idx=0)
        self.first = kmq.CodebookLinear(256, 700, 3)
        self.second = kmq.CodebookLinear(700, 256, 8, group_rows=8)
        self.head = kmq.CodebookLinear(256, 50, 2)
        generator = torch.Generator().manual_seed(7)
        for module in self.children():
            index = torch.randint(0, 2**module.bits, (module.rows, module.cols), dtype=torch.uint8, generator=generator)
            with torch.no_grad():
                module.packed.copy_(kmq.pack(index, module.bits))
                module.codebook.copy_(torch.randn(module.codebook.shape, generator=generator) * 0.06)

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids) * 10
        x = x + self.second(F.gelu(self.first(x)))
        x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0].mean(1)
        return types.SimpleNamespace(loss=F.cross_entropy(self.head(x), labels))
