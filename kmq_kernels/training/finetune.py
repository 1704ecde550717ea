"""Fine-tuning and evaluation on transformers' Trainer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from ..layers import CodebookModule
from .settings import DivergedError, PipelineError, TrainingSettings
from .tasks import Task, tokenize


def parameter_groups(model: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """AdamW groups: weights with decay, biases and norms without, codebooks without and with their own learning rate."""
    codebooks = {id(module.codebook) for module in model.modules() if isinstance(module, CodebookModule)}
    trained = [p for p in model.parameters() if p.requires_grad]
    books = [p for p in trained if id(p) in codebooks]
    matrices = [p for p in trained if id(p) not in codebooks and p.dim() > 1]
    vectors = [p for p in trained if id(p) not in codebooks and p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": books, "weight_decay": 0.0, "lr": settings.learning_rate * settings.codebook_lr_mult},
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


DISTILL_TEMPERATURE = 2.0
LOOK_EVERY = 16  # steps between two looks at the losses


def distillation_loss(student: Any, teacher: Any, attention_mask: torch.Tensor, regression: bool) -> torch.Tensor:
    """What keeps a quantized model near the one it came from: the sum of a term for the logits and one for the hidden states.

    student, teacher: outputs with logits (batch, labels) and hidden_states, each (batch, tokens, hidden). The first term is
    KL(teacher || student) at temperature 2, times 4 (Hinton et al. 2015); for regression the mean squared difference. The
    second is the mean over the layers of the squared difference, as a share of the mean square of the teacher's states, over
    the tokens that are no padding. Both are about 1 for a model that has nothing of the teacher.
    """
    if regression:
        soft = torch.nn.functional.mse_loss(student.logits, teacher.logits)
    else:
        ours, theirs = (torch.log_softmax(out.logits / DISTILL_TEMPERATURE, -1) for out in (student, teacher))
        soft = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * DISTILL_TEMPERATURE**2
    real = attention_mask.unsqueeze(-1).to(student.logits.dtype)
    shares = [
        ((ours - theirs).square() * real).sum() / (theirs.square() * real).sum().clamp_min(1e-12)
        for ours, theirs in zip(student.hidden_states, teacher.hidden_states, strict=True)
    ]
    return soft + torch.stack(shares).mean()


class _StageTrainer(Trainer):
    """Trainer with the parameter groups of this package, the loss of every step, and distillation from `teacher`."""

    def __init__(self, settings: TrainingSettings, teacher: Any = None, **kwargs: Any) -> None:
        self._settings = settings
        self._teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.losses: list[torch.Tensor] = []
        super().__init__(**kwargs)
        if self._teacher is not None and self.place_model_on_device:
            self._move_model_to_device(self._teacher, self.args.device)

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
        out = model(**inputs, output_hidden_states=True)
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            theirs = self._teacher(**given, output_hidden_states=True)
        regression = self._teacher.config.num_labels == 1
        loss = out.loss + distillation_loss(out, theirs, inputs["attention_mask"], regression)
        return (loss, out) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(cast(nn.Module, self.model), self._settings)
            self.optimizer = torch.optim.AdamW(groups, lr=self._settings.learning_rate)
        return self.optimizer


def _trainer(
    model: Any,
    tokenizer: Any,
    settings: TrainingSettings,
    scratch: Path,
    train: Any = None,
    metrics: Any = None,
    teacher: Any = None,
) -> _StageTrainer:
    return _StageTrainer(
        settings,
        teacher,
        model=model,
        args=_training_arguments(scratch, settings, **_clipping(model)),
        train_dataset=train,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
    )


def _clipping(model: nn.Module) -> dict[str, float]:
    """No norm clipping with codebooks: their summed gradients would set the norm, and so the step of everything else."""
    return {"max_grad_norm": 0.0} if any(isinstance(module, CodebookModule) for module in model.modules()) else {}


def finetune(
    model: Any, tokenizer: Any, task: Task, settings: TrainingSettings, scratch: Path, teacher: Any = None
) -> list[float]:
    """Fine-tunes `model` in place on the task's training set and returns the loss of every step. `scratch`: a folder Trainer may
    write to. teacher: a model to distill from, where the settings ask for it.

    In a quantized model the packed indices stay as they are; codebooks and everything in floating point train. Raises
    DivergedError where a loss, or a weight at the end, is NaN or Inf.
    """
    if settings.distill and teacher is None:
        raise PipelineError("distill: expected a model to distill from; `kmq run` has one, the model of stage 1")
    train = tokenize(task.train, tokenizer, settings.max_length)
    trainer = _trainer(model, tokenizer, settings, scratch, train, teacher=teacher if settings.distill else None)
    trainer.train()
    losses = trainer.checked_losses()
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise DivergedError(f"{name} is NaN or Inf after step {settings.steps}; a smaller learning rate may help", losses)
    return losses


def calibration_batches(
    task: Task, tokenizer: Any, batch_size: int, count: int, max_length: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """`count` batches drawn from the training set, texts of similar length together; the same for the same seed."""
    size = min(batch_size * count, len(task.train))
    drawn = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))[:size].tolist()
    tokens = tokenize(task.train.select(drawn), tokenizer, max_length)
    order = sorted(range(size), key=lambda i: len(tokens[i]["input_ids"]))
    pad = DataCollatorWithPadding(tokenizer)
    return [dict(pad([tokens[i] for i in order[k : k + batch_size]])) for k in range(0, size, batch_size)]


def evaluate(model: Any, tokenizer: Any, task: Task, settings: TrainingSettings, scratch: Path) -> dict[str, float]:
    """The task's metrics; where it has several evaluation sets, each key is "set/metric" and the plain key is of the first.

    Raises DivergedError where an output of the model is NaN or Inf.
    """

    def of_finite(prediction: Any) -> dict[str, float]:
        outputs = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        if not np.isfinite(outputs).all():
            raise DivergedError(f"the model gives NaN or Inf for texts of the {name} set")
        return task.compute_metrics(prediction)

    metrics: dict[str, float] = {}
    for name, split in task.evaluation.items():
        tokens = tokenize(split, tokenizer, settings.max_length)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        tokens = tokens.select(sorted(range(len(lengths)), key=lengths.__getitem__))  # batches of similar length pad little
        found = _trainer(model, tokenizer, settings, scratch, metrics=of_finite).evaluate(tokens)
        for key in task.metrics:
            metrics.setdefault(key, float(found[f"eval_{key}"]))
            if len(task.evaluation) > 1:
                metrics[f"{name}/{key}"] = float(found[f"eval_{key}"])
    return metrics
