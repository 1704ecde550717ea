"""What a fine-tuning and a sensitivity are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

from .. import sensitivity

Assignments = Literal["fixed", "moving"]


class PipelineError(ValueError):
    """A request that cannot be carried out, with the reason in one sentence."""


class DivergedError(PipelineError):
    """A model whose losses, weights or outputs are no numbers any more. losses: of every step before that."""

    def __init__(self, sentence: str, losses: Sequence[float] = ()) -> None:
        super().__init__(sentence)
        self.losses = list(losses)


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """One fine-tuning. steps: optimizer steps; learning_rate: of everything but codebooks, which take
    learning_rate * codebook_lr_mult and no weight decay, and latent weights, which take learning_rate * latent_lr_mult;
    max_length: tokens a text is cut to; distill: whether stage 3 also follows the logits and hidden states of the stage-1 model,
    see `distillation_loss`; assignments: whether the indices of a quantized model stay ("fixed") or are chosen anew after every
    step, nearest to a latent weight that trains ("moving"), see `layers.moving`."""

    steps: int = 450
    batch_size: int = 32
    learning_rate: float = 3e-4
    codebook_lr_mult: float = 5.0
    latent_lr_mult: float = 4.0
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    max_length: int = 64
    seed: int = 0
    distill: bool = False
    assignments: Assignments = "fixed"

    def __post_init__(self) -> None:
        if self.assignments not in get_args(Assignments):
            raise PipelineError(f"assignments: expected 'fixed' or 'moving', got {self.assignments!r}")
        for name in ("steps", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise PipelineError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "codebook_lr_mult", "latent_lr_mult"):
            if not getattr(self, name) > 0:
                raise PipelineError(f"{name}: expected a number above 0, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class SensitivitySettings:
    """Which batches of the training set sensitivities are computed on, and how; see `sensitivity`.

    Fisher: `fisher_batches` batches of `fisher_batch_size` texts, damped with `damping` times the mean. Hessian likewise, with
    at most `hessian_iterations` products a batch and module. Objective "output": `output_batches` batches of `output_batch_size`,
    or `text_batches` where there are only texts, whose stage 3 begins nearer to the model then.
    """

    fisher_batches: int = 400
    fisher_batch_size: int = 4
    damping: float = sensitivity.DAMPING
    hessian_batches: int = 2
    hessian_batch_size: int = 8
    hessian_iterations: int = 5
    output_batches: int = 32
    text_batches: int = 192
    output_batch_size: int = 16
