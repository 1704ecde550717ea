"""The stream behind checkpoint.py: one thread reads ahead, the main thread maps and clusters, one thread writes.

A file gets its name when it is complete: written below OUT/.kmq, synced, its size and SHA-256 noted, renamed. With it stands
the SHA-256 of every tensor it was made from, taken while that was read ahead.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..files import CheckpointError, StoredTensor, file_record, header_bytes, open_regular, sync
from ..quantization import encode_weights
from .plan import Shard, StreamPlan, Unit

STATE = ".kmq"
OUTPUT_FAILED = 3  # exit code: the output could not be written; the same command goes on

# Small tensors are clustered together, so that every thread has work: as much as the largest tensor takes, in these limits.
_LEAST_BATCH, _LARGEST_BATCH = 16 << 20, 64 << 20  # bytes
_PENDING_BYTES = 8 << 20  # what may wait to be written while the largest batch is clustered; beside smaller ones, more
_AHEAD_BYTES = 64 << 20  # what is read before it is needed, and the rest of the batch that it ends in
_READ_BYTES = 2 << 20  # a request of the reading thread; the kernel's read-ahead keeps more of them in flight
_CHUNK = 8 << 20
_MADV_POPULATE_READ = 22
_STAMP = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")  # of a file; the system alone sets the last one
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
T = TypeVar("T")


class OutputError(OSError):
    """The output folder cannot be written; what is finished is kept."""

    exit_code = OUTPUT_FAILED


# Reading


class Ahead:
    """Reads tensors into the page cache, where `_read` finds them, and leaves the cache as it was.

    What was not there before goes when it has been used: the cache is for those who come back to what they read, and its pages
    are taken anew for what is read next. (A virtual machine may have given free memory back to its host; getting it again takes
    longer than reading from a fast disk.)
    """

    def __init__(self) -> None:
        self.stopped = False
        self._was_cached: dict[Path, bool] = {}
        self._began: dict[Path, os.stat_result] = {}

    def fetch(self, tensors: list[StoredTensor]) -> dict[str, str]:
        """Reads tensors and returns the SHA-256 of each, by name; what cannot be read is for `_read` to report.

        Read, not only asked for: POSIX_FADV_WILLNEED fills the cache with single pages, which takes more time than the disk does.
        """
        digests = {}
        buffer = memoryview(bytearray(_READ_BYTES))
        for tensor in tensors:
            with contextlib.suppress(OSError, CheckpointError), open_regular(tensor.file) as file:
                if tensor.file not in self._was_cached:
                    self._began[tensor.file] = os.fstat(file.fileno())
                    self._was_cached[tensor.file] = _is_cached(file.fileno())
                digest = hashlib.sha256()
                at, end = tensor.begin, tensor.begin + tensor.nbytes
                while at < end and not self.stopped and (count := os.preadv(file.fileno(), [buffer[: end - at]], at)):
                    digest.update(buffer[:count])
                    at += count
                if at == end:
                    digests[tensor.name] = digest.hexdigest()
        return digests

    def unchanged(self, tensors: list[StoredTensor]) -> None:
        """Raises CheckpointError where a file is not the one that the first `fetch` from it found.

        What was hashed and what was clustered are then not known to be the same; the next run compares what it reads itself.
        """
        for file in {tensor.file for tensor in tensors}:
            began = self._began.get(file)
            with contextlib.suppress(OSError):
                now = os.stat(file)
                if began is not None and all(getattr(began, name) == getattr(now, name) for name in _STAMP):
                    continue
            raise CheckpointError(f"{file}: it changed while it was read; give the same command again")

    def drop(self, tensors: list[StoredTensor]) -> None:
        """Takes tensors that were fetched, and are mapped no more, from the page cache."""
        for tensor in tensors:
            with contextlib.suppress(OSError, CheckpointError, AttributeError), open_regular(tensor.file) as file:
                if not self._was_cached.get(tensor.file, True):
                    os.posix_fadvise(file.fileno(), tensor.begin, tensor.nbytes, os.POSIX_FADV_DONTNEED)


def tensor_digests(tensors: Iterable[StoredTensor]) -> dict[str, str]:
    """SHA-256 of tensors in their files, by name; one that cannot be read is missing. Several are read at a time."""

    def digest(tensor: StoredTensor) -> dict[str, str]:
        found = ahead.fetch([tensor])
        ahead.drop([tensor])
        return found

    ahead = Ahead()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return {name: value for found in pool.map(digest, tensors) for name, value in found.items()}


def _is_cached(descriptor: int) -> bool:
    """Whether the last byte of a file is in the page cache (the first ones are since the header was read) or cannot be asked."""
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], os.fstat(descriptor).st_size - 1, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return True


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


def read_batch(batch: Iterable[Unit], digests: dict[str, str], known: dict[str, str]) -> list[Tensor]:
    """The tensors of units, mapped. digests: their SHA-256 as they were read ahead, by name; known: what these must be.

    Raises CheckpointError where one cannot be read or is another one.
    """
    tensors = [_read(unit.source) for unit in batch]
    for unit in batch:
        file, name = unit.source.file, unit.source.name
        if name not in digests:
            raise CheckpointError(f"{file}: {name} cannot be read")
        if digests[name] != known.get(name, digests[name]):
            raise CheckpointError(f"{file}: {name} changed while it was read; give the same command again")
    return tensors


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
def output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        out = path.parents[1] if path.parent.name == STATE else path
        kept = "; finished shards are kept, the same command goes on from there" if any(out.glob("*.safetensors")) else ""
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}{kept}") from None


def write_file(path: Path, content: bytes | Iterable[bytes], scratch: Path) -> None:
    """A file that is complete when it has its name: written in the folder `scratch`, synced, renamed."""
    partial = scratch / f"{path.name}.{secrets.token_hex(4)}.partial"
    with open(partial, "wb") as file:
        for part in [content] if isinstance(content, bytes) else content:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


class _ShardFile:
    """A shard while it is written. All calls come from one thread."""

    def __init__(self, out: Path, shard: Shard) -> None:
        self.out, self.shard = out, shard
        # A name of its own: a rank of a job that is thought dead may still write.
        self._path = out / STATE / f"{shard.name}.{secrets.token_hex(4)}.partial"
        start, self._at = header_bytes(shard.tensors)
        self._missing = {name for name, *_ in shard.tensors}
        self._sources: dict[str, str] = {}  # SHA-256 of the tensors it is made from
        with output_errors(self._path):
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
        with output_errors(self._path):
            while len(view):
                done = os.pwrite(self._file.fileno(), view[: 64 << 20], at)
                view, at = view[done:], at + done

    def put(self, name: str, tensor: Tensor) -> None:
        """One tensor of the shard."""
        if tensor.numel():
            self._write(tensor.contiguous().view(-1).view(torch.uint8).numpy(), self._at[name])
        self._missing.remove(name)

    def note(self, digests: dict[str, str]) -> None:
        """What the source's tensors were."""
        self._sources.update(digests)

    def finish(self) -> None:
        """Notes size and checksums, then gives the shard its name; one that lacks a tensor is discarded."""
        if self._missing:
            self.discard()
            return
        with output_errors(self._path):
            os.fsync(self._file.fileno())
            self._file.close()
            record = {**file_record(self._path), "source": self._sources}
            write_file(self.out / STATE / f"{self.shard.name}.json", json.dumps(record).encode(), self.out / STATE)
            os.replace(self._path, self.out / self.shard.name)
            sync(self.out)

    def discard(self) -> None:
        """Removes an unfinished shard, so that it takes no space."""
        self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


