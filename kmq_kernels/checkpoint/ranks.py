"""The ranks of a torchrun job: who there is, what they tell each other, and who died.

Ranks exchange small Python objects over gloo. A thread in each rank watches the others: on the same host by their process, on
other hosts by a counter in the job's store. Waiting for a slow rank has no limit; waiting for a dead one ends with its name.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

T = TypeVar("T")

RANK_DIED = 4  # exit code
_TICK = 1.0  # seconds between two looks at the others
_PATIENCE = 60  # looks without a sign of life from another host
_GRACE = 5.0  # seconds the main thread has to end in its own way
_FOREVER = datetime.timedelta(days=365)


class RankDied(RuntimeError):
    """Another rank of the job is gone; the message names it."""

    exit_code = RANK_DIED


class LeadFailed(RuntimeError):
    """Rank 0 could not do its part and has said why; the other ranks end with its exit code and say nothing."""

    quiet = True

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class _Process(NamedTuple):
    machine: str  # where its pid means something
    host: str
    pid: int

    def gone(self) -> bool:
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except FileNotFoundError:
            return os.path.isdir("/proc/self")
        except OSError:
            return True  # it ended while it was read


def _this_process() -> _Process:
    machine = socket.gethostname()
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        machine = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return _Process(machine, socket.gethostname(), os.getpid())


@contextlib.contextmanager
def _heard_by_a_thread(number: int) -> Iterator[int]:
    """A pipe that gives the numbers of signals, so that a thread hears of `number` even while the main thread computes.

    torchrun ends the others with SIGTERM when one dies. Afterwards signals are handled as before; one that came when nobody read
    the pipe any more is sent again.
    """
    came = []
    wakeup, notify = os.pipe()
    os.set_blocking(notify, False)
    handler = signal.signal(number, lambda *_: came.append(True))
    descriptor = signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
    try:
        yield wakeup
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(wakeup)
        os.close(notify)
        if came:
            os.kill(os.getpid(), number)


class Ranks:
    """This process among the ranks of the job; without a job, the only one."""

    def __init__(self) -> None:
        self.rank, self.size, self.local_rank = 0, 1, 0
        self._processes = [_this_process()]
        self._store: Any = None
        self._dead: str | None = None
        self._noticed, self._ending = threading.Event(), threading.Event()
        self._signals = contextlib.ExitStack()  # puts the handling of signals back

    @classmethod
    @contextlib.contextmanager
    def of_environment(cls) -> Iterator[Ranks]:
        """The ranks that torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) started, for the time of a `with` block."""
        ranks = cls()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            ranks._join()
        try:
            yield ranks
        finally:
            ranks._ending.set()
            if ranks.size > 1 and dist.is_initialized():
                dist.destroy_process_group()
            ranks._signals.close()

    def _join(self) -> None:
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=10)))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=_FOREVER)
        self._processes = self.gather(_this_process())
        self._store = self._new_store()
        wakeup = None
        if threading.current_thread() is threading.main_thread():
            wakeup = self._signals.enter_context(_heard_by_a_thread(signal.SIGTERM))
        watcher = threading.Thread(target=self._watch, args=(wakeup,), daemon=True)
        watcher.start()
        self._signals.callback(watcher.join, 3 * _TICK)  # before the pipe it reads is closed

    def _new_store(self) -> Any:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, self.size, is_master=False, timeout=datetime.timedelta(minutes=1))
        return dist.PrefixStore(f"kmq/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    # What ranks tell each other

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._exchange(lambda: dist.all_gather_object(values, value))
        return values

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` returns in rank 0, in every rank. Where it raises, rank 0 raises that, the others LeadFailed."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [(True, work())]
            except Exception as error:
                told = (False, (str(error), getattr(error, "exit_code", 1)))
                self._exchange(lambda: dist.broadcast_object_list([told], src=0))
                raise
        self._exchange(lambda: dist.broadcast_object_list(outcome, src=0))
        done, value = outcome[0]
        if not done:
            raise LeadFailed(*value)
        return value

    def agree(self, fine: bool, error: Callable[[], Exception]) -> None:
        """Ends all ranks alike where something that all of them know is not fine; only rank 0 raises `error`."""
        if not fine:
            wrong = error()
            raise wrong if self.rank == 0 else LeadFailed(str(wrong), getattr(wrong, "exit_code", 1))

    def add(self, name: str, amount: int) -> int:
        """Adds to a counter of the job and returns it."""
        if self._store is None:
            return amount
        return self._store.add(name, amount)

    def _exchange(self, operation: Callable[[], Any]) -> None:
        self.check()
        try:
            operation()
        except RuntimeError as error:  # gloo: the connection was closed
            self._noticed.wait(3 * _TICK)  # the watcher will know by whom
            self.check()
            raise RankDied(f"another rank ended ({error}); start the same command again to go on") from None

    # Who died

    def check(self) -> None:
        """Raises RankDied where another rank is known to be gone."""
        if self._dead is not None:
            raise RankDied(self._dead)

    def _gone_here(self) -> list[int]:
        here = self._processes[self.rank].machine
        return [rank for rank, process in enumerate(self._processes) if process.machine == here and process.gone()]

    def _say(self, gone: list[int]) -> str:
        names = [f"rank {rank} (process {self._processes[rank].pid} on {self._processes[rank].host})" for rank in gone]
        return f"{' and '.join(names)} died; finished shards are kept, start the same command again to go on"

    def _end(self, gone: list[int], code: int) -> None:
        if self._ending.is_set():
            return
        if gone and self.rank == min(set(range(self.size)) - set(gone)):
            print(f"kmq: {self._say(gone)}", file=sys.stderr, flush=True)
        os._exit(code)

    def _watch(self, wakeup: int | None) -> None:
        elsewhere = [r for r, process in enumerate(self._processes) if process.machine != self._processes[self.rank].machine]
        store = self._new_store() if elsewhere else None
        seen: dict[int, tuple[int, int]] = {}
        look = 0
        while not self._ending.is_set():
            look += 1
            ready, _, _ = select.select([wakeup] if wakeup is not None else [], [], [], _TICK)
            gone = self._gone_here()
            if ready and wakeup is not None and signal.SIGTERM in os.read(wakeup, 64):
                self._end(gone, 128 + signal.SIGTERM)
            if store is not None:
                try:
                    store.add(f"beat/{self.rank}", 1)
                    for rank in elsewhere:
                        beat = store.add(f"beat/{rank}", 0)
                        if seen.get(rank, (-1, 0))[0] != beat:
                            seen[rank] = (beat, look)
                        elif look - seen[rank][1] > _PATIENCE:
                            gone.append(rank)
                except RuntimeError:  # the store is with rank 0, or with the launcher on its host
                    gone = gone or [0]
            if gone and not self._ending.is_set():
                self._dead = self._say(gone)
                self._noticed.set()
                if not self._ending.wait(_GRACE):
                    self._end(gone, RANK_DIED)
