"""`kmq run`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

from .command import Command
from .messages import quieten
from .options import (
    DATA,
    KEPT_NEAR,
    OUTPUT,
    PRESETS,
    QUANTIZATION,
    TASKS,
    TRAINING,
    Allocation,
    AsJson,
    AssignmentsOption,
    Batch,
    BitsPerWeight,
    DataDir,
    GradReduction,
    Granularity,
    GranularityOption,
    GroupRows,
    IgnoreLabel,
    LabelColumn,
    LatentRate,
    MaxLength,
    ModelArg,
    Objective,
    OutlierFraction,
    OutOption,
    PairsFile,
    ProblemOption,
    Rate,
    RowScale,
    Scheme,
    Seed,
    SizeOption,
    Steps,
    TextColumn,
    TrainFile,
    ValidationFile,
    Verbose,
    Weighting,
    number,
    option,
    refuse_both,
)
from .results import results_table, summary_table
from .training import expect_folder, load_given_task


def run(
    model: ModelArg = "minilm",
    task: Annotated[
        list[str] | None,
        option(
            DATA,
            "TASK",
            f"{TASKS}; may be repeated.",
            default="banking77",
        ),
    ] = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    pairs: PairsFile = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "label",
    problem: ProblemOption = None,
    ignore_label: IgnoreLabel = None,
    max_length: MaxLength = 64,
    bits: Annotated[
        list[int] | None,
        option(QUANTIZATION, "N", "Bits of an index, 1 to 8; may be repeated.", default="4", check=number("bits", 1, 8)),
    ] = None,
    scheme: Annotated[
        list[Scheme] | None,
        option(
            QUANTIZATION, "kmeans|linear", "Clusters of least error, or bins of equal width; may be repeated.", default="kmeans"
        ),
    ] = None,
    granularity: GranularityOption = Granularity.tensor,
    group_rows: GroupRows = 8,
    preset: Annotated[
        str | None,
        option(
            QUANTIZATION,
            "NAME",
            f"A published system: {PRESETS} or hessian (linear, more bits for larger eigenvalues).",
        ),
    ] = None,
    grad_reduction: Annotated[
        GradReduction | None,
        option(QUANTIZATION, "sum|mean", "Gradient of a centroid from those of its members.", default="sum"),
    ] = None,
    allocation: Annotated[
        Allocation | None,
        option(
            QUANTIZATION,
            "uniform|distortion|fisher|hessian",
            "How modules get their bits: the same for all; least squared error;"
            " least error weighted by the Fisher diagonal; by Hessian eigenvalue.",
            default="uniform",
        ),
    ] = None,
    bits_per_weight: BitsPerWeight = None,
    size: SizeOption = None,
    weighting: Annotated[
        Weighting,
        option(QUANTIZATION, "none|fisher", "What weighs the values in the clustering: nothing, or the Fisher diagonal."),
    ] = Weighting.none,
    objective: Annotated[
        Objective,
        option(QUANTIZATION, "weights|output", KEPT_NEAR, default="weights; output where assignments move and for texts"),
    ] = Objective.weights,
    outlier_fraction: OutlierFraction = 0.0,
    row_scale: RowScale = False,
    fisher_batches: Annotated[
        int, option(QUANTIZATION, "N", "Batches of 4 texts for the Fisher diagonal.", check=number("fisher_batches", 1))
    ] = 400,
    hessian_batches: Annotated[
        int, option(QUANTIZATION, "N", "Batches of 8 texts for the Hessian eigenvalues.", check=number("hessian_batches", 1))
    ] = 2,
    compare: Annotated[
        str | None,
        option(QUANTIZATION, "FILE|standard", "A list of configurations instead: a JSON file, or 'standard'."),
    ] = None,
    steps: Steps = 450,
    second_steps: Annotated[
        int,
        option(
            TRAINING,
            "N",
            "Optimizer steps of stage 3 with fixed assignments, and of the control.",
            default="30; 300 for the task texts",
            check=number("second_steps", 1),
        ),
    ] = 30,
    batch_size: Batch = 32,
    learning_rate: Rate = 3e-4,
    second_learning_rate: Annotated[
        float,
        option(
            TRAINING,
            "RATE",
            "Learning rate of stage 3 and of the control.",
            check=number("second_learning_rate", 0.0, above=True),
        ),
    ] = 1e-4,
    codebook_lr_mult: Annotated[
        float,
        option(
            TRAINING,
            "FACTOR",
            "Codebooks learn this many times faster in stage 3.",
            check=number("codebook_lr_mult", 0.0, above=True),
        ),
    ] = 5.0,
    latent_lr_mult: LatentRate = 4.0,
    assignments: AssignmentsOption = None,
    moving_steps: Annotated[
        int | None,
        option(
            TRAINING,
            "N",
            "Optimizer steps of stage 3 with moving assignments.",
            default="--second-steps where it is given, else 300",
            check=number("moving_steps", 1),
        ),
    ] = None,
    distill: Annotated[
        bool | None, option(TRAINING, "", "Stage 3 also follows the stage-1 model.", default="on where assignments move")
    ] = None,
    control: Annotated[bool, option(TRAINING, "", "Also fine-tune the fp32 model for the steps of stage 3.")] = True,
    seed: Seed = 0,
    seeds: Annotated[
        int, option(TRAINING, "N", "Repeat everything with so many seeds, from --seed on.", check=number("seeds", 1))
    ] = 1,
    out: OutOption = Path("kmq-run"),
    keep_models: Annotated[
        bool | None, option(OUTPUT, "", "Keep the weights.", default="on; off with --compare or --seeds")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune, cluster, fine-tune again: a table and OUTPUT/results.json.

    The same command again resumes, and further configurations may be added to a folder.
    """
    if compare is None:
        refuse_both(bits, size, bits_per_weight)
    data = {
        "data_dir": data_dir, "train_file": train_file, "validation_file": validation_file, "pairs": pairs,
        "text_column": text_column, "label_column": label_column, "problem": problem, "ignore_label": ignore_label,
    }  # fmt: skip
    expect_folder(model)
    tasks = [load_given_task(name, **dict(data)) for name in (list(dict.fromkeys(task)) if task else [None])]

    from .. import report as reports
    from .. import training
    from ..files import parse_size
    from ..tasks import Texts

    quieten(verbose)
    given_steps = Command.given({"second_steps": second_steps}).get("second_steps")
    if given_steps is None and all(isinstance(each, Texts) for each in tasks):
        second_steps = training.MOVING_STEPS
    moving_steps = moving_steps or given_steps or training.MOVING_STEPS
    options: dict[str, Any] = {
        "granularity": granularity.value,
        "group_rows": group_rows,
        "preset": preset,
        "bits_per_weight": bits_per_weight,
        "size": None if size is None else parse_size("size", size),
        "weighting": weighting.value,
        "objective": objective.value,
        "outlier_fraction": outlier_fraction,
        "row_scale": row_scale,
    }
    options |= {} if grad_reduction is None else {"grad_reduction": grad_reduction.value}
    options |= {} if allocation is None else {"allocation": allocation.value}
    if compare is None:
        # What is not given is left to the preset.
        kinds: list[dict[str, Any]] = [{"scheme": kind.value} for kind in scheme or []] or [{}]
        widths: list[dict[str, Any]] = [{"bits": each} for each in bits or []] or [{}]
        own = Command.given(options)
        asked = None if assignments is None else assignments.value
        texts = all(isinstance(each, Texts) for each in tasks)
        given = [{**kind, **each, **own} for kind in kinds for each in widths]
        variants = [_variant(fields, asked, texts, moving_steps, distill) for fields in given]
    else:
        beside = {**options, "scheme": scheme, "grad_reduction": grad_reduction, "allocation": allocation}
        standard = compare == "standard"
        beside |= {"assignments": assignments, "distill": distill} | ({} if standard else {"bits": bits})
        if name := next(iter(Command.given(beside)), None):
            raise training.PipelineError(f"{name}: every entry of a list has its own; leave it out, or --compare")
        entries = training.standard_variants(bits or (1, 2, 3, 4, 8)) if standard else training.read_variants(Path(compare))
        variants = [
            dataclasses.replace(entry, steps=moving_steps) if entry.assignments == "moving" and entry.steps is None else entry
            for entry in entries
        ]
    _refuse_unused(variants, tasks, granularity, preset, distill)
    names = [variant.name for variant in variants]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise training.PipelineError(f"{doubled}: asked for twice")
    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "max_length": max_length,
        "codebook_lr_mult": codebook_lr_mult,
        "latent_lr_mult": latent_lr_mult,
    }
    lines = sys.stderr if as_json else sys.stdout
    comparison = training.Comparison(
        model=model,
        tasks=tasks,
        out=out,
        variants=variants,
        seeds=range(seed, seed + seeds),
        stage1=training.TrainingSettings(steps=steps, learning_rate=learning_rate, **shared),
        stage3=training.TrainingSettings(steps=second_steps, learning_rate=second_learning_rate, **shared),
        command=["kmq", *sys.argv[1:]],
        announce=lambda text: print(text, file=lines, flush=True),
        sensitivity=training.SensitivitySettings(fisher_batches=fisher_batches, hessian_batches=hessian_batches),
        control=control,
    )
    if compare is None and seeds == 1 and len(tasks) == 1:
        single = comparison.run_of(tasks[0], seed, out)
        single.keep_models = keep_models is not False
        results = single()
        found = reports.collect(out)
        text = "\n\n".join([results_table(results), *map(summary_table, filter(None, reports.quality(found)))])
        written = out / "results.json"
        content: Any = results
        everything = [results]
    else:
        comparison.keep_models = keep_models is True
        content = everything = comparison()
        found = reports.collect(out)
        text = "\n\n".join(map(summary_table, [*reports.summaries(found), *filter(None, reports.quality(found))]))
        written = reports.write_report(out)
    print(json.dumps(content) if as_json else f"\n{text}\n\nwritten: {written}")
    if sentences := [sentence for results in everything for sentence in training.stopped_stages(results)]:
        raise training.DivergedError("; ".join(sentences))  # after all else is done and written


