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

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .. import sensitivity
from ..files import publish, write_json
from ..hf import load
from ..quantization import KMQConfig, check_budget, model_size, plan, quantize_
from .facts import layer_facts, peak_memory, reset_peak_memory, versions
from .finetune import calibration_batches, evaluate, finetune
from .models import folder_bytes, load_for_task, resolve_model, save
from .settings import PipelineError, SensitivitySettings, TrainingSettings
from .tasks import Task

log = logging.getLogger(__name__)


STAGE_FILE = "stage.json"
LAYERS_FILE = "layers.json"


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
        how, names = self.sensitivity, [weight.name for weight in plan(model, config).quantized]
        # Of all weights that could be quantized: configurations with other `skip` share the file.
        if config.needs_fisher:
            batches = self._calibration(tokenizer, how.fisher_batch_size, how.fisher_batches)
            fisher = sensitivity.fisher_diagonal(model, batches, path=self.out / "fisher.safetensors")
            importance = {name: fisher[name] for name in names if name in fisher}
            importance = sensitivity.importance(importance, how.damping)
        if config.allocation == "hessian":
            batches = self._calibration(tokenizer, how.hessian_batch_size, how.hessian_batches)
            eigenvalues = sensitivity.hessian_eigenvalues(
                model, batches, iterations=how.hessian_iterations, path=self.out / "hessian.safetensors"
            )
            eigenvalues = {name: eigenvalues[name] for name in names if name in eigenvalues}
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
        reset_peak_memory()
        model, tokenizer = make()
        with publish(folder) as partial:
            scratch = partial / "trainer"
            losses = []
            if training is not None:
                teacher = load(self.out / "stage1") if training.distill else None
                losses = finetune(model, tokenizer, self.task, training, scratch, teacher)
            seconds = time.perf_counter() - start
            memory = peak_memory()
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
