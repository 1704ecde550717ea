"""One model trained or measured by itself: `kmq finetune` and `kmq evaluate`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..files import FINISHED, check_output, find_source, publish, unfinished, write_json
from ..hf import load
from ..quantization import KMQConfig
from ..tasks import Task, Texts, class_names
from .checkpoints import last_checkpoint
from .embedders import EmbeddingMetrics, EmbeddingTeacher, load_embedder, pooling_of
from .finetune import distil, evaluate, finetune
from .identity import difference, model_digests, task_facts
from .models import load_for_task, load_tokenizer, quality_of, save
from .moving import default_assignments, matching_weights
from .settings import Assignments, DivergedError, PipelineError, TrainingSettings

TASK_FILE = "task.json"
_METRICS = "metrics.json"


def finetune_folder(
    model: str,
    task: Task | Texts,
    settings: TrainingSettings,
    out: Path,
    teacher: str | None = None,
    assignments: Assignments | None = None,
    moving_rate: float | None = None,
    resume: bool = False,
) -> dict[str, float]:
    """Trains the model of a folder on a task, saves it in the new folder `out` with its task.json, and returns its metrics.

    teacher: the model in floating point that a quantized one was made from, which it then follows; with `Texts` it is needed.
    assignments: None for what suits the bits of the model. moving_rate: the learning rate where they move, None for that of
    the settings. resume: go on with a training of this request that was stopped in `out`, from its last checkpoint; begin where
    there is none. The result is that of a training that was not stopped, bit for bit on the same machine and threads.
    Raises PipelineError where model and teacher do not belong together, CheckpointError where `out` has something else.
    """
    check_output(out, resume)
    network, tokenizer, followed = _loaded(model, task, settings.seed, teacher)
    config = getattr(network.config, "quantization_config", None)
    kind = assignments or (default_assignments(config) if isinstance(config, KMQConfig) else "fixed")
    rate = moving_rate if kind == "moving" and moving_rate is not None else settings.learning_rate
    settings = dataclasses.replace(settings, assignments=kind, distill=teacher is not None, learning_rate=rate)
    if followed is not None:
        matching_weights(network, followed)
    request = {
        "kmq_kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": model,
        "model_files": model_digests(model),
        "teacher": teacher,
        "teacher_files": {} if teacher is None else model_digests(teacher),
        **task_facts(task),
        "settings": dataclasses.asdict(settings),
    }
    with unfinished(out, request, resume, difference, _worth_keeping) as state:
        if not (state / FINISHED).is_dir():
            beside = None
            if isinstance(task, Texts) and teacher is not None:
                follow = EmbeddingTeacher(followed, pooling_of(teacher))
                measure = EmbeddingMetrics(task, followed, tokenizer, settings.max_length, follow.pooling)
                distil(network, tokenizer, task, settings, state, follow, resumable=True)
                metrics, beside = measure(network), find_source(teacher)
            elif isinstance(task, Task):
                finetune(network, tokenizer, task, settings, state, followed, resumable=True)
                metrics = evaluate(network, tokenizer, task, settings, state)
            more: dict[str, Any] = {"source": teacher, "quality": quality_of(task, metrics, None), "beside": beside}
            with publish(state / FINISHED) as partial:
                save(network, tokenizer, partial, name=model, made_by="kmq finetune", **more)
                write_json(partial / TASK_FILE, task.source)
                write_json(state / _METRICS, metrics)
        found = json.loads((state / _METRICS).read_text())
    return {name: math.nan if value is None else value for name, value in found.items()}


def _worth_keeping(error: BaseException, state: Path) -> bool:
    """Whether a training that ended in `error` can go on, and has something to go on from."""
    return not isinstance(error, DivergedError) and last_checkpoint(state) is not None


def _loaded(model: str, task: Task | Texts, seed: int, teacher: str | None) -> tuple[Any, Any, Any]:
    """Model, tokenizer and teacher, where there is one."""
    if isinstance(task, Texts):
        if teacher is None:
            raise PipelineError("teacher: the task texts needs the model in floating point that MODEL was made from")
        return load(model), load_tokenizer(model), load_embedder(teacher, seed)[0]
    network, tokenizer = load_for_task(model, task, seed)
    if teacher is None:
        return network, tokenizer, None
    followed = load(teacher)
    theirs, ours = (class_names(each.config.id2label, each.config.num_labels) for each in (followed, network))
    if type(followed) is not type(network) or theirs != ours:
        raise PipelineError(f"teacher: {teacher} is no {type(network).__name__} with the classes of {model}")
    return network, tokenizer, followed


def evaluate_embedder(model: str, task: Texts, teacher: str, settings: TrainingSettings) -> dict[str, float]:
    """The metrics of an embedder beside `teacher`, the model in floating point that it was made from."""
    followed, tokenizer = load_embedder(teacher, settings.seed)
    measure = EmbeddingMetrics(task, followed, tokenizer, settings.max_length, pooling_of(teacher))
    return measure(load(model))
