"""Charts as inline SVG."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
import statistics
from collections.abc import Sequence

from .tables import STAGES, Record, Value, configuration_names, family, measured, metric_value, once_a_seed, stage_facts

# Okabe and Ito's colours, which readers with any colour vision tell apart; each series has its own marker, too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d00", "#404040", "#e69f00")
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 5")
MARKERS = ("circle", "square", "diamond", "up", "down", "cross")

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
    parts.append(f'<text class="label" x="{centre}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def marker_shape(shape: str, x: float, y: float, colour: str, filled: bool) -> str:
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


def series_style(families: Sequence[str]) -> dict[str, tuple[str, str]]:
    return {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(families)}


def accuracy_chart(runs: Sequence[Record], style: dict[str, tuple[str, str]]) -> str:
    """Metric against bits per weight: a series for each family of configurations, hollow before stage 3, filled after it."""
    points: dict[str, dict[str, list[tuple[float, Value, str]]]] = {}
    for name in configuration_names(runs):
        for stage in STAGES:
            facts = measured(runs, stage_facts(runs, name, stage))
            value = metric_value(runs, facts)
            if value is not None:
                bits = statistics.fmean(each["bits_per_weight"] for each in facts)
                points.setdefault(family(name), {}).setdefault(stage, []).append((bits, value, name))
    first = metric_value(runs, once_a_seed((run, run.results["stage1"]) for run in runs))
    everything = [point for stages in points.values() for series in stages.values() for point in series]
    values = [value for _, value, _ in everything] + ([first] if first else [])
    if not values:
        return ""
    low = min(value.mean - (value.error or 0.0) for value in values)
    high = max(value.mean + (value.error or 0.0) for value in values)
    pad = 0.04 * (high - low) or 0.05
    sizes = [size for size, _, _ in everything] or [1.0, 8.0]
    axes = Axes((min(sizes) / 1.08, max(sizes) * 1.08), (low - pad, min(high + pad, 1.0)), log_x=True)  # no metric is above 1
    shown = [b for b in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 32) if axes.x[0] <= b <= axes.x[1]]
    metric = runs[0].results["metric"].replace("_", " ")
    parts = [_grid(axes, shown, ticks(*axes.y), "bits per weight of the whole model (logarithmic)", metric)]
    if first is not None:
        x, y = axes.at(axes.x[0], first.mean)
        spread = first.error or 0.0
        top, bottom = axes.at(axes.x[0], first.mean + spread)[1], axes.at(axes.x[0], first.mean - spread)[1]
        parts.append(f'<rect class="band" x="{x}" width="{WIDTH - RIGHT - x}" y="{top}" height="{max(bottom - top, 0.1):.1f}"/>')
        parts.append(f'<line class="reference" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{x + 6}" y="{y - 5}">fp32 after stage 1: {escape(str(first))}</text>')
    for name, stages in points.items():
        colour, marker = style[name]
        for stage, series in stages.items():
            series = sorted(series, key=lambda point: point[0])
            filled = stage == "stage3"
            line = " ".join("{},{}".format(*axes.at(b, value.mean)) for b, value, _ in series)
            dash = "" if filled else ' stroke-dasharray="5 4"'
            parts.append(f'<g class="series" data-series="{escape(name)}" data-stage="{stage}">')
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8"{dash} points="{line}"/>')
            for b, value, configuration in series:
                x, y = axes.at(b, value.mean)
                if value.error:
                    top, bottom = axes.at(b, value.mean + value.error)[1], axes.at(b, value.mean - value.error)[1]
                    bar = f"M{x} {top}V{bottom}M{x - 4} {top}h8M{x - 4} {bottom}h8"
                    parts.append(f'<path d="{bar}" stroke="{colour}" stroke-width="1.4" fill="none"/>')
                tip = f"{configuration}, {stage[:-1]} {stage[-1]}: {value} at {b:.2f} bits per weight"
                parts.append(f"<g><title>{escape(tip)}</title>{marker_shape(marker, x, y, colour, filled)}</g>")
            parts.append("</g>")
    return _svg("".join(parts), f"{metric} against bits per weight")


def training_chart(runs: Sequence[Record], style: dict[str, tuple[str, str]]) -> str:
    """Loss of stage 3 against the step, mean over the seeds and over a window of neighbouring steps."""
    curves: list[tuple[str, str, list[float]]] = []
    for name in configuration_names(runs):
        losses = [finite(facts.get("losses") or []) for facts in stage_facts(runs, name, "stage3")]
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
        parts.append(f'<g class="series" data-series="{escape(series)}" data-stage="stage3"><title>{escape(name)}</title>')
        parts.append(f'<polyline {stroke} points="{line}"/></g>')
        sample = f'<svg class="line" viewBox="0 0 36 10" aria-hidden="true"><path d="M0 5h36" {stroke}/></svg>'
        key.append(f"<span>{sample} {escape(name)}</span>")
    return _svg("".join(parts), "training loss of stage 3") + f'<p class="note key">{" ".join(key)}</p>'


def stage1_chart(runs: Sequence[Record]) -> str:
    """Loss of stage 1 against the step, a line for each seed."""
    found = {run.seed: finite(run.results["stage1"].get("losses") or []) for run in reversed(runs)}  # the first of a seed stays
    curves = [(seed, smooth(curve, max(1, len(curve) // 25))) for seed, curve in sorted(found.items()) if curve]
    if not curves:
        return ""
    axes = Axes((1.0, float(max(2, *(len(c) for _, c in curves)))), (0.0, 1.05 * max(v for _, c in curves for v in c)))
    parts = [_grid(axes, ticks(*axes.x), ticks(*axes.y), "step of stage 1", "training loss")]
    for number, (seed, curve) in enumerate(curves):
        line = " ".join("{},{}".format(*axes.at(i + 1, value)) for i, value in enumerate(curve))
        stroke = f'fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="1.6"'
        parts.append(f'<g><title>seed {seed}</title><polyline {stroke} points="{line}"/></g>')
    return _svg("".join(parts), "training loss of stage 1")


def finite(values: Sequence[float | None]) -> Sequence[float]:
    """What comes before the first value that is not finite: where a training diverged, its curve ends."""
    return list(itertools.takewhile(lambda value: value is not None and math.isfinite(value), values))  # type: ignore[arg-type]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values at every place."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def _svg(content: str, label: str) -> str:
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{content}</svg>'
    return f'<div class="chart" tabindex="0">{drawing}</div>'


def escape(text: str) -> str:
    return html.escape(text, quote=True)
