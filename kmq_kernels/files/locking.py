"""Who may write: a lock that goes with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, refusal: Callable[[], Exception]) -> Iterator[None]:
    """Holds the lock file `path` for the block; raises `refusal()` where another holder, in this process or any other, has it.

    The system gives the lock back when the process ends, also when it is killed; the file that then stays is no lock. On a file
    system without locks, and in a folder that cannot be written, there is none.
    """
    try:
        descriptor = _take(path, refusal)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes, so that nobody holds a file that has no name
        os.close(descriptor)


def _take(path: Path, refusal: Callable[[], Exception]) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise refusal() from None
            except OSError:  # a file system without locks
                return descriptor
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one who had it removed the file after it was opened here
