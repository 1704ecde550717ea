"""Checkpoints of any size, quantized as a stream: safetensors in, safetensors out, one tensor in memory at a time.

Each shard of the output (see plan.py) is made from the tensors it needs (see stream.py): mapped, clustered, written. Where bits
are to be found for a budget, a first pass measures every weight (see curves.py), and the plan is decided by what it found. A run
that was killed goes on after the last finished shard, or weight, if the source still holds what the finished ones were made from
(see folder.py); another source is refused. config.json comes when every shard is verified, then the manifest with all checksums,
of the source and of the output, then .kmq goes. The same command on a finished output compares both: other weights are refused;
where only files beside the weights changed (configuration, tokenizer, card), these are made again. For objective "output" what
stands for weights is found first, from the outputs of the layers on texts (see outputs.py).

The ranks of a torchrun job take whole shards, the most work first, and the files
are the same for any number of ranks.
"""

from __future__ import annotations

import collections
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
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..files import (
    INDEX,
    MANIFEST,
    CheckpointError,
    DamagedError,
    check_files,
    file_record,
    manifest_digest,
    open_regular,
    read_manifest,
    sync,
)
from ..hf import SENTENCE_CONFIG, Facts, card, sentence_class, with_requirement
from .curves import CURVES, Curve, curves_json, measure
from .folder import Folder, record
from .outputs import Batch, batches_digest, output_tensors
from .plan import Shard, StreamPlan, Unit
from .ranks import Ranks
from .stream import STATE, Stream, Times, output_errors, tensor_digests, write_file

Work = TypeVar("Work", Shard, Unit)


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
    file_bytes: int  # of all files of weights, with their headers and the index
    size: int | None  # the budget that they meet
    module_bits: dict[int, int]  # how many weights have so many bits
    side_files_made: bool  # whether the files beside the weights were written by this run
    read_bytes: int
    clustered_weights: int
    measured_weights: int  # in the first pass, for a budget
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
    calibration: list[Batch] | None = None,
) -> Summary:
    """Carries out a plan: writes the packed model folder `out`, or goes on with it.

    device: where weights are clustered. ranks: this process among those of a torchrun job (all with the same plan and a file
    system they share). on_progress: called in rank 0 after each batch of tensors. calibration: batches of texts for objective
    "output", which has the whole model in memory and works in one process. Raises CheckpointError where the folder
    holds something else or the source is damaged, OutputError where the output cannot be written, RankDied, and ValueError
    naming a weight with NaN or Inf; finished shards are kept, and the same call goes on from there.
    """
    start = time.perf_counter()
    ranks = ranks or Ranks()
    with_outputs = plan.config.objective == "output"
    if with_outputs != (calibration is not None):
        raise ValueError(f"calibration: objective {plan.config.objective!r} {'needs' if with_outputs else 'takes no'} batches")
    if with_outputs and ranks.size > 1:
        raise ValueError("objective: 'output' goes layer after layer in one process; give the command without torchrun")
    wanted = plan.request(device.partition(":")[0])
    wanted |= {"calibration": batches_digest(calibration)} if calibration is not None else {}
    same = len({json.dumps(other) for other in ranks.gather((wanted, plan.side_files))}) == 1
    ranks.agree(same, lambda: CheckpointError(f"{plan.source}: the ranks do not see the same checkpoint, options and version"))
    with contextlib.ExitStack() as stack:
        folder: Folder | None = None

        def lead() -> Folder:
            nonlocal folder
            folder = folder or Folder(stack, plan, out, wanted)
            return folder

        progress = _Reading(plan, ranks, on_progress)
        curves, read, measured = _measure(plan, out, device, ranks, lead, progress)
        took = time.perf_counter() - start
        settled = plan if plan.budget is None else plan.at_bits(plan.budget.least_error([c.errors for c in curves.values()]))
        done, known = ranks.lead(lambda: lead().claim(settled))
        known.update((unit.source.name, curves[unit.name].source) for unit in plan.measured)
        _check_source(plan, out, {name: digest for name, digest in known.items() if name not in read}, ranks)
        shared = all(ranks.gather((out / MANIFEST).is_file() if done is None else (out / STATE).is_dir()))
        ranks.agree(shared, lambda: CheckpointError(f"{out}: not the same folder for all ranks; they must share a file system"))
        todo = [] if done is None else [shard for shard in settled.shards if shard.name not in done]
        mine = _share(todo, ranks.size)[ranks.rank]
        progress.begin(sum(shard.work for shard in settled.shards) - sum(shard.work for shard in todo))
        ready: dict[str, Tensor] = {}
        begun = time.perf_counter()
        if calibration is not None and todo:
            fitting = _Fitting(settled, progress)
            with output_errors(out):
                ready, read_now = output_tensors(settled, out, calibration, device, fitting)
            known.update(read_now)
            fitting.finish()
        stream = Stream(out, settled, device, lambda shard, batch: progress.add(batch, shard.name), known)
        stream.ready, stream.times.cluster = ready, time.perf_counter() - begun
        if todo:
            with output_errors(out):
                stream.run(mine)
            ranks.gather(None)
        _check_output(settled, out, ranks)
        ranks.lead(lambda: _publish(settled, out, wanted, curves) if done is not None else None)
    ranks.gather(None)
    stream.times.measure = took if measured else 0.0
    stream.times.total = time.perf_counter() - start
    quantized = [unit for unit in settled.units if unit.bits is not None]
    made = {unit.name for shard in mine for unit in shard.units}
    files = [*(shard.name for shard in settled.shards), *([INDEX] if len(settled.shards) > 1 else [])]
    return Summary(
        out=str(out),
        model_class=plan.model_class,
        weights=_count(settled.units),
        quantized_weights=_count(quantized),
        bytes_before=sum(shard.work for shard in plan.shards),
        bytes_after=sum(shard.nbytes for shard in settled.shards),
        shards=len(settled.shards),
        shards_made=len(mine),
        file_bytes=sum((out / name).stat().st_size for name in files),
        size=plan.config.size,
        module_bits=dict(sorted(collections.Counter(unit.bits or 0 for unit in quantized).items())),
        side_files_made=done is not None,
        read_bytes=sum(shard.work for shard in mine) + sum(unit.source.nbytes for unit in measured),
        clustered_weights=_count([unit for unit in quantized if unit.name in made]),
        measured_weights=_count(measured),
        times=stream.times,
        peak_bytes=_peak_bytes(),
    )


