"""Fine-tuning and evaluation on transformers' Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import WEIGHTS_NAME

from ..layers import CodebookModule
from ..tasks import Task, Texts, class_names, tokenize
from ..terminal import draws_bars
from .checkpoints import Checkpoints
from .distillation import Teacher, check_follows
from .embedders import EmbeddingTeacher
from .models import check_fits
from .moving import Settle, moving
from .settings import DivergedError, PipelineError, TrainingSettings

log = logging.getLogger(__name__)

MANY_UNKNOWN = 0.1  # share of the tokens of a data set


def parameter_groups(model: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """AdamW groups: weights with decay, biases and norms without, codebooks without and with their own learning rate, latent
    weights likewise: what decays them would move them over the edges between centroids."""
    packed = [module for module in model.modules() if isinstance(module, CodebookModule)]
    codebooks = {id(module.codebook) for module in packed}
    latent = {id(module.latent) for module in packed if module.latent is not None}
    trained = [p for p in model.parameters() if p.requires_grad]
    books = [p for p in trained if id(p) in codebooks]
    moving = [p for p in trained if id(p) in latent]
    others = [p for p in trained if id(p) not in codebooks | latent]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
        {"params": books, "weight_decay": 0.0, "lr": settings.learning_rate * settings.codebook_lr_mult},
        {"params": moving, "weight_decay": 0.0, "lr": settings.learning_rate * settings.latent_lr_mult},
    ]
    return [group for group in groups if group["params"]]


def _training_arguments(folder: Path, settings: TrainingSettings, **more: Any) -> TrainingArguments:
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    # transformers renamed this within 5.x.
    renamed = "train_sampling_strategy" in known
    bucketing = {"train_sampling_strategy": "group_by_length"} if renamed else {"group_by_length": True}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=128,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(settings.warmup_ratio * settings.steps),
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_pin_memory=False,
        **bucketing,
        **more,
    )


LOOK_EVERY = 16  # steps between two looks at the losses


class _StageTrainer(Trainer):
    """Trainer with the parameter groups of this package, the loss of every step, and distillation from `teacher`."""

    def __init__(self, settings: TrainingSettings, teacher: Teacher | None = None, **kwargs: Any) -> None:
        self._settings = settings
        self._teacher = teacher
        self.losses: list[torch.Tensor] = []
        super().__init__(**kwargs)
        if self._teacher is not None and self.place_model_on_device:
            self._move_model_to_device(self._teacher.model, self.args.device)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keeps the loss, without waiting for its value but every few steps; raises DivergedError where one is no number."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        if len(self.losses) % LOOK_EVERY == 0 and not bool(torch.stack(self.losses[-LOOK_EVERY:]).isfinite().all()):
            self.checked_losses()
        return loss

    def checked_losses(self) -> list[float]:
        """The loss of every step; raises DivergedError where one is NaN or Inf."""
        losses = torch.stack(self.losses).tolist()
        wrong = next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if wrong is not None:
            where = f"from step {wrong + 1} of {self._settings.steps} on"
            raise DivergedError(f"the loss is {losses[wrong]} {where}; a smaller learning rate may help", losses[:wrong])
        return losses

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The task's loss, with the distance from the teacher where there is one."""
        if self._teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, out = self._teacher.loss(model, inputs)
        return (loss, out) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(cast(nn.Module, self.model), self._settings)
            # Unfused a step on every weight of a small model takes a third of the time of its forward, or more.
            devices = {parameter.device.type for group in groups for parameter in group["params"]}
            fused = True if devices <= {"cpu", "cuda"} else None  # other devices may have none
            self.optimizer = torch.optim.AdamW(groups, lr=self._settings.learning_rate, fused=fused)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """For a checkpoint: the state dict as it is, which is how Trainer loads it; save_pretrained changes names and ties."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(cast(nn.Module, self.model).state_dict(), folder / WEIGHTS_NAME)


class _Bar(TrainerCallback):
    """A bar of the steps with the mean loss of the last few; Trainer's own callbacks print dictionaries between its bars."""

    def __init__(self, title: str, losses: list[torch.Tensor]) -> None:
        """losses: of every step so far, which the trainer adds to."""
        self._title, self._losses = title, losses
        self._bar: Any = None

    def _start(self, total: int, done: int = 0) -> None:
        self._bar = tqdm(total=total, initial=done, desc=self._title, leave=False, dynamic_ncols=True, disable=not draws_bars())

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._bar.disable and self._losses and len(self._losses) % LOOK_EVERY == 0:
            self._bar.set_postfix(loss=f"{float(torch.stack(self._losses[-LOOK_EVERY:]).mean()):.3f}", refresh=False)
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        if self._bar is None:
            self._start(len(eval_dataloader))
        self._bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()


