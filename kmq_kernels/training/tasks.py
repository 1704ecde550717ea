"""Data sets and metrics.

A task is `banking77` (ships with the package), a GLUE name with a folder that holds GLUE's own files, or any two csv, tsv or
jsonl files by column names. Files are read from disk into memory; nothing is downloaded and no cache is written.

csv follows RFC 4180 with a header line. tsv has no quoting, as in GLUE: a quotation mark is part of the text. All are UTF-8.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

try:
    from datasets import Dataset, Features, Value, concatenate_datasets
    from datasets import Sequence as ListOf
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
except ImportError as error:
    raise ImportError(f"Tasks need more packages ({error}): pip install 'kmq_kernels[train]'") from error

logger = logging.getLogger(__name__)

BANKING77 = Path(__file__).parent / "banking77"
SHOWN_LABELS = 10  # of the known labels in a message
TOKENIZE_BATCH = 4096  # texts a call: enough to occupy a fast tokenizer's threads
BAR_DELAY = 2.0  # seconds; no progress bar for what is done sooner


class TaskError(ValueError):
    """A task or a data file that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class Task:
    """A labelled text data set with its metrics.

    Every split has the columns `text`, `text_pair` (for sentence pairs) and `label`: int64 in [0, num_labels), or float32 for
    regression, where `num_labels` is 1 and `label_names` is None. `metrics[0]` is the headline.
    """

    name: str
    num_labels: int
    label_names: tuple[str, ...] | None
    regression: bool
    metrics: tuple[str, ...]
    train: Dataset
    evaluation: dict[str, Dataset]  # "test", "validation", or MNLI's "validation_matched" and "validation_mismatched"
    skipped_lines: dict[str, int] = field(default_factory=dict)  # file name -> malformed lines left out (QQP and MNLI have some)
    source: str | None = None  # of own data the training file and its folder, "reviews/train.csv"

    @property
    def metric(self) -> str:
        """The key of the headline metric in what `compute_metrics` returns."""
        return self.metrics[0]

    def compute_metrics(self, eval_prediction: Any) -> dict[str, float]:
        """Trainer's `compute_metrics`: predictions (N, num_labels) (or a tuple that starts with them) and labels (N,).

        A correlation with a constant is undefined and given as 0.0.
        """
        predictions, labels = eval_prediction
        if isinstance(predictions, tuple):
            predictions = predictions[0]
        predictions, labels = np.asarray(predictions), np.asarray(labels)
        if self.regression:
            predictions, labels = predictions.reshape(-1).astype(np.float64), labels.reshape(-1).astype(np.float64)
        else:
            predictions = predictions.argmax(-1)
        return {metric: _metric(metric, predictions, labels) for metric in self.metrics}


