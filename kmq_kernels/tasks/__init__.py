"""Labelled texts with their metrics: banking77, GLUE, own files; and their classes matched with those of a model. Texts without
labels, for embedders.

Reading needs neither torch nor transformers, so a mistake in a file is said at once; the packages of the extra [train] are
imported when data sets are built and metrics computed.
"""

from .errors import TaskError
from .labels import class_names, match_classes, shown
from .load import load_task
from .task import Task, tokenize
from .texts import Texts, read_texts

__all__ = ["Task", "TaskError", "Texts", "class_names", "load_task", "match_classes", "read_texts", "shown", "tokenize"]
