"""The three stages on transformers' Trainer, and comparisons of many configurations."""

from ..tasks import Task, TaskError, Texts, load_task, tokenize
from .comparison import Comparison, Variant, read_variants, standard_variants
from .distillation import distillation_loss
from .finetune import calibration_batches, evaluate, finetune, parameter_groups
from .models import EMBEDDED_ID, EMBEDDED_MODEL, check_fits, load_for_task, load_tokenizer, resolve_model, save
from .moving import MOVING_STEPS, default_assignments, moving
from .run import Run, stopped_stages
from .settings import DivergedError, PipelineError, SensitivitySettings, TrainingSettings
from .single import evaluate_embedder, finetune_folder

__all__ = [
    "EMBEDDED_ID",
    "EMBEDDED_MODEL",
    "MOVING_STEPS",
    "Comparison",
    "DivergedError",
    "PipelineError",
    "Run",
    "SensitivitySettings",
    "Task",
    "TaskError",
    "Texts",
    "TrainingSettings",
    "Variant",
    "calibration_batches",
    "check_fits",
    "default_assignments",
    "distillation_loss",
    "evaluate",
    "evaluate_embedder",
    "finetune",
    "finetune_folder",
    "load_for_task",
    "load_task",
    "load_tokenizer",
    "moving",
    "parameter_groups",
    "read_variants",
    "resolve_model",
    "save",
    "standard_variants",
    "stopped_stages",
    "tokenize",
]
