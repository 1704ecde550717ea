"""Classes of a model and classes of a task, matched by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_NO_NAME = re.compile(r"\s*(?:label[_ -]?)?[+-]?\d+(?:\.\d*)?\s*", re.IGNORECASE)
_SHOWN = 5  # names in a sentence


def class_names(id2label: Mapping[int | str, str] | None, num_labels: int) -> tuple[str, ...]:
    """The names of a model's classes in their order, from its configuration; "LABEL_0" and so on where it says none."""
    found = {int(index): str(name) for index, name in (id2label or {}).items()}
    return tuple(found.get(index, f"LABEL_{index}") for index in range(num_labels))


def have_names(names: Sequence[str]) -> bool:
    """Whether these say what the classes mean: "LABEL_0" and numbers do not."""
    return not all(_NO_NAME.fullmatch(name) for name in names)


def _folded(names: Sequence[str]) -> list[str]:
    """Without case, spaces, underscores and hyphens."""
    return [re.sub(r"[\s_-]+", "", name.casefold()) for name in names]


def shown(names: Sequence[str]) -> str:
    """Names for a sentence, the first few of many."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def match_classes(model: Sequence[str], task: Sequence[str]) -> tuple[tuple[int, ...] | None, str]:
    """For each class of the task the class of the model that means the same, and a sentence where there is something to say.

    Classes are matched by name. Where the model or the task has no names, class i of one is taken for class i of the other,
    and the sentence says so. None where names do not match or numbers differ; the sentence then says why.
    """
    ours, theirs = _folded(task), _folded(model)
    if len(set(ours)) < len(ours) or len(set(theirs)) < len(theirs):  # case or spaces tell classes apart
        ours, theirs = list(task), list(model)
    if set(ours) <= set(theirs):
        return tuple(theirs.index(name) for name in ours), ""
    if len(model) != len(task):
        return None, f"the model has {len(model)} classes ({shown(model)}), the task has {len(task)} ({shown(task)})"
    if have_names(model) and have_names(task):
        return None, f"the classes of the model ({shown(model)}) are not those of the task ({shown(task)})"
    whose, which = ("task", task) if have_names(model) else ("model", model)
    sentence = f"class i of the model is taken for class i of the task, for those of the {whose} have no names ({shown(which)})"
    return tuple(range(len(task))), sentence
