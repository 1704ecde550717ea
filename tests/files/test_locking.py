"""Locks that go with their process; files and folders that two processes write; JSON that browsers read."""

import json
import math
import signal
import subprocess
import sys

import pytest

from kmq_kernels.files import CheckpointError, dump_json, locked, publish, write_json

HOLD = """
import sys, time
from pathlib import Path
from kmq_kernels.files import locked
with locked(Path(sys.argv[1]), RuntimeError):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_goes_with_its_process(tmp_path):
    path = tmp_path / "lock"

    def taken():
        return CheckpointError("another process is in it")

    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process is in it"), locked(path, taken):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert path.exists()
    with locked(path, taken), pytest.raises(CheckpointError), locked(path, taken):  # nor twice in one process
        pass
    assert not path.exists()


def test_a_lock_in_a_file_that_was_removed_meanwhile(tmp_path, monkeypatch):
    """The one who had it went between opening and locking: the lock is then of a file without a name, and is taken anew."""
    import fcntl

    real, path = fcntl.flock, tmp_path / "lock"

    def late(descriptor, how):
        real(descriptor, how)
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(path, RuntimeError), pytest.raises(CheckpointError), locked(path, lambda: CheckpointError("held")):
        pass


def test_two_do_not_publish_one_folder(tmp_path):
    with publish(tmp_path / "model") as partial:
        (partial / "mine").write_text("1")
        with pytest.raises(CheckpointError, match="another process is writing it"), publish(tmp_path / "model"):
            pass
        assert (partial / "mine").read_text() == "1"
    with pytest.raises(CheckpointError, match="it exists"), publish(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_json_has_no_nan(tmp_path):
    content = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": "NaN", "d": True, "e": None}
    assert dump_json(content) == '{"a": [1.5, null, [null, {"b": null}]], "c": "NaN", "d": true, "e": null}'
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text())["a"][1] is None
