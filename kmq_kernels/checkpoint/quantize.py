"""Checkpoints of any size, quantized as a stream: safetensors in, safetensors out, one tensor in memory at a time.

Each shard of the output (see plan.py) is made from the tensors it needs (see stream.py): mapped, clustered,
written. An unfinished output folder holds, beside the shards that are complete,

    OUT/.kmq/request.json        what was asked for; another request on the same folder is refused
    OUT/.kmq/*.partial           files being written; they are synced, then get their name
    OUT/.kmq/SHARD.json          its size, its SHA-256 and those of the tensors it was made from, there before it has its name

so a run that was killed goes on after the last finished shard, if the source still holds what the finished ones were made from;
another source is refused. config.json comes when every shard is verified, then the manifest with all checksums, of the source
and of the output, then .kmq goes. The same command on a finished output compares both: other weights are refused; where only
files beside the weights changed (configuration, tokenizer, card), these are made again.

The ranks of a torchrun job take whole shards, the most work first, and the files
are the same for any number of ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import ops
from ..files import (
    INDEX,
    MANIFEST,
    CheckpointError,
    DamagedError,
    check_files,
    file_record,
    locked,
    manifest_digest,
    open_regular,
    read_json,
    read_manifest,
    sync,
)
from ..hf import MODEL_CARD
from .plan import Shard, StreamPlan, Unit
from .ranks import Ranks
from .stream import STATE, OutputError, Stream, Times, output_errors, tensor_digests, write_file
from .verify import manifest_source


@dataclasses.dataclass
class Progress:
    """How far a run is. Bytes are those of the tensors read; with several ranks, of all of them."""

    total: int
    done: int = 0
    resumed: int = 0  # part of `done` that an earlier run did
    tensor: str = ""
    shard: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did. Bytes and weights are of the whole output; the rest, from `shards_made` on, of this run and process."""

    out: str
    model_class: str
    weights: int
    quantized_weights: int
    bytes_before: int
    bytes_after: int
    shards: int
    shards_made: int
    side_files_made: bool  # whether the files beside the weights were written by this run
    read_bytes: int
    clustered_weights: int
    times: Times
    peak_bytes: int  # of resident memory since the process began

    @property
    def bits_per_weight(self) -> float:
        """Bits of the output for each weight of the model."""
        return 8 * self.bytes_after / max(self.weights, 1)