def _metric(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    if metric == "accuracy":
        return float(accuracy_score(labels, predictions))
    if metric == "f1":
        return float(f1_score(labels, predictions, zero_division=0))
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    if metric == "matthews_correlation":
        return float(matthews_corrcoef(labels, predictions))
    correlation = {"pearson": pearsonr, "spearman": spearmanr}[metric]
    return float(correlation(predictions, labels).statistic)


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


def load_task(
    name: str | None = "banking77",
    *,
    data_dir: Path | str | None = None,
    train_file: Path | str | None = None,
    validation_file: Path | str | None = None,
    text_columns: Sequence[str] = ("text",),
    label_column: str = "label",
) -> Task:
    """The task by `name`, or made of `train_file` and `validation_file` (which need no name).

    name: "banking77", or a GLUE task in any usual spelling ("sst2", "SST-2", ...) with `data_dir`, the folder of its files or
    the folder that holds GLUE's folders ("SST-2" or "sst2", ...). text_columns: one column, or two for sentence pairs. In own
    files, labels are classes in sorted order; a number with a fraction anywhere in the training file's label column makes a
    regression.
    Raises TaskError for everything that is wrong with the name or the files.
    """
    key = (name or "").lower().replace("-", "").replace("_", "")
    if train_file is not None or validation_file is not None:
        if key not in ("", "banking77"):
            raise TaskError(f"Give either the task {name!r} or a training and a validation file, not both.")
        if train_file is None or validation_file is None:
            raise TaskError(f"A {'training' if train_file is None else 'validation'} file is missing: the two go together.")
        if isinstance(text_columns, str) or not 1 <= len(text_columns) <= 2:
            raise TaskError(f"text_columns must name one column, or two for sentence pairs, got {text_columns!r}.")
        return _from_files(Path(train_file).expanduser(), Path(validation_file).expanduser(), text_columns, label_column)
    if key == "banking77":
        if data_dir is not None:
            raise TaskError("banking77 ships with the package; a data folder is for the GLUE tasks.")
        return _banking77()
    if key not in GLUE:
        known = ", ".join(["banking77", *GLUE])
        raise TaskError(f"Unknown task {name!r}; the tasks are {known}, or your own training and validation file.")
    if data_dir is None:
        raise TaskError(f"The task {key} needs a data folder that holds its GLUE files.")
    return _glue(key, Path(data_dir).expanduser())


def tokenize(task_split: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """A split of a Task -> input_ids, attention_mask, token_type_ids (if the tokenizer has them) and labels.

    Truncated to max_length, not padded.
    """
    pair = "text_pair" in task_split.column_names
    parts = []
    for start in tqdm(range(0, len(task_split), TOKENIZE_BATCH), desc="tokenize", delay=BAR_DELAY, leave=False):
        batch = task_split[start : start + TOKENIZE_BATCH]
        encoded = tokenizer(
            batch["text"],
            batch["text_pair"] if pair else None,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=True,
        )
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
        features = Features({name: ListOf(Value("int32")) for name in names} | {"labels": task_split.features["label"]})
        parts.append(Dataset.from_dict({name: encoded[name] for name in names} | {"labels": batch["label"]}, features=features))
    return concatenate_datasets(parts)


@dataclass(frozen=True)
class _Split:
    """The texts and labels of one file as they stand there, with the line each example starts on."""

    path: Path
    lines: list[int]
    texts: list[list[str]]  # one list per text column
    labels: list[str]
    skipped: int

    def dataset(self, labels: Sequence[int] | Sequence[float], regression: bool) -> Dataset:
        columns: dict[str, Sequence[Any]] = dict(zip(("text", "text_pair"), self.texts, strict=False))
        features = {name: Value("string") for name in columns} | {"label": Value("float32" if regression else "int64")}
        return Dataset.from_dict(columns | {"label": labels}, features=Features(features))

    def class_indices(self, keys: Sequence[str], classes: Sequence[str], source: str) -> list[int]:
        """The index in `classes` of each example's key (its label in canonical spelling); `source` says what the classes are."""
        index = {label: i for i, label in enumerate(classes)}
        for line, key, label in zip(self.lines, keys, self.labels, strict=True):
            if key not in index:
                known = ", ".join(classes[:SHOWN_LABELS]) + (", ..." if len(classes) > SHOWN_LABELS else "")
                raise TaskError(f"{self.path}, line {line}: the label {label!r} is not one of {source} ({known}).")
        return [index[key] for key in keys]

    def numbers(self) -> list[float]:
        values = []
        for line, label in zip(self.lines, self.labels, strict=True):
            value = _number(label)
            if value is None:
                raise TaskError(f"{self.path}, line {line}: the label {label!r} is not a finite number.")
            values.append(value)
        return values


def _banking77() -> Task:
    names = tuple(json.loads((BANKING77 / "categories.json").read_text(encoding="utf-8")))
    splits = {}
    for key in ("train", "test"):
        split = _read_split(BANKING77 / f"{key}.csv", ("text",), "category")
        splits[key] = split.dataset(split.class_indices(split.labels, names, "the intents"), regression=False)
    return Task("banking77", len(names), names, False, ("accuracy",), splits["train"], {"test": splits["test"]})


def _glue(name: str, data_dir: Path) -> Task:
    layout = GLUE[name]
    if not data_dir.is_dir():
        raise TaskError(f"The data folder {data_dir} does not exist.")
    for folder in (layout.folder, name):
        if (data_dir / folder).is_dir():
            data_dir = data_dir / folder
            break
    train_file, evaluation_files = "train.tsv", layout.evaluation_files
    if name == "mrpc" and not (data_dir / train_file).exists() and (data_dir / "msr_paraphrase_train.txt").exists():
        train_file, evaluation_files = "msr_paraphrase_train.txt", {"test": "msr_paraphrase_test.txt"}

    def read(file: str) -> _Split:
        return _read_split(data_dir / file, layout.text_columns, layout.label_column, layout.columns, layout.skip_malformed)

    splits = {"train": read(train_file)} | {key: read(file) for key, file in evaluation_files.items()}
    regression = not layout.labels
    data = {}
    for key, split in splits.items():
        source = f"{layout.folder}'s labels"
        labels = split.numbers() if regression else split.class_indices(split.labels, layout.labels, source)
        data[key] = split.dataset(labels, regression)
    train = data.pop("train")
    skipped = {split.path.name: split.skipped for split in splits.values() if split.skipped}
    return Task(name, len(layout.labels) or 1, layout.label_names, regression, layout.metrics, train, data, skipped)


def _from_files(train_file: Path, validation_file: Path, text_columns: Sequence[str], label_column: str) -> Task:
    for path in (train_file, validation_file):
        if path.suffix.lower() not in (".csv", ".tsv", ".jsonl"):
            raise TaskError(f"{path}: the file name must end in .csv, .tsv or .jsonl.")
    train, validation = (_read_split(path, text_columns, label_column) for path in (train_file, validation_file))
    name, source = train_file.stem, f"{train_file.resolve().parent.name}/{train_file.name}"
    numbers = [_number(label) for label in train.labels]
    if any(number is not None and not number.is_integer() for number in numbers):
        data = (split.dataset(split.numbers(), regression=True) for split in (train, validation))
        return Task(name, 1, None, True, ("pearson", "spearman"), next(data), {"validation": next(data)}, source=source)
    if None in numbers:
        keys, validation_keys = train.labels, validation.labels
        classes = tuple(sorted(set(keys)))
    else:
        # 1, "1" and 1.0 are one class.
        keys, validation_keys = ([_integer_spelling(label) for label in split.labels] for split in (train, validation))
        classes = tuple(sorted(set(keys), key=int))
    if len(classes) < 2:
        raise TaskError(f"{train_file}: all labels are {classes[0]!r}, and a classification needs at least two.")
    known = "the labels of the training file"
    train_data = train.dataset(train.class_indices(keys, classes, known), regression=False)
    validation_data = validation.dataset(validation.class_indices(validation_keys, classes, known), regression=False)
    return Task(name, len(classes), classes, False, ("accuracy",), train_data, {"validation": validation_data}, source=source)


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    # float() takes the underscores of Python source, where a file means a name such as 1_2.
    return value if math.isfinite(value) and "_" not in label else None


def _integer_spelling(label: str) -> str:
    number = _number(label)
    return label if number is None or not number.is_integer() else str(int(number))


def _read_split(
    path: Path,
    text_columns: Sequence[str],
    label_column: str,
    columns: Sequence[str] | None = None,
    skip_malformed: bool = False,
) -> _Split:
    """Reads one file.

    columns: the columns of a file without a header line; a first line that does name the wanted columns is taken as the header.
    skip_malformed: leaves out, and counts, lines with a wrong number of fields, an empty text, or no label (or "-", which MNLI
    writes where its annotators did not agree); otherwise each is an error.
    """
    if not path.is_file():
        raise TaskError(f"The data file {path} does not exist.")
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TaskError(f"{path}, line {line}: the file is not UTF-8 (byte 0x{error.object[error.start]:02x}).") from None
    records = _json_records(path, content) if path.suffix.lower() == ".jsonl" else _delimited_records(path, content)
    if records and (columns is None or {*text_columns, label_column} <= set(records[0][1])):
        columns = records.pop(0)[1]
    if not columns:
        raise TaskError(f"The data file {path} is empty.")
    if not records:
        raise TaskError(f"The data file {path} has no examples.")
    for name in (*text_columns, label_column):
        if name not in columns:
            raise TaskError(f"{path} has no column {name!r}; its columns are {', '.join(map(str, columns))}.")
    positions = [columns.index(name) for name in (*text_columns, label_column)]

    no_label = ("", "-") if skip_malformed else ("",)
    lines: list[int] = []
    rows: list[list[str]] = []
    for line, values in tqdm(records, desc=path.name, delay=BAR_DELAY, leave=False):
        problem = None
        if len(values) != len(columns):
            problem = f"{len(values)} fields, expected {len(columns)}"
        else:
            *texts, label = [values[position] for position in positions]
            for name, text in zip(text_columns, texts, strict=True):
                if text is None or (isinstance(text, str) and not text.strip()):
                    problem = f"the text {name!r} is empty"
                elif not isinstance(text, str):
                    problem = f"the text {name!r} is not a string but {text!r}"
            if label is None or str(label).strip() in no_label:
                problem = f"the label {label_column!r} is missing"
            elif isinstance(label, list | dict):
                problem = f"the label {label_column!r} is neither a string nor a number but {label!r}"
        if problem is None:
            lines.append(line)
            rows.append([*texts, str(int(label) if isinstance(label, bool) else label).strip()])
        elif not skip_malformed:
            raise TaskError(f"{path}, line {line}: {problem}.")
    skipped = len(records) - len(rows)
    if not rows:
        raise TaskError(f"The data file {path} has no examples; all {skipped} lines are malformed.")
    if skipped:
        logger.warning("%s: %d malformed lines left out of %d.", path, skipped, len(records))
    *texts_by_column, labels = ([row[i] for row in rows] for i in range(len(positions)))
    return _Split(path, lines, texts_by_column, labels, skipped)


def _delimited_records(path: Path, content: str) -> list[tuple[int, list[Any]]]:
    """(line, fields) of every line that is not blank."""
    if path.suffix.lower() == ".csv":
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    else:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    records: list[tuple[int, list[Any]]] = []
    line = 1
    try:
        for fields in reader:
            if fields:
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise TaskError(f"{path}, line {line}: the record cannot be read ({error}).") from None
    return records


def _json_records(path: Path, content: str) -> list[tuple[int, list[Any]]]:
    """The keys of the first object as a header, then (line, values) of every object; a key that an object lacks gives None."""
    records: list[tuple[int, list[Any]]] = []
    columns: list[str] = []
    for line, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path}, line {line}: not JSON ({error.msg}).") from None
        if not isinstance(record, dict):
            raise TaskError(f"{path}, line {line}: expected one JSON object a line.")
        if not records:
            columns = list(record)
            records.append((line, columns))
        records.append((line, [record.get(name) for name in columns]))
    return records
