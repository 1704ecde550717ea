"""What is wrong with a task or a data file."""

from __future__ import annotations


class TaskError(ValueError):
    """A task or a data file that cannot be used; the message is one sentence for the user."""
