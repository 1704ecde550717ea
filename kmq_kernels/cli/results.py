"""The tables of `kmq run`."""

from __future__ import annotations

from typing import Any

from .layout import table


def summary_table(summary: Any) -> str:
    """The table of a comparison, or as many of its columns as a narrow screen shows: mean and standard error, and size."""
    for shown in (9, 6, 5, 3):
        text = table(summary.columns[:shown], (row[:shown] for row in summary.rows), summary.title, blocks=False)
        if text:
            break
    return text or table(summary.columns, summary.rows, summary.title)


def results_table(results: dict[str, Any]) -> str:
    """The table of a run: one row a model; bits per weight, MB on disk, times smaller than fp32, seconds of stages 2 and 3."""
    metric = results["metric"]

    def size(facts: dict[str, Any]) -> tuple[str, ...]:
        return f"{facts['bits_per_weight']:.2f}", f"{facts['bytes_on_disk'] / 1e6:.2f}", f"{facts['ratio']:.2f}x"

    def value(facts: dict[str, Any] | None) -> str:
        if facts is not None and "stopped" in facts:
            return "diverged"
        return "" if facts is None else f"{facts['metrics'][metric]:.4f}"

    first, control = results["stage1"], results["control"]
    rows = [(f"fp32 ({first['seconds']:.0f} s)", value(first), "", *size(first), "", "")]
    if control is not None:
        rows.append(
            (
                "fp32, control",
                "",
                value(control),
                *size(first if "stopped" in control else control),
                "",
                f"{control['seconds']:.0f}",
            )
        )
    for name, stages in results["quantized"].items():
        second, third = stages["stage2"], stages["stage3"]
        if second is None:  # asked for, and not finished yet
            continue
        took = "" if third is None else f"{third['seconds']:.0f}"
        last = second if third is None or "stopped" in third else third
        rows.append((name, value(second), value(third), *size(last), f"{second['seconds']:.1f}", took))
    if first["metrics"].keys() > {"mean_cosine"}:  # an embedder: the model itself is what all are measured against
        rows[0] = ("fp32", *rows[0][1:])
    columns = ("model", "after stage 2", "after stage 3", "bits per weight", "MB", "ratio", "s, stage 2", "s, stage 3")
    request = results["request"]
    return table(columns, rows, f"{request['model']} on {request['task']}: {metric.replace('_', ' ')}")
