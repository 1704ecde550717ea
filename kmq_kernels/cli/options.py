"""What the commands of `kmq` share: choices, arguments and options, the console."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from click.core import ParameterSource
from rich.console import Console

console = Console(markup=False, emoji=False)  # what it prints is paths and names, in which [brackets] and :words: mean themselves


class Scheme(str, enum.Enum):
    """Clustering schemes."""

    kmeans = "kmeans"
    linear = "linear"


class Granularity(str, enum.Enum):
    """What shares a codebook."""

    tensor = "tensor"
    row = "row"
    group = "group"


class Allocation(str, enum.Enum):
    """How modules get their bits."""

    uniform = "uniform"
    distortion = "distortion"
    fisher = "fisher"
    hessian = "hessian"


class Weighting(str, enum.Enum):
    """What weighs the values in the clustering."""

    none = "none"
    fisher = "fisher"


class Compute(str, enum.Enum):
    """Arithmetic of packed linear layers."""

    float = "float"
    int8 = "int8"


class GradReduction(str, enum.Enum):
    """Gradient of a centroid."""

    sum = "sum"
    mean = "mean"


ModelArg = Annotated[str, typer.Argument(help=r"Model folder or hub id; 'minilm' is the one in the \[demo] extra.")]
OutOption = Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")]
TaskOption = Annotated[str | None, typer.Option("--task", help="banking77 or a GLUE name. [default: banking77]")]
DataDir = Annotated[Path | None, typer.Option(help="Folder with the GLUE task's own files.")]
TrainFile = Annotated[Path | None, typer.Option(help="Own training data: csv, tsv or jsonl.")]
ValidationFile = Annotated[Path | None, typer.Option(help="Own validation data: csv, tsv or jsonl.")]
TextColumn = Annotated[list[str] | None, typer.Option(help="Column of the text; twice for pairs. [default: text]")]
LabelColumn = Annotated[str, typer.Option(help="Column of the label.")]
Steps = Annotated[int, typer.Option(help="Optimizer steps of stage 1.")]
Batch = Annotated[int, typer.Option(help="Texts in a batch.")]
Rate = Annotated[float, typer.Option(help="Learning rate of stage 1.")]
MaxLength = Annotated[int, typer.Option(help="Tokens a text is cut to.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Those of the options of the running command that the caller gave: a preset may set the others."""
    context = click.get_current_context()
    return {name: value for name, value in values.items() if context.get_parameter_source(name) is not ParameterSource.DEFAULT}


def parse_bytes(name: str, text: str) -> int:
    """A size such as 500MB or 2GB, decimal; `name` is the option it was given for."""
    number = text.upper().removesuffix("B")
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    number = number[:-1] if unit > 1 else number
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"{name}: expected a size such as 500MB or 2GB, got {text!r}")
    return int(number) * unit
