"""One self-contained HTML page of what was run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import dump_json, publish_file
from .charts import accuracy_chart, escape, marker_shape, series_style, stage1_chart, training_chart
from .tables import STAGES, Group, Record, Summary, collect, configuration_names, family, grouped, quality, summaries

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
                centroids = [None if c is None else float(f"{c:.4g}") for c in layer["centroids"]]
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
    text = page(records)
    with publish_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return target


def page(records: Sequence[Record]) -> str:
    """The page as text."""
    groups = grouped(records)
    tables, qualities = summaries(records), quality(records)
    data, sections = [], []
    for number, group in enumerate(groups):
        layers = layer_data(group.runs)
        data.append(layers)
        sections.append(_section(number, group, tables[number], qualities[number], bool(layers["configurations"])))
    seeds = sorted({record.seed for record in records})
    names = [group.task + (f" ({group.detail})" if group.detail else "") for group in groups]
    links = "".join(f'<a href="#task{i}">{escape(name)}</a> ' for i, name in enumerate(names))
    template = (HERE / "report.html").read_text(encoding="utf-8")
    content = {
        "STYLE": (HERE / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": (HERE / "report.js").read_text(encoding="utf-8"),
        "TITLE": escape(f"kmq: {', '.join(dict.fromkeys(group.task for group in groups))}"),
        "LEAD": escape(_lead(len(records), seeds)),
        "LINKS": links,
        "SECTIONS": "".join(sections),
        "CONDITIONS": _conditions(records, groups),
        "DATA": dump_json(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: content[match.group(1)], template)


def _lead(runs: int, seeds: Sequence[int]) -> str:
    """What the figures are of."""
    text = f"{runs} run{'' if runs == 1 else 's'}, seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}."
    return text if len(seeds) == 1 else f"{text} Figures are means over the seeds ± their standard error."


def _section(number: int, group: Group, table: Summary, all_metrics: Summary | None, layers: bool) -> str:
    runs = group.runs
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
        f'<section id="task{number}" data-task="{number}"><h2>{escape(group.title)}</h2>',
        "<h3>Accuracy against size</h3>",
        f'<fieldset class="legend"><legend>Shown</legend>{legend}<span class="gap"></span>{stages}</fieldset>',
        accuracy_chart(runs, style),
        _table(table),
    ]
    if all_metrics is not None:
        parts += ["<h3>Quality</h3>", _table(all_metrics, "Every metric beside that of the fp32 model.")]
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


CONTROL = "Stage 3 of the fp32 row is the control: the fp32 model fine-tuned for the steps of stage 3."


def _table(table: Summary, note: str = CONTROL) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    title = escape(table.title)
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


def _stages(record: Record) -> dict[str, dict[str, Any]]:
    """The figures of every stage that is finished, by what it is called."""
    results = record.results
    found = {"stage 1": results["stage1"], "control": results.get("control")}
    for name, stages in results["quantized"].items():
        found |= {f"{name}, stage {stage[-1]}": stages.get(stage) for stage in STAGES}
    return {name: facts for name, facts in found.items() if facts is not None}


def _conditions(records: Sequence[Record], groups: Sequence[Group]) -> str:
    commands: dict[str, None] = {}
    versions: dict[str, dict[str, list[str]]] = {}  # what -> its values -> the stages that were made with them
    for record in records:
        stages = _stages(record)
        if not any("versions" in facts for facts in stages.values()):  # results of an earlier version
            stages = {"the last command": record.results}
        for name, facts in stages.items():
            commands[shlex.join(facts.get("command") or [])] = None
            for key, value in facts.get("versions", {}).items():
                versions.setdefault(key, {}).setdefault(str(value), []).append(name)
    parts = ["<h2>Conditions</h2><h3>Repeat it</h3>"]
    parts += [f"<pre tabindex='0'>{escape(command)}</pre>" for command in commands if command]
    parts.append("<h3>Versions and machine</h3><dl>")
    for key, values in versions.items():
        text = next(iter(values)) if len(values) == 1 else "; ".join(f"{v} ({_few(names)})" for v, names in values.items())
        parts.append(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>")
    parts.append("</dl>")
    for group in groups:
        request = group.runs[0].results["request"]
        parts.append(f"<h3>Settings{escape(f': {group.title}') if len(groups) > 1 else ''}</h3><dl>")
        for key in ("stage1", "stage3", "sensitivity", "rows"):
            if key in request:
                text = ", ".join(f"{name} {value}" for name, value in request[key].items() if name != "seed")
                parts.append(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>")
        for name, own in request.get("stage3_of", {}).items():
            differs = {key: value for key, value in (own or {}).items() if value != request["stage3"].get(key)}
            text = "none" if own is None else ", ".join(f"{key} {value}" for key, value in differs.items())
            parts.append(f"<dt>{escape(f'stage3 of {name}')}</dt><dd>{escape(text)}</dd>")
        parts.append("</dl>")
    return "".join(parts)


def _few(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
