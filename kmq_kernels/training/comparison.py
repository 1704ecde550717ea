"""A list of configurations for several tasks and seeds: one run of the three stages for each task and seed.

OUT/TASK/seedN/                       a run, see `pipeline`: one stage-1 model, every configuration on it
OUT/report.html                       see `report`
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..quantization import KMQConfig
from ..tasks import Task, Texts
from .moving import check_assignments
from .run import Run, log
from .settings import Assignments, PipelineError, SensitivitySettings, TrainingSettings


@dataclasses.dataclass(frozen=True)
class Variant:
    """One configuration of a comparison: its name, the quantization, and what stage 3 does with it. steps: of stage 3, where
    they are not those of all."""

    name: str
    config: KMQConfig
    stage3: bool = True
    distill: bool = False
    assignments: Assignments = "fixed"
    steps: int | None = None


def read_variants(path: Path) -> list[Variant]:
    """The list in a JSON file: objects with a name, fields of KMQConfig, and optionally "stage3", "assignments" ("fixed"),
    "distill" (true where they move) and "steps" (of stage 3)."""
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        raise PipelineError(f"{path}: there is no such file; expected a list of configurations in JSON") from None
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: not a list of configurations in JSON ({error})") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise PipelineError(f"{path}: expected a list of objects, at least one")
    variants: list[Variant] = []
    for number, entry in enumerate(entries):
        fields = dict(entry)
        name, stage3, steps = fields.pop("name", None), fields.pop("stage3", True), fields.pop("steps", None)
        assignments = fields.pop("assignments", "fixed")
        distill = fields.pop("distill", assignments == "moving")
        if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
            raise PipelineError(f"{path}, entry {number}: expected a name that can be a folder's, got {name!r}")
        if name in ("stage1", "control") or name in [variant.name for variant in variants]:
            raise PipelineError(f"{path}, entry {number}: the name {name!r} is taken")
        try:
            config = KMQConfig.from_dict(fields)
            if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int)):
                raise PipelineError(f"steps: expected an integer, got {steps!r}")
            TrainingSettings(assignments=assignments, steps=1 if steps is None else steps)
            check_assignments(assignments, config)
        except (TypeError, ValueError) as error:
            raise PipelineError(f"{path}, entry {number}, {name}: {error}") from None
        variants.append(Variant(name, config, bool(stage3), bool(distill), assignments, steps))
    return variants


def standard_variants(bits: Sequence[int] = (1, 2, 3, 4, 8), averages: Sequence[float] = (2.5, 3.0)) -> list[Variant]:
    """The source's systems and the better ones of this package side by side.

    K-means and linear at every number of bits (linear at 8 bits is the source's "int8"); then, at every average, the exact
    allocation with and without Fisher weights and the Hessian baseline; at 2 and 3 bits the source's method as written, Fisher
    weights alone, outliers and distillation. What the averages are compared by is the state before stage 3, so they have none.
    """
    variants = [Variant(f"kmeans-{b}bit", KMQConfig(bits=b)) for b in bits]
    variants += [
        Variant("int8", KMQConfig(preset="int8")) if b == 8 else Variant(f"linear-{b}bit", KMQConfig(preset="linear", bits=b))
        for b in bits
    ]
    for average in averages:
        budget: dict[str, Any] = {"bits_per_weight": average}
        variants += [
            Variant(f"fisher-{average:g}bpw", KMQConfig(allocation="fisher", **budget), stage3=False),
            Variant(f"distortion-{average:g}bpw", KMQConfig(allocation="distortion", **budget), stage3=False),
            Variant(f"hessian-{average:g}bpw", KMQConfig(preset="hessian", **budget), stage3=False),
        ]
    for b in sorted({2, 3} & set(bits)):
        variants += [
            Variant(f"paper-{b}bit", KMQConfig(preset="paper", bits=b), stage3=False),
            Variant(f"kmeans-fisher-{b}bit", KMQConfig(bits=b, weighting="fisher"), stage3=False),
            Variant(f"kmeans-outliers-{b}bit", KMQConfig(bits=b, outlier_fraction=0.005), stage3=False),
            Variant(f"kmeans-distill-{b}bit", KMQConfig(bits=b), distill=True),
        ]
    return variants


@dataclasses.dataclass
class Comparison:
    """A list of configurations for several tasks and seeds: one `Run` for each task and seed, which share nothing but OUT."""

    model: str
    tasks: Sequence[Task | Texts]
    out: Path
    variants: Sequence[Variant]
    seeds: Sequence[int]
    stage1: TrainingSettings
    stage3: TrainingSettings
    command: Sequence[str] = ()
    announce: Callable[[str], None] = log.info
    sensitivity: SensitivitySettings = dataclasses.field(default_factory=SensitivitySettings)
    keep_models: bool = False
    control: bool = True

    def __call__(self) -> list[dict[str, Any]]:
        """Runs what is not finished yet, seed by seed, and returns the results of all runs.

        Raises PipelineError before anything is computed where one of the folders holds another run.
        """
        pairs = [(task, seed) for seed in self.seeds for task in self.tasks]
        runs = [self.run_of(task, seed, self.out / task.folder / f"seed{seed}") for task, seed in pairs]
        for run in runs:
            if run.out.exists():
                run.check()
        return [run() for run in runs]

    def run_of(self, task: Task | Texts, seed: int, out: Path) -> Run:
        """The run of one task and seed, in the folder `out`."""

        plain = isinstance(task, Texts)  # nothing to follow but the model itself
        common = dataclasses.replace(self.stage3, seed=seed, distill=self.stage3.distill or plain)

        def stage3(variant: Variant) -> TrainingSettings | None:
            own: dict[str, Any] = {
                "distill": variant.distill or plain,
                "assignments": variant.assignments,
                "steps": variant.steps or common.steps,
            }
            return dataclasses.replace(common, **own) if variant.stage3 else None

        return Run(
            model=self.model,
            task=task,
            out=out,
            configs={v.name: dataclasses.replace(v.config, seed=seed) for v in self.variants},
            stage1=dataclasses.replace(self.stage1, seed=seed),
            stage3=common,
            stage3_of={v.name: stage3(v) for v in self.variants if stage3(v) != common},
            control=self.control and not plain,
            command=self.command,
            announce=lambda text: self.announce(text if out == self.out else f"{task.name}, seed {seed}: {text}"),
            sensitivity=self.sensitivity,
            keep_models=self.keep_models,
        )
