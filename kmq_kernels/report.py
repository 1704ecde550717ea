"""What `kmq run` left in a folder as tables and as one self-contained HTML page.

The page needs no network and no server: charts are inline SVG, drawn here; the map of the layers and the histograms, where the
reader chooses what to see, are drawn by the script in report.js from data in the page.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "data" / "report"
STAGES = ("stage2", "stage3")

# Okabe and Ito's colours, which readers with any colour vision tell apart; each series has its own marker, too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#404040", "#e69f00")
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 5")
MARKERS = ("circle", "square", "diamond", "up", "down", "cross")


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


def _by_task(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.task, record.model), []).append(record)
    return groups


def _names(records: Sequence[Record]) -> list[str]:
    """Configurations that any of the runs has finished something of."""
    found = {name: None for r in records for name, stages in r.results["quantized"].items() if any(stages.values())}
    return list(found)


def _facts(records: Sequence[Record], name: str, stage: str) -> list[dict[str, Any]]:
    found = [record.results["quantized"].get(name, {}).get(stage) for record in records]
    return [facts for facts in found if facts is not None]


def _metric(records: Sequence[Record], facts: Sequence[dict[str, Any] | None]) -> Value | None:
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
    for (task, model), runs in _by_task(records).items():
        rows = []
        first = [run.results["stage1"] for run in runs]
        control = [run.results["control"] for run in runs if run.results.get("control") is not None]
        rows.append(_row("fp32 after stage 1", _metric(runs, first), _metric(runs, control), first, control or first, len(first)))
        for name in _names(runs):
            second, third = _facts(runs, name, "stage2"), _facts(runs, name, "stage3")
            rows.append(_row(name, _metric(runs, second), _metric(runs, third), second, third or second, len(second)))
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


# Charts: inline SVG

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 46


@dataclasses.dataclass(frozen=True)
class Axes:
    """Maps figures to a chart's pixels; x may be logarithmic."""

    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixel of a point."""
        low, high, value = (math.log2(v) if self.log_x else v for v in (*self.x, x))
        across = (value - low) / ((high - low) or 1.0)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        return round(LEFT + across * (WIDTH - LEFT - RIGHT), 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers in [low, high], about so many."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [round((first + i) * step, 10) for i in range(count + 1)]


def _grid(axes: Axes, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> str:
    parts = []
    for value in y_ticks:
        x, y = axes.at(axes.x[0], value)
        parts.append(f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{x - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        x, y = axes.at(value, axes.y[0])
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{y + 18}" text-anchor="middle">{value:g}</text>')
    centre, middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="label" x="{centre}" y="{HEIGHT - 8}" text-anchor="middle">{_e(x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{_e(y_label)}</text>'
    )
    return "".join(parts)


def _marker(shape: str, x: float, y: float, colour: str, filled: bool) -> str:
    style = f'fill="{colour if filled else "var(--paper)"}" stroke="{colour}" stroke-width="2"'
    if shape == "circle":
        return f'<circle cx="{x}" cy="{y}" r="5" {style}/>'
    outlines = {
        "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "diamond": ((0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0)),
        "up": ((0, -6), (6, 5), (-6, 5)),
        "down": ((0, 6), (6, -5), (-6, -5)),
        "cross": ((-2, -6), (2, -6), (2, -2), (6, -2), (6, 2), (2, 2), (2, 6), (-2, 6), (-2, 2), (-6, 2), (-6, -2), (-2, -2)),
    }
    points = " ".join(f"{round(x + dx, 1)},{round(y + dy, 1)}" for dx, dy in outlines[shape])
    return f'<polygon points="{points}" {style}/>'


def _series_style(families: Sequence[str]) -> dict[str, tuple[str, str]]:
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(families)}


def accuracy_chart(runs: Sequence[Record], style: dict[str, tuple[str, str]]) -> str:
    """Metric against bits per weight: a series for each family of configurations, hollow before stage 3, filled after it."""
    points: dict[str, dict[str, list[tuple[float, Value, str]]]] = {}
    for name in _names(runs):
        for stage in STAGES:
            facts = _facts(runs, name, stage)
            value = _metric(runs, facts)
            if value is not None:
                bits = statistics.fmean(each["bits_per_weight"] for each in facts)
                points.setdefault(family(name), {}).setdefault(stage, []).append((bits, value, name))
    first = _metric(runs, [run.results["stage1"] for run in runs])
    everything = [point for stages in points.values() for series in stages.values() for point in series]
    values = [value for _, value, _ in everything] + ([first] if first else [])
    low = min(value.mean - (value.error or 0.0) for value in values)
    high = max(value.mean + (value.error or 0.0) for value in values)
    pad = 0.04 * (high - low) or 0.05
    sizes = [size for size, _, _ in everything] or [1.0, 8.0]
    axes = Axes((min(sizes) / 1.08, max(sizes) * 1.08), (low - pad, high + pad), log_x=True)
    shown = [b for b in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 32) if axes.x[0] <= b <= axes.x[1]]
    metric = runs[0].results["metric"].replace("_", " ")
    parts = [_grid(axes, shown, ticks(*axes.y), "bits per weight of the whole model (logarithmic)", metric)]
    if first is not None:
        x, y = axes.at(axes.x[0], first.mean)
        spread = first.error or 0.0
        top, bottom = axes.at(axes.x[0], first.mean + spread)[1], axes.at(axes.x[0], first.mean - spread)[1]
        parts.append(f'<rect class="band" x="{x}" width="{WIDTH - RIGHT - x}" y="{top}" height="{max(bottom - top, 0.1):.1f}"/>')
        parts.append(f'<line class="reference" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{x + 6}" y="{y - 5}">fp32 after stage 1: {_e(str(first))}</text>')
    for name, stages in points.items():
        colour, marker = style[name]
        for stage, series in stages.items():
            series = sorted(series, key=lambda point: point[0])
            filled = stage == "stage3"
            line = " ".join("{},{}".format(*axes.at(b, value.mean)) for b, value, _ in series)
            dash = "" if filled else ' stroke-dasharray="5 4"'
            parts.append(f'<g class="series" data-series="{_e(name)}" data-stage="{stage}">')
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8"{dash} points="{line}"/>')
            for b, value, configuration in series:
                x, y = axes.at(b, value.mean)
                if value.error:
                    top, bottom = axes.at(b, value.mean + value.error)[1], axes.at(b, value.mean - value.error)[1]
                    bar = f"M{x} {top}V{bottom}M{x - 4} {top}h8M{x - 4} {bottom}h8"
                    parts.append(f'<path d="{bar}" stroke="{colour}" stroke-width="1.4" fill="none"/>')
                tip = f"{configuration}, {stage[:-1]} {stage[-1]}: {value} at {b:.2f} bits per weight"
                parts.append(f"<g><title>{_e(tip)}</title>{_marker(marker, x, y, colour, filled)}</g>")
            parts.append("</g>")
    return _svg("".join(parts), f"{metric} against bits per weight")


def training_chart(runs: Sequence[Record], style: dict[str, tuple[str, str]]) -> str:
    """Loss of stage 3 against the step, mean over the seeds and over a window of neighbouring steps."""
    curves: list[tuple[str, str, list[float]]] = []
    for name in _names(runs):
        losses = [finite(facts.get("losses") or []) for facts in _facts(runs, name, "stage3")]
        if losses and all(losses):
            length = min(map(len, losses))
            mean = [statistics.fmean(each[i] for each in losses) for i in range(length)]
            curves.append((family(name), name, smooth(mean, max(1, length // 12))))
    if not curves:
        return ""
    values = [value for _, _, curve in curves for value in curve]
    steps = max(len(curve) for _, _, curve in curves)
    axes = Axes((1.0, float(max(steps, 2))), (0.0, 1.05 * max(values)))
    parts = [_grid(axes, ticks(*axes.x), ticks(*axes.y), "step of stage 3", "training loss")]
    key = []
    before: dict[str, int] = {}
    for series, name, curve in curves:
        dash = DASHES[before.get(series, 0) % len(DASHES)]
        before[series] = before.get(series, 0) + 1
        stroke = f'fill="none" stroke="{style[series][0]}" stroke-width="1.6" stroke-dasharray="{dash}"'
        line = " ".join("{},{}".format(*axes.at(i + 1, value)) for i, value in enumerate(curve))
        parts.append(f'<g class="series" data-series="{_e(series)}" data-stage="stage3"><title>{_e(name)}</title>')
        parts.append(f'<polyline {stroke} points="{line}"/></g>')
        sample = f'<svg class="line" viewBox="0 0 36 10" aria-hidden="true"><path d="M0 5h36" {stroke}/></svg>'
        key.append(f"<span>{sample} {_e(name)}</span>")
    return _svg("".join(parts), "training loss of stage 3") + f'<p class="note key">{" ".join(key)}</p>'


def stage1_chart(runs: Sequence[Record]) -> str:
    """Loss of stage 1 against the step, a line for each seed."""
    curves = [(run.seed, finite(run.results["stage1"].get("losses") or [])) for run in runs]
    curves = [(seed, smooth(curve, max(1, len(curve) // 25))) for seed, curve in curves if curve]
    if not curves:
        return ""
    axes = Axes((1.0, float(max(2, *(len(c) for _, c in curves)))), (0.0, 1.05 * max(v for _, c in curves for v in c)))
    parts = [_grid(axes, ticks(*axes.x), ticks(*axes.y), "step of stage 1", "training loss")]
    for number, (seed, curve) in enumerate(curves):
        line = " ".join("{},{}".format(*axes.at(i + 1, value)) for i, value in enumerate(curve))
        stroke = f'fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="1.6"'
        parts.append(f'<g><title>seed {seed}</title><polyline {stroke} points="{line}"/></g>')
    return _svg("".join(parts), "training loss of stage 1")


def finite(values: Sequence[float]) -> Sequence[float]:
    """What comes before the first value that is not finite: where a training diverged, its curve ends."""
    return values[: next((i for i, value in enumerate(values) if not math.isfinite(value)), len(values))]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values at every place."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def _svg(content: str, label: str) -> str:
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_e(label)}">{content}</svg>'
    return f'<div class="chart" tabindex="0">{drawing}</div>'


def _e(text: str) -> str:
    return html.escape(text, quote=True)


# The page


def _layers(record: Record, *parts: str) -> list[dict[str, Any]]:
    file = record.folder.joinpath(*parts, "layers.json")
    return json.loads(file.read_text()) if file.is_file() else []


def layer_data(runs: Sequence[Record]) -> dict[str, Any]:
    """What the script draws, from the first seed: histograms of the fp32 weights; bits, error and codebook by configuration."""
    run = runs[0]
    weights = {layer["name"]: {"shape": layer["shape"], **layer["histogram"]} for layer in _layers(run, "stage1")}
    configurations: dict[str, dict[str, Any]] = {}
    for name in _names(runs):
        scheme = run.results["request"]["configs"].get(name, {}).get("scheme", "kmeans")
        for stage in STAGES:
            entries = {}
            for layer in _layers(run, name, stage):
                if "bits" not in layer:
                    continue
                centroids = [float(f"{c:.4g}") for c in layer["centroids"]]
                entries[layer["name"]] = {
                    "bits": layer["bits"],
                    "error": layer.get("error"),
                    "bytes": layer["bytes"],
                    "codebooks": layer["codebooks"],
                    "outliers": layer["outliers"],
                    "scaled": layer["row_scale"],
                    "centroids": centroids,
                }
            if entries:
                configurations.setdefault(name, {"scheme": scheme})[stage] = entries
    return {"seed": run.seed, "weights": weights, "configurations": configurations}


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of all runs in `folder` to `out`, default folder/report.html, whole or not at all; returns its path."""
    records = collect(folder)
    target = folder / "report.html" if out is None else out
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(page(records), encoding="utf-8")
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target