def _refuse_unused(variants: Any, tasks: Any, granularity: Granularity, preset: str | None, distill: bool | None) -> None:
    """Raises PipelineError for options of `run` that were given and would do nothing."""
    from .. import training
    from ..tasks import Texts

    def given(*names: str) -> str | None:
        return next(iter(Command.given(dict.fromkeys(names))), None)

    still = all(variant.assignments == "fixed" for variant in variants)
    if still and (name := given("moving_steps", "latent_lr_mult")):
        raise training.PipelineError(f"{name}: no assignments move here; --assignments moving lets them")
    if granularity != Granularity.group and preset is None and (name := given("group_rows")):
        raise training.PipelineError(f"{name}: it is for --granularity group, got {granularity.value}")
    if all(isinstance(task, Texts) for task in tasks):
        if name := given("steps", "learning_rate"):
            raise training.PipelineError(
                f"{name}: it is for stage 1, which the task texts does not have; --second-steps is for stage 3"
            )
        if name := given("label_column"):
            raise training.PipelineError(f"{name}: the task texts has no labels")
        if distill is False:
            raise training.PipelineError("distill: to follow the model itself is all that the task texts has to learn")


def _name(config: Any) -> str:
    """The folder of a configuration of `run`: what tells it from the others that one command can ask for."""
    name = f"{config.preset or config.scheme}-{config.bits}bit"
    if config.has_budget:
        budget = f"-{config.bits_per_weight:g}bpw" if config.bits_per_weight else f"-{config.size}bytes" if config.size else ""
        name = f"{config.preset or config.scheme}-{config.allocation}{budget or f'-{config.bits}bit'}"
    if config.objective == "output":
        name += "-output"
    return name


def _variant(fields: dict[str, Any], asked: Any, texts: bool, moving_steps: int, distill: bool | None) -> Any:
    """A configuration of `run` with its stage 3; k-means without Fisher weights, which would say little then, is against outputs
    where assignments move and for texts.

    fields: of KMQConfig, what was given, which stays; asked: what is done with the indices, None for what suits the bits.
    """
    from .. import training
    from ..quantization import KMQConfig

    config = KMQConfig(**fields)
    kind = asked or training.default_assignments(config)
    moves = kind == "moving"
    free = config.scheme == "kmeans" and config.preset is None and config.weighting == "none"
    if (moves or texts) and free and "objective" not in fields:
        config = KMQConfig(**fields, objective="output")
    return training.Variant(
        f"{_name(config)}-moving" if asked == "moving" else _name(config),
        config,
        distill=moves if distill is None else distill,
        assignments=kind,
        steps=moving_steps if moves else None,
    )
