"""Data files read: csv, tsv and jsonl to texts and labels, with every row that cannot be used said at once.

csv follows RFC 4180 with a header line. tsv has no quoting, as in GLUE: a quotation mark is part of the text. All are UTF-8.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
import math
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..terminal import draws_bars
from .errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SHOWN_LABELS = 10  # of the known labels in a message
SHOWN_ROWS = 5  # of the rows that cannot be used
BAR_DELAY = 2.0  # seconds; no progress bar for what is done sooner
_UNDECODED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are not UTF-8
_SURROGATE = re.compile("[\ud800-\udfff]")


def refuse_rows(path: Path, problems: Sequence[tuple[int, str]]) -> None:
    """Raises TaskError where there are rows that cannot be used: (line, what is wrong) of each."""
    if len(problems) == 1:
        raise TaskError(f"{path}, line {problems[0][0]}: {problems[0][1]}.")
    if problems:
        some = "; ".join(f"line {line}: {problem}" for line, problem in problems[:SHOWN_ROWS])
        more = f"; and {len(problems) - SHOWN_ROWS:,} more" if len(problems) > SHOWN_ROWS else ""
        raise TaskError(f"{path}: {len(problems):,} rows cannot be used: {some}{more}.")


def number(label: str) -> float | None:
    """The finite number that a label spells, else None."""
    try:
        value = float(label)
    except ValueError:
        return None
    # float() takes the underscores of Python source, where a file means a name such as 1_2.
    return value if math.isfinite(value) and "_" not in label else None


def integer_spelling(label: str) -> str:
    """1, "1" and 1.0 are one class, and so is no other integer, however large."""
    try:
        exact = Decimal(label)
    except InvalidOperation:
        return label
    whole = exact.is_finite() and exact.adjusted() < 400 and exact == exact.to_integral_value()
    return str(int(exact)) if whole else label


def not_finite(label: str) -> bool:
    """Whether a label spells NaN or an infinity."""
    try:
        return not math.isfinite(float(label))
    except ValueError:
        return False


@dataclass(frozen=True)
class Split:
    """The texts and labels of one file as they stand there, with the line each example starts on."""

    path: Path
    lines: list[int]
    texts: list[list[str]]  # one list per text column
    labels: list[str]
    skipped: int  # malformed
    ignored: int  # with a label that was to be ignored

    def dataset(self, labels: Sequence[int] | Sequence[float], regression: bool) -> Dataset:
        """The data set of these texts with labels as the task counts them."""
        from datasets import Dataset, Features, Value

        columns: dict[str, Sequence[Any]] = dict(zip(("text", "text_pair"), self.texts, strict=False))
        features = {name: Value("string") for name in columns} | {"label": Value("float32" if regression else "int64")}
        return Dataset.from_dict(columns | {"label": labels}, features=Features(features))

    def class_indices(self, keys: Sequence[str], classes: Sequence[str], source: str) -> list[int]:
        """The index in `classes` of each example's key (its label in canonical spelling); `source` says what the classes are."""
        index = {label: i for i, label in enumerate(classes)}
        known = ", ".join(classes[:SHOWN_LABELS]) + (", ..." if len(classes) > SHOWN_LABELS else "")
        rows = zip(self.lines, keys, self.labels, strict=True)
        wrong = [(line, label) for line, key, label in rows if key not in index]
        if len(wrong) == 1:
            refuse_rows(self.path, [(wrong[0][0], f"the label {wrong[0][1]!r} is not one of {source} ({known})")])
        elif wrong:
            refuse_rows(self.path, [(line, f"the label {label!r} is not one of {source}") for line, label in wrong])
        return [index[key] for key in keys]

    def numbers(self) -> list[float]:
        """The labels as finite numbers."""
        values = [number(label) for label in self.labels]
        rows = zip(self.lines, values, self.labels, strict=True)
        refuse_rows(
            self.path, [(line, f"the label {label!r} is not a finite number") for line, value, label in rows if value is None]
        )
        return [value for value in values if value is not None]


def read_split(
    path: Path,
    text_columns: Sequence[str],
    label_column: str,
    columns: Sequence[str] | None = None,
    skip_malformed: bool = False,
    ignore_labels: Collection[str] = (),
) -> Split:
    """Reads one file.

    columns: the columns of a file without a header line; a first line that does name the wanted columns is taken as the header.
    skip_malformed: leaves out, and counts, lines with a wrong number of fields, an empty text, or no label (or "-", which MNLI
    writes where its annotators did not agree); otherwise each is an error. ignore_labels: rows with these are left out, and
    counted.
    """
    if not path.is_file():
        raise TaskError(f"The data file {path} does not exist.")
    columns, records = read_records(path, columns, {*text_columns, label_column})
    positions = column_positions(path, columns, "text_columns", text_columns)
    positions += column_positions(path, columns, "label_column", (label_column,))

    no_label = ("", "-") if skip_malformed else ("",)
    lines: list[int] = []
    rows: list[list[str]] = []
    problems: list[tuple[int, str]] = []
    ignored = 0
    for line, values in tqdm(records, desc=path.name, delay=BAR_DELAY, leave=False, disable=not draws_bars()):
        if len(values) != len(columns):
            problems.append((line, f"{len(values)} fields, expected {len(columns)}"))
            continue
        *texts, label = [values[position] for position in positions]
        spelled = None if label is None else str(int(label) if isinstance(label, bool) else label).strip()
        if spelled in ignore_labels:
            ignored += 1
            continue
        problem = _problem(dict(zip(text_columns, texts, strict=True)), label_column, label, no_label)
        if problem is None and spelled is not None:
            lines.append(line)
            rows.append([*texts, spelled])
        else:
            problems.append((line, str(problem)))
    if not skip_malformed:
        refuse_rows(path, problems)
    if not rows:
        why = f"all {len(problems)} lines are malformed" if problems else f"all {ignored} rows have labels that are ignored"
        raise TaskError(f"The data file {path} has no examples; {why}.")
    if problems:
        log.warning("%s: %d malformed lines left out of %d.", path, len(problems), len(records))
    *texts_by_column, labels = ([row[i] for row in rows] for i in range(len(positions)))
    return Split(path, lines, texts_by_column, labels, len(problems), ignored)


