"""Checkpoints of any size, quantized as a stream: safetensors in, safetensors out, one tensor in memory at a time.

Each shard of the output (see checkpoint_plan.py) is made from the tensors it needs: mapped, clustered, written. While one
tensor is clustered, a thread reads the next into the page cache and another writes the one before. An unfinished output folder
holds, beside the shards that are complete,

    OUT/.kmq/request.json        what was asked for; another request on the same folder is refused
    OUT/.kmq/*.partial           files being written; they are synced, then get their name
    OUT/.kmq/SHARD.json          its size and SHA-256, there before the shard has its name

so a run that was killed goes on after the last finished shard. config.json comes when every shard is verified, then the
manifest with all checksums, then .kmq goes. The ranks of a torchrun job take whole shards, the most work first, and the files
are the same for any number of ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import math
import mmap
import os
import resource
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import ops
from .checkpoint_plan import Shard, StreamPlan, Unit
from .config import KMQConfig
from .encoding import encode_weights
from .hf import MODEL_CARD
from .ranks import Ranks
from .tensor_files import (
    INDEX,
    OTHER_WEIGHTS,
    CheckpointError,
    StoredTensor,
    files_below,
    header_bytes,
    open_regular,
    read_json,
    stored_tensors,
)

MANIFEST = "kmq_manifest.json"
STATE = ".kmq"
OUTPUT_FAILED = 3  # exit code: the output could not be written; the same command goes on
DAMAGED = 5  # exit code: files do not match their checksums

_BATCH_BYTES = 64 << 20  # small tensors are clustered together, so that every thread has work
_PENDING_BYTES = 32 << 20  # what may wait to be written while the largest batch is clustered; beside smaller ones, more
_AHEAD_BYTES = 256 << 20  # what is read before it is needed
_READ_BYTES = 2 << 20  # a request of the reading thread; the kernel's read-ahead keeps more of them in flight
_CHUNK = 8 << 20
_MADV_POPULATE_READ = 22
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
T = TypeVar("T")


class OutputError(OSError):
    """The output folder cannot be written; what is finished is kept."""

    exit_code = OUTPUT_FAILED


class DamagedError(CheckpointError):
    """Files that do not match their checksums."""

    exit_code = DAMAGED


# Reading


def _read_ahead(tensors: list[StoredTensor]) -> None:
    """Reads tensors into the page cache, where `_read` finds them; what cannot be read is for `_read` to report.

    Read, not only asked for: POSIX_FADV_WILLNEED fills the cache with single pages, which takes more time than the disk does.
    """
    buffer = memoryview(bytearray(_READ_BYTES))
    for tensor in tensors:
        with contextlib.suppress(OSError, CheckpointError), open_regular(tensor.file) as file:
            at, end = tensor.begin, tensor.begin + tensor.nbytes
            while at < end and (count := os.preadv(file.fileno(), [buffer[: end - at]], at)):
                at += count


def _read(tensor: StoredTensor) -> Tensor:
    """The tensor, mapped and present; the mapping goes with the last tensor that uses it.

    Raises CheckpointError where the disk or the file does not give it.
    """
    if tensor.nbytes == 0:
        return torch.empty(tensor.shape, dtype=tensor.torch_dtype)
    shift = tensor.begin % mmap.ALLOCATIONGRANULARITY
    try:
        with open_regular(tensor.file) as file:
            if os.fstat(file.fileno()).st_size < tensor.begin + tensor.nbytes:
                raise OSError(0, "the file was cut short")
            mapped = mmap.mmap(
                file.fileno(),
                shift + tensor.nbytes,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,  # torch takes no read-only memory; pages stay shared until written
                offset=tensor.begin - shift,
            )
        flat = torch.frombuffer(mapped, dtype=torch.uint8, count=tensor.nbytes, offset=shift)
        _populate(flat.data_ptr() - shift, shift + tensor.nbytes)
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: {tensor.name} cannot be read: {error.strerror}") from None
    if flat.data_ptr() % tensor.torch_dtype.itemsize:
        flat = flat.clone()
    return flat.view(tensor.torch_dtype).view(tensor.shape)


def _populate(address: int, count: int) -> None:
    """Brings a mapping into memory. A disk that fails gives an error here, where touching the pages would end the process."""
    for at in range(0, count, _CHUNK):
        if _libc.madvise(address + at, min(_CHUNK, count - at), _MADV_POPULATE_READ) != 0:
            code = ctypes.get_errno()
            if code == 22:  # EINVAL: a kernel older than 5.14; the pages come when they are touched
                return
            raise OSError(code, os.strerror(code))


# Writing


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        kept = "; finished shards are kept, the same command goes on from there"
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}{kept}") from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes | Iterable[bytes], scratch: Path) -> None:
    """A file that is complete when it has its name: written in the folder `scratch`, synced, renamed."""
    partial = scratch / f"{path.name}.{secrets.token_hex(4)}.partial"
    with open(partial, "wb") as file:
        for part in [content] if isinstance(content, bytes) else content:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sha256(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(1 << 20)
    with open_regular(path) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(memoryview(buffer)[:count])
            size += count
    return {"bytes": size, "sha256": digest.hexdigest()}


class _ShardFile:
    """A shard while it is written. All calls come from one thread."""

    def __init__(self, out: Path, shard: Shard) -> None:
        self.out, self.shard = out, shard
        # A name of its own: a rank of a job that is thought dead may still write.
        self._path = out / STATE / f"{shard.name}.{secrets.token_hex(4)}.partial"
        start, self._at = header_bytes(shard.tensors)
        self._missing = {name for name, *_ in shard.tensors}
        with _output_errors(self._path):
            self._file = open(self._path, "xb", buffering=0)  # noqa: SIM115  # closed by finish or discard
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._file.fileno(), 0, len(start) + shard.nbytes)  # a disk too small says so now
                self._write(start, 0)
            except OSError:
                self.discard()
                raise

    def _write(self, data: Any, at: int) -> None:
        view = memoryview(data)
        with _output_errors(self._path):
            while len(view):
                done = os.pwrite(self._file.fileno(), view[: 64 << 20], at)
                view, at = view[done:], at + done

    def put(self, name: str, tensor: Tensor) -> None:
        """One tensor of the shard."""
        if tensor.numel():
            self._write(tensor.contiguous().view(-1).view(torch.uint8).numpy(), self._at[name])
        self._missing.remove(name)

    def finish(self) -> None:
        """Notes size and checksum, then gives the shard its name; one that lacks a tensor is discarded."""
        if self._missing:
            self.discard()
            return
        with _output_errors(self._path):
            os.fsync(self._file.fileno())
            self._file.close()
            record = _sha256(self._path)
            write_file(self.out / STATE / f"{self.shard.name}.json", json.dumps(record).encode(), self.out / STATE)
            os.replace(self._path, self.out / self.shard.name)
            _sync_folder(self.out)

    def discard(self) -> None:
        """Removes an unfinished shard, so that it takes no space."""
        self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


def _put(file: Future[_ShardFile], results: list[tuple[str, Tensor]]) -> None:
    for name, tensor in results:
        file.result().put(name, tensor)


def _finish(file: Future[_ShardFile]) -> None:
    file.result().finish()


def _discard(file: Future[_ShardFile]) -> None:
    file.result().discard()


# The stream


@dataclasses.dataclass
class Progress:
    """How far a run is. Bytes are those of the tensors read; with several ranks, of all of them."""

    total: int
    done: int = 0
    resumed: int = 0  # part of `done` that an earlier run did
    tensor: str = ""
    shard: str = ""


@dataclasses.dataclass
class Times:
    """Seconds: waiting for the disk to read, clustering, and in the thread that writes; `total` on the clock."""

    read: float = 0.0
    cluster: float = 0.0
    write: float = 0.0
    total: float = 0.0


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
    read_bytes: int
    clustered_weights: int
    times: Times
    peak_bytes: int  # of resident memory since the process began

    @property
    def bits_per_weight(self) -> float:
        """Bits of the output for each weight of the model."""
        return 8 * self.bytes_after / max(self.weights, 1)


def _batches(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    """Units that are read and clustered together, in the order in which they stand on the disk."""
    batch: list[Unit] = []
    size = 0
    for unit in sorted(units, key=lambda unit: (str(unit.source.file), unit.source.begin)):
        if batch and size + unit.source.nbytes > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(unit)
        size += unit.source.nbytes
    if batch:
        yield batch


class _Stream:
    """Makes shards: one thread reads ahead, the main thread maps and clusters, one thread writes."""

    def __init__(self, out: Path, config: KMQConfig, device: str, on_batch: Callable[[Shard, list[Unit]], None]) -> None:
        self.out, self.config, self.device, self._on_batch = out, config, device, on_batch
        self.times = Times()
        self._pending: list[tuple[Future[Any], int]] = []  # writes, and the bytes each keeps in memory

    def run(self, shards: list[Shard]) -> None:
        """Makes the shards one after the other."""
        work = [(shard, batch) for shard in shards for batch in _batches(shard.units)]
        sizes = [sum(unit.source.nbytes for unit in batch) for _, batch in work]
        results = [sum(unit.nbytes for unit in batch) for _, batch in work]
        most = max((size + result for size, result in zip(sizes, results, strict=True)), default=0) + _PENDING_BYTES
        coming = 0  # bytes that are read or being read, and not clustered yet
        ready: list[Future[None]] = []
        file: Future[_ShardFile] | None = None
        with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as reader:
            try:
                for i, (shard, batch) in enumerate(work):
                    while len(ready) < len(work) and (len(ready) <= i + 1 or coming < _AHEAD_BYTES):
                        coming += sizes[len(ready)]
                        ready.append(reader.submit(_read_ahead, [unit.source for unit in work[len(ready)][1]]))
                    file = file or self._later(writer, 0, _ShardFile, self.out, shard)
                    self._wait(most - sizes[i] - results[i])
                    self._later(writer, results[i], _put, file, self._cluster(batch, ready[i]))
                    coming -= sizes[i]
                    if i + 1 == len(work) or work[i + 1][0] is not shard:
                        self._later(writer, 0, _finish, file)
                        file = None
                    self._on_batch(shard, batch)
                self._wait(-1)
            except BaseException:
                reader.shutdown(cancel_futures=True)
                if file is not None:
                    writer.submit(_discard, file)
                raise

    def _later(self, writer: ThreadPoolExecutor, size: int, task: Callable[..., T], *args: Any) -> Future[T]:
        """Has the writing thread do a task, which keeps `size` bytes in memory until then."""

        def timed(*args: Any) -> T:
            start = time.perf_counter()
            try:
                return task(*args)
            finally:
                self.times.write += time.perf_counter() - start

        future = writer.submit(timed, *args)
        self._pending.append((future, size))
        return future

    def _wait(self, most: int) -> None:
        """Until the pending writes keep at most so many bytes; raises what a write raised."""
        while self._pending and (self._pending[0][0].done() or sum(size for _, size in self._pending) > most):
            self._pending.pop(0)[0].result()

    def _cluster(self, batch: list[Unit], ready: Future[None]) -> list[tuple[str, Tensor]]:
        start = time.perf_counter()
        ready.result()
        tensors = [_read(unit.source) for unit in batch]
        read = time.perf_counter()
        results: list[tuple[str, Tensor]] = []
        chosen: list[tuple[Unit, Tensor]] = []
        for unit, tensor in zip(batch, tensors, strict=True):
            if unit.bits is not None:
                chosen.append((unit, tensor.to(unit.dtype)))
            else:  # a copy: the mapping would have the thread that writes wait for the disk again
                results.append((unit.outputs[0].name, tensor.to(unit.dtype, copy=True)))
        if chosen:
            encoded = encode_weights(
                [tensor.to(self.device) for _, tensor in chosen],
                [unit.bits or 0 for unit, _ in chosen],
                self.config,
                names=[unit.name for unit, _ in chosen],
            )
            for (unit, _), result in zip(chosen, encoded, strict=True):
                for output in unit.outputs:
                    part = getattr(result, output.name.rpartition(".")[2])
                    results.append((output.name, part.to(output.dtype).cpu()))
        self.times.read += read - start
        self.times.cluster += time.perf_counter() - read
        return results


# The run


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
    same = len({json.dumps(other) for other in ranks.gather(wanted)}) == 1
    ranks.agree(same, lambda: CheckpointError(f"{plan.source}: the ranks do not see the same checkpoint, options and version"))
    with contextlib.ExitStack() as stack:
        done = ranks.lead(lambda: _prepare(stack, plan, out, wanted))
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

        stream = _Stream(out, plan.config, device, on_batch)
        if todo:
            with _output_errors(out):
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


def _prepare(stack: contextlib.ExitStack, plan: StreamPlan, out: Path, wanted: dict[str, Any]) -> list[str] | None:
    """Claims the output folder; the names of the shards it has already, or None where it is complete."""
    source = plan.source.resolve()
    if out.resolve() == source or out.resolve().is_relative_to(source) or source.is_relative_to(out.resolve()):
        raise CheckpointError(f"{out}: the output and {plan.source} lie in one another; choose another folder")
    state = out / STATE
    stamps = {name: (plan.source / name).stat().st_mtime_ns for name in wanted["source"]}
    request = {**wanted, "modified": stamps}
    complete: dict[str, dict[str, Any]] = {}
    if (out / MANIFEST).is_file():
        manifest = _manifest(out)
        _same_request(out, manifest.get("request"), wanted)
        complete = manifest["files"]
        if not state.exists() and all(_is_there(out / name, record) for name, record in complete.items()):
            return None
    elif not state.is_dir() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: it exists and is no unfinished output; choose another folder or remove it")
    with _output_errors(out):
        state.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((state / "lock").open("wb"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{out}: another run is writing it") from None
        except OSError:  # a file system without locks
            pass
        if complete and all(_is_there(out / name, record) for name, record in complete.items()):
            shutil.rmtree(state)  # what a run left that was killed at its very end
            return None
        if (state / "request.json").is_file():
            _same_request(out, read_json(state / "request.json"), request)
        else:
            write_file(state / "request.json", json.dumps(request).encode(), state)
        done = []
        for shard in plan.shards:
            record = complete.get(shard.name) or _record(out, shard)
            if record is not None and _is_there(out / shard.name, record):
                done.append(shard.name)
                write_file(state / f"{shard.name}.json", json.dumps(record).encode(), state)
        for partial in state.glob("*.partial"):
            partial.unlink()
        needed = sum(shard.nbytes for shard in plan.shards if shard.name not in done)
        free = shutil.disk_usage(out).free
        if needed > free:
            raise OutputError(f"{out}: the output needs {needed / 1e6:,.0f} MB more, the disk has {free / 1e6:,.0f} MB free")
    return done


def _same_request(out: Path, found: Any, wanted: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise CheckpointError(f"{out}: what it was made with cannot be read; choose another folder or remove it")

    def flat(request: dict[str, Any]) -> dict[str, Any]:
        groups = ("quantization", "source", "modified")
        return {**request, **{f"{g} of {k}": v for g in groups for k, v in (request.get(g) or {}).items()}}

    mine, theirs = flat(json.loads(json.dumps(wanted))), flat(found)
    names = [name for name in {**theirs, **mine} if not isinstance(mine.get(name), dict)]
    for name in names:
        if mine.get(name) == theirs.get(name):
            continue
        kind, _, what = name.rpartition(" of ")
        if kind in ("source", "modified"):
            raise CheckpointError(f"{out}: it was begun from another {what} than this; choose another folder or remove it")
        given = f"{what} {theirs.get(name)!r}, this asks for {mine.get(name)!r}"
        raise CheckpointError(f"{out}: it was begun with {given}; choose another folder or remove it")


def _record(out: Path, shard: Shard) -> dict[str, Any] | None:
    """What was noted when a shard was finished."""
    path = out / STATE / f"{shard.name}.json"
    record = read_json(path) if path.is_file() else None
    return record if isinstance(record, dict) and set(record) == {"bytes", "sha256"} else None


def _is_there(path: Path, record: dict[str, Any]) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == record["bytes"]


def _checked(out: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences about the files that are not as recorded; several are read at a time."""

    def check(name: str) -> str | None:
        path = out / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is missing"
        with open_regular(path) as file, contextlib.suppress(OSError, AttributeError):
            # What this process has just written is in the page cache; what counts is on the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = _sha256(path)
        if found["bytes"] != files[name]["bytes"]:
            return f"{name} has {found['bytes']} bytes, not {files[name]['bytes']}"
        return None if found == files[name] else f"{name} does not match its checksum"

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return [sentence for sentence in pool.map(check, files) if sentence]


