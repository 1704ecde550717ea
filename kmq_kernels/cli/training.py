"""`kmq finetune` and `kmq evaluate`, and the task and model that they and `kmq run` are given."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from .layout import pairs as listed
from .messages import note, quieten
from .options import (
    MODEL,
    OUTPUT,
    TRAINING,
    AsJson,
    AssignmentsOption,
    Batch,
    Compute,
    DataDir,
    IgnoreLabel,
    LabelColumn,
    LatentRate,
    MaxLength,
    ModelArg,
    OutOption,
    PairsFile,
    ProblemOption,
    Seed,
    TaskOption,
    TeacherOption,
    TextColumn,
    TrainFile,
    ValidationFile,
    Verbose,
    argument,
    number,
    option,
)

TASK_FILE = "task.json"
FINETUNE_RATE = 3e-4
MOVING_RATE = 1e-4  # latent values learn four times as fast, and 1e-3 was too much for them


def expect_folder(model: str) -> None:
    """A path that is not there, or offline any name, is refused before data is read and libraries are imported."""
    from ..files import looks_local, model_folder

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")  # as the hub's library reads it
    if looks_local(model) or (offline and model != "minilm"):
        model_folder(model)


def load_given_task(name: str | None, classes: Any = None, **options: Any) -> Any:
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
    expect_folder(model)
    if teacher is not None:
        expect_folder(teacher)
    data = load_given_task(
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
        data = load_given_task(task, classes, **given, **more)
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
