"""One self-contained HTML page of what was run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import accuracy_chart, escape, marker_shape, series_style, stage1_chart, training_chart
from .tables import STAGES, Record, Summary, by_task, collect, configuration_names, family, summaries

HERE = Path(__file__).parent


# The page


def _layers(record: Record, *parts: str) -> list[dict[str, Any]]:
    file = record.folder.joinpath(*parts, "layers.json")
    return json.loads(file.read_text()) if file.is_file() else []


def layer_data(runs: Sequence[Record]) -> dict[str, Any]:
    """What the script draws, from the first seed: histograms of the fp32 weights; bits, error and codebook by configuration."""
    run = runs[0]
    weights = {layer["name"]: {"shape": layer["shape"], **layer["histogram"]} for layer in _layers(run, "stage1")}
    configurations: dict[str, dict[str, Any]] = {}
    for name in configuration_names(runs):
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
    groups = by_task(records)
    tables = summaries(records)
    data, sections = [], []
    for number, ((task, model), runs) in enumerate(groups.items()):
        layers = layer_data(runs)
        data.append(layers)
        sections.append(_section(number, task, model, runs, tables[number], bool(layers["configurations"])))
    seeds = ", ".join(str(seed) for seed in sorted({record.seed for record in records}))
    links = "".join(f'<a href="#task{i}">{escape(task)}</a> ' for i, (task, _) in enumerate(groups))
    template = (HERE / "report.html").read_text(encoding="utf-8")
    content = {
        "STYLE": (HERE / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": (HERE / "report.js").read_text(encoding="utf-8"),
        "TITLE": escape(f"kmq: {', '.join(dict.fromkeys(task for task, _ in groups))}"),
        "LEAD": escape(f"Runs: {len(records)}, seeds: {seeds}. Figures are means over the seeds ± their standard error."),
        "LINKS": links,
        "SECTIONS": "".join(sections),
        "CONDITIONS": _conditions(records),
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: content[match.group(1)], template)


def _section(number: int, task: str, model: str, runs: Sequence[Record], table: Summary, layers: bool) -> str:
    families = list(dict.fromkeys(family(name) for name in configuration_names(runs)))
    style = series_style(families)
    legend = "".join(
        f'<label><input type="checkbox" checked data-toggle="{escape(name)}"> {_swatch(*style[name])} {escape(name)}</label>'
        for name in families
    )
    stages = "".join(
        f'<label><input type="checkbox" checked data-stage-toggle="stage{k}"> {text}</label>'
        for k, text in ((2, "after stage 2 (hollow, dashed)"), (3, "after stage 3 (filled)"))
    )
    parts = [
        f'<section id="task{number}" data-task="{number}"><h2>{escape(model)} on {escape(task)}</h2>',
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
    return f'<svg class="swatch" viewBox="0 0 16 16" aria-hidden="true">{marker_shape(marker, 8, 8, colour, True)}</svg>'


def _table(table: Summary) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    title = escape(table.title)
    note = "Stage 3 of the fp32 row is the control: the fp32 model fine-tuned for the steps of stage 3."
    return (
        f'<p class="note">{title}. {note}</p><div class="wide" tabindex="0"><table aria-label="{title}">'
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
    parts += [f"<pre tabindex='0'>{escape(command)}</pre>" for command in commands if command]
    parts.append("<h3>Versions and machine</h3><dl>")
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for key, value in record.results.get("versions", {}).items():
            versions.setdefault(key, {})[str(value)] = None
    parts += [f"<dt>{escape(key)}</dt><dd>{escape(', '.join(values))}</dd>" for key, values in versions.items()]
    parts.append("</dl><h3>Settings</h3><dl>")
    request = records[0].results["request"]
    for key in ("stage1", "stage3", "sensitivity", "rows"):
        if key in request:
            text = ", ".join(f"{name} {value}" for name, value in request[key].items())
            parts.append(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>")
    parts.append("</dl>")
    return "".join(parts)
