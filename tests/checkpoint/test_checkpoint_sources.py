"""kmq quantize knows its source by content: what changed is refused or made anew, whatever names, sizes and times say."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from checkpoints import content, quantize, rewrite
from huggingface_hub import ModelCard

import kmq_kernels as kmq
from kmq_kernels.checkpoint import DamagedError, find_source, make_plan, quantize_checkpoint, verify_checkpoint
from kmq_kernels.files import CheckpointError

SHARDS = {"bits": 4, "shard_bytes": 8000}


def negate(folder, pattern):
    """Turns weights round in a file of the same size and times."""
    file = folder / "model.safetensors"
    before = file.stat()
    rewrite(folder, lambda tensors: [tensor.neg_() for name, tensor in tensors.items() if pattern in name])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def half(source, out, batches=3):
    """An output that was interrupted."""
    calls = []

    def stop(progress):
        calls.append(progress)
        if len(calls) == batches:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quantize(source, out, on_progress=stop, **SHARDS)


def test_what_was_not_read_yet_may_change(bert, tmp_path):
    """Nothing that is finished was made from it, so the output is that of the source as it is now."""
    half(bert, tmp_path / "out")
    made = {
        name for record in (tmp_path / "out/.kmq").glob("*.safetensors.json") for name in json.loads(record.read_text())["source"]
    }
    assert made
    assert not any("layer.1" in name for name in made)
    negate(bert, "layer.1.output.dense.weight")
    assert quantize(bert, tmp_path / "out", **SHARDS).shards_made > 0
    quantize(bert, tmp_path / "fresh", **SHARDS)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
    negate(bert, sorted(made)[0])
    with pytest.raises(CheckpointError, match=f"another model.safetensors than this \\({sorted(made)[0]} has other values"):
        quantize(bert, tmp_path / "out", **SHARDS)


def test_a_repair_takes_the_source_it_was_made_from(bert, tmp_path):
    quantize(bert, tmp_path / "out", **SHARDS)
    before = content(tmp_path / "out")
    index = json.loads(before["model.safetensors.index.json"])["weight_map"]
    (tmp_path / "out" / index["bert.pooler.dense.packed"]).unlink()
    negate(bert, "pooler")  # of the missing shard
    with pytest.raises(CheckpointError, match=r"another model\.safetensors than this \(bert\.pooler"):
        quantize(bert, tmp_path / "out", **SHARDS)
    negate(bert, "pooler")
    assert quantize(bert, tmp_path / "out", **SHARDS).shards_made == 1
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["vocab.txt", "generation_config.json", "README.md", "sub/pooling.json"])
def test_files_beside_the_weights_are_made_again(bert, tmp_path, name):
    (bert / name).parent.mkdir(exist_ok=True)
    (bert / name).write_text('{"top_k": 1}')
    quantize(bert, tmp_path / "out", **SHARDS)
    for change in (lambda path: path.write_text('{"top_k": 2}'), lambda path: path.unlink()):
        change(bert / name)
        with pytest.raises(CheckpointError, match=f"another source than .*, which has another {name}"):
            verify_checkpoint(tmp_path / "out", bert)
        made = quantize(bert, tmp_path / "out", **SHARDS)
        assert (made.shards_made, made.side_files_made) == (0, True)
        shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
        quantize(bert, tmp_path / "fresh", **SHARDS)
        assert content(tmp_path / "out") == content(tmp_path / "fresh")
        assert verify_checkpoint(tmp_path / "out", bert)["source_tensors"] > 30


def test_a_file_edited_in_the_output_is_not_written_over(bert, tmp_path):
    quantize(bert, tmp_path / "out", **SHARDS)
    (tmp_path / "out/vocab.txt").write_text("mine")
    (bert / "README.md").write_text("new")
    before = content(tmp_path / "out")
    with pytest.raises(DamagedError, match=r"vocab\.txt has 4 bytes, not 6; remove that file"):
        quantize(bert, tmp_path / "out", **SHARDS)
    assert content(tmp_path / "out") | before == content(tmp_path / "out")
    (tmp_path / "out/vocab.txt").unlink()
    quantize(bert, tmp_path / "out", **SHARDS)
    assert (tmp_path / "out/vocab.txt").read_text() == "[PAD]\n"


def test_a_configuration_that_makes_other_tensors_is_refused(bert, tmp_path):
    half(bert, tmp_path / "out")
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with pytest.raises(CheckpointError, match=r"another config\.json, or with another transformers, than this"):
        quantize(bert, tmp_path / "out", **SHARDS)


def test_a_source_that_changes_while_it_is_read(bert, tmp_path):
    calls = []

    def change(progress):
        if not calls:
            negate(bert, "layer")
        calls.append(progress)

    with pytest.raises(CheckpointError, match=r"model\.safetensors: it changed while it was read; give the same command again"):
        quantize(bert, tmp_path / "out", on_progress=change, **SHARDS)

    def other_words(progress):
        (bert / "vocab.txt").write_text("new")

    with pytest.raises(CheckpointError, match=r"vocab\.txt: it changed while it was read"):
        quantize(bert, tmp_path / "side", on_progress=other_words, **SHARDS)
    assert not (tmp_path / "side/config.json").exists()
    quantize(bert, tmp_path / "side", **SHARDS)
    assert (tmp_path / "side/vocab.txt").read_text() == "new"


def test_checksums_are_those_of_the_tensors(bert, tmp_path):
    """Against safetensors and hashlib, not the reading of the stream."""
    import hashlib

    from safetensors.torch import load_file

    quantize(bert, tmp_path / "out", **SHARDS)
    noted = json.loads((tmp_path / "out/kmq_manifest.json").read_text())["source"]
    expected = {
        name: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in load_file(bert / "model.safetensors").items()
    }
    assert noted["tensors"] == expected
    assert noted["files"]["vocab.txt"] == hashlib.sha256(b"[PAD]\n").hexdigest()


def test_a_manifest_without_checksums_of_the_source(bert, tmp_path):
    from kmq_kernels.files import manifest_digest

    quantize(bert, tmp_path / "out", **SHARDS)
    file = tmp_path / "out/kmq_manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["source"], manifest["sha256"]
    file.write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
    assert verify_checkpoint(tmp_path / "out")["source_tensors"] == 0
    with pytest.raises(CheckpointError, match="a version that noted no checksums of its source"):
        quantize(bert, tmp_path / "out", **SHARDS)


RANK = """
import os, signal, time
from kmq_kernels.checkpoint import Ranks
before = signal.getsignal(signal.SIGTERM)
with Ranks.of_environment() as ranks:
    ranks.gather(1)
