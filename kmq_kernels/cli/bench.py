"""`kmq bench`: an encoder in fp32 beside its packed form, on the machine that runs it."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

from .layout import table
from .messages import note, quieten
from .options import (
    DATA,
    MEASUREMENT,
    QUANTIZATION,
    AsJson,
    Compute,
    Granularity,
    GranularityOption,
    ModelArg,
    Verbose,
    number,
    option,
)

SHAPES = "1x16,1x128,8x128,32x64,32xv64"
_BATCH = 32  # texts of a file

# Run by a process of its own: the growth of its resident memory by loading a model and one pass of 8 x 128 tokens.
_RESIDENT = """
import gc, sys, torch, transformers, warnings, kmq_kernels
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
warnings.simplefilter("ignore")
folder, kind, compute = sys.argv[1:]
with torch.inference_mode():
    # What the libraries themselves load at first use is not the model's.
    tiny = transformers.BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    transformers.BertModel(tiny).eval()(torch.ones(8, 128, dtype=torch.long))
    gc.collect()
    before = resident()
    model = kmq_kernels.load(folder) if kind == "packed" else transformers.AutoModel.from_pretrained(folder)
    model = model.eval() if compute == "none" else kmq_kernels.optimize_(model.eval(), compute)
    tokens = min(128, model.config.max_position_embeddings - 2)
    model(torch.ones(8, tokens, dtype=torch.long))
    # Pages of a mapped file count when they are read, so every parameter is.
    for parameter in model.parameters():
        parameter.float().sum() if parameter.dtype.is_floating_point else parameter.max()
    gc.collect()
    print(resident() - before)
"""


def resident_growth(folder: Path, kind: str, compute: str | None) -> int | None:
    """Bytes that a fresh process grows by loading "fp32" or "packed" weights and one pass; None where the system does not say."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-c", _RESIDENT, str(folder), kind, compute or "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the memory of the {kind} model: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def random_batch(shape: str, vocabulary: int, longest: int) -> dict[str, Any]:
    """Token ids and mask of a shape: batch x tokens, or batch x vTOKENS for texts of 4 to so many, mean about 14."""
    import torch

    batch, _, tokens = shape.partition("x")
    most = tokens.removeprefix("v")
    if not batch.isdecimal() or not most.isdecimal() or int(batch) < 1 or int(most) < 1:
        raise ValueError(f"shapes: expected shapes such as 8x128 or 32xv64, got {shape!r}")
    if int(most) > longest:
        raise ValueError(f"shapes: expected at most {longest} tokens for this model, got {shape!r}")
    generator = torch.Generator().manual_seed(int(batch) * 1000 + int(most))
    lengths = torch.full((int(batch),), int(most))
    if tokens.startswith("v"):
        drawn = torch.randn(int(batch), generator=generator) * 0.5 + 2.6
        lengths = drawn.exp().round().long().clamp(min(4, int(most)), int(most))
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(5, vocabulary, mask.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": mask.long()}


def text_batches(folder: str, file: Path, longest: int) -> list[dict[str, Any]]:
    """The lines of a file, in batches in their order, padded to the longest of each."""
    from transformers import AutoTokenizer

    texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"texts: expected lines of text in {file}, got none")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    return [dict(tokenizer(texts[i : i + _BATCH], **options)) for i in range(0, len(texts), _BATCH)]


def mean_states(model: Any, batch: dict[str, Any]) -> Any:
    """Mean of the states of each text's tokens, (batch, hidden)."""
    kept = batch["attention_mask"][..., None].float()
    return (model(**batch).last_hidden_state.float() * kept).sum(1) / kept.sum(1)


