"""What keeps a quantized model near the model it came from: losses against a teacher, with labels and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..quantization import evaluating
from .settings import PipelineError

DISTILL_TEMPERATURE = 2.0


def hidden_states_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """The mean over the layers of the squared difference of hidden states, as a share of the mean square of the teacher's.

    student, teacher: a tensor (batch, tokens, hidden) a layer; attention_mask: (batch, tokens), 0 for padding, which does not
    count. About 1 for a model that has nothing of the teacher.
    """
    real = attention_mask.unsqueeze(-1).to(student[0].dtype)
    shares = [
        ((ours - theirs).square() * real).sum() / (theirs.square() * real).sum().clamp_min(1e-12)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(shares).mean()


def distillation_loss(student: Any, teacher: Any, attention_mask: Tensor, regression: bool) -> Tensor:
    """What keeps a quantized model near the one it came from: the sum of a term for the logits and one for the hidden states.

    student, teacher: outputs with logits (batch, labels) and hidden_states, each (batch, tokens, hidden). The first term is
    KL(teacher || student) at temperature 2, times 4 (Hinton et al. 2015); for regression the mean squared difference. The
    second is `hidden_states_loss`. Both are about 1 for a model that has nothing of the teacher.
    """
    if regression:
        soft = torch.nn.functional.mse_loss(student.logits, teacher.logits)
    else:
        ours, theirs = (torch.log_softmax(out.logits / DISTILL_TEMPERATURE, -1) for out in (student, teacher))
        soft = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * DISTILL_TEMPERATURE**2
    return soft + hidden_states_loss(student.hidden_states, teacher.hidden_states, attention_mask)


@torch.no_grad()
def check_follows(model: Any, tokenizer: Any) -> None:
    """Raises PipelineError for a model that cannot be followed, for it gives no hidden states, or not one a token."""
    batch = tokenizer(["a text"], return_tensors="pt").to(next(model.parameters()).device)
    with evaluating(model):
        states = getattr(model(**batch, output_hidden_states=True), "hidden_states", None)
    if not states or any(state.shape[:2] != batch["input_ids"].shape for state in states):
        what = "of another length than the text" if states else "of no layer"
        raise PipelineError(
            f"distill: {type(model).__name__} gives hidden states {what}, which nothing can follow; use --no-distill"
        )


class Teacher:
    """A model that another one follows: computed with in evaluation mode and without gradients."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def outputs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
        """The outputs of `model` and of the teacher for a batch, with hidden states; the teacher is not shown the labels.

        Both in evaluation mode, for the noise of dropout, which the teacher does not have, is larger than what 3 or 4 bits lack.
        So there is no gradient checkpointing either. The modules of `model` are in their modes again afterwards.
        """
        with evaluating(model):
            ours = model(**inputs, output_hidden_states=True)
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with evaluating(self.model), torch.no_grad():
            return ours, self.model(**given, output_hidden_states=True)

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The task's loss with the distance from the teacher, and the model's output."""
        ours, theirs = self.outputs(model, inputs)
        regression = self.model.config.num_labels == 1
        return ours.loss + distillation_loss(ours, theirs, inputs["attention_mask"], regression), ours
