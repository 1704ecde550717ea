"""Runs collected from their folders, and the tables of their figures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAGES = ("stage2", "stage3")


class ReportError(ValueError):
    """A folder that no report can be made of, with the reason in one sentence."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One run: its folder and the content of its results.json."""

    folder: Path
    results: dict[str, Any]

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.results["request"]["task"])

    @property
    def model(self) -> str:
        """What was fine-tuned."""
        return str(self.results["request"]["model"])

    @property
    def seed(self) -> int:
        """Seed of stage 1."""
        return int(self.results["request"]["stage1"]["seed"])


@dataclasses.dataclass(frozen=True)
class Value:
    """A figure over seeds: mean, and standard error where there are several."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for one value."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.error is None else f"{self.mean:.4f} ± {self.error:.4f}"


@dataclasses.dataclass(frozen=True)
class Summary:
    """A table as text: the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def collect(folder: Path) -> list[Record]:
    """The runs in a folder: the folder itself, or folders up to two levels below; in order of task and seed.

    Raises ReportError where there is none, or a results.json that is none.
    """
    files = [file for pattern in ("results.json", "*/results.json", "*/*/results.json") for file in folder.glob(pattern)]
    records = []
    for file in files:
        try:
            record = Record(file.parent, json.loads(file.read_text()))
            _ = (record.task, record.model, record.seed, record.results["metric"], record.results["quantized"])
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{file}: not the results of a run ({error!r})") from None
        if record.results["stage1"] is not None:
            records.append(record)
    if not records:
        raise ReportError(f"{folder}: no results of `kmq run` in it, nor up to two folders below")
    return sorted(records, key=lambda record: (record.task, record.model, record.seed))


def by_task(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.task, record.model), []).append(record)
    return groups


def configuration_names(records: Sequence[Record]) -> list[str]:
    """Configurations that any of the runs has finished something of."""
    found = {name: None for r in records for name, stages in r.results["quantized"].items() if any(stages.values())}
    return list(found)


def stage_facts(records: Sequence[Record], name: str, stage: str) -> list[dict[str, Any]]:
    found = [record.results["quantized"].get(name, {}).get(stage) for record in records]
    return [facts for facts in found if facts is not None]


def metric_value(records: Sequence[Record], facts: Sequence[dict[str, Any] | None]) -> Value | None:
    metric = records[0].results["metric"]
    values = tuple(float(each["metrics"][metric]) for each in facts if each is not None)
    return Value(values) if values else None


def _mean(facts: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [each[key] for each in facts if each.get(key) is not None]
    return statistics.fmean(values) if values else None


def _text(value: Any, form: str = "{}") -> str:
    return "" if value is None else form.format(value)


def summaries(records: Sequence[Record]) -> list[Summary]:
    """A table for each task: metric before and after stage 3 (mean and standard error over seeds), size, time, memory."""
    tables = []
    for (task, model), runs in by_task(records).items():
        rows = []
        first = [run.results["stage1"] for run in runs]
        control = [run.results["control"] for run in runs if run.results.get("control") is not None]
        rows.append(
            _row(
                "fp32 after stage 1", metric_value(runs, first), metric_value(runs, control), first, control or first, len(first)
            )
        )
        for name in configuration_names(runs):
            second, third = stage_facts(runs, name, "stage2"), stage_facts(runs, name, "stage3")
            rows.append(_row(name, metric_value(runs, second), metric_value(runs, third), second, third or second, len(second)))
        columns = ("configuration", "stage 2", "stage 3", "bits/w", "MB", "seeds", "s, stage 2", "s, stage 3", "peak MB")
        tables.append(Summary(f"{model} on {task}: {runs[0].results['metric'].replace('_', ' ')}", columns, tuple(rows)))
    return tables


def _row(
    name: str,
    before: Value | None,
    after: Value | None,
    second: Sequence[dict[str, Any]],
    last: Sequence[dict[str, Any]],
    seeds: int,
) -> tuple[str, ...]:
    size = _mean(last, "bytes_on_disk")
    memory = _mean(last, "peak_memory_bytes")
    return (
        name,
        _text(before),
        _text(after),
        _text(_mean(last, "bits_per_weight"), "{:.2f}"),
        _text(size and size / 1e6, "{:.2f}"),
        str(seeds),
        _text(_mean(second, "seconds"), "{:.1f}"),
        _text(_mean(last, "seconds") if after is not None else None, "{:.1f}"),
        _text(memory and memory / 1e6, "{:.0f}"),
    )


def markdown(summary: Summary) -> str:
    """The table in Markdown, figures to the right."""
    rule = "|".join(["---", *["---:"] * (len(summary.columns) - 1)])
    lines = [f"{summary.title}\n", f"| {' | '.join(summary.columns)} |", f"|{rule}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in summary.rows)]) + "\n"


def family(name: str) -> str:
    """The series of a configuration: its name without the number of bits at the end."""
    return re.sub(r"-\d+(?:\.\d+)?(?:bit|bpw)$", "", name)
