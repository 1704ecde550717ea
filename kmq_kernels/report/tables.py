"""Runs collected from their folders, grouped, and the tables of their figures.

Runs count as repetitions of one another when they differ in nothing but the seed: model, data, settings, version and, where
both have a configuration, that too. Of runs with the same seed one counts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
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
    return sorted(records, key=lambda record: (record.task, record.model, record.seed, str(record.folder)))


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed. detail: what tells them from others of the same model and task."""

    runs: tuple[Record, ...]
    detail: str = ""

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.runs[0].task

    @property
    def title(self) -> str:
        """Model and task."""
        return f"{self.runs[0].model} on {self.task}" + (f" ({self.detail})" if self.detail else "")


def grouped(records: Sequence[Record]) -> list[Group]:
    """The runs in groups, in the order of their first ones."""
    groups: list[list[Record]] = []
    for record in records:
        mine = next((group for group in groups if all(_repeats(record, other) for other in group)), None)
        if mine is None:
            groups.append([record])
        else:
            mine.append(record)
    found = []
    for group in groups:
        alike = [other for other in groups if (other[0].task, other[0].model) == (group[0].task, group[0].model)]
        found.append(Group(tuple(group), _detail(group, alike) if len(alike) > 1 else ""))
    return found


_BY_NAME = ("configs", "stage3_of")  # parts of a request that runs of one comparison may have more or fewer of
_CHECKSUMS = ("model_files", "data")


def _repeats(one: Record, other: Record) -> bool:
    first, second = (_settings(record.results["request"]) for record in (one, other))
    for part in _BY_NAME:
        shared = set(one.results["request"].get("configs", {})) & set(other.results["request"].get("configs", {}))
        mine, theirs = first.pop(part, {}), second.pop(part, {})
        if any(mine.get(name) != theirs.get(name) for name in shared):
            return False
    return first == second


def _settings(content: Any) -> Any:
    """A request without its seeds."""
    if not isinstance(content, dict):
        return content
    return {name: _settings(value) for name, value in content.items() if name != "seed"}


def _detail(group: Sequence[Record], alike: Sequence[Sequence[Record]]) -> str:
    """The settings, three at most, in which a group is not as the others, and its folder where these do not say it."""
    requests = [_settings(each[0].results["request"]) for each in alike]
    everywhere = set.intersection(*(set(request.get("configs", {})) for request in requests))
    flat = []
    for request in requests:
        named = {part: {k: v for k, v in request.get(part, {}).items() if k in everywhere} for part in _BY_NAME}
        flat.append(_flat({k: v for k, v in {**request, **named}.items() if k not in _CHECKSUMS}))
    mine = flat[next(i for i, each in enumerate(alike) if each is group)]
    differ = [name for name in mine if any(name not in other or other[name] != mine[name] for other in flat)]
    said = [f"{name} {mine[name]}" for name in differ[:3]]
    told = sum(all(other.get(name) == mine[name] for name in differ[:3]) for other in flat) == 1
    folder = group[0].folder.resolve()
    place = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else folder.name
    return ", ".join(said if said and told else [*said, f"in {place}"])


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def configuration_names(records: Sequence[Record]) -> list[str]:
    """Configurations that any of the runs has finished something of."""
    found = {name: None for r in records for name, stages in r.results["quantized"].items() if any(stages.values())}
    return list(found)


def stage_facts(records: Sequence[Record], name: str, stage: str) -> list[dict[str, Any]]:
    return once_a_seed((record, record.results["quantized"].get(name, {}).get(stage)) for record in records)


def once_a_seed(found: Iterable[tuple[Record, dict[str, Any] | None]]) -> list[dict[str, Any]]:
    """The figures of a stage, where there are some: of each seed those of its first run."""
    facts: dict[int, dict[str, Any]] = {}
    for record, each in found:
        if each is not None:
            facts.setdefault(record.seed, each)
    return list(facts.values())