def _check_output(plan: StreamPlan, out: Path, ranks: Ranks) -> None:
    """Reads every shard once more, of a complete output every file; each rank its part."""
    if (out / STATE).exists():
        records = {shard.name: _record(out, shard) or {} for shard in plan.shards}
    else:
        records = _manifest(out)["files"]
    mine = dict(list(records.items())[ranks.rank :: ranks.size])
    wrong = [sentence for part in ranks.gather(_checked(out, mine)) for sentence in part]
    repair = "remove that file and give the same command again"
    ranks.agree(not wrong, lambda: DamagedError(f"{out}: {wrong[0]}; {repair}"))


def _publish(plan: StreamPlan, out: Path, wanted: dict[str, Any]) -> None:
    """Everything but the shards, config.json after the rest, then the manifest; the state goes last."""
    state = out / STATE
    files: dict[str, dict[str, Any]] = {}
    with _output_errors(out):
        for shard in plan.shards:
            record = _record(out, shard)
            assert record is not None
            files[shard.name] = record
        for path, content in _side_files(plan):
            target = out / path
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, content, state)
            files[str(path)] = _sha256(target)
        manifest = {"format": 1, "request": wanted, "files": dict(sorted(files.items()))}
        manifest["sha256"] = _own_digest(manifest)
        write_file(out / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode(), state)
        shutil.rmtree(state)
        _sync_folder(out)


