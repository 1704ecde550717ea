"""What the commands of `kmq` share: choices, arguments and options, in the groups of their help pages."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

MODEL, DATA, QUANTIZATION, TRAINING, OUTPUT = "Model", "Data", "Quantization", "Training", "Output"
MEASUREMENT = "Measurement"


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


class Objective(str, enum.Enum):
    """What clustering minimises the error of."""

    weights = "weights"
    output = "output"


class Compute(str, enum.Enum):
    """Arithmetic of packed linear layers."""

    float = "float"
    int8 = "int8"


class Assignments(str, enum.Enum):
    """What stage 3 does with the indices."""

    fixed = "fixed"
    moving = "moving"


class GradReduction(str, enum.Enum):
    """Gradient of a centroid."""

    sum = "sum"
    mean = "mean"


class Problem(str, enum.Enum):
    """What the labels of own files are."""

    classification = "classification"
    regression = "regression"


Check = Callable[[Any], Any]


def option(group: str, metavar: str, sentence: str, *names: str, default: str | None = None, check: Check | None = None) -> Any:
    """An option of a group. default: what to show as default where the value does not say it. check: raises for a wrong value."""
    shown: Any = True if default is None else default
    return typer.Option(*names, help=sentence, metavar=metavar, rich_help_panel=group, show_default=shown, callback=check)


def argument(metavar: str, sentence: str) -> Any:
    """What a command works on."""
    return typer.Argument(metavar=metavar, help=sentence, rich_help_panel=MODEL)


def size_of(name: str) -> Check:
    """A check of a number of bytes."""

    def check(value: Any) -> Any:
        from ..files import parse_size

        if value is not None:
            parse_size(name, value)
        return value

    return check


def number(name: str, least: float, most: float | None = None, *, above: bool = False, below: bool = False) -> Check:
    """A check that needs nothing imported: a number, or each of several, not below `least` (or above it) nor above `most` (or
    below it).

    The sentences are those of KMQConfig and TrainingSettings, which check again.
    """
    kind = "an integer" if isinstance(least, int) else "a number"
    low = f"above {least:g}" if above else f"not below {least:g}"
    expected = f"{kind} {low}" if most is None else f"{kind} from {least:g} to {'below ' if below else ''}{most:g}"
    if isinstance(least, int) and most is None:
        expected = f"at least {least}"

    def check(value: Any) -> Any:
        for each in value if isinstance(value, (list, tuple)) else [value]:
            low_enough = each is None or most is None or (each < most if below else each <= most)
            if not low_enough or not (each is None or (each > least if above else each >= least)):
                raise ValueError(f"{name}: expected {expected}, got {each}")
        return value

    return check


def refuse_both(bits: Any, size: str | None, bits_per_weight: float | None) -> None:
    """Raises ValueError where bits are given beside a budget, which finds them."""
    if bits and (size or bits_per_weight):
        budget = f"--size {size}" if size else f"--bits-per-weight {bits_per_weight:g}"
        raise ValueError(f"bits: {budget} finds the bits that fit it; give one of the two")


ModelArg = Annotated[str, argument("MODEL", "Model folder or hub id; 'minilm' is the model in the [demo] extra.")]
OutOption = Annotated[Path, option(OUTPUT, "DIR", "Folder to write.", "-o", "--output")]
AsJson = Annotated[bool, option(OUTPUT, "", "Print JSON on standard output, and everything else on standard error.", "--json")]
Verbose = Annotated[bool, option(OUTPUT, "", "Also show what the libraries say: load reports, warnings.", "-v", "--verbose")]

TASKS = (
    "banking77 (ships with the package), with --data-dir one of sst2, cola, mrpc, rte, stsb, wnli, qnli, qqp, mnli, or texts: an"
    " embedder on a --train-file without labels"
)
TaskOption = Annotated[str | None, option(DATA, "TASK", f"{TASKS}.", "--task", default="banking77")]
DataDir = Annotated[Path | None, option(DATA, "DIR", "Folder of the GLUE task's own files, or of GLUE's folders.")]
TrainFile = Annotated[
    Path | None, option(DATA, "FILE", "Own training data: csv, tsv or jsonl; for texts also txt, a text a line.")
]
ValidationFile = Annotated[
    Path | None, option(DATA, "FILE", "Own validation data, likewise; for texts by default a tenth of the training data.")
]
PairsFile = Annotated[
    Path | None,
    option(DATA, "FILE", "For texts: scored pairs, csv, tsv or jsonl with columns sentence1, sentence2 and score.", "--pairs"),
]
TextColumn = Annotated[
    list[str] | None, option(DATA, "NAME", "Column of the text in own files; twice for pairs.", default="text")
]
LabelColumn = Annotated[str, option(DATA, "NAME", "Column of the label in own files.")]
ProblemOption = Annotated[
    Problem | None,
    option(
        DATA, "classification|regression", "What the labels of own files are.",
        default="regression where a label has a fraction, else classification",
    ),
]  # fmt: skip
IgnoreLabel = Annotated[list[str] | None, option(DATA, "LABEL", "Leave rows of own files with this label out; may be repeated.")]
MaxLength = Annotated[
    int, option(DATA, "N", "Tokens a text is cut to; at most the positions of the model.", check=number("max_length", 1))
]

SchemeOption = Annotated[Scheme, option(QUANTIZATION, "kmeans|linear", "Clusters of least error, or bins of equal width.")]
GranularityOption = Annotated[
    Granularity, option(QUANTIZATION, "tensor|row|group", "What shares a codebook: a weight, a row, or a group of rows.")
]
GroupRows = Annotated[int, option(QUANTIZATION, "N", "Rows of a group, for granularity 'group'.", check=number("group_rows", 1))]
BitsPerWeight = Annotated[
    float | None,
    option(
        QUANTIZATION, "BITS", "Budget instead of --bits: bits per weight of the whole model.",
        check=number("bits_per_weight", 0.0, above=True),
    ),
]  # fmt: skip
SizeOption = Annotated[
    str | None,
    option(
        QUANTIZATION, "SIZE", "Budget instead of --bits: bytes of the weight file, such as 30MB, 25MiB or 30_000_000.",
        check=size_of("size"),
    ),
]  # fmt: skip
OutlierFraction = Annotated[
    float,
    option(
        QUANTIZATION, "SHARE", "Share of each weight, from 0 to below 0.5, that is kept exactly.",
        check=number("outlier_fraction", 0.0, 0.5, below=True),
    ),
]  # fmt: skip
RowScale = Annotated[bool, option(QUANTIZATION, "", "A factor for each row beside the shared codebook.")]
KEPT_NEAR = "What clustering keeps near: the weights, or what the layers give for texts without labels."
ObjectiveOption = Annotated[Objective, option(QUANTIZATION, "weights|output", KEPT_NEAR)]
PRESETS = (
    "paper (the method as it was published: k-means++, 3 Lloyd steps, mean gradients), linear (bins of equal width), int8 (linear"
    " at 8 bits)"
)

Steps = Annotated[int, option(TRAINING, "N", "Optimizer steps of stage 1.", check=number("steps", 1))]
Batch = Annotated[int, option(TRAINING, "N", "Texts in a batch.", check=number("batch_size", 1))]
Rate = Annotated[float, option(TRAINING, "RATE", "Learning rate of stage 1.", check=number("learning_rate", 0.0, above=True))]
LatentRate = Annotated[
    float,
    option(
        TRAINING, "FACTOR", "Latent weights learn this many times faster than biases and norms.",
        check=number("latent_lr_mult", 0.0, above=True),
    ),
]  # fmt: skip
AssignmentsOption = Annotated[
    Assignments | None,
    option(
        TRAINING, "fixed|moving", "Indices in stage 3: kept, or nearest to latent weights that train, at every step.",
        default="moving at 1 and 2 bits, but in a preset or a budget; else fixed",
    ),
]  # fmt: skip
TeacherOption = Annotated[
    str | None,
    option(TRAINING, "MODEL", "The model in floating point that MODEL was made from: stage 3 follows it.", "--teacher"),
]
Seed = Annotated[int, option(TRAINING, "N", "Seed of everything random.")]
