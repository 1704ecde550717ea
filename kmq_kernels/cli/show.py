"""`kmq inspect` and `kmq report`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from .layout import fold, pairs, table, width
from .messages import quieten
from .options import OUTPUT, AsJson, Verbose, argument, option


def report(
    folder: Annotated[Path, argument("DIR", "Folder of `kmq run`, with or without --compare.")],
    out: Annotated[Path | None, option(OUTPUT, "FILE", "File to write.", "-o", "--output", default="DIR/report.html")] = None,
    markdown: Annotated[bool, option(OUTPUT, "", "Print the tables as Markdown instead.", "--markdown")] = False,
    as_json: AsJson = False,
) -> None:
    """One self-contained HTML page of what was run: accuracy against size, bits and distortion, weights, training, conditions."""
    from .. import report as reports

    if markdown or as_json:
        records = reports.collect(folder)
        found = [*reports.summaries(records), *filter(None, reports.quality(records))]
        text = json.dumps([dataclasses.asdict(summary) for summary in found]) if as_json else None
        print(text or "\n".join(reports.markdown(summary) for summary in found))
        return
    print(f"written: {reports.write_report(folder, out)}")


def inspect(
    model: Annotated[Path | None, argument("DIR", "Model folder; without it, only the build is shown.")] = None,
    every: Annotated[bool, option(OUTPUT, "", "A row for each layer; else equal ones share a row.", "--all")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """What a model folder is made of: bits, codebooks and bytes of every layer; and which implementation each op has here."""
    from .. import hf, ops
    from ..layers import CodebookModule
    from ..quantization import model_size

    content: dict[str, Any] = {"build": ops.build_info()}
    if model is not None:
        quieten(verbose)
        if str(model) == "minilm" and not model.exists():
            from ..training import resolve_model

            model = Path(resolve_model(str(model)))
        network = hf.load(model)
        size = model_size(network)
        layers = [
            {
                "name": name,
                "kind": type(module).__name__,
                "shape": [module.rows, module.cols],
                "bits": module.bits,
                "codebooks": module.codebook.shape[0],
                "bytes": sum(part.numel() * part.element_size() for part in module.stored().values()),
            }
            for name, module in network.named_modules()
            if isinstance(module, CodebookModule)
        ]
        quantization = getattr(network.config, "quantization_config", None)
        content["model"] = {
            "path": str(model),
            "config": None if quantization is None else quantization.to_dict(),
            "layers": layers,
            "weights": size.weights,
            "quantized_weights": size.quantized_weights,
            "bytes": size.total_bytes,
            "bits_per_weight": size.bits_per_weight,
            "ratio": size.ratio,
        }
    if as_json:
        print(json.dumps(content))
        return
    if model is not None:
        if content["model"]["layers"]:
            print(layers_table(content["model"]["layers"], str(model), every))
        left = (content["model"]["config"] or {"skip": ["every layer"]})["skip"]
        print("\n" + "\n".join(fold(f"left in floating point: {', '.join(left) or 'no layer'}", width())))
        figures = f"{size.weights:,} weights, {size.total_bytes:,} bytes, {size.bits_per_weight:.3f} bits per weight"
        print(f"{figures}, {size.ratio:.2f}x smaller\n")
    build = content["build"]
    rows = [(name, where["cpu"], where["cuda"]) for name, where in build["ops"].items()]
    print(table(("op", "cpu", "cuda"), rows, f"kmq_kernels {build['version']}, torch {build['torch']}", left=3))
    extension = build["extension"]
    if isinstance(extension, dict):
        extension = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in extension.items())
    print("\n" + pairs([("extension", extension)]))


def layers_table(layers: Sequence[dict[str, Any]], title: str, every: bool = False) -> str:
    """The codebook layers; those that differ in their number or their place in a block alone share a row unless `every`."""
    rows = []
    for names, layer in [([layer["name"]], layer) for layer in layers] if every else _alike(layers):
        facts = (
            layer["kind"].removeprefix("Codebook"), "x".join(map(str, layer["shape"])), layer["bits"], layer["codebooks"],
            f"{layer['bytes']:,}",
        )  # fmt: skip
        rows.append((shared_name(names), *facts) if every else (shared_name(names), *facts, len(names)))
    columns = ("layer", "kind", "shape", "bits", "books", "bytes" if every else "bytes each", "layers")
    return table(columns[: 6 if every else 7], rows, title, left=2)


def _alike(layers: Sequence[dict[str, Any]]) -> list[tuple[list[str], dict[str, Any]]]:
    """Layers of equal facts in the same blocks (names up to the last number), in the order of the first of each."""
    groups: dict[Any, tuple[list[str], dict[str, Any]]] = {}
    for layer in layers:
        prefix = re.match(r"(?:.*\.)?\d+\.", layer["name"])
        block = re.sub(r"\d+", "#", prefix[0]) if prefix else layer["name"]
        key = (block, *(str(value) for name, value in layer.items() if name != "name"))
        groups.setdefault(key, ([], layer))[0].append(layer["name"])
    return list(groups.values())


def shared_name(names: Sequence[str]) -> str:
    """One text for the names of layers in numbered blocks: "encoder.layer.0-5: attention.self.query, attention.self.key"."""
    if len(names) == 1:
        return names[0]
    parts = [re.fullmatch(r"(.*?)(\d+)\.(.*)", name) for name in names]
    if not all(parts) or len({part[1] for part in parts if part}) > 1:
        return ", ".join(names)
    members: dict[str, list[int]] = {}
    for part in parts:
        assert part is not None
        members.setdefault(part[3], []).append(int(part[2]))
    by_numbers: dict[str, list[str]] = {}
    for member, numbers in members.items():
        by_numbers.setdefault(_ranges(numbers), []).append(member)
    start = parts[0][1] if parts[0] else ""
    return "; ".join(f"{start}{numbers}: {', '.join(found)}" for numbers, found in by_numbers.items())


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
