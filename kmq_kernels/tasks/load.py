"""load_task: the task by its name or made of own files.

A task is `banking77` (ships with the package), a GLUE name with a folder that holds GLUE's own files, or any two csv, tsv or
jsonl files by column names. Files are read from disk into memory; nothing is downloaded and no cache is written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from .errors import TaskError
from .labels import match_classes
from .reading import Split, integer_spelling, nearest, not_finite, number, read_split, refuse_rows
from .task import Task
from .texts import TEXTS, Texts, load_texts

BANKING77 = Path(__file__).parent / "banking77"

Problem = Literal["classification", "regression"]


@dataclass(frozen=True)
class _Glue:
    """Where a GLUE task's texts and labels stand in its files."""

    folder: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]  # as the files spell them, in the order of the class indices; none for regression
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    columns: tuple[str, ...] | None = None  # of files without a header line
    evaluation_files: Mapping[str, str] = field(default_factory=lambda: {"validation": "dev.tsv"})
    skip_malformed: bool = False


ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    "sst2": _Glue("SST-2", ("sentence",), "label", ("0", "1"), ("negative", "positive"), columns=("sentence", "label")),
    "cola": _Glue(
        "CoLA",
        ("sentence",),
        "label",
        ("0", "1"),
        ("unacceptable", "acceptable"),
        metrics=("matthews_correlation",),
        columns=("source", "label", "mark", "sentence"),
    ),
    "mrpc": _Glue(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        ("0", "1"),
        ("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
    ),
    "rte": _Glue("RTE", ("sentence1", "sentence2"), "label", ENTAILMENT, ENTAILMENT),
    "stsb": _Glue("STS-B", ("sentence1", "sentence2"), "score", (), None, metrics=("pearson", "spearman")),
    "wnli": _Glue("WNLI", ("sentence1", "sentence2"), "label", ("0", "1"), ("not_entailment", "entailment")),
    "qnli": _Glue("QNLI", ("question", "sentence"), "label", ENTAILMENT, ENTAILMENT),
    "qqp": _Glue(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        ("0", "1"),
        ("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        skip_malformed=True,
    ),
    "mnli": _Glue(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        ("entailment", "neutral", "contradiction"),
        evaluation_files={"validation_matched": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"},
        skip_malformed=True,
    ),
}


def require_packages() -> None:
    """Raises ImportError, naming what to install, where a package of the extra [train] is missing; imports none."""
    for package in ("datasets", "scipy", "sklearn"):
        if find_spec(package) is None:
            raise ImportError(f"Tasks need more packages (no module {package}): pip install 'kmq_kernels[train]'")


def load_task(
    name: str | None = None,
    *,
    data_dir: Path | str | None = None,
    train_file: Path | str | None = None,
    validation_file: Path | str | None = None,
    text_columns: Sequence[str] = ("text",),
    label_column: str = "label",
    problem: Problem | None = None,
    ignore_labels: Collection[str] = (),
    model_classes: Sequence[str] | None = None,
    pairs: Path | str | None = None,
) -> Task | Texts:
    """The task by `name`, or made of `train_file` and `validation_file` (which need no name).

    name: "banking77" (where nothing is named), or a GLUE task in any usual spelling ("sst2", "SST-2", ...) with `data_dir`, the
    folder of its files or the folder that holds GLUE's folders ("SST-2" or "sst2", ...). text_columns: one column, or two for
    sentence pairs. In own files, labels are classes in sorted order; a number with a fraction anywhere in the training file's
    label column makes a regression, unless `problem` says what it is. ignore_labels: rows of own files with these labels are
    left out. model_classes: names of the classes of the model that is to be evaluated (one for a regression), which then needs
    no training file. "texts" has no labels: texts for an embedder, see `Texts`. pairs: a file of scored pairs for it.
    Raises TaskError for everything that is wrong with the name or the files, ImportError where [train] is not installed.
    """
    require_packages()
    key = (name or "").lower().replace("-", "").replace("_", "")
    if problem not in (None, "classification", "regression"):
        raise TaskError(f"problem: expected classification or regression, got {problem!r}.")
    ignored = (ignore_labels,) if isinstance(ignore_labels, str) else tuple(map(str, ignore_labels))
    if key == TEXTS:
        if problem is not None or ignored:
            raise TaskError(f"{'problem' if problem else 'ignore_labels'}: the task texts has no labels.")
        if data_dir is not None:
            raise TaskError("data_dir: it holds the files of a GLUE task; the task texts takes a training file.")
        if isinstance(text_columns, str) or len(text_columns) != 1:
            raise TaskError(f"text_columns: the task texts takes one column, got {text_columns!r}.")
        return load_texts(train_file, validation_file, text_columns[0], pairs)
    if pairs is not None:
        raise TaskError("pairs: scored pairs measure an embedder; they go with the task texts.")
    if train_file is not None or validation_file is not None:
        if key:
            raise TaskError(f"name: give either the task {name!r} or own files, not both.")
        if data_dir is not None:
            raise TaskError("data_dir: it holds the files of a GLUE task; own files are given one by one.")
        if isinstance(text_columns, str) or not 1 <= len(text_columns) <= 2:
            raise TaskError(f"text_columns: expected the name of one column, or two for sentence pairs, got {text_columns!r}.")
        if validation_file is None:
            raise TaskError("validation_file: a validation file is missing beside the training file.")
        if train_file is None and model_classes is None:
            raise TaskError("train_file: a training file is missing beside the validation file.")
        own = _OwnFiles(text_columns, label_column, problem, ignored)
        given = {"train_file": None if train_file is None else str(Path(train_file).expanduser().resolve())}
        given["validation_file"] = str(Path(validation_file).expanduser().resolve())
        source = {"text_columns": list(text_columns), "label_column": label_column, "problem": problem}
        train = None if train_file is None else Path(train_file).expanduser()
        validation = Path(validation_file).expanduser()
        return own.task(train, validation, model_classes, {**given, **source, "ignore_labels": list(ignored)})
    if problem is not None or ignored:
        raise TaskError(
            f"{'problem' if problem else 'ignore_labels'}: it is for own files; a named task says what its labels are."
        )
    if key in ("", "banking77"):
        if data_dir is not None and not key:
            raise TaskError(f"name: which task is in the data folder? The GLUE tasks are {', '.join(GLUE)}.")
        if data_dir is not None:
            raise TaskError("data_dir: banking77 ships with the package; a data folder is for the GLUE tasks.")
        return _banking77()
    if key not in GLUE:
        known = ["banking77", *GLUE]
        more = (
            f"the tasks are {', '.join(known)}, or your own training and validation file, or texts{nearest(key, [*known, TEXTS])}"
        )
        raise TaskError(f"name: unknown task {name!r}; {more}.")
    if data_dir is None:
        raise TaskError(f"data_dir: the task {key} needs a data folder that holds its GLUE files.")
    return _glue(key, Path(data_dir).expanduser())


def _banking77() -> Task:
    names = tuple(json.loads((BANKING77 / "categories.json").read_text(encoding="utf-8")))
    splits = {}
    for key in ("train", "test"):
        split = read_split(BANKING77 / f"{key}.csv", ("text",), "category")
        splits[key] = split.dataset(split.class_indices(split.labels, names, "the intents"), regression=False)
    evaluation = {"test": splits["test"]}
    return Task("banking77", len(names), names, False, ("accuracy",), splits["train"], evaluation, source={"name": "banking77"})


def _glue(name: str, data_dir: Path) -> Task:
    layout = GLUE[name]
    if not data_dir.is_dir():
        raise TaskError(f"data_dir: the data folder {data_dir} does not exist.")
    source = {"name": name, "data_dir": str(data_dir.resolve())}
    for folder in (layout.folder, name):
        if (data_dir / folder).is_dir():
            data_dir = data_dir / folder
            break
    train_file, evaluation_files = "train.tsv", layout.evaluation_files
    if name == "mrpc" and not (data_dir / train_file).exists() and (data_dir / "msr_paraphrase_train.txt").exists():
        train_file, evaluation_files = "msr_paraphrase_train.txt", {"test": "msr_paraphrase_test.txt"}

    def read(file: str) -> Split:
        return read_split(data_dir / file, layout.text_columns, layout.label_column, layout.columns, layout.skip_malformed)

    splits = {"train": read(train_file)} | {key: read(file) for key, file in evaluation_files.items()}
    regression = not layout.labels
    data = {}
    for key, split in splits.items():
        whose = f"{layout.folder}'s labels"
        labels = split.numbers() if regression else split.class_indices(split.labels, layout.labels, whose)
        data[key] = split.dataset(labels, regression)
    train = data.pop("train")
    skipped = {split.path.name: split.skipped for split in splits.values() if split.skipped}
    num_labels = len(layout.labels) or 1
    return Task(name, num_labels, layout.label_names, regression, layout.metrics, train, data, skipped, source=source)


@dataclass(frozen=True)
class _OwnFiles:
    """How own files are read."""

    text_columns: Sequence[str]
    label_column: str
    problem: Problem | None
    ignore_labels: tuple[str, ...]

    def task(
        self, train_file: Path | None, validation_file: Path, model_classes: Sequence[str] | None, source: dict[str, Any]
    ) -> Task:
        """The task of one file, whose classes are the model's, or of two, where they are those of the first."""
        paths = [path for path in (train_file, validation_file) if path is not None]
        for path in paths:
            if path.suffix.lower() not in (".csv", ".tsv", ".jsonl"):
                raise TaskError(f"{path}: the file name must end in .csv, .tsv or .jsonl.")
        splits = [read_split(path, self.text_columns, self.label_column, ignore_labels=self.ignore_labels) for path in paths]
        name = "/".join(part for part in (paths[0].resolve().parent.name, paths[0].name) if part)
        if train_file is None and model_classes is not None:
            task = self._of_model(name, splits[0], model_classes)
        else:
            task = self._of_two(name, *splits)
        left_out = [f"{split.path}: {split.ignored:,} rows left out for their label" for split in splits if split.ignored]
        return dataclasses.replace(task, notes=(*task.notes, *left_out), source=source)

    def _of_two(self, name: str, train: Split, validation: Split) -> Task:
        notes: tuple[str, ...] = ()
        numbers = [number(label) for label in train.labels]
        whole = [value is None or value.is_integer() for value in numbers]
        if self.problem == "regression" or (self.problem is None and not all(whole)):
            if self.problem is None:
                different = f"{len(set(train.labels)):,} different numbers, a regression"
                notes = (f"label column {self.label_column!r}: {different}; --problem classification for classes",)
            return _regression(name, train, validation, notes)
        # A column of numbers with NaN among them has rows without a label; among names it is one.
        if all(value is not None or not_finite(label) for value, label in zip(numbers, train.labels, strict=True)):
            for split in (train, validation):
                rows = zip(split.lines, split.labels, strict=True)
                missing = f"the label {self.label_column!r} is missing"
                refuse_rows(split.path, [(line, f"{missing} ({label!r})") for line, label in rows if not_finite(label)])
        if None in numbers or not all(whole):
            keys, validation_keys = train.labels, validation.labels
            classes = tuple(sorted(set(keys)))
        else:
            keys, validation_keys = ([integer_spelling(label) for label in split.labels] for split in (train, validation))
            classes = tuple(sorted(set(keys), key=int))
            if classes[0] == "-1" and len(classes) > 2:
                count = f"{keys.count('-1'):,} rows have the label -1, which is a class like the others"
                notes = (f"{train.path}: {count}; --ignore-label -1 leaves them out",)
        if len(classes) < 2:
            raise TaskError(f"{train.path}: all labels are {classes[0]!r}, and a classification needs at least two.")
        source = "the labels of the training file"
        train_data = train.dataset(train.class_indices(keys, classes, source), regression=False)
        data = validation.dataset(validation.class_indices(validation_keys, classes, source), regression=False)
        return Task(name, len(classes), classes, False, ("accuracy",), train_data, {"validation": data}, notes=notes)

    def _of_model(self, name: str, validation: Split, model_classes: Sequence[str]) -> Task:
        regression = self.problem == "regression" or (self.problem is None and len(model_classes) == 1)
        empty = Split(validation.path, [], [[] for _ in validation.texts], [], 0, 0)
        if regression:
            return _regression(name, empty, validation, ())
        keys = [integer_spelling(label) for label in validation.labels]
        found = tuple(sorted(set(keys)))
        indices = tuple(str(index) for index in range(len(model_classes)))
        order, sentence = match_classes(model_classes, found)
        if order is not None and not sentence:
            spelled = dict(zip(order, found, strict=True))
            classes = tuple(spelled.get(index, label) for index, label in enumerate(model_classes))
        elif set(found) <= set(indices) and not set(model_classes) & set(indices):
            classes = indices  # `for_model` will say that they are taken in their order
        else:
            classes = tuple(model_classes)
        labels = validation.class_indices(keys, classes, "the classes of the model")
        data = {"validation": validation.dataset(labels, regression=False)}
        return Task(name, len(classes), classes, False, ("accuracy",), empty.dataset([], False), data)


def _regression(name: str, train: Split, validation: Split, notes: tuple[str, ...]) -> Task:
    numbers = train.dataset(train.numbers(), regression=True)
    data = {"validation": validation.dataset(validation.numbers(), regression=True)}
    return Task(name, 1, None, True, ("pearson", "spearman"), numbers, data, notes=notes)
