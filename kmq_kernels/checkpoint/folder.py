"""The output folder of a run: who may write it, what it was begun with, what an earlier run left in it.

An unfinished output has, beside the shards that are complete,

    OUT/.kmq/request.json        what was asked for; another request on the same folder is refused
    OUT/.kmq/curves/*.json       with a budget: the error of a weight at 1 to 8 bits, and the SHA-256 of its tensor
    OUT/.kmq/*.partial           files being written; they are synced, then get their name
    OUT/.kmq/SHARD.json          its size, its SHA-256 and those of the tensors it was made from, there before it has its name
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from ..files import MANIFEST, CheckpointError, DamagedError, check_files, locked, read_json, read_manifest
from .curves import CURVES, Curve, note_curve, noted_curves, read_curves
from .plan import Shard, StreamPlan
from .stream import STATE, OutputError, output_errors, write_file
from .verify import manifest_source


class Claim(NamedTuple):
    """What an output folder has already: the names of its shards, None where it is complete; and the SHA-256 of the tensors that
    they (also one that is missing now) were made from, by name."""

    done: list[str] | None
    known: dict[str, str]


class Folder:
    """The output of a run, in rank 0."""

    def __init__(self, stack: contextlib.ExitStack, plan: StreamPlan, out: Path, wanted: dict[str, Any]) -> None:
        """stack: keeps the lock. wanted: the request. Raises CheckpointError where the folder is something else's."""
        self.out, self.state, self._stack, self._wanted = out, out / STATE, stack, wanted
        self._is_open = False
        self._curves: dict[str, Curve] = {}  # those of a finished output
        source = plan.source.resolve()
        if out.resolve() == source or out.resolve().is_relative_to(source) or source.is_relative_to(out.resolve()):
            raise CheckpointError(f"{out}: the output and {plan.source} lie in one another; choose another folder")
        self.manifest: dict[str, Any] | None = None
        if (out / MANIFEST).is_file():
            self.manifest = read_manifest(out)
            _same_request(out, self.manifest.get("request"), wanted)
        elif not self.state.is_dir() and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise CheckpointError(f"{out}: it exists and is no unfinished output; choose another folder or remove it")

    def _open(self) -> None:
        """Takes the lock and notes the request, once."""
        if self._is_open:
            return
        self.state.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(locked(self.state / "lock", lambda: CheckpointError(f"{self.out}: another run is writing it")))
        self._is_open = True
        if (self.state / "request.json").is_file():
            _same_request(self.out, read_json(self.state / "request.json"), self._wanted)
        else:
            write_file(self.state / "request.json", json.dumps(self._wanted).encode(), self.state)

    def curves(self, plan: StreamPlan) -> dict[str, Curve]:
        """The curves that are known of what a plan has measured; where some are missing, the folder is this run's from now on."""
        if self.manifest is not None and (self.out / CURVES).is_file():
            record = {name: value for name, value in self.manifest["files"].items() if name == CURVES}
            if wrong := check_files(self.out, record):
                raise DamagedError(f"{self.out}: {wrong[0]}; remove that file and give the same command again")
            self._curves = read_curves(self.out / CURVES, plan)
            return self._curves
        with output_errors(self.out):
            self._open()
            return noted_curves(self.state, plan)

    def claim(self, plan: StreamPlan) -> Claim:
        """What is there of the shards of a plan; the folder is this run's, unless it is complete."""
        manifest = self.manifest
        if manifest is not None and not self.state.exists() and _is_complete(plan, self.out, manifest):
            return Claim(None, manifest_source(self.out, manifest)["tensors"])
        with output_errors(self.out):
            self._open()
            if manifest is not None and _is_complete(plan, self.out, manifest):
                shutil.rmtree(self.state)  # what a run left that was killed at its very end
                return Claim(None, manifest_source(self.out, manifest)["tensors"])
            if manifest is not None:
                self._reopen(plan, manifest)
            done: list[str] = []
            known: dict[str, str] = {}
            for shard in plan.shards:
                noted = record(self.out, shard)
                if noted is None:
                    continue
                known.update(noted["source"])
                if _is_there(self.out / shard.name, noted):
                    done.append(shard.name)
            for partial in self.state.glob("*.partial"):
                partial.unlink()
            needed = sum(shard.nbytes for shard in plan.shards if shard.name not in done)
            free = shutil.disk_usage(self.out).free
            if needed > free:
                sizes = f"the output needs {needed / 1e6:,.0f} MB more, the disk has {free / 1e6:,.0f} MB free"
                raise OutputError(f"{self.out}: {sizes}")
        return Claim(done, known)

    def _reopen(self, plan: StreamPlan, manifest: dict[str, Any]) -> None:
        """Makes a finished output an unfinished one that has its shards: the files beside them are to be made again."""
        out, files, tensors = self.out, manifest["files"], manifest_source(self.out, manifest)["tensors"]
        shards = {shard.name: shard for shard in plan.shards}
        beside = [name for name in files if name not in shards]
        if wrong := check_files(out, {name: files[name] for name in beside if (out / name).exists()}):
            raise DamagedError(f"{out}: {wrong[0]}; remove that file and give the same command again")
        for unit_name, curve in self._curves.items():
            note_curve(self.state, unit_name, curve)
        for name, shard in shards.items():
            noted = {**files[name], "source": {unit.source.name: tensors[unit.source.name] for unit in shard.units}}
            write_file(self.state / f"{name}.json", json.dumps(noted).encode(), self.state)
        for name in sorted(beside, key="config.json".__ne__):  # config.json goes first: nobody loads a mixture
            (out / name).unlink(missing_ok=True)
        (out / MANIFEST).unlink()


