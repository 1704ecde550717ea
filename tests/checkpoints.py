"""Quantizing a checkpoint, what a folder holds, and changing its tensors."""

from pathlib import Path

from safetensors.torch import load_file, save_file

import kmq_kernels as kmq
from kmq_kernels.checkpoint import make_plan, quantize_checkpoint


def quantize(source, out, *, model_class=None, shard_bytes=256_000_000, on_progress=None, **options):
    """Plan and stream; options are those of the configuration."""
    plan = make_plan(Path(source), kmq.KMQConfig(**options), model_class=model_class, shard_bytes=shard_bytes)
    return quantize_checkpoint(plan, Path(out), on_progress=on_progress)


def content(folder):
    """The bytes of every file below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def rewrite(folder, change):
    """Applies `change` to the tensors of a folder (name -> tensor), in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
