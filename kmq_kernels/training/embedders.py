"""Embedders without labels: the model is its own teacher, stage 3 follows its embeddings and hidden states on plain texts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel

from ..files import CheckpointError, model_folder, one_line, read_json
from ..layers import CodebookModule
from ..quantization import evaluating
from ..tasks import Texts
from ..terminal import draws_bars
from .distillation import Teacher, hidden_states_loss
from .models import load_tokenizer, require_weights
from .settings import DivergedError, PipelineError

BATCH = 64  # texts a batch of an evaluation
SIMILAR = 2000  # most held-out texts of which all pairs are compared, which takes 0.26 GB
POOLINGS = ("mean", "cls", "max", "lasttoken")
_SAME = {"mean_tokens": "mean", "mean_sqrt_len_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "lasttoken": "lasttoken"}


def load_embedder(path: str, seed: int) -> tuple[Any, Any]:
    """The base model of a folder or hub id in fp32, and its tokenizer. A pooler that it lacks is made anew; embeddings do not
    come from there.

    Raises PipelineError where the model is quantized already, CheckpointError where another tensor is missing or has another
    shape than its configuration asks for.
    """
    if Path(path).exists():
        require_weights(Path(path))
    tokenizer = load_tokenizer(path)
    transformers.set_seed(seed)
    try:
        model, loading = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: transformers cannot load its base model ({one_line(error)})") from None
    if any(isinstance(module, CodebookModule) for module in model.modules()):
        raise PipelineError(f"model: {path} is quantized already; the task texts begins with a model in floating point")
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise CheckpointError(f"{path}: {missing[0]} is missing from the checkpoint")
    return model, tokenizer


def pooling_of(path: str) -> str:
    """How a folder of sentence-transformers pools its hidden states, one of POOLINGS; "mean" where it does not say.

    Raises PipelineError for another way, or several at once.
    """
    folder = model_folder(path)
    if folder is None or not (folder / "modules.json").is_file():
        return "mean"
    listed = read_json(folder / "modules.json")
    kinds = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    place = next((entry.get("path") for entry in kinds if str(entry.get("type")).rpartition(".")[2] == "Pooling"), None)
    file = None if place is None else folder / str(place) / "config.json"
    if file is None or not file.is_file():
        return "mean"
    content = read_json(file)
    stated = content.get("pooling_mode")
    modes = [stated] if isinstance(stated, str) else list(stated or [])
    modes += [
        name.removeprefix("pooling_mode_") for name, on in content.items() if name.startswith("pooling_mode_") and on is True
    ]
    found = {_SAME.get(mode, mode) for mode in modes} or {"mean"}
    if len(found) > 1 or not found <= set(POOLINGS):
        raise PipelineError(
            f"{file}: expected one way to pool, of {', '.join(POOLINGS)}; got {', '.join(sorted(map(str, found)))}"
        )
    return found.pop()


def pooled(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Embeddings (batch, hidden) of last hidden states (batch, tokens, hidden); attention_mask (batch, tokens): 0 for padding."""
    real = attention_mask.unsqueeze(-1)
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "max":
        return hidden.masked_fill(real == 0, -torch.inf).amax(1)
    if pooling == "lasttoken":
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    return (hidden * real).sum(1) / real.sum(1).clamp_min(1)


class EmbeddingTeacher(Teacher):
    """The loss of an embedder that follows another: the squared distance of the normalized embeddings, which is twice what
    their cosine lacks to 1, and `hidden_states_loss`."""

    def __init__(self, model: Any, pooling: str) -> None:
        super().__init__(model)
        self.pooling = pooling

    def loss(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The loss for a batch, and the model's output."""
        ours, theirs = self.outputs(model, inputs)
        mask = inputs["attention_mask"]
        one, other = (pooled(out.last_hidden_state, mask, self.pooling) for out in (ours, theirs))
        distance = 2 - 2 * torch.nn.functional.cosine_similarity(one, other).mean()
        return distance + hidden_states_loss(ours.hidden_states, theirs.hidden_states, mask), ours


@torch.no_grad()
def embeddings(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int, pooling: str, title: str = "embed") -> Tensor:
    """Normalized embeddings (texts, hidden) fp64 of texts, in their order; a text is cut to `max_length` tokens.

    Raises DivergedError where one is NaN or Inf.
    """
    device = next(model.parameters()).device
    tokens = tokenizer(list(texts), truncation=True, max_length=max_length)
    order = sorted(range(len(texts)), key=lambda i: len(tokens["input_ids"][i]))  # batches of similar length pad little
    parts = []
    with evaluating(model):
        for start in tqdm(range(0, len(order), BATCH), desc=title, leave=False, disable=not draws_bars()):
            some = {name: [values[i] for i in order[start : start + BATCH]] for name, values in tokens.items()}
            batch = tokenizer.pad(some, return_tensors="pt").to(device)
            parts.append(pooled(model(**batch).last_hidden_state, batch["attention_mask"], pooling).double().cpu())
    found = torch.cat(parts)
    if not bool(torch.isfinite(found).all()):
        raise DivergedError("the model gives NaN or Inf for held-out texts")
    return torch.nn.functional.normalize(found)[torch.tensor(order).argsort()]


def spearman(one: Tensor, other: Tensor) -> float:
    """Spearman's correlation of two vectors; 0.0 where one is constant, which has none."""
    from scipy.stats import spearmanr

    if float(one.max()) == float(one.min()) or float(other.max()) == float(other.min()):
        return 0.0
    return float(spearmanr(one.numpy(), other.numpy()).statistic)


class EmbeddingMetrics:
    """The metrics of `Texts` for models that came from one in floating point, `source`; its embeddings are computed once."""

    def __init__(self, task: Texts, source: Any, tokenizer: Any, max_length: int, pooling: str) -> None:
        self.task, self.max_length, self.pooling = task, max_length, pooling
        self._source, self._tokenizer = source, tokenizer

    @functools.cached_property
    def _reference(self) -> Tensor:
        found = self._embed(self._source, self.task.evaluation["held_out"]["text"], "embed with the fp32 model")
        self._source = None
        return found

    def _embed(self, model: Any, texts: Any, title: str) -> Tensor:
        return embeddings(model, self._tokenizer, texts, self.max_length, self.pooling, title)

    def __call__(self, model: Any, title: str = "evaluate") -> dict[str, float]:
        """The metrics of a model; raises DivergedError where an embedding is NaN or Inf. Similarities are those of all pairs of
        the held-out texts, or of 2,000 of them, always the same."""
        reference = self._reference
        ours = self._embed(model, self.task.evaluation["held_out"]["text"], title)
        cosines = (ours * reference).sum(1)
        some = torch.randperm(len(ours), generator=torch.Generator().manual_seed(0))[:SIMILAR].sort().values
        above = torch.triu_indices(len(some), len(some), 1)
        similarities = [(each[some] @ each[some].T)[above[0], above[1]] for each in (ours, reference)]
        metrics = {
            "mean_cosine": float(cosines.mean()),
            "worst_cosine": float(cosines.min()),
            "similarity_spearman": spearman(*similarities),
        }
        if self.task.pairs is not None:
            one, other = (self._embed(model, self.task.pairs[name], title) for name in ("text", "text_pair"))
            metrics["pairs_spearman"] = spearman((one * other).sum(1), torch.tensor(self.task.pairs["label"]))
        return metrics
