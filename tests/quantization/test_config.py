"""KMQConfig: presets, patterns, errors, and its way through a dict."""

import copy
import dataclasses
import pickle

import pytest

from kmq_kernels import KMQConfig
from kmq_kernels.quantization import name_matches


def test_round_trip():
    config = KMQConfig(bits=3, module_bits={"word_embeddings": 5}, granularity="group", group_rows=4)
    assert KMQConfig.from_dict(config.to_dict()) == config


def test_paper_preset():
    config = KMQConfig(preset="paper", bits=2)
    assert (config.algorithm, config.init, config.max_iter, config.grad_reduction) == ("lloyd", "k-means++", 3, "mean")
    assert KMQConfig.from_dict(config.to_dict()) == config


def test_presets_of_the_other_systems():
    assert (KMQConfig(preset="linear", bits=3).scheme, KMQConfig(preset="linear", bits=3).bits) == ("linear", 3)
    assert (KMQConfig(preset="int8").scheme, KMQConfig(preset="int8").bits) == ("linear", 8)
    hessian = KMQConfig(preset="hessian", bits_per_weight=2.5)
    assert (hessian.scheme, hessian.allocation, hessian.has_budget) == ("linear", "hessian", True)
    for config in (KMQConfig(preset="int8"), hessian, KMQConfig(size=10**6), KMQConfig(outlier_fraction=0.01, row_scale=True)):
        assert KMQConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"allocation": "random"}, "allocation: expected one of 'uniform', 'distortion', 'fisher', 'hessian', got 'random'"),
        ({"bits_per_weight": -1.0}, "bits_per_weight: expected a number above 0"),
        ({"bits_per_weight": 3.0, "size": 10}, "got both"),
        ({"size": 0}, "size: expected an integer not below 1"),
        ({"outlier_fraction": 0.5}, "outlier_fraction: expected a number from 0 to below 0.5, got 0.5"),
        ({"row_scale": True, "granularity": "row"}, "row_scale: expected granularity 'tensor' or 'group'"),
        ({"weighting": "fisher", "scheme": "linear"}, "weighting: the linear scheme takes no weights"),
        ({"preset": "int8", "bits": 3}, "bits: preset 'int8' sets 8, got 3"),
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
        ({"preset": "int8", "bits": 4}, "bits: preset 'int8' sets 8, got 4"),
        ({"preset": "paper", "algorithm": "optimal"}, "algorithm: preset 'paper' sets 'lloyd', got 'optimal'"),
        ({"preset": "paper", "max_iter": 300}, "max_iter: preset 'paper' sets 3, got 300"),
        ({"preset": "linear", "scheme": "kmeans"}, "scheme: preset 'linear' sets 'linear', got 'kmeans'"),
        ({"preset": "hessian", "allocation": "uniform"}, "allocation: preset 'hessian' sets 'hessian', got 'uniform'"),
        ({"seed": -1}, "seed: expected an integer not below 0"),
        ({"tol": "small"}, "tol: expected a number, got 'small'"),
        ({"outlier_fraction": None}, "outlier_fraction: expected a number, got None"),
        ({"row_scale": "yes"}, "row_scale: expected True or False, got 'yes'"),
        ({"scheme": 3}, "scheme: expected one of 'kmeans', 'linear', got 3"),
        ({"preset": "paper", "max_iter": 10}, "max_iter: preset 'paper' sets 3, got 10"),
        ({"tol": float("nan")}, "tol"),
    ],
)
def test_bad_values(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        KMQConfig(**options)


def test_what_is_given_beside_a_preset_is_known_by_position_and_after_copies():
    with pytest.raises(ValueError, match="bits: preset 'int8' sets 8, got 4"):
        KMQConfig("kmq", 4, preset="int8")
    config = KMQConfig(preset="int8", seed=3)
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), KMQConfig.from_dict(config.to_dict())):
        assert again == config
    assert dataclasses.replace(config, seed=4).bits == 8
    with pytest.raises(ValueError, match="bits: preset 'int8' sets 8, got 4"):
        dataclasses.replace(config, bits=4)
    assert set(vars(config)) == {field.name for field in dataclasses.fields(config)}
    assert KMQConfig(preset="int8", bits=8) == KMQConfig(preset="int8")


def test_unknown_key():
    with pytest.raises(ValueError, match="unknown keys colour"):
        KMQConfig.from_dict({"bits": 4, "colour": "red"})


def test_patterns_match_whole_components():
    assert name_matches("classifier", "classifier.dense")
    assert name_matches("classifier", "model.classifier")
    assert not name_matches("classifier", "pre_classifier")
    assert name_matches(r"layer\.\d+\.output", "bert.encoder.layer.11.output.dense")