def choose_device(asked: str, ranks: Ranks) -> str:
    """Where to cluster: "cpu", a CUDA device, or for "auto" this rank's GPU where the clustering has a kernel for GPUs."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() and ops.has_kernel("kmeans", "CUDA") else "cpu"
    if asked != "cpu" and not (asked.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"device: expected cpu, cuda or auto on this machine, got {asked!r}")
    return f"cuda:{ranks.local_rank % torch.cuda.device_count()}" if asked == "cuda" else asked


def quantize_checkpoint(
    plan: StreamPlan,
    out: Path,
    *,
    device: str = "cpu",
    ranks: Ranks | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Carries out a plan: writes the packed model folder `out`, or goes on with it.

    device: where weights are clustered. ranks: this process among those of a torchrun job (all with the same plan and a file
    system they share). on_progress: called in rank 0 after each batch of tensors. Raises CheckpointError where the folder
    holds something else or the source is damaged, OutputError where the output cannot be written, RankDied, and ValueError
    naming a weight with NaN or Inf; finished shards are kept, and the same call goes on from there.
    """
    start = time.perf_counter()
    ranks = ranks or Ranks()
    wanted = plan.request(device.partition(":")[0])
    same = len({json.dumps(other) for other in ranks.gather((wanted, plan.side_files))}) == 1
    ranks.agree(same, lambda: CheckpointError(f"{plan.source}: the ranks do not see the same checkpoint, options and version"))
    with contextlib.ExitStack() as stack:
        done, known = ranks.lead(lambda: _prepare(stack, plan, out, wanted))
        _check_source(plan, out, known, ranks)
        shared = all(ranks.gather((out / MANIFEST).is_file() if done is None else (out / STATE).is_dir()))
        ranks.agree(shared, lambda: CheckpointError(f"{out}: not the same folder for all ranks; they must share a file system"))
        todo = [] if done is None else [shard for shard in plan.shards if shard.name not in done]
        mine = _share(todo, ranks.size)[ranks.rank]
        progress = Progress(sum(shard.work for shard in plan.shards))
        progress.done = progress.resumed = progress.total - sum(shard.work for shard in todo)

        def on_batch(shard: Shard, batch: list[Unit]) -> None:
            ranks.check()
            read = ranks.add("read", sum(unit.source.nbytes for unit in batch))
            progress.done = progress.resumed + read if ranks.size > 1 else progress.done + read
            progress.tensor, progress.shard = batch[-1].name, shard.name
            if on_progress is not None and ranks.rank == 0:
                on_progress(progress)

        stream = Stream(out, plan, device, on_batch, known)
        if todo:
            with output_errors(out):
                stream.run(mine)
            ranks.gather(None)
        _check_output(plan, out, ranks)
        ranks.lead(lambda: _publish(plan, out, wanted) if done is not None else None)
    ranks.gather(None)
    stream.times.total = time.perf_counter() - start
    quantized = [unit for unit in plan.units if unit.bits is not None]
    made = {unit.name for shard in mine for unit in shard.units}
    return Summary(
        out=str(out),
        model_class=plan.model_class,
        weights=sum(math.prod(unit.source.shape) for unit in plan.units),
        quantized_weights=sum(math.prod(unit.source.shape) for unit in quantized),
        bytes_before=progress.total,
        bytes_after=sum(shard.nbytes for shard in plan.shards),
        shards=len(plan.shards),
        shards_made=len(mine),
        side_files_made=done is not None,
        read_bytes=sum(shard.work for shard in mine),
        clustered_weights=sum(math.prod(unit.source.shape) for unit in quantized if unit.name in made),
        times=stream.times,
        peak_bytes=_peak_bytes(),
    )


def _peak_bytes() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:  # getrusage would count the parent before exec
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _share(shards: list[Shard], ranks: int) -> list[list[Shard]]:
    """Shards for each rank: the largest first, each to the rank with the least work."""
    parts: list[list[Shard]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for shard in sorted(shards, key=lambda shard: (-shard.work, shard.name)):
        rank = load.index(min(load))
        parts[rank].append(shard)
        load[rank] += shard.work
    return [sorted(part, key=lambda shard: shard.name) for part in parts]


class _Claim(NamedTuple):
    """What an output folder has already: the names of its shards, None where it is complete; and the SHA-256 of the tensors that
    they (also one that is missing now) were made from, by name."""

    done: list[str] | None
    known: dict[str, str]


def _prepare(stack: contextlib.ExitStack, plan: StreamPlan, out: Path, wanted: dict[str, Any]) -> _Claim:
    """Claims the output folder."""
    source = plan.source.resolve()
    if out.resolve() == source or out.resolve().is_relative_to(source) or source.is_relative_to(out.resolve()):
        raise CheckpointError(f"{out}: the output and {plan.source} lie in one another; choose another folder")
    state = out / STATE
    manifest: dict[str, Any] | None = None
    if (out / MANIFEST).is_file():
        manifest = read_manifest(out)
        _same_request(out, manifest.get("request"), wanted)
        if not state.exists() and _is_complete(plan, out, manifest):
            return _Claim(None, manifest_source(out, manifest)["tensors"])
    elif not state.is_dir() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: it exists and is no unfinished output; choose another folder or remove it")
    with output_errors(out):
        state.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(state / "lock", lambda: CheckpointError(f"{out}: another run is writing it")))
        if manifest is not None and _is_complete(plan, out, manifest):
            shutil.rmtree(state)  # what a run left that was killed at its very end
            return _Claim(None, manifest_source(out, manifest)["tensors"])
        if (state / "request.json").is_file():
            _same_request(out, read_json(state / "request.json"), wanted)
        else:
            write_file(state / "request.json", json.dumps(wanted).encode(), state)
        if manifest is not None:
            _reopen(plan, out, manifest)
        done: list[str] = []
        known: dict[str, str] = {}
        for shard in plan.shards:
            record = _record(out, shard)
            if record is None:
                continue
            known.update(record["source"])
            if _is_there(out / shard.name, record):
                done.append(shard.name)
        for partial in state.glob("*.partial"):
            partial.unlink()
        needed = sum(shard.nbytes for shard in plan.shards if shard.name not in done)
        free = shutil.disk_usage(out).free
        if needed > free:
            raise OutputError(f"{out}: the output needs {needed / 1e6:,.0f} MB more, the disk has {free / 1e6:,.0f} MB free")
    return _Claim(done, known)


