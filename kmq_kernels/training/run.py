"""The three stages on transformers' Trainer: fine-tune, cluster, fine-tune again with the quantization kept.

A run lives in one folder. Every stage appears under its name only when it is complete, so a run that was interrupted goes on
from the last finished stage:

    OUT/run.json                          what was asked for, with the checksums of the model's files and of all rows of the data
    OUT/task.json                         the arguments of `load_task` that give the task again
    OUT/.lock                             while a process works here; a second one is refused
    OUT/stage1/                           fine-tuned fp32 model
    OUT/fisher.safetensors, hessian...    sensitivities of its weights, where a configuration needs them
    OUT/control/                          the same, fine-tuned for the steps of stage 3
    OUT/kmeans-4bit/stage2/, stage3/      one pair for each scheme and number of bits
    OUT/results.json                      every figure, rewritten after each stage

Each stage folder has stage.json (metrics, seconds, memory, losses; versions, machine and command that made it) and layers.json
(what became of every weight), from which `report` draws its page. Configurations may be added to a finished run; anything else
that differs from run.json, a row of the data or a file of the model included, is refused. A stage 3 or a control that diverges
is stopped: its stage.json then has "stopped", a sentence, and the losses until there, and the other configurations go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .. import __version__, sensitivity
from ..files import find_source, locked, publish, write_json
from ..hf import Quality, load
from ..quantization import KMQConfig, check_budget, model_size, plan, quantize_, refuse_unmatched
from ..tasks import Task, Texts, class_names
from .distillation import check_follows
from .embedders import EmbeddingMetrics, EmbeddingTeacher, load_embedder, pooling_of
from .facts import layer_facts, peak_memory, reset_peak_memory, versions
from .finetune import calibration_batches, distil, evaluate, finetune
from .identity import changed_file, difference, model_digests, task_facts
from .models import check_fits, folder_bytes, load_for_task, quality_of, resolve_model, save
from .moving import check_assignments
from .settings import DivergedError, PipelineError, SensitivitySettings, TrainingSettings
from .single import TASK_FILE

log = logging.getLogger(__name__)


STAGE_FILE = "stage.json"
LAYERS_FILE = "layers.json"
LOCK = ".lock"


@dataclasses.dataclass
class Run:
    """The three stages for every configuration, on one fine-tuned model; see the module's docstring.

    stage3_of: settings of stage 3 for single configurations, None for no stage 3. keep_models: whether the weights of finished
    configurations stay; without them, figures and layers.json stay.

    With `Texts` stage1/ is the model itself, there is no control, and stage 3 follows the model on texts without labels.
    """

    model: str
    task: Task | Texts
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
    _checked: set[Path] = dataclasses.field(default_factory=set, init=False, repr=False)  # stages whose files are as noted
    _measure: EmbeddingMetrics | None = dataclasses.field(default=None, init=False, repr=False)

    @functools.cached_property
    def _source(self) -> str:
        """Where the model is; a hub is asked once."""
        return resolve_model(self.model)

    def request(self) -> dict[str, Any]:
        """All that decides the result; reads the model's files and the data for their checksums."""
        return {
            "kmq_kernels": __version__,
            "model": self.model,
            "model_files": model_digests(self._source),
            **task_facts(self.task),
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
        self.check()
        begun = self._refused_before()
        with self._claimed():
            self._open_folder()
            self._checked.clear()
            return self._run(begun)

    def _run(self, begun: list[tuple[Any, Any]]) -> dict[str, Any]:
        first = self.out / "stage1"
        plain = isinstance(self.task, Texts)
        title = "the model itself" if plain else f"stage 1: fine-tune, {self.stage1.steps} steps"
        self._stage(first, title, lambda: begun.pop() if begun else self._fresh(), None if plain else self.stage1)
        begun.clear()
        if self.control and not isinstance(self.task, Texts):
            task = self.task
            self._stage(
                self.out / "control",
                f"control: {self.stage3.steps} more fp32 steps",
                lambda: load_for_task(str(self._as_noted(first)), task, self.stage3.seed),
                dataclasses.replace(self.stage3, assignments="fixed"),
            )
        for name, config in self.configs.items():
            self._configuration(name, config, first)
        return self.results()

    def _fresh(self, folder: str | None = None) -> tuple[Any, Any]:
        source, seed = folder or self._source, self.stage1.seed
        return load_embedder(source, seed) if isinstance(self.task, Texts) else load_for_task(source, self.task, seed)

    def _refused_before(self) -> list[tuple[Any, Any]]:
        """Refuses what can be refused before anything is trained or noted: a folder that lacks something, texts longer than the
        model takes, patterns that match nothing, a budget that cannot be met. Returns the model of stage 1 if that is to come."""
        first = self.out / "stage1"
        begun = (first / STAGE_FILE).is_file()
        new = [config for name, config in self.configs.items() if not (self.out / name / "stage2" / STAGE_FILE).is_file()]
        if begun and not new:
            return []
        if isinstance(self.task, Texts):
            if not len(self.task.train):
                raise PipelineError("train_file: the task texts has none to train on")
            pooling_of(self._source)
            for config in new:
                if config.needs_fisher or config.allocation == "hessian":
                    what = "weighting" if config.weighting == "fisher" else "allocation"
                    raise PipelineError(f"{what}: sensitivities need labels, and the task texts has none")
        model, tokenizer = self._fresh(str(first) if begun else None)
        first_stage = [] if isinstance(self.task, Texts) else [self.stage1]
        for settings in (*first_stage, self.stage3, *filter(None, self.stage3_of.values())):
            check_fits(model, tokenizer, settings.max_length)
        if any(training is not None and training.distill for training in map(self._stage3, self.configs)):
            check_follows(model, tokenizer)
        for config in new:
            refuse_unmatched(plan(model, config), config, type(model).__name__)
            check_budget(model, config)
        return [] if begun else [(model, tokenizer)]

    def _stage3(self, name: str) -> TrainingSettings | None:
        return self.stage3_of.get(name, self.stage3)

    def _configuration(self, name: str, config: KMQConfig, first: Path) -> None:
        second, third = self.out / name / "stage2", self.out / name / "stage3"
        training = self._stage3(name)
        self._stage(second, f"{name}, stage 2: cluster", lambda: self._quantized(first, config), None)
        if training is not None:

            def again() -> tuple[Any, Any]:
                # Its weights may be gone already: they are the same again.
                if not list(second.glob("*.safetensors")):
                    return self._quantized(first, config)
                return load(self._as_noted(second)), AutoTokenizer.from_pretrained(second)

            how = (["assignments move"] if training.assignments == "moving" else []) + (["distilled"] if training.distill else [])
            title = f"{name}, stage 3: fine-tune again, {', '.join([f'{training.steps} steps', *how])}"
            self._stage(third, title, again, training)
        if not self.keep_models:
            for file in (self.out / name).glob("*/*.safetensors"):
                file.unlink()

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """Keeps other processes from the folder; one that is killed leaves it free."""
        self.check()
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out / LOCK, lambda: PipelineError(f"{self.out}: another process is working in it")):
            yield

    def check(self) -> dict[str, Any]:
        """The request with what the folder has already; raises PipelineError where the folder holds something else."""
        marker = self.out / "run.json"
        if self.stage1.assignments == "moving" or self.stage1.distill:
            raise PipelineError("stage1: expected fixed assignments and no distillation: it comes before all that is quantized")
        for name, config in self.configs.items():
            if (training := self._stage3(name)) is not None:
                check_assignments(training.assignments, config)
        request = json.loads(json.dumps(self.request()))
        if not marker.is_file():
            if self.out.exists() and (not self.out.is_dir() or any(path.name != LOCK for path in self.out.iterdir())):
                raise PipelineError(f"{self.out}: it exists and is not a run of this command; choose another folder or remove it")
            return request
        before = {"stage3_of": {}, **json.loads(marker.read_text())}
        if not isinstance(self.task, Texts):  # a run that was begun before there was the field does not need it
            before["sensitivity"] = {"text_batches": self.sensitivity.text_batches, **before["sensitivity"]}
        shared = [name for name in request["configs"] if name in before["configs"]]
        everywhere = ("configs", "stage3_of")

        def asked(content: dict[str, Any]) -> dict[str, Any]:
            every = content["stage3_of"]
            named = {name: {**content["configs"][name], "stage3": every.get(name, content["stage3"])} for name in shared}
            return {**{key: value for key, value in content.items() if key not in everywhere}, "configs": named}

        if what := difference(asked(before), asked(request)):
            raise PipelineError(f"{self.out}: it holds another run ({what}); choose another folder or remove it")
        for part in everywhere:
            request[part] = {**before[part], **request[part]}
        return request

    def _open_folder(self) -> None:
        """Starts a folder, or goes on with one: configurations may be added, nothing else may differ."""
        request = self.check()
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "run.json", request)
        write_json(self.out / TASK_FILE, self.task.source)

    def _as_noted(self, stage: Path) -> Path:
        """The folder of a finished stage, whose files are still those that it wrote."""
        if stage not in self._checked:
            noted = json.loads((stage / STAGE_FILE).read_text())["files"]
            if name := changed_file(stage, noted):
                raise PipelineError(f"{stage / name}: it is not the file that the stage wrote; remove {self.out} and begin anew")
            self._checked.add(stage)
        return stage

    def _quantized(self, first: Path, config: KMQConfig) -> tuple[Any, Any]:
        model, tokenizer = load(self._as_noted(first)), AutoTokenizer.from_pretrained(first)
        importance = eigenvalues = None
        how, names = self.sensitivity, [weight.name for weight in plan(model, config).quantized]
        # Of all weights that could be quantized: configurations with other `skip` share the file.
        if config.needs_fisher:
            batches = self._calibration(model, tokenizer, how.fisher_batch_size, how.fisher_batches)
            fisher = sensitivity.fisher_diagonal(model.to(_device()), batches, path=self.out / "fisher.safetensors")
            importance = {name: fisher[name].cpu() for name in names if name in fisher}
            importance = sensitivity.importance(importance, how.damping)
        if config.allocation == "hessian":
            batches = self._calibration(model, tokenizer, how.hessian_batch_size, how.hessian_batches)
            eigenvalues = sensitivity.hessian_eigenvalues(
                model.to(_device()), batches, iterations=how.hessian_iterations, path=self.out / "hessian.safetensors"
            )
            eigenvalues = {name: eigenvalues[name] for name in names if name in eigenvalues}
        calibration = None
        if config.objective == "output":
            count = how.text_batches if isinstance(self.task, Texts) else how.output_batches
            calibration = self._calibration(model, tokenizer, how.output_batch_size, count)
        model.to("cpu" if calibration is None else _device())
        quantize_(model, config, sample_weight=importance, eigenvalues=eigenvalues, calibration=calibration)
        return model.cpu(), tokenizer

    def _calibration(self, model: Any, tokenizer: Any, batch_size: int, count: int) -> list[dict[str, torch.Tensor]]:
        task = self.task
        if isinstance(task, Task):
            task, _ = task.for_model(class_names(model.config.id2label, model.config.num_labels))
        return calibration_batches(task, tokenizer, batch_size, count, self.stage1.max_length, self.stage1.seed)

    def _stage(self, folder: Path, title: str, make: Callable[[], tuple[Any, Any]], training: TrainingSettings | None) -> None:
        if (folder / STAGE_FILE).is_file():
            stopped = json.loads((folder / STAGE_FILE).read_text()).get("stopped")
            self.announce(f"{title}: {stopped or 'finished earlier'}")
            return
        start = time.perf_counter()
        reset_peak_memory()
        model, tokenizer = make()
        with publish(folder) as partial:
            try:
                facts = self._made(partial, model, tokenizer, training, start, title)
                original = None if folder.parent == self.out else load(self._as_noted(self.out / "stage1"))
                write_json(partial / LAYERS_FILE, layer_facts(model, original))
            except DivergedError as error:
                if folder.name not in ("stage3", "control"):  # the others are what everything else is made of
                    raise
                stopped = f"stopped: {error}; remove {folder} to try it again"
                self.announce(f"{title}: {stopped}")
                facts = {
                    "stopped": stopped,
                    "metrics": {},
                    "seconds": round(time.perf_counter() - start, 2),
                    "losses": [round(loss, 5) for loss in error.losses],
                }
            write_json(partial / STAGE_FILE, {**facts, "versions": versions(), "command": list(self.command)})
        write_json(self.out / "results.json", self.results())
        if "stopped" not in facts:
            metric = self.task.metric
            size = f"{facts['bytes_on_disk'] / 1e6:.2f} MB, {facts['bits_per_weight']:.2f} bits per weight"
            self.announce(f"{title}: {metric.replace('_', ' ')} {facts['metrics'][metric]:.4f}, {facts['seconds']:.1f} s, {size}")

    def _made(
        self, partial: Path, model: Any, tokenizer: Any, training: TrainingSettings | None, start: float, title: str
    ) -> dict[str, Any]:
        """Trains and evaluates a model, saves it in the folder `partial`, and returns its figures."""
        scratch = partial / "trainer"
        losses = []
        try:
            if training is not None:
                losses = self._trained(model, tokenizer, training, scratch, title)
            seconds = time.perf_counter() - start
            memory = peak_memory()
            metrics = self._metrics(model, tokenizer, training or self.stage3, scratch, f"{title}, evaluation")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        beside = find_source(self._source) if isinstance(self.task, Texts) else None
        save(model, tokenizer, partial, source=self._source, name=self.model, quality=self._quality(metrics), beside=beside)
        size = model_size(model)
        return {
            "metrics": metrics,
            "seconds": round(seconds, 2),
            "evaluation_seconds": round(time.perf_counter() - start - seconds, 2),
            "peak_memory_bytes": memory,
            "bits_per_weight": size.bits_per_weight,
            "ratio": size.ratio,
            "bytes_on_disk": folder_bytes(partial),
            "losses": [round(loss, 5) for loss in losses],
            "files": model_digests(str(partial)),
        }

    def _quality(self, metrics: dict[str, float]) -> Quality:
        """For the card: metrics beside those of the fp32 model that was trained as long, or else of stage 1."""
        stages = (self.out / name / STAGE_FILE for name in ("control", "stage1"))
        fp32 = next((json.loads(stage.read_text()).get("metrics") for stage in stages if stage.is_file()), None)
        return quality_of(self.task, metrics, fp32)

    def _trained(self, model: Any, tokenizer: Any, training: TrainingSettings, scratch: Path, title: str) -> list[float]:
        """Trains a model and returns the losses."""
        plain = isinstance(self.task, Texts)
        follows = plain or training.distill or training.assignments == "moving"
        teacher = load(self._as_noted(self.out / "stage1")) if follows else None
        if isinstance(self.task, Texts):
            follow = EmbeddingTeacher(teacher, pooling_of(self._source))
            return distil(model, tokenizer, self.task, training, scratch, follow, title)
        return finetune(model, tokenizer, self.task, training, scratch, teacher, title)

    def _metrics(self, model: Any, tokenizer: Any, settings: TrainingSettings, scratch: Path, title: str) -> dict[str, float]:
        if not isinstance(self.task, Texts):
            return evaluate(model, tokenizer, self.task, settings, scratch, title)
        if self._measure is None:
            first = self.out / "stage1"
            source = load(self._as_noted(first)) if first.is_dir() else model
            self._measure = EmbeddingMetrics(self.task, source, tokenizer, self.stage3.max_length, pooling_of(self._source))
        return self._measure(model, title)

    def results(self) -> dict[str, Any]:
        """What is finished so far: figures and settings.

        Each stage has the versions, the machine and the command that made it; those at the top are of stage 1.
        """

        def facts(*parts: str) -> Any:
            file = self.out.joinpath(*parts, STAGE_FILE)
            return json.loads(file.read_text()) if file.is_file() else None

        marker = self.out / "run.json"
        request = json.loads(marker.read_text()) if marker.is_file() else self.request()
        names = list(request["configs"])
        first = facts("stage1")
        return {
            "command": (first or {}).get("command", []),
            "metric": self.task.metric,
            "request": request,
            "stage1": first,
            "control": facts("control"),
            "quantized": {name: {"stage2": facts(name, "stage2"), "stage3": facts(name, "stage3")} for name in names},
            "versions": (first or {}).get("versions", {}),
        }


def stopped_stages(results: dict[str, Any]) -> list[str]:
    """A sentence for each stage of a run that diverged and was stopped."""
    stages = {"control": results["control"]}
    stages |= {f"{name}, stage 3": stages["stage3"] for name, stages in results["quantized"].items()}
    return [f"{name}: {facts['stopped']}" for name, facts in stages.items() if facts is not None and "stopped" in facts]


def _device() -> torch.device:
    """Where Trainer has its models, and sensitivities are computed."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
