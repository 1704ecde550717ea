"""`kmq run`, `kmq finetune` and `kmq evaluate`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .options import (
    Allocation,
    Batch,
    Compute,
    DataDir,
    GradReduction,
    Granularity,
    LabelColumn,
    MaxLength,
    ModelArg,
    OutOption,
    Rate,
    Scheme,
    Seed,
    Steps,
    TaskOption,
    TextColumn,
    TrainFile,
    ValidationFile,
    Weighting,
    console,
    given,
    parse_bytes,
)


def _task(
    name: str | None, data_dir: Path | None, train: Path | None, validation: Path | None, text: list[str] | None, label: str
) -> Any:
    from ..training import load_task

    files = {"train_file": train, "validation_file": validation}
    return load_task(
        name or (None if train else "banking77"), data_dir=data_dir, **files, text_columns=text or ("text",), label_column=label
    )


def run(
    model: ModelArg = "minilm",
    out: OutOption = Path("kmq-run"),
    task: Annotated[list[str] | None, typer.Option(help="banking77 or GLUE names; may be repeated. [default: banking77]")] = None,
    bits: Annotated[list[int] | None, typer.Option(help="Bits of an index, 1 to 8; may be repeated. [default: 4]")] = None,
    scheme: Annotated[list[Scheme] | None, typer.Option(help="May be given several times. [default: kmeans]")] = None,
    granularity: Granularity = Granularity.tensor,
    group_rows: Annotated[int, typer.Option(help="Rows of a group.")] = 8,
    preset: Annotated[str | None, typer.Option(help="A system of the source: paper, linear, int8 or hessian.")] = None,
    grad_reduction: Annotated[GradReduction | None, typer.Option(help="Gradient of a centroid. [default: sum]")] = None,
    allocation: Annotated[Allocation | None, typer.Option(help="How modules get their bits. [default: uniform]")] = None,
    bits_per_weight: Annotated[float | None, typer.Option(help="Budget: bits per weight of the whole model.")] = None,
    size: Annotated[str | None, typer.Option(help="Budget: bytes of the weight file, such as 30MB.")] = None,
    weighting: Annotated[Weighting, typer.Option(help="What weighs the values in the clustering.")] = Weighting.none,
    outlier_fraction: Annotated[float, typer.Option(help="Share of each weight that is kept exactly.")] = 0.0,
    row_scale: Annotated[bool, typer.Option(help="A factor for each row beside the shared codebook.")] = False,
    distill: Annotated[bool, typer.Option(help="Stage 3 also follows the stage-1 model.")] = False,
    compare: Annotated[str | None, typer.Option(help="List of configurations: a JSON file, or 'standard'.")] = None,
    seeds: Annotated[int, typer.Option(help="Repeat everything with so many seeds, from --seed on.", min=1)] = 1,
    steps: Steps = 450,
    second_steps: Annotated[int, typer.Option(help="Optimizer steps of stage 3 and of the control.")] = 30,
    batch_size: Batch = 32,
    learning_rate: Rate = 3e-4,
    second_learning_rate: Annotated[float, typer.Option(help="Learning rate of stage 3 and of the control.")] = 1e-4,
    codebook_lr_mult: Annotated[float, typer.Option(help="Codebooks learn this many times faster in stage 3.")] = 5.0,
    max_length: MaxLength = 64,
    seed: Seed = 0,
    control: Annotated[bool, typer.Option(help="Also fine-tune the fp32 model for the steps of stage 3.")] = True,
    fisher_batches: Annotated[int, typer.Option(help="Batches of 4 texts for the Fisher diagonal.", min=1)] = 400,
    hessian_batches: Annotated[int, typer.Option(help="Batches of 8 texts for the Hessian eigenvalues.", min=1)] = 2,
    keep_models: Annotated[bool | None, typer.Option(help="Keep the weights. [default: not with --compare or --seeds]")] = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "label",
) -> None:
    """Fine-tune, cluster, fine-tune again: a table and OUTPUT/results.json. The same command again resumes."""
    from .. import report as reports
    from ..quantization import KMQConfig
    from ..training import (
        Comparison,
        PipelineError,
        SensitivitySettings,
        TrainingSettings,
        Variant,
        read_variants,
        standard_variants,
    )

    options: dict[str, Any] = {
        "granularity": granularity.value,
        "group_rows": group_rows,
        "preset": preset,
        "bits_per_weight": bits_per_weight,
        "size": None if size is None else parse_bytes("size", size),
        "weighting": weighting.value,
        "outlier_fraction": outlier_fraction,
        "row_scale": row_scale,
    }
    options |= {} if grad_reduction is None else {"grad_reduction": grad_reduction.value}
    options |= {} if allocation is None else {"allocation": allocation.value}
    if compare is None:
        # What is not given is left to the preset.
        kinds: list[dict[str, Any]] = [{"scheme": kind.value} for kind in scheme or []] or [{}]
        widths: list[dict[str, Any]] = [{"bits": width} for width in bits or []] or [{}]
        configs = [KMQConfig(**kind, **width, **given(options)) for kind in kinds for width in widths]
        variants = [Variant(_name(config), config, distill=distill) for config in configs]
    elif compare == "standard":
        variants = standard_variants(bits or (1, 2, 3, 4, 8))
    else:
        variants = read_variants(Path(compare))
    names = [variant.name for variant in variants]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise PipelineError(f"{doubled}: asked for twice")
    lengths = {"batch_size": batch_size, "max_length": max_length}
    shared: dict[str, Any] = {**lengths, "codebook_lr_mult": codebook_lr_mult}
    comparison = Comparison(
        model=model,
        tasks=[
            _task(name, data_dir, train_file, validation_file, text_column, label_column)
            for name in (list(dict.fromkeys(task)) if task else [None])
        ],
        out=out,
        variants=variants,
        seeds=range(seed, seed + seeds),
        stage1=TrainingSettings(steps=steps, learning_rate=learning_rate, **shared),
        stage3=TrainingSettings(steps=second_steps, learning_rate=second_learning_rate, **shared),
        command=["kmq", *sys.argv[1:]],
        announce=lambda text: console.print(text, style="bold"),
        sensitivity=SensitivitySettings(fisher_batches=fisher_batches, hessian_batches=hessian_batches),
        control=control,
    )
    if compare is None and seeds == 1 and len(comparison.tasks) == 1:
        single = comparison.run_of(comparison.tasks[0], seed, out)
        single.keep_models = keep_models is not False
        results = single()
        console.print(results_table(results))
        console.print(f"written: {out / 'results.json'}", soft_wrap=True)
        _refuse_stopped([results])
        return
    comparison.keep_models = keep_models is True
    everything = comparison()
    for table in reports.summaries(reports.collect(out)):
        console.print(_summary_table(table))
    console.print(f"written: {reports.write_report(out)}", soft_wrap=True)
    _refuse_stopped(everything)


def _refuse_stopped(everything: list[dict[str, Any]]) -> None:
    """Ends in an error where a stage diverged, after all else is done and written."""
    from ..training import DivergedError, stopped_stages

    if sentences := [sentence for results in everything for sentence in stopped_stages(results)]:
        raise DivergedError("; ".join(sentences))


def _name(config: Any) -> str:
    """The folder of a configuration of `run`: what tells it from the others that one command can ask for."""
    name = f"{config.preset or config.scheme}-{config.bits}bit"
    if config.has_budget:
        budget = f"-{config.bits_per_weight:g}bpw" if config.bits_per_weight else f"-{config.size}bytes" if config.size else ""
        name = f"{config.preset or config.scheme}-{config.allocation}{budget or f'-{config.bits}bit'}"
    return name


def _summary_table(summary: Any) -> Table:
    """The table of a comparison, as much of it as fits 80 columns: mean and standard error over the seeds, and size."""
    shown = [0, 1, 2, 3, 4]
    table = Table(title=summary.title)
    for column in shown:
        table.add_column(summary.columns[column], justify="left" if column == 0 else "right", no_wrap=True)
    for row in summary.rows:
        table.add_row(*(row[column] for column in shown))
    return table


def results_table(results: dict[str, Any]) -> Table:
    """The table of a run: one row a model; bits per weight, MB on disk, times smaller than fp32, seconds of stages 2 and 3."""
    metric = results["metric"]
    table = Table(title=f"{results['request']['model']} on {results['request']['task']}: {metric}")
    table.add_column("model", no_wrap=True)
    for column in ("stage 2", "stage 3", "bits/w", "MB", "ratio", "s 2", "s 3"):
        table.add_column(column, justify="right", no_wrap=True)

    def size(facts: dict[str, Any]) -> tuple[str, ...]:
        return f"{facts['bits_per_weight']:.2f}", f"{facts['bytes_on_disk'] / 1e6:.2f}", f"{facts['ratio']:.2f}x"

    def value(facts: dict[str, Any]) -> str:
        if facts is not None and "stopped" in facts:
            return "diverged"
        return "" if facts is None else f"{facts['metrics'][metric]:.4f}"

    first, control = results["stage1"], results["control"]
    table.add_row(f"fp32 ({first['seconds']:.0f} s)", value(first), "", *size(first), "", "")
    if control is not None:
        last = first if "stopped" in control else control
        table.add_row("fp32, control", "", value(control), *size(last), "", f"{control['seconds']:.0f}")
    for name, stages in results["quantized"].items():
        second, third = stages["stage2"], stages["stage3"]
        table.add_row(
            name, value(second), value(third), *size(second if third is None or "stopped" in third else third),
            f"{second['seconds']:.1f}",
            "" if third is None else f"{third['seconds']:.0f}",
        )  # fmt: skip
    return table


def finetune(
    model: ModelArg = "minilm",
    out: OutOption = Path("kmq-finetuned"),
    task: TaskOption = None,
    steps: Steps = 450,
    batch_size: Batch = 32,
    learning_rate: Rate = 3e-4,
    codebook_lr_mult: Annotated[float, typer.Option(help="Codebooks of a quantized MODEL learn this many times faster.")] = 5.0,
    max_length: MaxLength = 64,
    seed: Seed = 0,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "label",
) -> None:
    """Fine-tune MODEL on a task; a quantized model keeps its quantization (that is stage 3)."""
    from .. import training
    from ..files import publish

    if out.exists():
        raise training.PipelineError(f"{out}: it exists; choose another folder or remove it")
    settings = training.TrainingSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        codebook_lr_mult=codebook_lr_mult,
        max_length=max_length,
        seed=seed,
    )
    data = _task(task, data_dir, train_file, validation_file, text_column, label_column)
    network, tokenizer = training.load_for_task(training.resolve_model(model), data, seed)
    with publish(out) as partial:
        scratch = partial / "trainer"
        training.finetune(network, tokenizer, data, settings, scratch)
        metrics = training.evaluate(network, tokenizer, data, settings, scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        training.save(network, tokenizer, partial)
    _print_metrics(metrics)
    console.print(f"written: {out}", soft_wrap=True)


def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a fine-tuned model, quantized or not.")],
    task: TaskOption = None,
    max_length: MaxLength = 64,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "label",
    compute: Annotated[Compute | None, typer.Option(help="Run the packed encoder in one call of compiled code, so.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The task's metrics of a model folder."""
    import tempfile

    from transformers import AutoTokenizer

    from .. import hf, training
    from ..layers import optimize_

    data = _task(task, data_dir, train_file, validation_file, text_column, label_column)
    network = hf.load(model)
    if network.config.num_labels != data.num_labels:
        raise training.PipelineError(f"{model}: it has {network.config.num_labels} labels, the task has {data.num_labels}")
    if compute is not None:
        optimize_(network, compute.value)
    settings = training.TrainingSettings(max_length=max_length)
    with tempfile.TemporaryDirectory() as scratch:
        metrics = training.evaluate(network, AutoTokenizer.from_pretrained(model), data, settings, Path(scratch))
    if as_json:
        print(json.dumps(metrics))
    else:
        _print_metrics(metrics)


def _print_metrics(metrics: dict[str, float]) -> None:
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
