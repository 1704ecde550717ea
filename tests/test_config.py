"""KMQConfig: presets, patterns, errors, and its way through a dict."""

import pytest

from kmq_kernels import KMQConfig
from kmq_kernels.config import name_matches


def test_round_trip():
    config = KMQConfig(bits=3, module_bits={"word_embeddings": 5}, granularity="group", group_rows=4)
    assert KMQConfig.from_dict(config.to_dict()) == config


def test_paper_preset():
    config = KMQConfig(preset="paper", bits=2)
    assert (config.algorithm, config.init, config.max_iter, config.grad_reduction) == ("lloyd", "k-means++", 3, "mean")
    assert KMQConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 0}, "bits: expected an integer from 1 to 8, got 0"),
        ({"bits": 9}, "bits: expected an integer from 1 to 8, got 9"),
        ({"bits": 4.0}, "bits: expected an integer from 1 to 8, got 4.0"),
        ({"bits": True}, "bits"),
        ({"scheme": "cubic"}, "scheme: expected one of 'kmeans', 'linear', got 'cubic'"),
        ({"granularity": "column"}, "granularity"),
        ({"group_rows": 0}, "group_rows"),
        ({"module_bits": {"x": 12}}, r"module_bits\['x'\]: expected an integer from 1 to 8"),
        ({"module_bits": {"(": 4}}, "not a regular expression"),
        ({"skip": ["["]}, "not a regular expression"),
        ({"preset": "newspaper"}, "preset"),
        ({"preset": "paper", "max_iter": 10}, "max_iter: preset 'paper' sets 3, got 10"),
        ({"tol": float("nan")}, "tol"),
    ],
)
def test_bad_values(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        KMQConfig(**options)


def test_unknown_key():
    with pytest.raises(ValueError, match="unknown keys colour"):
        KMQConfig.from_dict({"bits": 4, "colour": "red"})


def test_patterns_match_whole_components():
    assert name_matches("classifier", "classifier.dense")
    assert name_matches("classifier", "model.classifier")
    assert not name_matches("classifier", "pre_classifier")
    assert name_matches(r"layer\.\d+\.output", "bert.encoder.layer.11.output.dense")