assert signal.getsignal(signal.SIGTERM) is before
assert signal.set_wakeup_fd(-1) == -1
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""


def test_sigterm_is_heard_again_after_a_job(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": rank},
        )
        for rank in "01"
    ]
    assert [job.wait(120) for job in jobs] == [-signal.SIGTERM] * 2


def _snapshot(bert, cache):
    """A model in the hub's cache: files are links to the blobs of their repository."""
    repository = cache / "models--someone--tiny-bert"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in bert.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.name.encode()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_snapshot_in_the_hubs_cache(bert, tmp_path):
    snapshot = _snapshot(bert, tmp_path)
    folder, root = find_source(str(snapshot))
    plan = make_plan(folder, kmq.KMQConfig(bits=3), root=root)
    quantize_checkpoint(plan, tmp_path / "out")
    quantize(bert, tmp_path / "other", bits=3)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert ModelCard.load(tmp_path / "out/README.md").data.base_model == "someone/tiny-bert"
    (tmp_path / "secret.txt").write_text("mine")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match=r"notes\.txt: a link out of the folder"):
        make_plan(folder, kmq.KMQConfig(bits=3), root=root)
    (snapshot / "notes.txt").unlink()
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its blob is missing in the hub's cache; download"):
        make_plan(folder, kmq.KMQConfig(bits=3), root=root)