def _put(file: Future[_ShardFile], results: list[tuple[str, Tensor]], digests: dict[str, str]) -> None:
    for name, tensor in results:
        file.result().put(name, tensor)
    file.result().note(digests)


def _finish(file: Future[_ShardFile]) -> None:
    file.result().finish()


def _discard(file: Future[_ShardFile]) -> None:
    file.result().discard()


# The stream


@dataclasses.dataclass
class Times:
    """Seconds: the pass that measures, then waiting for the disk to read, clustering, and in the thread that writes; `total` on
    the clock."""

    measure: float = 0.0
    read: float = 0.0
    cluster: float = 0.0
    write: float = 0.0
    total: float = 0.0


def batch_bytes(units: Sequence[Unit]) -> int:
    """Most bytes of the source that are read and clustered together."""
    return min(max(_LEAST_BATCH, *(unit.source.nbytes for unit in units)), _LARGEST_BATCH)


def batches(units: Iterable[Unit], most: int) -> Iterator[list[Unit]]:
    """Units that are read and clustered together, `most` bytes or one of them, in the order in which they stand on the disk."""
    batch: list[Unit] = []
    size = 0
    for unit in sorted(units, key=lambda unit: (str(unit.source.file), unit.source.begin)):
        if batch and size + unit.source.nbytes > most:
            yield batch
            batch, size = [], 0
        batch.append(unit)
        size += unit.source.nbytes
    if batch:
        yield batch