def _trainer(
    model: Any,
    tokenizer: Any,
    settings: TrainingSettings,
    scratch: Path,
    train: Any = None,
    metrics: Any = None,
    teacher: Teacher | None = None,
    title: str = "",
) -> _StageTrainer:
    trainer = _StageTrainer(
        settings,
        teacher,
        model=model,
        args=_training_arguments(scratch, settings, **_clipping(model)),
        train_dataset=train,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Bar(title, trainer.losses))
    if settings.assignments == "moving":
        trainer.add_callback(Settle(model))
    return trainer


def _clipping(model: nn.Module) -> dict[str, float]:
    """No norm clipping with codebooks: their summed gradients would set the norm, and so the step of everything else."""
    return {"max_grad_norm": 0.0} if any(isinstance(module, CodebookModule) for module in model.modules()) else {}


def _task_for(model: Any, tokenizer: Any, task: Task, max_length: int) -> Task:
    """The task with the labels of the model, when everything fits."""
    check_fits(model, tokenizer, max_length)
    task, sentence = task.for_model(class_names(model.config.id2label, model.config.num_labels))
    if sentence:
        _say(f"{task.name}: {sentence}")
    return task


def _tokens(name: str, split: Any, tokenizer: Any, max_length: int) -> Any:
    """The split as tokens; says so where the tokenizer does not know many of its words."""
    tokens = tokenize(split, tokenizer, max_length)
    if (unknown := tokenizer.unk_token_id) is not None:
        ids = np.concatenate([chunk.flatten().to_numpy() for chunk in tokens.data.column("input_ids").chunks])
        words = ids[~np.isin(ids, [token for token in tokenizer.all_special_ids if token != unknown])]
        share = float((words == unknown).mean()) if len(words) else 0.0
        if share > MANY_UNKNOWN:
            _say(f"{name}: {share:.0%} of the tokens are unknown to the tokenizer; is it the one of this model and language?")
    return tokens


@functools.cache
def _say(sentence: str) -> None:
    """Warns, once: the stages of a run evaluate the same texts again."""
    log.warning("%s", sentence)


def finetune(
    model: Any,
    tokenizer: Any,
    task: Task,
    settings: TrainingSettings,
    scratch: Path,
    teacher: Any = None,
    title: str = "fine-tune",
    resumable: bool = False,
) -> list[float]:
    """Fine-tunes `model` in place on the task's training set and returns the loss of every step. `scratch`: a folder Trainer may
    write to; resumable: checkpoints are kept there, and the last one is where training goes on. teacher: the model in floating
    point that it was made from, to distill from and for moving assignments to begin at, where the settings ask for it. title: of
    the progress bar.

    In a quantized model the packed indices stay as they are, unless the settings let them move; codebooks and everything in
    floating point train. Classes of the task and of the model are matched by name, see `Task.for_model`. Raises PipelineError for
    a distillation without a teacher, or of a model without hidden states to follow, and for moving assignments of a model without
    codebooks, DivergedError where a loss, or a weight at the end, is NaN or Inf.
    """
    if settings.distill and teacher is None:
        raise PipelineError("distill: expected a model to distill from; `kmq run` has one, the model of stage 1")
    _require_texts(task)
    task = _task_for(model, tokenizer, task, settings.max_length)
    train = _tokens(f"{task.name}, training set", task.train, tokenizer, settings.max_length)
    follows = Teacher(teacher) if settings.distill else None
    return _train(model, tokenizer, settings, scratch, train, follows, teacher, title, resumable)


