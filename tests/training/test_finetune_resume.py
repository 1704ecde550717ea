"""`kmq finetune --resume`: a training that was stopped at any step ends in the bits of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import content, quantize
from safetensors.torch import load_file
from tiny_task import kmq_command, write_task

import kmq_kernels as kmq
from kmq_kernels import training
from kmq_kernels.files import CheckpointError, locked
from kmq_kernels.training import checkpoints

STEPS = 20  # of 8 texts: two and a half passes over 64
KINDS = {
    "fp32": {},
    "fixed": {},
    "moving": {"assignments": "moving", "teacher": "source"},
    "texts": {"teacher": "source"},
}


class Stopped(KeyboardInterrupt):
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with dropout, its packed forms, and data."""
    folder = tmp_path_factory.mktemp("resume")
    write_task(folder, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    for name, bits in (("fixed", 4), ("moving", 2)):
        model = kmq.load(folder / "model")
        kmq.quantize_(model, kmq.KMQConfig(bits=bits))
        training.save(model, training.load_tokenizer(str(folder / "model")), folder / name)
    lines = (folder / "train.csv").read_text().splitlines()[1:]
    (folder / "corpus.txt").write_text("\n".join(line.partition(",")[0] for line in lines))
    base = kmq.load(folder / "model").bert
    training.save(base, training.load_tokenizer(str(folder / "model")), folder / "base")
    kmq.quantize_(base, kmq.KMQConfig(bits=4))
    training.save(base, training.load_tokenizer(str(folder / "model")), folder / "texts")
    return folder


def arguments(place, kind, **more):
    """What finetune_folder takes, but the output folder."""
    if kind == "texts":
        task = training.load_task("texts", train_file=place / "corpus.txt")
    else:
        task = training.load_task(None, train_file=place / "train.csv", validation_file=place / "dev.csv")
    settings = training.TrainingSettings(steps=STEPS, batch_size=8, max_length=8, learning_rate=1e-2)
    model = str(place / {"fp32": "model"}.get(kind, kind))
    options = {**KINDS[kind], **more}
    if "teacher" in options:
        options["teacher"] = str(place / ("base" if kind == "texts" else "model"))
    return model, task, settings, options


def tune(place, kind, out, **more):
    model, task, settings, options = arguments(place, kind, **more)
    return training.finetune_folder(model, task, settings, out, **options)


def stop_after(monkeypatch, step):
    """Has training stop after that step, with a checkpoint of every step before it."""
    trainer = training.finetune.__globals__["_StageTrainer"]
    whole = trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stopped
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(checkpoints, "SAVE_SECONDS", 0)
    monkeypatch.setattr(checkpoints, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(trainer, "training_step", training_step)


def stopped(monkeypatch, step, call):
    """Has `call` stop after that step."""
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Stopped):
            call()


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory):
    """straight(kind): metrics and files of a training that was not stopped, without one checkpoint."""
    found = {}

    def once(kind):
        if kind not in found:
            out = tmp_path_factory.mktemp("straight") / "out"
            found[kind] = tune(place, kind, out), content(out)
        return found[kind]

    return once


@pytest.mark.parametrize("step", [1, 7, 8, 9, 19])
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_after_any_step(place, straight, tmp_path, monkeypatch, kind, step):
    """Within an epoch, at its end, after it: dropout, order of the texts, optimizer, schedule, latent weights go on."""
    metrics, files = straight(kind)
    out = tmp_path / "out"
    stopped(monkeypatch, step, lambda: tune(place, kind, out))
    assert os.listdir(out) == [".training"]
    kept = sorted(path.name for path in (out / ".training").iterdir())
    assert kept == [f"checkpoint-{step}", "request.json"]
    assert tune(place, kind, out, resume=True) == metrics
    assert content(out) == files
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert any(name.endswith(".safetensors") for name in files)


def test_stopped_often(place, straight, tmp_path, monkeypatch):
    for step in (3, 3, 8, 13, 17):
        stopped(monkeypatch, step, lambda: tune(place, "moving", tmp_path / "out", resume=True))
    assert (tune(place, "moving", tmp_path / "out", resume=True), content(tmp_path / "out")) == straight("moving")


def test_the_losses_of_all_steps(place, tmp_path, monkeypatch):
    model, task, settings, _ = arguments(place, "fp32")

    def losses(folder, **options):
        network, tokenizer = training.load_for_task(model, task, 0)
        return training.finetune(network, tokenizer, task, settings, folder, **options)

    expected = losses(tmp_path / "a")
    assert not any((tmp_path / "a").iterdir())  # no checkpoint that nobody asked for
    stopped(monkeypatch, 11, lambda: losses(tmp_path / "b", resumable=True))
    assert losses(tmp_path / "b", resumable=True) == expected
    assert len(expected) == STEPS


def test_a_checkpoint_that_was_not_complete_counts_as_none(place, straight, tmp_path, monkeypatch):
    """Killed while Trainer writes the second one, or while the first one is removed."""
    out = tmp_path / "out"
    stopped(monkeypatch, 5, lambda: tune(place, "fixed", out))
    state = out / ".training"
    (state / "checkpoint-6").mkdir()
    (state / "checkpoint-6/optimizer.pt").write_bytes(b"half")
    (state / "checkpoint-4").mkdir()
    (state / "checkpoint-4/optimizer.pt").write_bytes(b"half removed")
    assert (tune(place, "fixed", out, resume=True), content(out)) == straight("fixed")