def _is_complete(plan: StreamPlan, out: Path, manifest: dict[str, Any]) -> bool:
    """Whether every file is there, made from files beside the weights that are still the same."""
    same = manifest_source(out, manifest)["files"] == plan.side_files
    return same and all(_is_there(out / name, record) for name, record in manifest["files"].items())


def _same_request(out: Path, found: Any, wanted: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise CheckpointError(f"{out}: what it was made with cannot be read; choose another folder or remove it")

    def flat(request: dict[str, Any]) -> dict[str, Any]:
        groups = ("quantization", "source", "layout")
        return {**request, **{f"{g} of {k}": v for g in groups for k, v in (request.get(g) or {}).items()}}

    mine, theirs = flat(json.loads(json.dumps(wanted))), flat(found)
    names = [name for name in {**theirs, **mine} if not isinstance(mine.get(name), dict)]
    for name in names:
        if mine.get(name) == theirs.get(name):
            continue
        if name == "calibration":
            raise CheckpointError(
                f"{out}: it was begun with other texts, or another tokenizer; choose another folder or remove it"
            )
        kind, _, what = name.rpartition(" of ")
        if kind == "layout":
            what = "config.json, or with another transformers,"
        if kind in ("source", "layout"):
            raise CheckpointError(f"{out}: it was begun from another {what} than this; choose another folder or remove it")
        given = f"{what} {theirs.get(name)!r}, this asks for {mine.get(name)!r}"
        raise CheckpointError(f"{out}: it was begun with {given}; choose another folder or remove it")


def record(out: Path, shard: Shard) -> dict[str, Any] | None:
    """What was noted when a shard was finished: its size, its SHA-256, and those of the tensors it was made from."""
    path = out / STATE / f"{shard.name}.json"
    record = read_json(path) if path.is_file() else None
    if not isinstance(record, dict) or set(record) != {"bytes", "sha256", "source"} or not isinstance(record["source"], dict):
        return None
    return record if set(record["source"]) == {unit.source.name for unit in shard.units} else None


def _is_there(path: Path, record: dict[str, Any]) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == record["bytes"]
