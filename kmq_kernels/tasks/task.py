"""A task: labelled texts, what their labels mean, and its metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ..terminal import draws_bars
from .errors import TaskError
from .labels import match_classes
from .reading import BAR_DELAY

if TYPE_CHECKING:
    from datasets import Dataset

TOKENIZE_BATCH = 4096  # texts a call: enough to occupy a fast tokenizer's threads


@dataclass(frozen=True)
class Task:
    """A labelled text data set with its metrics.

    Every split has the columns `text`, `text_pair` (for sentence pairs) and `label`: int64 in [0, num_labels), or float32 for
    regression, where `num_labels` is 1 and `label_names` is None. `metrics[0]` is the headline.
    """

    name: str
    num_labels: int
    label_names: tuple[str, ...] | None
    regression: bool
    metrics: tuple[str, ...]
    train: Dataset  # empty where only a validation file was given
    evaluation: dict[str, Dataset]  # "test", "validation", or MNLI's "validation_matched" and "validation_mismatched"
    skipped_lines: dict[str, int] = field(default_factory=dict)  # file name -> malformed lines left out (QQP and MNLI have some)
    notes: tuple[str, ...] = ()  # sentences about how the data was understood
    source: dict[str, Any] = field(default_factory=dict)  # arguments of `load_task` that give it again
    classes: tuple[int, ...] | None = None  # set by `for_model`: the label in the splits of each class of the task

    @property
    def metric(self) -> str:
        """The key of the headline metric in what `compute_metrics` returns."""
        return self.metrics[0]

    @property
    def folder(self) -> str:
        """The name as that of a folder: "reviews-train" for "reviews/train.csv"."""
        stem = self.name.rpartition(".")[0] if "/" in self.name else self.name
        return stem.replace("/", "-")

    def for_model(self, names: Sequence[str]) -> tuple[Task, str]:
        """The task with the labels of a model whose classes have these names, and a sentence where there is something to say.

        Metrics stay those of the task. Raises TaskError where the classes cannot be matched, see `match_classes`.
        """
        if self.regression:
            if len(names) != 1:
                raise TaskError(f"the model has {len(names)} classes, {self.name} is a regression")
            return self, ""
        order, sentence = match_classes(names, self.label_names or ())
        if order is None:
            raise TaskError(f"{self.name}: {sentence}")
        if order == tuple(range(len(names))) or self.classes == order:
            return self, sentence
        return dataclasses.replace(
            self,
            train=_relabelled(self.train, order),
            evaluation={name: _relabelled(split, order) for name, split in self.evaluation.items()},
            classes=order,
        ), sentence

    def compute_metrics(self, eval_prediction: Any) -> dict[str, float]:
        """Trainer's `compute_metrics`: predictions (N, num_labels) (or a tuple that starts with them) and labels (N,).

        A correlation with a constant is undefined and given as 0.0.
        """
        predictions, labels = eval_prediction
        if isinstance(predictions, tuple):
            predictions = predictions[0]
        predictions, labels = np.asarray(predictions), np.asarray(labels)
        if self.regression:
            predictions, labels = predictions.reshape(-1).astype(np.float64), labels.reshape(-1).astype(np.float64)
        else:
            if self.classes is not None:  # back to the task's own; -1 is a class that only the model has
                back = np.full(predictions.shape[-1], -1)
                back[list(self.classes)] = range(len(self.classes))
                predictions, labels = back[predictions.argmax(-1)], back[labels]
            else:
                predictions = predictions.argmax(-1)
        return {metric: _metric(metric, predictions, labels) for metric in self.metrics}


def _relabelled(split: Dataset, order: Sequence[int]) -> Dataset:
    labels = [order[label] for label in split["label"]]
    return split.remove_columns("label").add_column("label", labels, feature=split.features["label"])


def _metric(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if metric == "accuracy":
        return float(accuracy_score(labels, predictions))
    if metric == "f1":
        return float(f1_score(labels == 1, predictions == 1, zero_division=0))
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    if metric == "matthews_correlation":
        return float(matthews_corrcoef(labels, predictions))
    correlation = {"pearson": pearsonr, "spearman": spearmanr}[metric]
    return float(correlation(predictions, labels).statistic)


def tokenize(task_split: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """A split -> input_ids, attention_mask, token_type_ids (if the tokenizer has them) and labels (if the split has them).

    Truncated to max_length, not padded.
    """
    from datasets import Dataset, Features, Value, concatenate_datasets
    from datasets import Sequence as ListOf

    pair = "text_pair" in task_split.column_names
    parts = []
    starts = range(0, len(task_split), TOKENIZE_BATCH)
    for start in tqdm(starts, desc="tokenize", delay=BAR_DELAY, leave=False, disable=not draws_bars()):
        batch = task_split[start : start + TOKENIZE_BATCH]
        encoded = tokenizer(
            batch["text"],
            batch["text_pair"] if pair else None,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=True,
        )
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
        columns = {name: encoded[name] for name in names}
        features = {name: ListOf(Value("int32")) for name in names}
        if "label" in task_split.column_names:
            columns["labels"], features["labels"] = batch["label"], task_split.features["label"]
        parts.append(Dataset.from_dict(columns, features=Features(features)))
    return concatenate_datasets(parts)
