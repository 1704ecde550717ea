"""The resume matrix: each thing that is read, changed between two calls of each thing that resumes; docs/resuming.md has it."""

import json
import logging
import os
import shutil
import types
from pathlib import Path

import pytest
import torch
from checkpoints import content, quantize, rewrite
from tiny_task import write_task

import kmq_kernels as kmq
from kmq_kernels import training
from kmq_kernels.checkpoint import verify_checkpoint
from kmq_kernels.files import CheckpointError
from kmq_kernels.sensitivity import SensitivityError, fisher_diagonal, hessian_eigenvalues

THINGS = ("quantize", "run", "finetune", "fisher", "hessian", "comparison")
REFUSALS = (CheckpointError, training.PipelineError, SensitivityError)

# What changes -> what each of THINGS does about it.
MATRIX = {
    "nothing": ("goes on",) * 6,
    "weights": ("refused",) * 6,
    "config.json": ("made again", "refused", "refused", "anew", "anew", "refused"),
    "tokenizer": ("made again", "refused", "refused", "anew", "anew", "refused"),
    "data": ("reads none", "refused", "refused", "anew", "anew", "refused"),
    "settings": ("refused", "refused", "refused", "anew", "anew", "refused"),
    "version": ("refused", "refused", "refused", "anew", "anew", "refused"),
}
# A part of the sentence or the warning.
SAYS = {
    "weights": "model.safetensors|other weights",
    "config.json": "config.json|another loss",
    "tokenizer": "tokenizer.json|other batches",
    "data": "rows of the (train|validation) set|other batches",
    "settings": "this asks for|now it is|batches, 2 are asked for",
    "version": "9.9",
}


def change_weights(folder):
    """Other values of the same shapes in a file of the same size and times."""
    file = folder / "model/model.safetensors"
    before = file.stat()
    rewrite(folder / "model", lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def change_config(folder):
    file = folder / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "relu"}))


def change_tokenizer(folder):
    file = folder / "model/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["good"], vocab["bad"] = vocab["bad"], vocab["good"]
    file.write_text(json.dumps(tokenizer))


def change_data(folder, name="train.csv"):
    """As many rows, every label turned round."""
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace(",yes", ",?").replace(",no", ",yes").replace(",?", ",no"))


CHANGES = {"weights": change_weights, "config.json": change_config, "tokenizer": change_tokenizer, "data": change_data}


def task_of(folder):
    return training.load_task(None, train_file=folder / "train.csv", validation_file=folder / "dev.csv")


def start_quantize(folder, **settings):
    return quantize(folder / "model", folder / "out", shard_bytes=8000, **{"bits": 4, **settings})


def start_run(folder, **settings):
    steps = training.TrainingSettings(steps=1, batch_size=8, max_length=8, **settings)
    configs = {"kmeans-2bit": kmq.KMQConfig(bits=2)}
    return training.Run(
        "model", task_of(folder), folder / "run", configs, steps, steps, control=False, stage3_of={"kmeans-2bit": None}
    )()


def start_comparison(folder, **settings):
    steps = training.TrainingSettings(steps=1, batch_size=8, max_length=8, **settings)
    variants = [training.Variant("kmeans-2bit", kmq.KMQConfig(bits=2), stage3=False)]
    return training.Comparison("model", [task_of(folder)], folder / "comparison", variants, [0, 1], steps, steps, control=False)()


def start_finetune(folder, out="tuned", **settings):
    steps = training.TrainingSettings(**{"steps": 3, "batch_size": 8, "max_length": 8, **settings})
    return training.finetune_folder("model", task_of(folder), steps, folder / out, resume=True)


def batches_of(folder):
    tokenizer = training.load_for_task("model", task_of(folder), 0)[1]
    return training.calibration_batches(task_of(folder), tokenizer, 4, 3, 8, 0)


