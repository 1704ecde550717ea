"""For tests of objective "output": batches without labels, a small encoder, and what stands for a model."""

import copy

import torch
import transformers
from conftest import family_config

import kmq_kernels as kmq


def batches_of(count, seed=5, rows=8, length=12):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(5, 120, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, 8:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def ids_of(lengths, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 50, (8, length), generator=generator)} for length in lengths]


def encoder(family="bert", **options):
    torch.manual_seed(1)
    return transformers.AutoModel.from_config(family_config(family, **options)).eval()


def quantized(model, batches=None, **options):
    model = copy.deepcopy(model)
    kmq.quantize_(model, kmq.KMQConfig(**options), calibration=batches)
    return model


def same_weights(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
