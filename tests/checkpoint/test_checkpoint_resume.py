"""kmq quantize: the same bytes after any interruption and for any number of ranks; full, read-only and damaged folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import content, quantize, rewrite

from kmq_kernels.checkpoint import DamagedError, verify_checkpoint
from kmq_kernels.checkpoint.stream import OutputError
from kmq_kernels.files import CheckpointError


def job(name, sharded, *arguments):
    """What a job of checkpoint_jobs.py printed, and what it said on stderr."""
    tests = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])}
    source, options = sharded
    command = [sys.executable, str(tests / "checkpoint_jobs.py"), name, str(source), json.dumps(options)]
    done = subprocess.run([*command, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def assert_killed_everywhere(result):
    assert result["shards"] > 8
    assert len(result["landed"]) == 9, result["landed"]
    assert any(0 < finished < result["shards"] for finished in result["finished"])


def test_killed_in_every_phase(sharded, tmp_path):
    result, _ = job("kills", sharded, tmp_path, 18, 1)
    assert_killed_everywhere(result)


@pytest.mark.slow
def test_killed_thirty_times(sharded, tmp_path):
    result, _ = job("kills", sharded, tmp_path, 30, time.time_ns() % 10**6)
    print(result)
    assert_killed_everywhere(result)


def test_ranks_make_the_same_files(sharded, tmp_path):
    job("ranks", sharded, tmp_path, "2,4")


def test_a_rank_that_dies_is_named(sharded, tmp_path):
    result, said = job("death", sharded, tmp_path)
    assert result["codes"] == [4, -signal.SIGKILL]
    assert f"rank 1 (process {result['pid']} on" in said
    assert result["waited"] < 20
    assert result["made"] >= 2


def test_another_command_on_the_same_folder(sharded, bert, tmp_path):
    source, options = sharded

    class Stop(Exception):
        pass

    def stop(progress):
        raise Stop

    with pytest.raises(Stop):
        quantize(source, tmp_path / "out", on_progress=stop, **options)
    before = content(tmp_path / "out")
    for other, sentence in [
        ({**options, "bits": 3}, "bits 4, this asks for 3"),
        ({**options, "shard_bytes": 300_000}, "shard_bytes 250000"),
        ({**options, "skip": ["pooler"]}, "skip None"),
    ]:
        with pytest.raises(CheckpointError, match=sentence):
            quantize(source, tmp_path / "out", **other)
    with pytest.raises(CheckpointError, match="model_class 'BertModel'"):
        quantize(bert, tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match="unfinished"):
        verify_checkpoint(tmp_path / "out")
    assert content(tmp_path / "out") == before
    quantize(source, tmp_path / "out", **options)
    done = content(tmp_path / "out")
    quantize(source, tmp_path / "whole", **options)
    assert done == content(tmp_path / "whole")
    assert not (tmp_path / "out/.kmq").exists()
    with pytest.raises(CheckpointError, match="bits 4, this asks for 3"):
        quantize(source, tmp_path / "out", **{**options, "bits": 3})
    assert quantize(source, tmp_path / "out", **options).shards_made == 0
    assert content(tmp_path / "out") == done


def test_folders_that_are_no_output(bert, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    inside = "in one another"
    for out, sentence in [(tmp_path / "full", "choose another folder"), (bert, inside), (bert / "out", inside)]:
        before = content(out) if out.exists() else {}
        with pytest.raises(CheckpointError, match=sentence):
            quantize(bert, out)
        assert (content(out) if out.exists() else {}) == before
    shutil.copytree(bert, tmp_path / "packed")
    quantize(bert, tmp_path / "one")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(tmp_path / "one", tmp_path / "two")


def test_two_at_a_time(sharded, tmp_path):
    source, options = sharded

    def again(progress):
        with pytest.raises(CheckpointError, match="another run is writing"):
            quantize(source, tmp_path / "out", **options)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quantize(source, tmp_path / "out", on_progress=again, **options)
    quantize(source, tmp_path / "out", **options)


def test_damage_is_found_and_repaired(sharded, tmp_path):
    source, options = sharded
    quantize(source, tmp_path / "out", **options)
    before = content(tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out")["files"] == len(before) - 1
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[-7] ^= 4
    shard.write_bytes(data)
    for check in (lambda: verify_checkpoint(tmp_path / "out"), lambda: quantize(source, tmp_path / "out", **options)):
        with pytest.raises(DamagedError, match=f"{shard.name} does not match its checksum"):
            check()
    for name in (shard.name, "config.json"):
        (tmp_path / "out" / name).unlink()
        with pytest.raises(DamagedError, match="is missing"):
            verify_checkpoint(tmp_path / "out")
        assert quantize(source, tmp_path / "out", **options).shards_made == (name == shard.name)
        assert content(tmp_path / "out") == before
    (tmp_path / "out/.kmq").mkdir()  # what a kill leaves after the manifest is there
    (tmp_path / "out/.kmq/lock").touch()
    assert quantize(source, tmp_path / "out", **options).shards_made == 0
    assert content(tmp_path / "out") == before


def test_nan_in_a_weight(bert, tmp_path):
    def change(tensors):
        tensors["bert.encoder.layer.1.output.dense.weight"][3, 4] = torch.nan

    rewrite(bert, change)
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight: NaN or Inf"):
        quantize(bert, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


MOUNTED = """
set -e
mkdir -p "$1"
mount -t tmpfs -o size=$2 tmpfs "$1"
[ "$3" = ro ] && mount -o remount,ro "$1"
shift 3
set +e
"$@"
echo "code $?"
cd "$OUT" && find . -name '*.safetensors'
"""


def on_small_disk(source, options, folder, size, mode, out):
    tests = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")]), "OUT": str(folder)}
    run = ["unshare", "-rm", "sh", "-c", MOUNTED, "sh", str(folder), size, mode]
    if subprocess.run([*run, "true"], capture_output=True, env=env, check=False).returncode != 0:
        pytest.skip("no private mounts here")
    command = [sys.executable, "-m", "kmq_kernels.cli", "quantize", str(source), "-o", str(out)]
    done = subprocess.run([*run, *command, *options], env=env, capture_output=True, text=True, timeout=500, check=False)
    code, *files = done.stdout.split("code ")[1].split()
    sentences = [line for line in done.stderr.strip().splitlines() if not line.startswith("kmq: left out")]
    assert len(sentences) == 1, done.stderr
    return int(code), files, sentences[0]


def test_full_disk(sharded, tmp_path):
    source, _ = sharded
    code, files, sentence = on_small_disk(source, ["--shard-size", "250KB"], tmp_path / "disk", "1m", "rw", tmp_path / "disk/out")
    assert (code, files) == (3, [])
    assert "needs" in sentence
    assert "MB free" in sentence


def test_disk_that_fills_up_meanwhile(sharded, tmp_path, monkeypatch):
    """The free space looked enough, and was not: the shards that are finished stay, nothing partial has a name."""
    source, options = sharded
    quantize(source, tmp_path / "whole", **options)
    real, left = os.pwrite, [900_000]

    def pwrite(descriptor, data, at):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match="No space left on device"):
        quantize(source, tmp_path / "out", **options)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert files
    assert all(file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes() for file in files)
    assert not (tmp_path / "out/config.json").exists()
    assert not list((tmp_path / "out/.kmq").glob("*.partial"))
    monkeypatch.undo()
    quantize(source, tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_read_only_target(sharded, tmp_path):
    code, files, sentence = on_small_disk(sharded[0], [], tmp_path / "disk", "64m", "ro", tmp_path / "disk/out")
    assert (code, files) == (3, [])
    assert "Read-only file system" in sentence
