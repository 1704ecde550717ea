"""`kmq inspect` and `kmq report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .options import (
    console,
)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of `kmq run`, with or without --compare.")],
    out: Annotated[Path | None, typer.Option("-o", "--output", help="File to write. [default: FOLDER/report.html]")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown instead.")] = False,
) -> None:
    """One self-contained HTML page of what was run: accuracy against size, bits and distortion, weights, training, conditions."""
    from .. import report as reports

    if markdown:
        print("\n".join(reports.markdown(summary) for summary in reports.summaries(reports.collect(folder))))
        return
    console.print(f"written: {reports.write_report(folder, out)}", soft_wrap=True)


def inspect(
    model: Annotated[Path | None, typer.Argument(help="Model folder; without it, only the build is shown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a model folder is made of: bits, codebooks and bytes of every layer; and which implementation each op has here."""
    from .. import hf, ops
    from ..layers import CodebookModule
    from ..quantization import model_size

    content: dict[str, Any] = {"build": ops.build_info()}
    if model is not None:
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
        table = Table("layer", "kind", "shape", "bits", "codebooks", "bytes", title=str(model))
        for layer in content["model"]["layers"]:
            shape = "x".join(map(str, layer["shape"]))
            table.add_row(layer["name"], layer["kind"], shape, str(layer["bits"]), str(layer["codebooks"]), f"{layer['bytes']:,}")
        console.print(table)
        left = (content["model"]["config"] or {"skip": ["every layer"]})["skip"]
        console.print(f"left in floating point: {', '.join(left) or 'no layer'}")
        figures = f"{size.weights:,} weights, {size.total_bytes:,} bytes, {size.bits_per_weight:.3f} bits per weight"
        console.print(f"{figures}, {size.ratio:.2f}x smaller")
    build = content["build"]
    table = Table("op", "cpu", "cuda", title=f"kmq_kernels {build['version']}, torch {build['torch']}")
    for name, where in build["ops"].items():
        table.add_row(name, where["cpu"], where["cuda"])
    console.print(table)
    console.print(f"extension: {build['extension']}")