class Stream:
    """Makes shards: one thread reads ahead, the main thread maps and clusters, one thread writes."""

    def __init__(
        self,
        out: Path,
        plan: StreamPlan,
        device: str,
        on_batch: Callable[[Shard, list[Unit]], None],
        known: dict[str, str],
    ) -> None:
        """known: the SHA-256 that tensors must have, by name."""
        self.ready: dict[str, Tensor] = {}  # tensors of the output that stand for weights already, by name
        self.out, self.config, self.device, self._on_batch, self._known = out, plan.config, device, on_batch, known
        self._batch_bytes = batch_bytes(plan.units)
        self.times = Times()
        self._pending: list[tuple[Future[Any], int]] = []  # writes, and the bytes each keeps in memory

    def run(self, shards: list[Shard]) -> None:
        """Makes the shards one after the other."""
        work = [(shard, batch) for shard in shards for batch in batches(shard.units, self._batch_bytes)]
        sizes = [sum(unit.source.nbytes for unit in batch) for _, batch in work]
        results = [sum(unit.nbytes for unit in batch) for _, batch in work]
        most = max((size + result for size, result in zip(sizes, results, strict=True)), default=0) + _PENDING_BYTES
        ahead, ready = Ahead(), list[Future[dict[str, str]]]()
        file: Future[_ShardFile] | None = None
        with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as reader:
            try:
                for i, (shard, batch) in enumerate(work):
                    while len(ready) < len(work) and (len(ready) <= i + 1 or sum(sizes[i + 1 : len(ready)]) < _AHEAD_BYTES):
                        ready.append(reader.submit(ahead.fetch, [unit.source for unit in work[len(ready)][1]]))
                    file = file or self._later(writer, 0, _ShardFile, self.out, shard)
                    self._wait(most - sizes[i] - results[i])
                    sources = [unit.source for unit in batch]
                    clustered, digests = self._cluster(batch, ready[i])
                    ahead.unchanged(sources)
                    self._later(writer, results[i], _put, file, clustered, digests)
                    self._later(writer, 0, ahead.drop, sources)
                    if i + 1 == len(work) or work[i + 1][0] is not shard:
                        self._later(writer, 0, _finish, file)
                        file = None
                    self._on_batch(shard, batch)
                self._wait(-1)
            except BaseException:
                ahead.stopped = True
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

    def _cluster(self, batch: list[Unit], ready: Future[dict[str, str]]) -> tuple[list[tuple[str, Tensor]], dict[str, str]]:
        """What the tensors of a batch become, and the SHA-256 of each."""
        start = time.perf_counter()
        digests = ready.result()
        tensors = read_batch(batch, digests, self._known)
        read = time.perf_counter()
        results: list[tuple[str, Tensor]] = []
        chosen: list[tuple[Unit, Tensor]] = []
        for unit, tensor in zip(batch, tensors, strict=True):
            if unit.outputs[0].name in self.ready:
                found = [(output, self.ready[output.name]) for output in unit.outputs]
                for output, made in found:
                    if tuple(made.shape) != tuple(output.shape):
                        shapes = f"{tuple(made.shape)}, expected {tuple(output.shape)}"
                        raise CheckpointError(f"{self.out}: what stands for {output.name} has shape {shapes}; remove the folder")
                results += [(output.name, made.to(output.dtype)) for output, made in found]
            elif unit.bits is not None:
                chosen.append((unit, tensor.to(unit.dtype)))
            else:  # a copy: the mapping would have the thread that writes wait for the disk again
                results.append((unit.outputs[0].name, tensor.to(unit.dtype, copy=True)))
        if chosen:
            encoded = encode_weights(
                [as_matrix(unit, tensor).to(self.device) for unit, tensor in chosen],
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
        return results, digests


def as_matrix(unit: Unit, tensor: Tensor) -> Tensor:
    """The weight (rows, cols), which a layer may store transposed or with a third dimension of 1."""
    return tensor.t().contiguous() if unit.transposed else tensor.flatten(1)