def _problem(texts: dict[str, Any], label_column: str, label: Any, no_label: tuple[str, ...]) -> str | None:
    """What is wrong with a row."""
    problem = None
    for name, text in texts.items():
        if text is None or (isinstance(text, str) and not text.strip()):
            problem = f"the text {name!r} is empty"
        elif not isinstance(text, str):
            problem = f"the text {name!r} is not a string but {text}"
        elif half := half_characters(name, text):
            problem = half
    if label is None or str(label).strip() in no_label:
        problem = f"the label {label_column!r} is missing"
    elif isinstance(label, (float, Decimal)) and not_finite(str(label)):
        problem = f"the label {label_column!r} is missing ({label})"
    elif isinstance(label, (list, dict)):
        problem = f"the label {label_column!r} is neither a string nor a number but {label}"
    elif _SURROGATE.search(str(label)):
        problem = f"the label {label_column!r} holds half a character ({label!r})"
    return problem


def half_characters(name: str, text: str) -> str:
    """What is wrong with a text that holds half of a pair of surrogates; "" for any other."""
    half = _SURROGATE.search(text)
    return f"the text {name!r} holds half a character ({half[0]!r}), which no tokenizer reads" if half else ""


def read_records(
    path: Path, columns: Sequence[str] | None = None, wanted: Collection[str] = ()
) -> tuple[Sequence[str], list[tuple[int, list[Any]]]]:
    """Columns and (line, values) of every row of a csv, tsv or jsonl file.

    columns: those of a file without a header line; a first line that does name the `wanted` ones is taken as the header.
    """
    content = decoded(path)
    records = _json_records(path, content) if path.suffix.lower() == ".jsonl" else _delimited_records(path, content)
    if records and (columns is None or set(wanted) <= set(records[0][1])):
        columns = records.pop(0)[1]
    if not columns:
        raise TaskError(f"The data file {path} is empty.")
    if not records:
        raise TaskError(f"The data file {path} has no examples.")
    return columns, records


def column_positions(path: Path, columns: Sequence[str], argument: str, names: Sequence[str]) -> list[int]:
    """Where the columns `names` stand; raises TaskError, which begins with the argument that names them, where one is missing."""
    for name in names:
        if name not in columns:
            known = ", ".join(map(str, columns))
            raise TaskError(f"{argument}: {path} has no column {name!r}; its columns are {known}{nearest(name, columns)}.")
    return [columns.index(name) for name in names]


def decoded(path: Path) -> str:
    """The content of a file of UTF-8; raises TaskError naming the lines that are not."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        lines = enumerate(raw.split(b"\n"), 1)
        found = [(line, _UNDECODED.search(part.decode(errors="surrogateescape"))) for line, part in lines]
        refuse_rows(path, [(line, f"the file is not UTF-8 (byte 0x{ord(bad[0]) - 0xDC00:02x})") for line, bad in found if bad])
        raise


def _delimited_records(path: Path, content: str) -> list[tuple[int, list[Any]]]:
    """(line, fields) of every line that is not blank."""
    before = csv.field_size_limit(sys.maxsize)  # a text may have any length: it is cut to max_length tokens anyway
    records: list[tuple[int, list[Any]]] = []
    line = 1
    try:
        if path.suffix.lower() == ".csv":
            reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        else:
            reader = csv.reader(io.StringIO(content, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
        for fields in reader:
            if fields:
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise TaskError(f"{path}, line {line}: the record cannot be read ({error}).") from None
    finally:
        csv.field_size_limit(before)
    return records


def _json_records(path: Path, content: str) -> list[tuple[int, list[Any]]]:
    """The keys of the first object as a header, then (line, values) of every object; a key that an object lacks gives None."""
    records: list[tuple[int, list[Any]]] = []
    columns: list[str] = []
    problems: list[tuple[int, str]] = []
    for line, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text, parse_float=Decimal)  # a label is spelled as in the file
        except (ValueError, RecursionError) as error:
            deep = isinstance(error, RecursionError)
            problems.append((line, f"not JSON ({'nested too deeply' if deep else getattr(error, 'msg', error)})"))
            continue
        if not isinstance(record, dict):
            problems.append((line, "expected one JSON object a line"))
            continue
        if not records:
            columns = list(record)
            records.append((line, columns))
        records.append((line, [record.get(name) for name in columns]))
    refuse_rows(path, problems)
    return records


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a sentence: the known name that is nearest, where one is near."""
    found = difflib.get_close_matches(name, list(map(str, known)), n=1)
    return f"; nearest: {found[0]}" if found else ""