def _require_texts(task: Task | Texts) -> None:
    if not len(task.train):
        raise PipelineError(f"train_file: {task.name} has no training set")


def distil(
    model: Any,
    tokenizer: Any,
    task: Texts,
    settings: TrainingSettings,
    scratch: Path,
    teacher: EmbeddingTeacher,
    title: str = "distil",
    resumable: bool = False,
) -> list[float]:
    """Trains a quantized embedder in place to follow the one that it was made from on plain texts; returns the loss of every
    step. The arguments and what is raised: as of `finetune`."""
    _require_texts(task)
    check_fits(model, tokenizer, settings.max_length)
    train = _tokens(f"{task.name}, training set", task.train, tokenizer, settings.max_length)
    return _train(model, tokenizer, settings, scratch, train, teacher, teacher.model, title, resumable)


def _train(
    model: Any,
    tokenizer: Any,
    settings: TrainingSettings,
    scratch: Path,
    train: Any,
    follows: Teacher | None,
    source: Any,
    title: str,
    resumable: bool,
) -> list[float]:
    """Trains on tokens, following a teacher where there is one; `source`: see `moving`."""
    if follows is not None:
        check_follows(model, tokenizer)
    with contextlib.ExitStack() as stack:
        if settings.assignments == "moving":
            stack.enter_context(moving(model, source))
        trainer = _trainer(model, tokenizer, settings, scratch, train, teacher=follows, title=title)
        last = None
        if resumable:
            checkpoints = Checkpoints(scratch, model, trainer.losses)
            trainer.add_callback(checkpoints)
            last = checkpoints.last
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        losses = trainer.checked_losses()
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise DivergedError(f"{name} is NaN or Inf after step {settings.steps}; a smaller learning rate may help", losses)
    return losses


def calibration_batches(
    task: Task | Texts, tokenizer: Any, batch_size: int, count: int, max_length: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """`count` batches drawn from the training set, texts of similar length together; the same for the same seed."""
    size = min(batch_size * count, len(task.train))
    drawn = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))[:size].tolist()
    tokens = tokenize(task.train.select(drawn), tokenizer, max_length)
    order = sorted(range(size), key=lambda i: len(tokens[i]["input_ids"]))
    pad = DataCollatorWithPadding(tokenizer)
    return [dict(pad([tokens[i] for i in order[k : k + batch_size]])) for k in range(0, size, batch_size)]


def evaluate(
    model: Any, tokenizer: Any, task: Task, settings: TrainingSettings, scratch: Path, title: str = "evaluate"
) -> dict[str, float]:
    """The task's metrics; where it has several evaluation sets, each key is "set/metric" and the plain key is of the first.

    Classes of the task and of the model are matched by name, see `Task.for_model`. title: of the progress bar. Raises
    DivergedError where an output of the model is NaN or Inf.
    """
    task = _task_for(model, tokenizer, task, settings.max_length)

    def of_finite(prediction: Any) -> dict[str, float]:
        outputs = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        if not np.isfinite(outputs).all():
            raise DivergedError(f"the model gives NaN or Inf for texts of the {name} set")
        return task.compute_metrics(prediction)

    metrics: dict[str, float] = {}
    for name, split in task.evaluation.items():
        tokens = _tokens(f"{task.name}, {name} set", split, tokenizer, settings.max_length)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        tokens = tokens.select(sorted(range(len(lengths)), key=lengths.__getitem__))  # batches of similar length pad little
        found = _trainer(model, tokenizer, settings, scratch, metrics=of_finite, title=title).evaluate(tokens)
        for key in task.metrics:
            metrics.setdefault(key, float(found[f"eval_{key}"]))
            if len(task.evaluation) > 1:
                metrics[f"{name}/{key}"] = float(found[f"eval_{key}"])
    return metrics