def page(records: Sequence[Record]) -> str:
    """The page as text."""
    groups = _by_task(records)
    tables = summaries(records)
    data, sections = [], []
    for number, ((task, model), runs) in enumerate(groups.items()):
        layers = layer_data(runs)
        data.append(layers)
        sections.append(_section(number, task, model, runs, tables[number], bool(layers["configurations"])))
    seeds = ", ".join(str(seed) for seed in sorted({record.seed for record in records}))
    links = "".join(f'<a href="#task{i}">{_e(task)}</a> ' for i, (task, _) in enumerate(groups))
    template = (HERE / "report.html").read_text(encoding="utf-8")
    content = {
        "STYLE": (HERE / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": (HERE / "report.js").read_text(encoding="utf-8"),
        "TITLE": _e(f"kmq: {', '.join(dict.fromkeys(task for task, _ in groups))}"),
        "LEAD": _e(f"Runs: {len(records)}, seeds: {seeds}. Figures are means over the seeds ± their standard error."),
        "LINKS": links,
        "SECTIONS": "".join(sections),
        "CONDITIONS": _conditions(records),
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: content[match.group(1)], template)


def _section(number: int, task: str, model: str, runs: Sequence[Record], table: Summary, layers: bool) -> str:
    families = list(dict.fromkeys(family(name) for name in _names(runs)))
    style = _series_style(families)
    legend = "".join(
        f'<label><input type="checkbox" checked data-toggle="{_e(name)}"> {_swatch(*style[name])} {_e(name)}</label>'
        for name in families
    )
    stages = "".join(
        f'<label><input type="checkbox" checked data-stage-toggle="stage{k}"> {text}</label>'
        for k, text in ((2, "after stage 2 (hollow, dashed)"), (3, "after stage 3 (filled)"))
    )
    parts = [
        f'<section id="task{number}" data-task="{number}"><h2>{_e(model)} on {_e(task)}</h2>',
        "<h3>Accuracy against size</h3>",
        f'<fieldset class="legend"><legend>Shown</legend>{legend}<span class="gap"></span>{stages}</fieldset>',
        accuracy_chart(runs, style),
        _table(table),
    ]
    if layers:
        parts.append(_layer_controls(number))
    curves = [("Stage 1, a line for each seed", stage1_chart(runs))]
    curves.append(("Stage 3, mean over the seeds", training_chart(runs, style)))
    if any(chart for _, chart in curves):
        parts.append("<h3>Training</h3>")
        parts += [f"<h4>{title}</h4>{chart}" for title, chart in curves if chart]
    return "".join(parts) + "</section>"


def _swatch(colour: str, marker: str) -> str:
    return f'<svg class="swatch" viewBox="0 0 16 16" aria-hidden="true">{_marker(marker, 8, 8, colour, True)}</svg>'


def _table(table: Summary) -> str:
    head = "".join(f'<th scope="col">{_e(column)}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{_e(row[0])}</th>' + "".join(f"<td>{_e(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    note = "Stage 3 of the fp32 row is the control: the fp32 model fine-tuned for the steps of stage 3."
    return (
        f'<p class="note">{_e(table.title)}. {note}</p><div class="wide" tabindex="0"><table aria-label="{_e(table.title)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _layer_controls(number: int) -> str:
    return f"""<h3>Layers</h3>
<p class="controls"><label>Configuration <select id="configuration{number}"></select></label>
<label>Stage <select id="stage{number}"></select></label></p>
<p class="note">Bits of every tensor; colour: error. Choose one to see its weights.</p>
<div class="wide map" id="map{number}" tabindex="0"></div>
<p class="note" id="scale{number}"></p>
<h3>Weights of a tensor</h3>
<p class="controls"><label>Tensor <select id="tensor{number}"></select></label>
<label><input type="checkbox" id="log{number}"> logarithmic counts</label></p>
<div class="chart" tabindex="0" id="histogram{number}"></div>
<p class="note" id="facts{number}" aria-live="polite"></p>"""


def _conditions(records: Sequence[Record]) -> str:
    commands = dict.fromkeys(shlex.join(record.results.get("command") or []) for record in records)
    parts = ["<h2>Conditions</h2><h3>Repeat it</h3>"]
    parts += [f"<pre tabindex='0'>{_e(command)}</pre>" for command in commands if command]
    parts.append("<h3>Versions and machine</h3><dl>")
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for key, value in record.results.get("versions", {}).items():
            versions.setdefault(key, {})[str(value)] = None
    parts += [f"<dt>{_e(key)}</dt><dd>{_e(', '.join(values))}</dd>" for key, values in versions.items()]
    parts.append("</dl><h3>Settings</h3><dl>")
    request = records[0].results["request"]
    for key in ("stage1", "stage3", "sensitivity", "rows"):
        if key in request:
            text = ", ".join(f"{name} {value}" for name, value in request[key].items())
            parts.append(f"<dt>{_e(key)}</dt><dd>{_e(text)}</dd>")
    parts.append("</dl>")
    return "".join(parts)
