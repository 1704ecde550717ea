"""Budgets and sensitivities in the words of who asks for them."""

import warnings

import pytest
import torch
from conftest import family_model

import kmq_kernels as kmq
from kmq_kernels.layers import CodebookModule
from kmq_kernels.quantization import plan, refuse_unmatched
from kmq_kernels.sensitivity import SensitivityError, fisher_diagonal


def test_sizes_as_text():
    for given, size in (
        ("8MB", 8_000_000),
        ("10MiB", 10_485_760),
        ("8_000_000", 8_000_000),
        (8e6, 8_000_000),
        (8_000_000, 8_000_000),
    ):
        config = kmq.KMQConfig(size=given)
        assert (config.size, config.to_dict()["size"]) == (size, size)
    for wrong in ("much", 1.5, "0"):
        with pytest.raises(ValueError, match="size: expected a size such as 500MB, 2GB, 10MiB or 8_000_000, got"):
            kmq.KMQConfig(size=wrong)


def bits_of(model):
    return {module.bits for module in model.modules() if isinstance(module, CodebookModule)}


def test_a_uniform_budget_says_its_bits():
    model = family_model("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = kmq.quantize_(model, kmq.KMQConfig(bits_per_weight=100.0))
    assert (config.bits, bits_of(model)) == (8, {8})  # more cannot be spent, so nothing is said
    assert set(config.module_bits.values()) == {8}


def test_what_a_budget_leaves_is_said_where_it_is_a_quarter():
    net = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False), torch.nn.Linear(512, 512, bias=False))
    # 3.9 bits a weight have room for 3, and 0.9 of 3.9 bits are less than a quarter; 1.9 have room for 1: 0.9 of 1.9 are more.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = kmq.quantize_(torch.nn.Sequential(*net), kmq.KMQConfig(bits_per_weight=3.9))
    assert config.bits == 3
    with pytest.warns(
        UserWarning, match=r"bits_per_weight: 1 bits for all weights leave .* unused; allocation 'distortion' \(--allo"
    ):
        config = kmq.quantize_(torch.nn.Sequential(torch.nn.Linear(512, 512)), kmq.KMQConfig(bits_per_weight=1.9))
    assert config.bits == 1


def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest():
    model = family_model("bert")
    for name, options in (("skip", {"skip": ["poler"]}), ("module_bits", {"module_bits": {"poler": 8}})):
        config = kmq.KMQConfig(**options)
        with pytest.raises(
            ValueError, match=f"{name}: 'poler' matches no embedding or linear layer of the model; nearest: pooler"
        ):
            refuse_unmatched(plan(model, config), config, "the model")
    config = kmq.KMQConfig(skip=["classifier", "pooler"])
    refuse_unmatched(plan(model, config), config, "the model")


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (torch.zeros(1, 4, dtype=torch.long), "batches: expected dictionaries of the model's arguments, such as .*, got Tensor"),
        ({"input_ids": "good film"}, "batches: BertForSequenceClassification does not take them"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long)}, "batches: the model gives no loss; expected batches with labels"),
    ],
)
def test_a_wrong_batch_is_answered_in_one_short_sentence(batch, sentence):
    with pytest.raises(SensitivityError, match=sentence) as refused:
        fisher_diagonal(family_model("bert"), [batch])
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)
