"""Weight matrices (rows, cols) that the benchmarks run on: every embedding and linear layer but the classifier."""


def encoder(layers: int, hidden: int, intermediate: int) -> list[tuple[int, int]]:
    one = [(hidden, hidden)] * 4 + [(intermediate, hidden), (hidden, intermediate)]
    return one * layers


BERT_BASE = [(30522, 768), (512, 768), (2, 768), *encoder(12, 768, 3072), (768, 768)]
MPNET_BASE = [(30527, 768), (514, 768), *encoder(12, 768, 3072), (32, 12), (768, 768)]
BERT_LARGE = [(30522, 1024), (512, 1024), (2, 1024), *encoder(24, 1024, 4096), (1024, 1024)]
# A decoder of 7B weights: attention, the gated feed-forward block, input and output embedding.
SEVEN_B = [(32000, 4096)] * 2 + ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32
MINILM = [(30522, 384), (512, 384), (2, 384), *encoder(6, 384, 1536), (384, 384)]

# (OUT, IN) of the linear layers of BERT-base: attention, and the two of the feed-forward block.
BERT_BASE_LINEARS = [(768, 768), (3072, 768), (768, 3072)]
LINEAR_M = [1, 4, 16, 64, 512]

# The same of BERT-base, BERT-large and a larger square, and M, for a GPU.
GPU_LINEARS = [*BERT_BASE_LINEARS, (1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096)]
GPU_LINEAR_M = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
