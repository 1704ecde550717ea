"""What a command says beside its result: one sentence a line on standard error; what libraries say only with --verbose."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..terminal import draws_bars

_PACKAGE = Path(__file__).parents[1]


def note(sentence: str) -> None:
    """A sentence that is no result."""
    print(f"kmq: {' '.join(sentence.split())}", file=sys.stderr, flush=True)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """What this package logs as a warning, in one line."""
        note(record.getMessage())


@contextlib.contextmanager
def listening(verbose: bool) -> Iterator[None]:
    """Turns warnings of this package into notes, and silences those of others, and their bars, unless `verbose` asks for them.

    Begun before the libraries are imported: what they read from the environment is set here.
    """
    logger, shown = logging.getLogger("kmq_kernels"), warnings.showwarning
    before = logger.handlers, logger.propagate

    def show(message: Any, category: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        if Path(filename).is_relative_to(_PACKAGE):
            note(str(message))
        elif verbose:
            shown(message, category, filename, *args, **kwargs)

    if not verbose or not draws_bars():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
    logger.handlers, logger.propagate, warnings.showwarning = [_Notes(logging.WARNING)], False, show
    try:
        yield
    finally:
        (logger.handlers, logger.propagate), warnings.showwarning = before, shown


def quieten(verbose: bool) -> None:
    """The same for transformers, once it is imported: it draws a bar for every model that it loads."""
    from transformers.utils import logging as theirs

    if not verbose or not draws_bars():
        theirs.disable_progress_bar()
    if not verbose:
        theirs.set_verbosity_error()
