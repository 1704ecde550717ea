"""Sizes that the benchmarks share."""

# (OUT, IN) of the linear layers of BERT-base: attention, and the two of the feed-forward block.
BERT_BASE_LINEARS = [(768, 768), (3072, 768), (768, 3072)]
LINEAR_M = [1, 4, 16, 64, 512]