def decide(plan: StreamPlan, device: str = "cpu") -> StreamPlan:
    """A plan with its bits decided: the first pass, noted nowhere. For who only wants to know what would be made."""
    if plan.budget is None:
        return plan
    curves = measure(plan, plan.measured, None, device, {}, lambda batch: None)
    return plan.at_bits(plan.budget.least_error([curves[unit.name].errors for unit in plan.measured]))


def _count(units: Iterable[Unit]) -> int:
    """Weights of units."""
    return sum(math.prod(unit.source.shape) for unit in units)


class _Reading:
    """How far all ranks are, told to rank 0's `on_progress`."""

    def __init__(self, plan: StreamPlan, ranks: Ranks, on_progress: Callable[[Progress], None] | None) -> None:
        work = sum(shard.work for shard in plan.shards)
        self._progress = Progress(work + sum(unit.source.nbytes for unit in plan.measured))
        self._ranks, self._on_progress, self._read, self._found = ranks, on_progress, 0, 0

    def begin(self, resumed: int) -> None:
        """A pass begins, of which an earlier run did so many bytes."""
        self._progress.resumed += resumed
        self._count()

    def extend(self, count: int) -> None:
        """There is work that counts as so many bytes more."""
        self._progress.total += count

    def found(self, count: int, name: str | None = None) -> None:
        """So much of that is done, the last of it for the tensor `name`."""
        self._found += count
        self._count()
        if name is not None and self._on_progress is not None:
            self._progress.tensor = name
            self._on_progress(self._progress)

    def _count(self) -> None:
        self._progress.done = self._progress.resumed + self._found + self._read

    def add(self, batch: list[Unit], shard: str = "") -> None:
        """These units are read and worked on; raises RankDied where another rank is known to be gone."""
        self._ranks.check()
        count = sum(unit.source.nbytes for unit in batch)
        total = self._ranks.add("read", count)
        self._read = total if self._ranks.size > 1 else self._read + count
        self._count()
        self._progress.tensor, self._progress.shard = batch[-1].name, shard
        if self._on_progress is not None and self._ranks.rank == 0:
            self._on_progress(self._progress)


def _measure(
    plan: StreamPlan, out: Path, device: str, ranks: Ranks, lead: Callable[[], Folder], progress: _Reading
) -> tuple[dict[str, Curve], set[str], list[Unit]]:
    """The first pass: the curve of each unit that the budget decides about, in its order; names of tensors that a rank has read;
    the units that this rank measured."""
    if plan.budget is None:
        return {}, set(), []
    known = ranks.lead(lambda: lead().curves(plan))
    todo = [unit for unit in plan.measured if unit.name not in known]
    if not todo:
        progress.begin(sum(unit.source.nbytes for unit in plan.measured))
        return {unit.name: known[unit.name] for unit in plan.measured}, set(), []
    digests = {unit.source.name: known[unit.name].source for unit in plan.measured if unit.name in known}
    _check_source(plan, out, digests, ranks)
    progress.begin(sum(unit.source.nbytes for unit in plan.measured) - sum(unit.source.nbytes for unit in todo))
    shared = all(ranks.gather((out / STATE).is_dir()))
    ranks.agree(shared, lambda: CheckpointError(f"{out}: not the same folder for all ranks; they must share a file system"))
    mine = _share(todo, ranks.size)[ranks.rank]
    for part in ranks.gather(measure(plan, mine, out / STATE, device, digests, progress.add)):
        known.update(part)
    return {unit.name: known[unit.name] for unit in plan.measured}, {unit.source.name for unit in plan.measured}, mine