def test_stopped_while_the_files_get_their_places(place, straight, tmp_path, monkeypatch):
    """The trained model is complete: it is not trained again, and config.json comes last."""
    out = tmp_path / "out"
    whole, count = os.replace, []

    def replace(source, target):
        if Path(source).parent.name == "finished":
            count.append(Path(target).name)
            if len(count) == 3:
                raise Stopped
        return whole(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Stopped):
            tune(place, "fixed", out)
    assert not (out / "config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("kmq_kernels.training.single.finetune", None)
        metrics = tune(place, "fixed", out, resume=True)
    assert (metrics, content(out)) == straight("fixed")


def test_what_resume_refuses(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(monkeypatch, 2, lambda: tune(place, "fixed", out))
    before = content(out)
    for kind, more, says in [
        ("fixed", {}, r"a training was stopped in it; --resume goes on with it"),
        ("moving", {"resume": True, "assignments": "fixed"}, r"was another one \(model was '.*fixed', now it is '.*moving'\)"),
        ("fixed", {"resume": True, "assignments": "moving"}, r"\(settings assignments was 'fixed', now it is 'moving'\)"),
        ("fixed", {"resume": True, "teacher": "source"}, r"\(teacher was None, now it is '.*model'\)"),
    ]:
        with pytest.raises(CheckpointError, match=says) as error:
            tune(place, kind, out, **more)
        assert "\n" not in str(error.value)
        assert content(out) == before
    with locked(out / ".training/lock", AssertionError), pytest.raises(CheckpointError, match="another process is working in it"):
        tune(place, "fixed", out, resume=True)
    assert content(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="it exists and no training was stopped in it; choose another folder or remove it"):
        tune(place, "fixed", tmp_path / "other", resume=True)
    # Nothing is quantized into a training that was stopped.
    with pytest.raises(CheckpointError, match="it exists and is no unfinished output"):
        quantize(place / "model", out, bits=2)
    assert content(out) == before


def test_what_leaves_nothing(place, tmp_path, monkeypatch):
    """Stopped before a checkpoint, and a training that diverged: it would diverge again."""
    out = tmp_path / "deep/out"
    trainer = training.finetune.__globals__["_StageTrainer"]
    stopped(monkeypatch, 0, lambda: tune(place, "fp32", out))
    assert not out.exists()

    def diverged(self):
        raise training.DivergedError("the loss is nan")

    with monkeypatch.context() as patch:
        stop_after(patch, -1)
        patch.setattr(trainer, "checked_losses", diverged)
        with pytest.raises(training.DivergedError):
            tune(place, "fp32", out)
    assert not out.exists()
    assert tune(place, "fp32", out, resume=True)  # with nothing to go on from it begins


def test_a_minute_between_two(place, tmp_path, monkeypatch):
    """Checkpoints come by the clock, and take a twentieth of the time at most; no training of seconds writes one."""
    clock = [0.0]
    written = []
    trainer = training.finetune.__globals__["_StageTrainer"]
    whole, save = trainer.training_step, trainer.save_model

    def training_step(self, *args, **kwargs):
        clock[0] += 25.0
        return whole(self, *args, **kwargs)

    def save_model(self, *args, **kwargs):
        written.append(self.state.global_step)
        clock[0] += 5.0
        return save(self, *args, **kwargs)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(trainer, "training_step", training_step)
    monkeypatch.setattr(trainer, "save_model", save_model)
    tune(place, "fp32", tmp_path / "out")
    assert written == [3, 7, 11, 15, 19]  # after 75 s, then after 5 / 0.05 = 100 s each


def test_the_command(place, straight, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    files = ["--train-file", place / "train.csv", "--validation-file", place / "dev.csv", "--max-length", 8]
    command = ["finetune", place / "fixed", "-o", out, "--steps", STEPS, "--batch-size", 8, "--learning-rate", 1e-2, *files]
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert kmq_command(patch, *command) == 130
    assert "its last checkpoint is kept, and the same command with --resume goes on from there" in capsys.readouterr().err
    assert kmq_command(monkeypatch, *command) == 1
    assert capsys.readouterr().err.startswith(f"kmq: --output: {out}: a training was stopped in it; --resume goes on with it")
    assert kmq_command(monkeypatch, *command, "--resume", "--seed", 1) == 1
    assert "(settings seed was 0, now it is 1)" in capsys.readouterr().err
    assert kmq_command(monkeypatch, *command, "--resume", "--json") == 0
    metrics, expected = straight("fixed")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == metrics
    assert content(out) == expected
    assert kmq_command(monkeypatch, *command, "--resume") == 1
    assert "it exists and no training was stopped in it" in capsys.readouterr().err


@pytest.mark.slow
def test_killed(place, straight, tmp_path):
    """SIGKILL at moments that nobody chose, while checkpoints are written or between them, in processes of their own."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
from kmq_kernels import cli
from kmq_kernels.training import checkpoints
torch.use_deterministic_algorithms(True, warn_only=True)
checkpoints.SAVE_SECONDS, checkpoints.SAVE_SHARE = 0, 1e9
cli.main()
"""
    out = tmp_path / "out"
    command = ["finetune", str(place / "moving"), "-o", str(out), "--steps", str(STEPS), "--batch-size", "8", "--max-length", "8"]
    command += ["--learning-rate", "1e-2", "--train-file", str(place / "train.csv"), "--validation-file", str(place / "dev.csv")]
    command += ["--assignments", "moving", "--teacher", str(place / "model"), "--resume"]
    for delay in (0.0, 0.02, 0.05, 0.1):
        before = checkpoints.last_checkpoint(out / ".training")
        process = subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while process.poll() is None and checkpoints.last_checkpoint(out / ".training") == before:
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = load_file(out / "model.safetensors"), straight("moving")[1]["model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == theirs
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in ours.values())
