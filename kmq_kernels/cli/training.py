"""`kmq run`, `kmq finetune` and `kmq evaluate`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

from .command import Command
from .layout import pairs as listed
from .messages import note, quieten
from .options import (
    DATA,
    KEPT_NEAR,
    MODEL,
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
    Compute,
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
    TaskOption,
    TeacherOption,
    TextColumn,
    TrainFile,
    ValidationFile,
    Verbose,
    Weighting,
    argument,
    number,
    option,
    refuse_both,
)
from .results import results_table, summary_table

TASK_FILE = "task.json"
FINETUNE_RATE = 3e-4
MOVING_RATE = 1e-4  # latent values learn four times as fast, and 1e-3 was too much for them


def _expect_folder(model: str) -> None:
    """A path that is not there, or offline any name, is refused before data is read and libraries are imported."""
    from ..files import looks_local, model_folder

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")  # as the hub's library reads it
    if looks_local(model) or (offline and model != "minilm"):
        model_folder(model)


def _load_task(name: str | None, classes: Any = None, **options: Any) -> Any:
    """The task that the options of a command describe; what is to be said about it is said."""
    from ..tasks import load_task

    columns, problem = options.pop("text_column"), options.pop("problem")
    task = load_task(
        name,
        text_columns=columns or ("text",),
        problem=None if problem is None else problem.value,
        ignore_labels=options.pop("ignore_label") or (),
        model_classes=classes,
        **options,
    )
    for sentence in task.notes:
        note(sentence)
    return task


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
    _expect_folder(model)
    tasks = [_load_task(name, **dict(data)) for name in (list(dict.fromkeys(task)) if task else [None])]

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


def finetune(
    model: ModelArg = "minilm",
    task: TaskOption = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    pairs: PairsFile = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "label",
    problem: ProblemOption = None,
    ignore_label: IgnoreLabel = None,
    max_length: MaxLength = 64,
    steps: Annotated[int, option(TRAINING, "N", "Optimizer steps.", check=number("steps", 1))] = 450,
    batch_size: Batch = 32,
    learning_rate: Annotated[
        float | None,
        option(
            TRAINING,
            "RATE",
            "Learning rate.",
            default="3e-4; 1e-4 where assignments move",
            check=number("learning_rate", 0.0, above=True),
        ),
    ] = None,
    codebook_lr_mult: Annotated[
        float,
        option(
            TRAINING,
            "FACTOR",
            "Codebooks of a quantized MODEL learn this many times faster.",
            check=number("codebook_lr_mult", 0.0, above=True),
        ),
    ] = 5.0,
    latent_lr_mult: LatentRate = 4.0,
    assignments: AssignmentsOption = None,
    teacher: TeacherOption = None,
    seed: Seed = 0,
    out: OutOption = Path("kmq-finetuned"),
    resume: Annotated[
        bool, option(OUTPUT, "", "Go on with a training that was stopped in the output folder.", "--resume")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune MODEL on a task; a quantized model stays quantized (that is stage 3).

    With --teacher it follows the model that it was made from; on the task texts, which has no labels, that is all it does. A
    training that was stopped goes on where its last checkpoint is, one a minute at most: give the same command with --resume.
    """
    from ..files import check_output

    check_output(out, resume)
    _expect_folder(model)
    if teacher is not None:
        _expect_folder(teacher)
    data = _load_task(
        task, data_dir=data_dir, train_file=train_file, validation_file=validation_file, pairs=pairs, text_column=text_column,
        label_column=label_column, problem=problem, ignore_label=ignore_label,
    )  # fmt: skip
    from .. import training

    quieten(verbose)
    settings = training.TrainingSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate or FINETUNE_RATE,
        codebook_lr_mult=codebook_lr_mult,
        latent_lr_mult=latent_lr_mult,
        max_length=max_length,
        seed=seed,
    )
    kind: Any = None if assignments is None else assignments.value
    slower = MOVING_RATE if learning_rate is None else None
    source, followed = training.resolve_model(model), None if teacher is None else training.resolve_model(teacher)
    metrics = training.finetune_folder(source, data, settings, out, followed, kind, slower, resume)
    _print_metrics(metrics, as_json)
    if not as_json:
        print(f"written: {out}")


