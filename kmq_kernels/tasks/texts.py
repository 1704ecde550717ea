"""Texts without labels: what an embedder is quantized and measured on.

Texts are the lines of a txt file or a column of a csv, tsv or jsonl file. Scored pairs are a csv, tsv or jsonl file with the
columns sentence1, sentence2 and score, as GLUE's STS-B has them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import TaskError
from .reading import column_positions, decoded, half_characters, number, read_records, refuse_rows

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = "texts"  # the name of the task
PAIR_COLUMNS = ("sentence1", "sentence2", "score")
HELD_OUT = 1000  # texts at most that are kept from the training file where no validation file is given: a tenth of it
FEWEST = 3  # texts to be measured on: similarities of two have no rank
METRICS = ("mean_cosine", "worst_cosine", "similarity_spearman")


@dataclass(frozen=True)
class Texts:
    """Texts to quantize an embedder on, held-out texts to measure it on, and scored pairs where there are some.

    train, evaluation["held_out"]: data sets with the column `text`; pairs: with `text`, `text_pair` and `label` (float32). The
    metrics are the mean and the worst cosine of the embeddings to those of the model in floating point, Spearman's correlation
    of all similarities of two held-out texts with the same of that model, and, with pairs, Spearman's correlation of their
    similarities with the scores.
    """

    name: str
    train: Dataset
    evaluation: dict[str, Dataset]
    pairs: Dataset | None = None
    notes: tuple[str, ...] = ()  # sentences about how the data was understood
    source: dict[str, Any] = field(default_factory=dict)  # arguments of `load_task` that give it again

    num_labels = 0
    label_names = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Keys of what an evaluation gives."""
        return METRICS if self.pairs is None else (*METRICS, "pairs_spearman")

    @property
    def metric(self) -> str:
        """The headline of these."""
        return self.metrics[0]

    @property
    def folder(self) -> str:
        """The name as that of a folder: "wiki-corpus" for "wiki/corpus.txt"."""
        return self.name.rpartition(".")[0].replace("/", "-")


@dataclass(frozen=True)
class TextFile:
    """The texts of a file without those that are empty, and how many were."""

    path: Path
    texts: list[str]
    empty: int

    @property
    def note(self) -> tuple[str, ...]:
        """A sentence where something was left out."""
        kind = "line" if self.empty == 1 else "lines"
        return (f"{self.path}: {self.empty:,} {kind} without a text left out",) if self.empty else ()


def read_texts(path: Path | str, text_column: str = "text") -> TextFile:
    """The texts of a file: its lines (txt), or one column (csv, tsv, jsonl). Raises TaskError with a sentence otherwise."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".txt", ".csv", ".tsv", ".jsonl"):
        raise TaskError(f"{path}: the file name must end in .txt, .csv, .tsv or .jsonl.")
    if not path.is_file():
        raise TaskError(f"The data file {path} does not exist.")
    if path.suffix.lower() == ".txt":
        rows = list(enumerate(decoded(path).removesuffix("\n").split("\n"), 1))
    else:
        columns, records = read_records(path)
        (position,) = column_positions(path, columns, "text_columns", (text_column,))
        wide = [
            (line, f"{len(values)} fields, expected {len(columns)}") for line, values in records if len(values) != len(columns)
        ]
        refuse_rows(path, wide)
        rows = [(line, values[position]) for line, values in records]
    wrong = [(line, f"the text is not a string but {text}") for line, text in rows if not isinstance(text, str | None)]
    wrong += [(line, half_characters("text", text)) for line, text in rows if isinstance(text, str) and half_characters("", text)]
    refuse_rows(path, wrong)
    texts = [text.strip() for _, text in rows if text is not None and text.strip()]
    if not texts:
        raise TaskError(f"The data file {path} has no texts.")
    return TextFile(path, texts, len(rows) - len(texts))


def load_texts(
    train_file: Path | str | None,
    validation_file: Path | str | None = None,
    text_column: str = "text",
    pairs: Path | str | None = None,
) -> Texts:
    """The task of these files. A text that is there several times counts once, and none is both trained and measured on.

    Without a validation file a tenth of the texts, at most 1,000, is held out, the same ones every time; without a training
    file there is nothing to train on.
    """
    if train_file is None and validation_file is None:
        raise TaskError("train_file: the task texts needs a file of texts: txt, csv, tsv or jsonl.")
    files = [None if file is None else read_texts(file, text_column) for file in (train_file, validation_file)]
    notes = [note for file in files if file is not None for note in file.note]
    given, held = ([] if file is None else list(dict.fromkeys(file.texts)) for file in files)
    if validation_file is None:
        held = random.Random(0).sample(given, min(-(-len(given) // 10), HELD_OUT))
    kept = set(held)
    train = [text for text in given if text not in kept]
    if len(held) < FEWEST or (train_file is not None and not train):
        where = "train_file" if validation_file is None else "validation_file"
        found = f"{len(train):,} to train and {len(held):,} to measure on"
        more = (
            f" A tenth is held out, so give {10 * FEWEST - 9} or more, or a validation file." if validation_file is None else ""
        )
        raise TaskError(f"{where}: expected different texts, at least {FEWEST} of them to measure on, got {found}.{more}")
    if validation_file is not None and len(train) < len(given):
        notes.append(f"{train_file}: {len(given) - len(train):,} texts left out, which are in {validation_file}, too")
    source: dict[str, Any] = {"name": TEXTS, "train_file": _absolute(train_file), "validation_file": _absolute(validation_file)}
    source |= {"text_columns": [text_column], "pairs": _absolute(pairs)}
    path = next(file.path for file in files if file is not None)
    name = "/".join(part for part in (path.resolve().parent.name, path.name) if part)
    scored = None if pairs is None else _read_pairs(Path(pairs).expanduser())
    return Texts(name, _dataset(text=train), {"held_out": _dataset(text=held)}, scored, tuple(notes), source)


def _absolute(path: Path | str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _dataset(**columns: Any) -> Dataset:
    from datasets import Dataset, Features, Value

    features = {name: Value("float32" if name == "label" else "string") for name in columns}
    return Dataset.from_dict(columns, features=Features(features))


def _read_pairs(path: Path) -> Dataset:
    if path.suffix.lower() not in (".csv", ".tsv", ".jsonl"):
        raise TaskError(f"pairs: {path}: the file name must end in .csv, .tsv or .jsonl.")
    if not path.is_file():
        raise TaskError(f"pairs: the file {path} does not exist.")
    columns, records = read_records(path)
    positions = column_positions(path, columns, "pairs", PAIR_COLUMNS)
    problems, rows = [], []
    for line, values in records:
        if len(values) != len(columns):
            problems.append((line, f"{len(values)} fields, expected {len(columns)}"))
            continue
        *texts, score = [values[position] for position in positions]
        value = None if score is None or isinstance(score, bool) else number(str(score))
        if any(not isinstance(text, str) or not text.strip() for text in texts):
            problems.append((line, "one of the two texts is empty"))
        elif half := "".join(half_characters(name, text) for name, text in zip(PAIR_COLUMNS, texts, strict=False)):
            problems.append((line, half))
        elif value is None:
            problems.append(
                (line, "the score is missing" if score in (None, "") else f"the score {score} is not a finite number")
            )
        else:
            rows.append((*texts, value))
    refuse_rows(path, problems)
    if len({score for *_, score in rows}) < 2 or len(rows) < FEWEST:
        raise TaskError(f"pairs: {path}: expected at least {FEWEST} pairs with scores that differ.")
    one, other, scores = (list(column) for column in zip(*rows, strict=True))
    return _dataset(text=one, text_pair=other, label=scores)
