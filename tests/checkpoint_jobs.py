"""Runs of quantize_checkpoint in processes of their own, killed at a chosen call or at a random moment, or spread over ranks.

    python tests/checkpoint_jobs.py kills|ranks|death SOURCE OPTIONS FOLDER [ARGUMENTS]

A job checks that the files are the same bytes as those of an undisturbed run and prints what happened as JSON.
"""

import collections
import json
import mmap
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch
from checkpoints import content

import kmq_kernels as kmq
from kmq_kernels.checkpoint import Ranks, make_plan, quantize_checkpoint

# What a run is doing: the first of these functions that is on the stack. Everything else in these modules is "between".
PHASES = {
    "make_plan": "plan",
    "curves": "claim the folder",
    "claim": "claim the folder",
    "measure": "measure",
    "fetch": "read ahead",
    "_cluster": "cluster",
    "put": "write a shard",
    "finish": "finish a shard",
    "check": "verify",
    "_publish": "publish",
}
NAMES = [*dict.fromkeys(PHASES.values()), "between"]
_WATCHED = {
    sys.modules[f"kmq_kernels.{name}"].__file__
    for name in (
        "checkpoint.quantize",
        "checkpoint.plan",
        "checkpoint.folder",
        "checkpoint.curves",
        "checkpoint.stream",
        "checkpoint.verify",
        "files.manifest",
    )
}


class Watch:
    """Counts the calls that the modules make in each phase, and ends the process at one of them."""

    def __init__(self):
        self.phase = mmap.mmap(-1, 1)  # shared with the child: the phase it is in
        self.counts = collections.Counter()
        self.stop = None  # phase and number of the call

    def begin(self):
        """From here on, in this process."""
        threading.setprofile(self._look)
        sys.setprofile(self._look)

    def _look(self, frame, event, argument):
        if frame.f_code.co_filename not in _WATCHED:
            return
        phase = "between"
        while frame is not None:
            phase = PHASES.get(frame.f_code.co_name, phase)
            frame = frame.f_back
        self.counts[phase] += 1
        self.phase[0] = NAMES.index(phase)
        if self.stop is not None and self.stop[0] == phase and self.counts[phase] >= self.stop[1]:
            os.kill(os.getpid(), signal.SIGKILL)


class Jobs:
    """Child processes, forked from this one, which has imported everything."""

    def __init__(self, source, options):
        self.source, self.options = source, options
        torch.set_num_threads(1)
        make_plan(source, kmq.KMQConfig())

    def command(self, out, pause):
        """What `kmq quantize` does."""
        options = dict(self.options)
        shard_bytes = options.pop("shard_bytes", 256_000_000)
        plan = make_plan(self.source, kmq.KMQConfig(**options), shard_bytes=shard_bytes)
        with Ranks.of_environment() as ranks:
            quantize_checkpoint(plan, out, ranks=ranks, on_progress=lambda _: time.sleep(pause))

    def start(self, out, environment=None, watch=None, pause=0.0, counts=None):
        """A run in a child; its counts go into the file `counts`."""
        sys.stderr.flush()
        child = os.fork()
        if child:
            return child
        code = 9
        try:
            os.environ.update(environment or {})
            if watch:
                watch.begin()
            self.command(out, pause)
            sys.setprofile(None)
            if counts:
                counts.write_text(json.dumps(watch.counts))
            code = 0
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            code = getattr(error, "exit_code", 1)
        finally:
            os._exit(code)

    def together(self, out, size, **options):
        """The ranks of a job."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(size)}
        return [self.start(out, {**address, "RANK": str(rank)}, **options) for rank in range(size)]


def end(child):
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(jobs, folder, trials, seed):
    """Every second trial is killed first in a given phase, the others at a random moment; some are killed again and again."""
    trials, chance = int(trials), random.Random(int(seed))
    begin = time.monotonic()
    assert end(jobs.start(folder / "whole", watch=Watch(), counts=folder / "counts.json")) == 0
    length = time.monotonic() - begin
    counts = json.loads((folder / "counts.json").read_text())
    names = [name for name in NAMES if name in counts]  # without a budget nothing is measured
    assert set(NAMES) - set(names) <= {"measure"}, counts
    expected = content(folder / "whole")
    landed, finished = collections.Counter(), []
    for trial in range(trials):
        out = folder / f"trial{trial}"
        for again in range(chance.choice([1, 1, 2, 4])):
            watch = Watch()
            if again == 0 and trial % 2 == 0:
                phase = names[trial // 2 % len(names)]
                watch.stop = phase, chance.randint(1, int(0.95 * counts[phase]))
            child = jobs.start(out, watch=watch)
            if watch.stop is None:
                time.sleep(chance.uniform(0, 1.05 * length))
                os.kill(child, signal.SIGKILL)
            if end(child) == -signal.SIGKILL:
                landed[NAMES[watch.phase[0]]] += 1
                assert watch.stop is None or watch.phase[0] == NAMES.index(phase)
            else:
                assert watch.stop is None, (watch.stop, counts)
        finished.append(len(list(out.glob("*.safetensors"))))
        for path in out.glob("*.safetensors"):  # whatever has its name is complete
            assert path.read_bytes() == expected[path.name], path
        assert end(jobs.start(out)) == 0
        assert content(out) == expected, trial
    shards = sum(name.endswith(".safetensors") for name in expected)
    return {"landed": landed, "finished": finished, "shards": shards, "trials": trials}


def ranks(jobs, folder, sizes):
    """The same files for any number of ranks."""
    assert end(jobs.start(folder / "whole")) == 0
    expected = content(folder / "whole")
    for size in map(int, sizes.split(",")):
        codes = [end(child) for child in jobs.together(folder / f"of{size}", size)]
        assert codes == [0] * size, codes
        assert content(folder / f"of{size}") == expected
    return {"files": len(expected)}


def death(jobs, folder):
    """A rank is killed; the same job goes on from there."""
    assert end(jobs.start(folder / "whole")) == 0
    children = jobs.together(folder / "out", 2, pause=0.5)
    while len(list((folder / "out").glob("*.safetensors"))) < 2:
        time.sleep(0.02)
    os.kill(children[1], signal.SIGKILL)
    begin = time.monotonic()
    codes = [end(child) for child in children]
    waited = time.monotonic() - begin
    made = len(list((folder / "out").glob("*.safetensors")))
    assert [end(child) for child in jobs.together(folder / "out", 2)] == [0, 0]
    assert content(folder / "out") == content(folder / "whole")
    return {"codes": codes, "waited": waited, "made": made, "pid": children[1]}


if __name__ == "__main__":
    what, model, asked, *arguments = sys.argv[1:]
    job = {"kills": kills, "ranks": ranks, "death": death}[what]
    print(json.dumps(job(Jobs(Path(model), json.loads(asked)), Path(arguments[0]), *arguments[1:])))
