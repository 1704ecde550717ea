"""Whom the output is for: a person at a terminal, or a file, a pipe or a job that keeps it."""

from __future__ import annotations

import os
import sys


def draws_bars() -> bool:
    """Whether progress bars are drawn: there is a terminal, and no continuous integration (CI) that keeps what it shows."""
    return not os.environ.get("CI") and os.environ.get("TERM") != "dumb" and sys.stderr.isatty()
