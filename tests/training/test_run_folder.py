"""A run's folder: one process at a time, what each stage was made with, stages that diverge, own data by folder and file."""

import json
import math
import os
import signal
import subprocess
import sys
import types

import pytest
import torch
import transformers
from tiny_task import write_task

import kmq_kernels as kmq
from kmq_kernels import cli, report, training
from kmq_kernels.training import run as runs

STEP = training.TrainingSettings(steps=1, batch_size=8, max_length=8)
ONE = {"kmeans-2bit": kmq.KMQConfig(bits=2)}


def task_of(folder):
    return training.load_task(None, train_file=folder / "train.csv", validation_file=folder / "dev.csv")


def run_of(folder, **options):
    settings = {"configs": ONE, "stage1": STEP, "stage3": STEP, "control": False}
    return training.Run(str(folder / "model"), task_of(folder), folder / "out", **{**settings, **options})


@pytest.fixture
def folder(tmp_path):
    write_task(tmp_path)
    return tmp_path


WORKING = """
import sys, time
from pathlib import Path
from kmq_kernels.files import locked
with locked(Path(sys.argv[1]) / ".lock", RuntimeError):
    print("working", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_work_in_one_folder(folder):
    (folder / "out").mkdir()
    with subprocess.Popen([sys.executable, "-c", WORKING, str(folder / "out")], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "working\n"
        with pytest.raises(training.PipelineError, match="out: another process is working in it") as error:
            run_of(folder)()
        assert "\n" not in str(error.value)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert [path.name for path in (folder / "out").iterdir()] == [".lock"]  # of a process that was killed: no lock
    said, options = [], {"stage3_of": {"kmeans-2bit": None}}

    def again(text):
        said.append(text)
        with pytest.raises(training.PipelineError, match="another process is working in it"):
            run_of(folder, **options)()

    run_of(folder, announce=again, **options)()
    assert len(said) == 2
    assert not (folder / "out/.lock").exists()


def test_each_stage_keeps_what_it_was_made_with(folder, monkeypatch):
    monkeypatch.setattr(runs, "versions", lambda: {"torch": "2.11", "processor": "A"})
    options = {"stage3_of": {"kmeans-2bit": None, "kmeans-3bit": None}}
    run_of(folder, command=["kmq", "first"], **options)()
    monkeypatch.setattr(runs, "versions", lambda: {"torch": "2.13", "processor": "B"})
    results = run_of(folder, command=["kmq", "second"], configs={"kmeans-3bit": kmq.KMQConfig(bits=3)}, **options)()
    quantized = results["quantized"]
    made = [
        (facts["versions"]["torch"], facts["command"][1])
        for facts in (results["stage1"], *(q["stage2"] for q in quantized.values()))
    ]
    assert made == [("2.11", "first"), ("2.11", "first"), ("2.13", "second")]
    assert (results["versions"], results["command"]) == ({"torch": "2.11", "processor": "A"}, ["kmq", "first"])
    # A model of stage 1 that somebody exchanged is not taken for the one that the others came from.
    file = folder / "out/stage1/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(training.PipelineError, match=r"stage1/model\.safetensors: it is not the file that the stage wrote"):
        run_of(folder, configs={"kmeans-4bit": kmq.KMQConfig(bits=4)}, stage3_of={"kmeans-4bit": None})()


def test_a_folder_from_before_a_field_goes_on(folder):
    """How many texts a run without labels clusters on is nothing to a run that has labels."""
    options = {"stage3_of": {"kmeans-2bit": None}}
    run_of(folder, **options)()
    marker = folder / "out/run.json"
    before = json.loads(marker.read_text())
    del before["sensitivity"]["text_batches"]
    marker.write_text(json.dumps(before))
    said = []
    run_of(folder, announce=said.append, **options)()
    assert all("finished earlier" in line for line in said)


def test_own_data_is_called_by_folder_and_file(folder, tmp_path_factory):
    assert run_of(folder).request()["task"] == f"{folder.name}/train.csv"


def test_a_stage_3_that_diverges_is_told_and_the_others_go_on(folder, monkeypatch, capsys):
    wild = training.TrainingSettings(steps=4, batch_size=8, max_length=8, learning_rate=1e30)
    configs = {"kmeans-2bit": kmq.KMQConfig(bits=2), "kmeans-4bit": kmq.KMQConfig(bits=4)}
    options = {"configs": configs, "stage3_of": {"kmeans-2bit": wild}}
    said = []
    results = run_of(folder, announce=said.append, **options)()
    stopped = results["quantized"]["kmeans-2bit"]["stage3"]
    assert stopped["metrics"] == {}
    assert len(stopped["losses"]) < 4
    assert all(map(math.isfinite, stopped["losses"]))
    where = f"remove {folder / 'out/kmeans-2bit/stage3'} to try it again"
    assert f"the loss is nan from step {len(stopped['losses']) + 1} of 4 on" in stopped["stopped"]
    assert where in stopped["stopped"]
    assert sum(where in line for line in said) == 1
    assert results["quantized"]["kmeans-4bit"]["stage3"]["metrics"]
    assert training.stopped_stages(results) == [f"kmeans-2bit, stage 3: {stopped['stopped']}"]
    for file in (folder / "out").rglob("*.json"):
        if file.name in ("results.json", "stage.json", "layers.json"):
            json.loads(file.read_text(), parse_constant=lambda text: pytest.fail(text))
    assert "diverged" in report.page(report.collect(folder / "out"))
    again = []
    assert run_of(folder, announce=again.append, **options)() == results
    assert sum("stopped" in line for line in again) == 1


def test_kmq_run_ends_in_an_error_when_a_stage_diverged(folder, monkeypatch, capsys):
    arguments = [
        "--train-file",
        folder / "train.csv",
        "--validation-file",
        folder / "dev.csv",
        "--max-length",
        8,
        "--batch-size",
        8,
    ]
    few = ["--steps", 1, "--second-steps", 3, "--second-learning-rate", 1e30, "--no-control"]
    monkeypatch.setattr("sys.argv", ["kmq", "run", *map(str, [folder / "model", "-o", folder / "out[a]", *few, *arguments])])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = capsys.readouterr()
    assert stop.value.code == 1
    assert "kmeans-4bit, stage 3: stopped: the loss is nan" in told.err
    assert f"written: {folder / 'out[a]'}/results.json" in told.out
    assert "diverged" in told.out


def test_a_stage_1_that_diverges_ends_the_run(folder):
    wild = training.TrainingSettings(steps=20, batch_size=8, max_length=8, learning_rate=1e30)
    with pytest.raises(training.DivergedError, match=r"the loss is nan from step \d+ of 20 on; a smaller learning rate may help"):
        run_of(folder, stage1=wild)()
    assert {path.name for path in (folder / "out").iterdir()} == {"run.json", "task.json"}


def test_weights_and_outputs_that_are_no_numbers_are_told(folder):
    """One step with a finite loss that leaves no finite weights; and a model that gives NaN for a text."""
    task = task_of(folder)
    model, tokenizer = training.load_for_task(str(folder / "model"), task, 0)
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(training.DivergedError, match="the model gives NaN or Inf for texts of the validation set"):
        training.evaluate(model, tokenizer, task, STEP, folder / "scratch")
    model, tokenizer = training.load_for_task(str(folder / "model"), task, 0)
    model.bert.pooler.dense.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    with pytest.raises(training.DivergedError, match="is NaN or Inf after step 1") as error:
        training.finetune(model, tokenizer, task, STEP, folder / "scratch")
    assert len(error.value.losses) == 1


@pytest.mark.parametrize("name", ["out[bold]", "out[/x]", "out:bug:"])
def test_names_are_printed_as_they_are(folder, monkeypatch, capsys, name):
    """Square brackets and colons are no markup, in paths and in tables."""
    source = folder / name / "model"
    (folder / "model").rename(source.parent.mkdir(parents=True) or source)
    transformers.AutoModel.from_pretrained(source).save_pretrained(source)
    for arguments in (["quantize", source, "-o", f"{source}-out"], ["verify", f"{source}-out"], ["inspect", f"{source}-out"]):
        monkeypatch.setattr("sys.argv", ["kmq", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        assert name in capsys.readouterr().out.replace("\n", "")


def test_results_of_an_older_stage_claim_nothing(tmp_path):
    """A stage.json without versions: those of this call are not put in their place."""
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1/stage.json").write_text(json.dumps({"metrics": {"accuracy": 0.9}}))
    (tmp_path / "run.json").write_text(json.dumps({"configs": {}}))
    task = types.SimpleNamespace(metric="accuracy")
    results = training.Run("m", task, tmp_path, {}, command=["kmq", "run"]).results()
    assert (results["versions"], results["command"]) == ({}, [])
    assert os.listdir(tmp_path) == sorted(os.listdir(tmp_path)) or results["stage1"]