class _Fitting:
    """The progress of the search for what keeps the outputs: the weights count as bytes once more."""

    def __init__(self, plan: StreamPlan, progress: _Reading) -> None:
        self._bytes = {unit.name.removesuffix(".weight"): unit.source.nbytes for unit in plan.units if unit.bits is not None}
        self._progress = progress
        progress.extend(sum(self._bytes.values()))

    def __call__(self, names: list[str]) -> None:
        """The weights `names` are found."""
        if names:
            self._progress.found(sum(self._bytes.pop(name, 0) for name in names), f"{names[-1]}, fitted")

    def finish(self) -> None:
        """All are."""
        self._progress.found(sum(self._bytes.values()))


def _peak_bytes() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:  # getrusage would count the parent before exec
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _share(parts: list[Work], ranks: int) -> list[list[Work]]:
    """Shards or units for each rank: the largest first, each to the rank with the least work."""
    shares: list[list[Work]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for part in sorted(parts, key=lambda part: (-part.work, part.name)):
        rank = load.index(min(load))
        shares[rank].append(part)
        load[rank] += part.work
    return [sorted(share, key=lambda part: part.name) for share in shares]


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


def _check_output(plan: StreamPlan, out: Path, ranks: Ranks) -> None:
    """Reads every shard once more, of a complete output every file; each rank its part."""
    if (out / STATE).exists():
        records = {shard.name: record(out, shard) or {} for shard in plan.shards}
    else:
        records = read_manifest(out)["files"]
    mine = dict(list(records.items())[ranks.rank :: ranks.size])
    wrong = [sentence for part in ranks.gather(check_files(out, mine)) for sentence in part]
    repair = "remove that file and give the same command again"
    ranks.agree(not wrong, lambda: DamagedError(f"{out}: {wrong[0]}; {repair}"))


def _publish(plan: StreamPlan, out: Path, wanted: dict[str, Any], curves: dict[str, Curve]) -> None:
    """Everything but the shards, config.json after the rest, then the manifest; the state goes last."""
    state = out / STATE
    files: dict[str, dict[str, Any]] = {}
    tensors: dict[str, str] = {}
    with output_errors(out):
        for shard in plan.shards:
            noted = record(out, shard)
            assert noted is not None, shard.name
            files[shard.name] = {"bytes": noted["bytes"], "sha256": noted["sha256"]}
            tensors.update(noted["source"])
        for path, content in _side_files(plan, curves):
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


def _side_files(plan: StreamPlan, curves: dict[str, Curve]) -> Iterator[tuple[Path, bytes | Iterable[bytes]]]:
    """Path and content of each file beside the shards."""
    own = {"config.json", "README.md", MANIFEST, CURVES, SENTENCE_CONFIG}
    for name in plan.side_files:
        if name not in own:
            yield Path(name), _content(plan, name)
    if SENTENCE_CONFIG in plan.side_files:
        yield Path(SENTENCE_CONFIG), json.dumps(with_requirement(_sentence_config(plan)), indent=2, sort_keys=True).encode()
    yield Path("README.md"), _card(plan).encode()
    if len(plan.shards) > 1:
        weight_map = {name: shard.name for shard in plan.shards for name, *_ in shard.tensors}
        total = sum(shard.nbytes for shard in plan.shards)
        index = {"metadata": {"total_parameters": plan.parameters, "total_size": total}, "weight_map": weight_map}
        yield Path(INDEX), (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    if curves:
        yield Path(CURVES), curves_json(plan, curves).encode()
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
    """The card; that of the source follows."""
    quantized = [unit for unit in plan.units if unit.bits is not None]
    facts = Facts(
        bits=dict(collections.Counter(unit.bits or 0 for unit in quantized)),
        scheme=plan.config.scheme,
        weights=_count(plan.units),
        bytes_before=sum(math.prod(unit.source.shape) * unit.dtype.itemsize for unit in plan.units),
        bytes_after=sum(shard.nbytes for shard in plan.shards),
        made_by="kmq quantize",
    )
    before = b"".join(_content(plan, "README.md")).decode(errors="replace") if "README.md" in plan.side_files else None
    known = sentence_class(_sentence_config(plan)) if SENTENCE_CONFIG in plan.side_files else None
    return card(facts, base_model=plan.base_model, source_card=before, sentence_class=known)


def _sentence_config(plan: StreamPlan) -> dict[str, Any]:
    try:
        content = json.loads(b"".join(_content(plan, SENTENCE_CONFIG)))
    except ValueError as error:
        raise CheckpointError(f"{plan.source / SENTENCE_CONFIG}: not a JSON file ({error})") from None
    return content if isinstance(content, dict) else {}