def measured(records: Sequence[Record], facts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those that have no metric, because the training diverged."""
    metric = records[0].results["metric"]
    values = [(each, each["metrics"].get(metric)) for each in facts]
    return [each for each, value in values if value is not None and math.isfinite(value)]


def metric_value(records: Sequence[Record], facts: Sequence[dict[str, Any]]) -> Value | None:
    metric = records[0].results["metric"]
    values = tuple(float(each["metrics"][metric]) for each in measured(records, facts))
    return Value(values) if values else None


def _outcome(records: Sequence[Record], facts: Sequence[dict[str, Any]]) -> str:
    """The metric as text, and how many seeds diverged."""
    value, stopped = metric_value(records, facts), len(facts) - len(measured(records, facts))
    if not stopped:
        return _text(value)
    return "diverged" if value is None else f"{value} ({stopped} diverged)"


def _mean(facts: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [each[key] for each in facts if each.get(key) is not None]
    return statistics.fmean(values) if values else None


def _text(value: Any, form: str = "{}") -> str:
    return "" if value is None else form.format(value)


def summaries(records: Sequence[Record]) -> list[Summary]:
    """A table for each group of runs: metric before and after stage 3 (mean, standard error over seeds), size, time, memory."""
    tables = []
    for group in grouped(records):
        runs = group.runs
        first = once_a_seed((run, run.results["stage1"]) for run in runs)
        control = once_a_seed((run, run.results.get("control")) for run in runs)
        rows = [_row("fp32 after stage 1", runs, first, control)]
        rows += [
            _row(name, runs, stage_facts(runs, name, "stage2"), stage_facts(runs, name, "stage3"))
            for name in configuration_names(runs)
        ]
        columns = ("configuration", "stage 2", "stage 3", "bits/w", "MB", "seeds", "s, stage 2", "s, stage 3", "peak MB")
        tables.append(Summary(f"{group.title}: {runs[0].results['metric'].replace('_', ' ')}", columns, tuple(rows)))
    return tables


def quality(records: Sequence[Record]) -> list[Summary | None]:
    """For each group of runs a table of all metrics beside those of the fp32 model; None where there is one metric only."""
    tables: list[Summary | None] = []
    for group in grouped(records):
        runs = group.runs
        first = once_a_seed((run, run.results["stage1"]) for run in runs)
        names = list(dict.fromkeys(name for facts in measured(runs, first) for name in facts["metrics"]))
        rows = [("fp32", *_metrics(names, measured(runs, first)))]
        stages = [(name, stage) for name in configuration_names(runs) for stage in STAGES]
        found = [(name, stage, measured(runs, stage_facts(runs, name, stage))) for name, stage in stages]
        rows += [(f"{name}, stage {stage[-1]}", *_metrics(names, facts)) for name, stage, facts in found if facts]
        columns = ("model", *(name.replace("_", " ") for name in names))
        tables.append(Summary(f"{group.title}: quality", columns, tuple(rows)) if len(names) > 1 else None)
    return tables


def _metrics(names: Sequence[str], facts: Sequence[dict[str, Any]]) -> list[str]:
    found = [tuple(float(each["metrics"][name]) for each in facts if name in each["metrics"]) for name in names]
    return [str(Value(values)) if values else "" for values in found]


def _row(name: str, runs: Sequence[Record], second: Sequence[dict[str, Any]], third: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """second, third: figures of the stages before and after the fine-tuning that the columns are called by."""
    trained = measured(runs, third)
    last = trained or second
    size = _mean(last, "bytes_on_disk")
    memory = _mean(last, "peak_memory_bytes")
    return (
        name,
        _outcome(runs, second),
        _outcome(runs, third),
        _text(_mean(last, "bits_per_weight"), "{:.2f}"),
        _text(size and size / 1e6, "{:.2f}"),
        str(len(second)),
        _text(_mean(second, "seconds"), "{:.1f}"),
        _text(_mean(trained, "seconds"), "{:.1f}"),
        _text(memory and memory / 1e6, "{:.0f}"),
    )


def markdown(summary: Summary) -> str:
    """The table in Markdown, figures to the right."""
    rule = "|".join(["---", *["---:"] * (len(summary.columns) - 1)])
    lines = [f"{summary.title}\n", f"| {' | '.join(summary.columns)} |", f"|{rule}|"]
    rows = ([cell.replace("|", "\\|") for cell in row] for row in summary.rows)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def family(name: str) -> str:
    """The series of a configuration: its name without the number of bits at the end."""
    return re.sub(r"-\d+(?:\.\d+)?(?:bit|bpw)$", "", name)