def _is_complete(plan: StreamPlan, out: Path, manifest: dict[str, Any]) -> bool:
    """Whether every file is there, made from files beside the weights that are still the same."""
    same = manifest_source(out, manifest)["files"] == plan.side_files
    return same and all(_is_there(out / name, record) for name, record in manifest["files"].items())


def _reopen(plan: StreamPlan, out: Path, manifest: dict[str, Any]) -> None:
    """Makes a finished output an unfinished one that has its shards: the files beside them are to be made again."""
    files, tensors = manifest["files"], manifest_source(out, manifest)["tensors"]
    shards = {shard.name: shard for shard in plan.shards}
    beside = [name for name in files if name not in shards]
    if wrong := check_files(out, {name: files[name] for name in beside if (out / name).exists()}):
        raise DamagedError(f"{out}: {wrong[0]}; remove that file and give the same command again")
    for name, shard in shards.items():
        record = {**files[name], "source": {unit.source.name: tensors[unit.source.name] for unit in shard.units}}
        write_file(out / STATE / f"{name}.json", json.dumps(record).encode(), out / STATE)
    for name in sorted(beside, key="config.json".__ne__):  # config.json goes first: nobody loads a mixture
        (out / name).unlink(missing_ok=True)
    (out / MANIFEST).unlink()


def _check_source(plan: StreamPlan, out: Path, known: dict[str, str], ranks: Ranks) -> None:
    """Reads every tensor that was read before, and refuses a source that now holds another one; each rank its part."""
    tensors = [unit.source for unit in plan.units if unit.source.name in known]
    mine = tensors[ranks.rank :: ranks.size]
    found = tensor_digests(mine)
    other = [tensor for part in ranks.gather([t for t in mine if found.get(t.name) != known[t.name]]) for tensor in part]

    def refusal() -> CheckpointError:
        what = f"another {other[0].file.name} than this ({other[0].name} has other values)"
        return CheckpointError(f"{out}: it was begun from {what}; choose another folder or remove it")

    ranks.agree(not other, refusal)


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
        kind, _, what = name.rpartition(" of ")
        if kind == "layout":
            what = "config.json, or with another transformers,"
        if kind in ("source", "layout"):
            raise CheckpointError(f"{out}: it was begun from another {what} than this; choose another folder or remove it")
        given = f"{what} {theirs.get(name)!r}, this asks for {mine.get(name)!r}"
        raise CheckpointError(f"{out}: it was begun with {given}; choose another folder or remove it")


def _record(out: Path, shard: Shard) -> dict[str, Any] | None:
    """What was noted when a shard was finished: its size, its SHA-256, and those of the tensors it was made from."""
    path = out / STATE / f"{shard.name}.json"
    record = read_json(path) if path.is_file() else None
    if not isinstance(record, dict) or set(record) != {"bytes", "sha256", "source"} or not isinstance(record["source"], dict):
        return None
    return record if set(record["source"]) == {unit.source.name for unit in shard.units} else None


def _is_there(path: Path, record: dict[str, Any]) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == record["bytes"]