def start_sensitivity(kind, folder, path=True, **settings):
    model = kmq.load("model")
    pooler = kmq.KMQConfig(skip=["encoder", "embeddings"])  # one module has a Hessian in little time
    options = {"save_every": 1} if kind is fisher_diagonal else {"iterations": 1, "config": pooler}
    file = folder / f"{kind.__name__}.safetensors" if path else None
    return kind(model, batches_of(folder), path=file, **{**options, **settings})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every one of THINGS finished in one folder."""
    folder = tmp_path_factory.mktemp("finished") / "place"
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)  # the model is called by a path that stays the same in a copy
    try:
        write_task(folder)
        start_quantize(folder)
        start_run(folder)
        start_comparison(folder)
        for kind in (fisher_diagonal, hessian_eigenvalues):
            start_sensitivity(kind, folder)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A copy of all of it, in a folder of the same name."""
    shutil.copytree(finished, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def begin_half(thing, folder):
    """Leaves of a finished thing what an interruption leaves."""
    if thing == "quantize":
        shutil.rmtree(folder / "out")
        calls = []

        def stop(progress):
            calls.append(progress)
            if len(calls) == 3:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            quantize(folder / "model", folder / "out", shard_bytes=8000, bits=4, on_progress=stop)
        assert len(list((folder / "out").glob("*.safetensors"))) >= 1
    elif thing == "run":
        shutil.rmtree(folder / "run/kmeans-2bit")
    elif thing == "comparison":
        shutil.rmtree(folder / "comparison" / task_of(folder).folder / "seed1")
    else:
        kind = {"fisher": fisher_diagonal, "hessian": hessian_eigenvalues}[thing]
        (folder / f"{kind.__name__}.safetensors").unlink()
        start_sensitivity(kind, folder, num_batches=2)


def assert_refused(call, folder, says):
    before = content(folder)
    with pytest.raises(REFUSALS, match=says) as error:
        call()
    assert "\n" not in str(error.value)
    assert content(folder) == before


@pytest.mark.parametrize("half", [False, True], ids=["finished", "half done"])
@pytest.mark.parametrize("what", MATRIX)
def test_quantize(place, monkeypatch, what, half):
    if half:
        begin_half("quantize", place)
    if what in CHANGES:
        CHANGES[what](place)
    if what == "version":
        monkeypatch.setattr("kmq_kernels.checkpoint.plan.__version__", "9.9")
    settings = {"bits": 3} if what == "settings" else {}
    if MATRIX[what][0] == "refused":
        assert_refused(lambda: start_quantize(place, **settings), place, SAYS[what])
        return
    for path in place.glob("model/*"):
        path.touch()  # a time is nothing
    made = start_quantize(place)
    assert 0 < made.shards_made < made.shards if half else made.shards_made == 0
    assert made.side_files_made is (half or MATRIX[what][0] == "made again")
    quantize(place / "model", place / "fresh", shard_bytes=8000, bits=4)
    assert content(place / "out") == content(place / "fresh")
    found = verify_checkpoint(place / "out", place / "model")
    assert found["source_tensors"] > 30


def change(what, place, monkeypatch, module):
    """Makes `what` another one for the next call of a module of the training wing; returns settings for that call."""
    if what in CHANGES:
        CHANGES[what](place)
    if what == "evaluation data":
        change_data(place, "dev.csv")
    if what == "version":
        monkeypatch.setattr(f"kmq_kernels.training.{module}.__version__", "9.9")
    return {"learning_rate": 1e-5} if what == "settings" else {}


@pytest.mark.parametrize("thing", ["run", "comparison"])
@pytest.mark.parametrize("half", [False, True], ids=["finished", "half done"])
@pytest.mark.parametrize("what", [*MATRIX, "evaluation data"])
def test_runs(place, monkeypatch, thing, what, half):
    if half:
        begin_half(thing, place)
    start = {"run": start_run, "comparison": start_comparison}[thing]
    settings = change(what, place, monkeypatch, "run")
    if what != "nothing":
        assert_refused(lambda: start(place, **settings), place, SAYS.get(what, "rows of the validation set"))
        return
    again = start(place)
    others = sorted(
        (place / "comparison" / task_of(place).folder).glob("seed*/results.json")
        if thing == "comparison"
        else [place / "run/results.json"]
    )
    assert [json.loads(file.read_text()) for file in others] == (again if thing == "comparison" else [again])
    for results in again if thing == "comparison" else [again]:
        assert results["quantized"]["kmeans-2bit"]["stage2"]["metrics"]


@pytest.mark.parametrize("what", [*MATRIX, "evaluation data", "version of transformers"])
def test_finetune(place, monkeypatch, what):
    """What is finished is refused anyhow."""

    def stop(*args, **kwargs):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("kmq_kernels.training.checkpoints.SAVE_SECONDS", 0)
        patch.setattr("kmq_kernels.training.single.evaluate", stop)
        with pytest.raises(ZeroDivisionError):
            start_finetune(place)
    assert (place / "tuned/.training/checkpoint-1").is_dir()
    settings = change(what, place, monkeypatch, "single")
    if what == "version of transformers":
        monkeypatch.setattr("kmq_kernels.training.single.transformers", types.SimpleNamespace(__version__="9.9"))
    if what != "nothing":
        others = {"evaluation data": "rows of the validation set", "version of transformers": "transformers was '.*'.* '9.9'"}
        assert_refused(lambda: start_finetune(place, **settings), place, {**SAYS, **others}[what])
        return
    assert start_finetune(place) == start_finetune(place, "fresh")
    assert content(place / "tuned") == content(place / "fresh")
    assert_refused(lambda: start_finetune(place), place, "no training was stopped in it")


@pytest.mark.parametrize("kind", [fisher_diagonal, hessian_eigenvalues])
@pytest.mark.parametrize("half", [False, True], ids=["finished", "half done"])
@pytest.mark.parametrize("what", [*MATRIX, "loss"])
def test_sensitivities(place, monkeypatch, caplog, kind, what, half):
    if half:
        begin_half(kind.__name__.partition("_")[0], place)
    if what in CHANGES:
        CHANGES[what](place)
    if what == "version":
        monkeypatch.setattr("kmq_kernels.sensitivity.__version__", "9.9")
    settings = {}
    if what == "settings":
        settings = {"num_batches": 1 if half else 2} if kind is fisher_diagonal else {"iterations": 2}
    if what == "loss":
        settings = {"loss": lambda model, batch: model(**batch).logits.square().mean()}
    if what == "weights":
        assert_refused(lambda: start_sensitivity(kind, place), place, SAYS[what])
        return
    computed = []

    def seen(model, batch):
        computed.append(batch)
        return settings.get("loss", lambda m, b: m(**b).loss)(model, batch)

    options = {**settings, "loss": seen}
    with caplog.at_level(logging.WARNING, "kmq_kernels.sensitivity"):
        found = start_sensitivity(kind, place, **options)
    count = len(computed)
    fresh = start_sensitivity(kind, place, path=False, **settings)
    assert set(found) == set(fresh)
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(fresh[name])) for name in fresh)
    if what == "nothing":
        assert not caplog.records
        assert count == (2 if half else 1)  # the first batch once more, and what was missing
    else:
        assert "computed anew" in caplog.text
        assert count >= settings.get("num_batches", 3)
        # The file is now that of what was asked for.
        caplog.clear()
        start_sensitivity(kind, place, **options)
        assert not caplog.records


