"""Weight matrices (rows, cols) that the benchmarks run on: every embedding and linear layer but the classifier."""


def encoder(layers: int, hidden: int, intermediate: int) -> list[tuple[int, int]]:
    one = [(hidden, hidden)] * 4 + [(intermediate, hidden), (hidden, intermediate)]
    return one * layers


BERT_BASE = [(30522, 768), (512, 768), (2, 768), *encoder(12, 768, 3072), (768, 768)]
MPNET_BASE = [(30527, 768), (514, 768), *encoder(12, 768, 3072), (32, 12), (768, 768)]
MINILM = [(30522, 384), (512, 384), (2, 384), *encoder(6, 384, 1536), (384, 384)]

# (OUT, IN) of the linear layers of BERT-base: attention, and the two of the feed-forward block.
BERT_BASE_LINEARS = [(768, 768), (3072, 768), (768, 3072)]
LINEAR_M = [1, 4, 16, 64, 512]