def compare(models: dict[str, Any], batches: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    """Each model's ms for all batches, in turn and in shuffled order, its texts a second, its speed over the first model's
    (median of paired ratios), and the worst and the mean cosine between the mean states of a text and the first model's.
    """
    import torch

    times: dict[str, list[float]] = {name: [] for name in models}
    means = {name: torch.cat([mean_states(model, batch) for batch in batches]) for name, model in models.items()}
    for _ in range(repeats):
        for name in random.sample(list(models), len(models)):
            start = time.perf_counter()
            for batch in batches:
                models[name](**batch)
            times[name].append(time.perf_counter() - start)
    first, texts = next(iter(models)), sum(len(batch["input_ids"]) for batch in batches)
    rows = {}
    for name in models:
        seconds = statistics.median(times[name])
        cosine = torch.cosine_similarity(means[first].double(), means[name].double(), -1)
        rows[name] = {
            "ms": seconds * 1e3,
            "texts_per_second": texts / seconds,
            "ratio": statistics.median(a / b for a, b in zip(times[first], times[name], strict=True)),
            "worst_cosine": float(cosine.min()),
            "mean_cosine": float(cosine.mean()),
        }
    return rows


def _models(folder: str, bits: int | None, granularity: Granularity) -> tuple[Any, Any]:
    """The model in fp32 and its packed form: that of the folder, or one quantized with `bits`."""
    import copy

    import torch
    from transformers import AutoModel

    from ..layers import CodebookModule
    from ..quantization import KMQConfig, dequantize_, quantize_

    found = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if any(isinstance(module, CodebookModule) for module in found.modules()):
        if bits is not None:
            raise ValueError(f"bits: {folder} is quantized already, so its bits are given")
        dense = copy.deepcopy(found)
        dequantize_(dense)
        return dense, found
    packed = copy.deepcopy(found)
    quantize_(packed, KMQConfig(bits=bits or 4, granularity=granularity.value))
    return found, packed


def bench(
    model: ModelArg = "minilm",
    shapes: Annotated[
        str, option(DATA, "LIST", "Batch x tokens, comma-separated; v64: texts of 4 to 64 tokens, padded.")
    ] = SHAPES,
    texts: Annotated[Path | None, option(DATA, "FILE", "File with a text a line, instead of random tokens.")] = None,
    bits: Annotated[
        int | None,
        option(
            QUANTIZATION,
            "N",
            "Bits of an index, 1 to 8, for a model that is not quantized yet.",
            default="4",
            check=number("bits", 1, 8),
        ),
    ] = None,
    granularity: GranularityOption = Granularity.tensor,
    compute: Annotated[Compute, option(MEASUREMENT, "float|int8", "Arithmetic of the packed model.")] = Compute.float,
    repeats: Annotated[int, option(MEASUREMENT, "N", "Times that each model runs each shape.", check=number("repeats", 1))] = 15,
    threads: Annotated[int | None, option(MEASUREMENT, "N", "Threads.", default="torch's", check=number("threads", 1))] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Time, memory and outputs of MODEL in fp32 and packed, on this machine."""
    import torch

    from ..layers import optimize_
    from ..ops import build_info
    from ..training import resolve_model

    quieten(verbose)
    if threads is not None:
        torch.set_num_threads(threads)
    random.seed(0)
    folder = resolve_model(model)
    dense, packed = _models(folder, bits, granularity)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimize_(packed, compute.value)
    name = f"packed, {compute.value}"
    models: dict[str, Any] = {"fp32": dense, name: packed}
    longest = getattr(dense.config, "max_position_embeddings", 512) - 2
    if texts is not None:
        measured = {texts.name: text_batches(folder, texts, min(longest, 256))}
    else:  # all mistakes come before the first measurement
        measured = {shape: [random_batch(shape, dense.config.vocab_size, longest)] for shape in shapes.split(",")}
    with torch.inference_mode():
        results = {key: compare(models, batches, repeats) for key, batches in measured.items()}
    memory = {}
    with tempfile.TemporaryDirectory() as scratch:
        for key, one in models.items():
            one.save_pretrained(Path(scratch) / key)
        del models, dense, packed
        memory["fp32"] = resident_growth(Path(scratch) / "fp32", "fp32", None)
        memory[name] = resident_growth(Path(scratch) / name, "packed", compute.value)
    notes = [str(warning.message) for warning in said if issubclass(warning.category, UserWarning)]
    if as_json:
        conditions = {"threads": torch.get_num_threads(), "torch": torch.__version__, "build": build_info()["extension"]}
        print(json.dumps({"model": model, "conditions": conditions, "rows": results, "resident_bytes": memory, "notes": notes}))
        return
    cells = [
        (
            f"{shape} {key}", f"{row['ms']:.2f}", f"{row['texts_per_second']:.1f}", f"{row['ratio']:.2f}x",
            f"{row['worst_cosine']:.4f}", f"{row['mean_cosine']:.4f}",
        )
        for shape, rows in results.items()
        for key, row in rows.items()
    ]  # fmt: skip
    columns = ("shape and model", "ms", "texts/s", "speed", "worst cosine", "mean cosine")
    print(table(columns, cells, f"{model}, {torch.get_num_threads()} threads"))
    if all(memory.values()):
        shown = ", ".join(f"{key} {size / 2**20:.1f} MiB" for key, size in memory.items() if size is not None)
        print(f"\nresident memory after 8x128 tokens: {shown} ({(memory[name] or 0) / (memory['fp32'] or 1):.3f})")
    for sentence in notes:
        note(sentence)