@pytest.mark.parametrize(("factor", "anew"), [(1 + 1e-6, False), (1 + 1e-4, True)])
def test_a_loss_is_known_by_its_value(place, caplog, factor, anew):
    """Other threads add in another order: what differs by less than 1e-5 is the same loss."""
    begin_half("fisher", place)
    with caplog.at_level(logging.WARNING, "kmq_kernels.sensitivity"):
        start_sensitivity(fisher_diagonal, place, loss=lambda model, batch: factor * model(**batch).loss)
    assert ("computed anew" in caplog.text) == anew


def test_a_configuration_that_leaves_the_loss_changes_nothing(place, caplog):
    begin_half("fisher", place)
    file = place / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "transformers_version": "5.9"}))
    with caplog.at_level(logging.WARNING, "kmq_kernels.sensitivity"):
        start_sensitivity(fisher_diagonal, place)
    assert not caplog.records


def test_more_batches_go_on(place, caplog):
    begin_half("fisher", place)
    computed = []

    def loss(model, batch):
        computed.append(batch)
        return model(**batch).loss

    with caplog.at_level(logging.WARNING, "kmq_kernels.sensitivity"):
        start_sensitivity(fisher_diagonal, place, loss=loss, num_batches=3)
    assert not caplog.records
    assert len(computed) == 2  # the first once more, and the third


def test_the_table_in_the_docs():
    lines = (Path(__file__).parents[1] / "docs/resuming.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    assert len(rows) == len(MATRIX)
    for (what, *cells), (name, outcomes) in zip(rows, MATRIX.items(), strict=True):
        assert what.startswith(name), what
        assert [cell.partition(" (")[0] for cell in cells] == list(outcomes), what