def evaluate(
    model: Annotated[Path, argument("MODEL", "Folder of a fine-tuned model, quantized or not.")],
    task: TaskOption = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    validation_file: ValidationFile = None,
    pairs: PairsFile = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "label",
    problem: ProblemOption = None,
    ignore_label: IgnoreLabel = None,
    max_length: MaxLength = 64,
    teacher: TeacherOption = None,
    compute: Annotated[
        Compute | None,
        option(MODEL, "float|int8", "Run the packed encoder in one call of compiled code, with this arithmetic."),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """The task's metrics of a model folder.

    A folder of `kmq run` or `kmq finetune` knows its task. Own data needs a validation file only: its labels are the classes of
    the model. For texts, --teacher is what is measured against; in a folder of `kmq run` it is the model there.
    """
    import tempfile

    given = {"data_dir": data_dir, "train_file": train_file, "validation_file": validation_file, "pairs": pairs}
    if task is None and not any(given.values()):
        data = _task_of(model)
    else:
        classes = _classes_of(model) if validation_file is not None and train_file is None else None
        more = {"text_column": text_column, "label_column": label_column, "problem": problem, "ignore_label": ignore_label}
        data = _load_task(task, classes, **given, **more)
    from .. import hf, training
    from ..layers import optimize_

    quieten(verbose)
    settings = training.TrainingSettings(max_length=max_length)
    if isinstance(data, training.Texts):
        if compute is not None:
            raise ValueError("compute: embeddings are measured with the layers as they are; leave the option out")
        source = training.resolve_model(teacher) if teacher else _beside(model)
        _print_metrics(training.evaluate_embedder(str(model), data, source, settings), as_json)
        return
    tokenizer = training.load_tokenizer(str(model)) if model.is_dir() else None
    network = hf.load(model)
    if not hasattr(network.config, "id2label") or not type(network).__name__.endswith("ForSequenceClassification"):
        kind = type(network).__name__
        raise training.PipelineError(f"{model}: a {kind} has no classification layer; `kmq finetune` gives it one")
    if compute is not None:
        optimize_(network, compute.value)
    with tempfile.TemporaryDirectory() as scratch:
        metrics = training.evaluate(network, tokenizer, data, settings, Path(scratch))
    _print_metrics(metrics, as_json)


def _beside(model: Path) -> str:
    """The model in floating point of the run that a folder is of."""
    for folder in model.resolve().parents[:2]:
        if (folder / TASK_FILE).is_file() and (folder / "stage1").is_dir():
            return str(folder / "stage1")
    raise ValueError("teacher: embeddings are measured against the model in floating point; say which it is")


def _classes_of(model: Path) -> tuple[str, ...]:
    """The classes of a model by its config.json: one for a regression."""
    from ..files import CheckpointError, read_json
    from ..tasks import class_names

    if not (model / "config.json").is_file():
        raise CheckpointError(
            f"{model}: no such model folder" if not model.is_dir() else f"{model}: the folder has no config.json"
        )
    config = read_json(model / "config.json")
    named = config.get("id2label") if isinstance(config, dict) else None
    return class_names(named, len(named)) if isinstance(named, dict) and named else ("LABEL_0", "LABEL_1")


def _task_of(model: Path) -> Any:
    """The task that a folder was fine-tuned on, as `kmq run` and `kmq finetune` note it; else banking77."""
    from ..files import read_json
    from ..tasks import load_task

    for folder in (model, *model.resolve().parents[:2]):
        if (folder / TASK_FILE).is_file():
            source = read_json(folder / TASK_FILE)
            if isinstance(source, dict):
                note(f"task: {source.get('name') or source.get('validation_file')}, as {folder / TASK_FILE} says")
                return load_task(**source)
    note("task: banking77, for no other is named and the folder does not say")
    return load_task()


def _print_metrics(metrics: dict[str, float], as_json: bool) -> None:
    print(json.dumps(metrics) if as_json else listed((name, f"{value:.4f}") for name, value in metrics.items()))
