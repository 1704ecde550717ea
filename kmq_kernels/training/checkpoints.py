"""Checkpoints of a training: Trainer's own, with what they lack to go on with the same bits.

Trainer keeps optimizer, schedule and generators of random numbers. Beside them `progress.pt` has the losses so far, the latent
weights of moving assignments, and the state of torch's generator at the begin of the epoch: the order of its texts comes from
there, and Trainer draws it again. It is written last: a checkpoint without it was never complete.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..files import publish_file, sync
from ..layers import CodebookModule

SAVE_SECONDS = 60.0  # from one checkpoint to the next, at least
SAVE_SHARE = 0.05  # of the time, at most, is spent on them
_PREFIX = "checkpoint-"
_PROGRESS = "progress.pt"


def last_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of most steps in a folder; None where there is none."""
    complete = [place.parent for place in folder.glob(f"{_PREFIX}*/{_PROGRESS}")]
    return max(complete, key=lambda place: int(place.name.removeprefix(_PREFIX)), default=None)


class Checkpoints(TrainerCallback):
    """Has Trainer write a checkpoint into a folder from time to time, and the last one taken up.

    losses: of every step so far, which the trainer adds to. `last`: the checkpoint to go on from, None at the begin.
    """

    def __init__(self, folder: Path, model: nn.Module, losses: list[Tensor]) -> None:
        self.last = last_checkpoint(folder)
        self._folder, self._losses = folder, losses
        self._latents = {
            name: module.latent
            for name, module in model.named_modules()
            if isinstance(module, CodebookModule) and module.latent is not None
        }
        self._epoch: Tensor | None = None  # the generator at the begin of this epoch
        self._asked = self._due = time.monotonic()
        self._remove_but(self.last)

    def _remove_but(self, kept: Path | None) -> None:
        for place in self._folder.glob(f"{_PREFIX}*"):
            if place != kept:
                shutil.rmtree(place)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up what Trainer left out."""
        self._due = time.monotonic() + SAVE_SECONDS
        if self.last is None:
            return
        found = torch.load(self.last / _PROGRESS, map_location="cpu", weights_only=True)
        self._losses.extend(found["losses"].to(args.device))
        with torch.no_grad():
            for name, latent in self._latents.items():
                latent.copy_(found["latents"][name])
        self._epoch = found["epoch"]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The epoch that goes on begins as it began."""
        if self.last is not None and self._epoch is not None:
            torch.set_rng_state(self._epoch)
            self.last = None
        else:
            self._epoch = torch.get_rng_state()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a checkpoint when it is time."""
        self._asked = time.monotonic()
        if self._asked >= self._due and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Completes the checkpoint that Trainer wrote, and removes the one before."""
        place = self._folder / f"{_PREFIX}{state.global_step}"
        for file in place.iterdir():
            sync(file)
        begins = float(state.epoch).is_integer()  # after the last step of an epoch the next one is drawn from here
        latents = {name: latent.detach().cpu() for name, latent in self._latents.items()}
        content = {
            "losses": _joined(self._losses),
            "latents": latents,
            "epoch": torch.get_rng_state() if begins else self._epoch,
        }
        with publish_file(place / _PROGRESS) as partial:
            torch.save(content, partial)
        sync(place)
        self._remove_but(place)
        now = time.monotonic()
        self._due = now + max(SAVE_SECONDS, (now - self._asked) / SAVE_SHARE)


def _joined(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([loss.float() for loss in losses]).cpu()