def _check_output(plan: StreamPlan, out: Path, ranks: Ranks) -> None:
    """Reads every shard once more, of a complete output every file; each rank its part."""
    if (out / STATE).exists():
        records = {shard.name: _record(out, shard) or {} for shard in plan.shards}
    else:
        records = read_manifest(out)["files"]
    mine = dict(list(records.items())[ranks.rank :: ranks.size])
    wrong = [sentence for part in ranks.gather(check_files(out, mine)) for sentence in part]
    repair = "remove that file and give the same command again"
    ranks.agree(not wrong, lambda: DamagedError(f"{out}: {wrong[0]}; {repair}"))


def _publish(plan: StreamPlan, out: Path, wanted: dict[str, Any]) -> None:
    """Everything but the shards, config.json after the rest, then the manifest; the state goes last."""
    state = out / STATE
    files: dict[str, dict[str, Any]] = {}
    tensors: dict[str, str] = {}
    with output_errors(out):
        for shard in plan.shards:
            record = _record(out, shard)
            assert record is not None, shard.name
            files[shard.name] = {"bytes": record["bytes"], "sha256": record["sha256"]}
            tensors.update(record["source"])
        for path, content in _side_files(plan):
            target = out / path
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, content, state)
            files[str(path)] = file_record(target)
        source = {"tensors": dict(sorted(tensors.items())), "files": plan.side_files}
        manifest = {"format": 2, "request": wanted, "source": source, "files": dict(sorted(files.items()))}
        manifest["sha256"] = manifest_digest(manifest)
        write_file(out / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode(), state)
        shutil.rmtree(state)
        sync(out)


def _side_files(plan: StreamPlan) -> Iterator[tuple[Path, bytes | Iterable[bytes]]]:
    """Path and content of each file beside the shards."""
    own = {"config.json", "README.md", MANIFEST}
    for name in plan.side_files:
        if name not in own:
            yield Path(name), _content(plan, name)
    yield Path("README.md"), _card(plan).encode()
    if len(plan.shards) > 1:
        weight_map = {name: shard.name for shard in plan.shards for name, *_ in shard.tensors}
        total = sum(shard.nbytes for shard in plan.shards)
        index = {"metadata": {"total_parameters": plan.parameters, "total_size": total}, "weight_map": weight_map}
        yield Path(INDEX), (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    yield Path("config.json"), plan.config_json.encode()


def _content(plan: StreamPlan, name: str) -> Iterator[bytes]:
    """A file of the source as it was when the plan was made; raises CheckpointError at its end where it is another one."""
    digest = hashlib.sha256()
    with open_regular(plan.source / name) as file:
        while part := file.read(1 << 20):
            digest.update(part)
            yield part
    if digest.hexdigest() != plan.side_files[name]:
        raise CheckpointError(f"{plan.source / name}: it changed while it was read; give the same command again")


def _card(plan: StreamPlan) -> str:
    """The model card; that of the source follows, with its licence and languages kept at the head."""
    bits = sorted({unit.bits for unit in plan.units if unit.bits is not None})
    summary = f"{plan.config.scheme} clusters, {', '.join(map(str, bits))} bits an index, made by `kmq quantize`"
    head, _, body = MODEL_CARD.format(summary=summary).removeprefix("---\n").partition("---\n")
    if "README.md" not in plan.side_files:
        return f"---\n{head}---\n{body}"
    text = b"".join(_content(plan, "README.md")).decode(errors="replace")
    front, card = "", text
    if text.startswith("---\n") and "\n---\n" in text[3:]:
        front, _, card = text[4:].partition("\n---\n")
    kept, keep = [], False
    for line in front.splitlines():
        if not line.startswith((" ", "-")):
            keep = line.startswith(("license", "language"))
        if keep:
            kept.append(line)
    head += "".join(f"{line}\n" for line in kept)
    return f"---\n{head}---\n{body}\n## The model it was made from\n\n{card.lstrip()}"