def _side_files(plan: StreamPlan) -> Iterator[tuple[Path, bytes | Iterable[bytes]]]:
    """Path and content of each file beside the shards."""
    own = {"config.json", "README.md", INDEX, MANIFEST}
    for path in files_below(plan.source, plan.root):
        relative = path.relative_to(plan.source)
        if str(relative) in own or path.suffix in OTHER_WEIGHTS or path.name.endswith(".index.json"):
            continue
        yield relative, _content(path)
    yield Path("README.md"), _card(plan).encode()
    if len(plan.shards) > 1:
        weight_map = {name: shard.name for shard in plan.shards for name, *_ in shard.tensors}
        total = sum(shard.nbytes for shard in plan.shards)
        index = {"metadata": {"total_parameters": plan.parameters, "total_size": total}, "weight_map": weight_map}
        yield Path(INDEX), (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    yield Path("config.json"), plan.config_json.encode()


def _content(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        while part := file.read(1 << 20):
            yield part


def _card(plan: StreamPlan) -> str:
    """The model card; that of the source follows, with its licence and languages kept at the head."""
    bits = sorted({unit.bits for unit in plan.units if unit.bits is not None})
    summary = f"{plan.config.scheme} clusters, {', '.join(map(str, bits))} bits an index, made by `kmq quantize`"
    head, _, body = MODEL_CARD.format(summary=summary).removeprefix("---\n").partition("---\n")
    source = plan.source / "README.md"
    if not source.is_file():
        return f"---\n{head}---\n{body}"
    text = b"".join(_content(source)).decode(errors="replace")
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


def verify_checkpoint(out: Path) -> dict[str, Any]:
    """Checks a model folder: every file against the manifest, where it has one, every header and the index in any case.

    Returns {"files": checked against a checksum, "tensors": ..., "bytes": ...}. Raises DamagedError where a file is not as it
    was made, CheckpointError where the folder is unfinished or no valid checkpoint.
    """
    if (out / STATE).is_dir():
        raise CheckpointError(f"{out}: unfinished; the command that began it goes on from there")
    files: dict[str, dict[str, Any]] = {}
    if (out / MANIFEST).is_file():
        files = _manifest(out)["files"]
        if wrong := _checked(out, files):
            more = f", and {len(wrong) - 1} more files are not as they were made" if len(wrong) > 1 else ""
            raise DamagedError(f"{out}: {wrong[0]}{more}")
    tensors = stored_tensors(out)
    read_json(out / "config.json")
    return {"files": len(files), "tensors": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values())}


def _manifest(out: Path) -> dict[str, Any]:
    manifest = read_json(out / MANIFEST, "a manifest")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(_is_record(name, record) for name, record in files.items()):
        raise DamagedError(f"{out / MANIFEST}: not a manifest of this package")
    if manifest.pop("sha256", None) != _own_digest(manifest):
        raise DamagedError(f"{out / MANIFEST}: it does not match its own checksum")
    return manifest


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_record(name: str, record: Any) -> bool:
    path = Path(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return inside and isinstance(record, dict) and set(record) == {"bytes", "sha256"}
