"""An output folder that keeps what a stopped work needs to go on, until it is complete: that of `kmq finetune`.

Until then it has, and nothing else,

    OUT/.training/request.json   what was asked for; another request on the same folder is refused
    OUT/.training/lock           while a process works here
    OUT/.training/...            what the work itself keeps
    OUT/.training/finished/      the complete output, before its files get their places in OUT, config.json last
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .json import read_json
from .locking import locked
from .opening import CheckpointError
from .publishing import sync, write_json

STATE = ".training"
FINISHED = "finished"
_REQUEST = "request.json"


def stopped_in(out: Path) -> bool:
    """Whether a training was stopped in an output folder."""
    return (out / STATE).is_dir()


def check_output(out: Path, resume: bool) -> None:
    """Raises CheckpointError where `out` has something, but for a training that was stopped there and is to go on (`resume`)."""
    if stopped_in(out):
        if not resume:
            raise CheckpointError(
                f"out: {out}: a training was stopped in it; --resume goes on with it, else choose another folder or remove it"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "it exists and no training was stopped in it" if resume else "it exists"
        raise CheckpointError(f"out: {out}: {what}; choose another folder or remove it")


@contextlib.contextmanager
def unfinished(
    out: Path,
    request: dict[str, Any],
    resume: bool,
    difference: Callable[[dict[str, Any], dict[str, Any]], str | None],
    worth: Callable[[BaseException, Path], bool],
) -> Iterator[Path]:
    """The folder OUT/.training, this process's own for the block; it is to have `finished` when that ends.

    request: what decides the result. difference: in words the first thing in which two requests are not the same. worth: whether
    what the folder has should stay after an exception; else `out` is as if nothing had begun. Raises CheckpointError where
    another process works in it, and where what was stopped there is not this request.
    """
    check_output(out, resume)
    state, request = out / STATE, json.loads(json.dumps(request))
    before = read_json(state / _REQUEST) if (state / _REQUEST).is_file() else request
    if what := "it cannot be read" if not isinstance(before, dict) else difference(before, request):
        raise CheckpointError(
            f"out: {out}: the training that was stopped in it was another one ({what}); choose another folder or remove it"
        )
    made = not out.exists() or stopped_in(out)
    state.mkdir(parents=True, exist_ok=True)
    try:
        with locked(state / "lock", lambda: CheckpointError(f"out: {out}: another process is working in it")):
            try:
                write_json(state / _REQUEST, request)
                yield state
                _place(state, out)
            except BaseException as error:
                if not (state / FINISHED).is_dir() and not worth(error, state):
                    shutil.rmtree(state, ignore_errors=True)
                raise
    finally:
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _place(state: Path, out: Path) -> None:
    """Gives the finished files their places, and removes the rest. After a kill at any moment it can be done again."""
    finished = state / FINISHED
    names = sorted(os.listdir(finished), key="config.json".__eq__)  # it comes last: nobody loads half of a model
    for name in names:
        os.replace(finished / name, out / name)
    sync(out)
    retired = out.with_name(f".{out.name}.partial")  # what removing leaves after a kill is no training that was stopped
    shutil.rmtree(retired, ignore_errors=True)
    os.replace(state, retired)
    shutil.rmtree(retired, ignore_errors=True)
