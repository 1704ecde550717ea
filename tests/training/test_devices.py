"""The whole pipeline where models and data are on another device than the one they were loaded on."""

import accelerate
import pytest
import torch
import transformers
from conftest import family_model
from other_device import DEVICE, OtherDevice, There
from tiny_task import write_task

import kmq_kernels as kmq
from kmq_kernels import report, sensitivity, training
from kmq_kernels.training import facts
from kmq_kernels.training import run as runs

FEW = training.TrainingSettings(steps=2, batch_size=8, max_length=8)
DISTILLED = training.TrainingSettings(steps=2, batch_size=8, max_length=8, distill=True)
CONFIGS = {
    "kmeans-2bit": kmq.KMQConfig(bits=2, outlier_fraction=0.01, row_scale=True),
    "fisher": kmq.KMQConfig(allocation="fisher", bits_per_weight=7.0),
    "hessian": kmq.KMQConfig(allocation="hessian", bits_per_weight=7.0),
}


@pytest.fixture(autouse=True)
def _there_is_plain(monkeypatch):
    """On a real device weights are plain tensors; here they are of the class that stands for it."""
    monkeypatch.setattr("kmq_kernels.quantization.weights.PLAIN_TENSORS", (torch.nn.Parameter, torch.Tensor, There))


@pytest.fixture
def other(monkeypatch):
    """Trainer's device, and where sensitivities are computed, is DEVICE; a model is saved as one from a GPU, by its values."""
    save, arranged = runs.save, transformers.TrainingArguments.device.fget

    def save_values(model, tokenizer, folder, **facts):
        assert {parameter.device for parameter in model.parameters()} == {DEVICE}  # Trainer has moved it
        save(model.cpu(), tokenizer, folder, **facts)
        model.to(DEVICE)

    with OtherDevice() as mode:
        monkeypatch.setattr(transformers.TrainingArguments, "device", property(lambda self: (arranged(self), DEVICE)[1]))
        monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: DEVICE))
        monkeypatch.setattr(runs, "_device", lambda: DEVICE)
        monkeypatch.setattr(runs, "save", save_values)
        yield mode


def run_in(folder, out):
    task = training.load_task(None, train_file=folder / "train.csv", validation_file=folder / "dev.csv")
    how = training.SensitivitySettings(fisher_batches=2, hessian_batches=1, hessian_iterations=1)
    stage3_of = {"kmeans-2bit": DISTILLED, "fisher": None, "hessian": None}
    return training.Run(
        str(folder / "model"), task, folder / out, CONFIGS, FEW, FEW, sensitivity=how, stage3_of=stage3_of, control=False
    )


def figures(results):
    """What does not depend on the machine."""
    stages = {"stage1": results["stage1"]}
    stages |= {f"{name} {stage}": facts for name, both in results["quantized"].items() for stage, facts in both.items()}
    kept = ("metrics", "losses", "bits_per_weight", "bytes_on_disk")
    return {name: {key: stage[key] for key in kept} for name, stage in stages.items() if stage is not None}


def test_the_pipeline_on_another_device(tmp_path, request):
    write_task(tmp_path)
    expected = figures(run_in(tmp_path, "plain")())
    other = request.getfixturevalue("other")
    found = figures(run_in(tmp_path, "there")())
    assert other.moved > 100
    for name, stage in expected.items():
        assert found[name]["bytes_on_disk"] == pytest.approx(stage["bytes_on_disk"], rel=0.02)
        assert found[name]["losses"] == pytest.approx(stage["losses"], rel=1e-3)
        assert set(found[name]["metrics"]) == set(stage["metrics"])
    assert "kmeans-2bit" in report.page(report.collect(tmp_path / "there"))


def test_sensitivities_take_batches_from_anywhere(ids):
    model = family_model("bert")
    batches = [{"input_ids": ids[:2], "labels": torch.tensor([0, 1])}]
    expected = sensitivity.fisher_diagonal(model, batches), sensitivity.hessian_eigenvalues(model, batches, iterations=1)
    with OtherDevice():
        model.to(DEVICE)
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            model(**batches[0])
        fisher = sensitivity.fisher_diagonal(model, batches)
        eigenvalues = sensitivity.hessian_eigenvalues(model, batches, iterations=1)
    assert {value.device for value in fisher.values()} == {DEVICE}
    for name, value in expected[0].items():
        torch.testing.assert_close(fisher[name].value, value)
    assert eigenvalues == pytest.approx(expected[1], rel=1e-3)


def test_facts_of_a_model_that_is_not_where_its_original_is():
    original = family_model("bert")
    model = family_model("bert")
    kmq.quantize_(model, kmq.KMQConfig(bits=2))
    expected = facts.layer_facts(model, original)
    with OtherDevice():
        found = facts.layer_facts(model.to(DEVICE), original)
    assert found == expected
    weight = original.bert.pooler.dense.weight.detach().double()
    lost = (weight - model.bert.pooler.dense.weight.value.double()).square().sum()
    (pooler,) = [layer for layer in found if layer["name"] == "bert.pooler.dense"]
    assert pooler["error"] == pytest.approx(float(lost / (weight - weight.mean()).square().sum()))
