"""`kmq quantize` and `kmq verify`: checkpoints of any size from the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from ..terminal import draws_bars
from .command import Command
from .layout import pairs, table
from .messages import note, quieten
from .options import (
    MODEL,
    OUTPUT,
    PRESETS,
    QUANTIZATION,
    Allocation,
    AsJson,
    BitsPerWeight,
    Granularity,
    GranularityOption,
    GroupRows,
    ModelArg,
    Objective,
    ObjectiveOption,
    OutlierFraction,
    OutOption,
    RowScale,
    Scheme,
    SchemeOption,
    SizeOption,
    Verbose,
    argument,
    number,
    option,
    refuse_both,
    size_of,
)

CALIBRATION_TEXTS, CALIBRATION_TOKENS, CALIBRATION_BATCH = 512, 128, 16  # at most, of a text at most, in a batch


def quantize(
    model: ModelArg,
    out: OutOption,
    revision: Annotated[str | None, option(MODEL, "NAME", "Revision of a hub id.", default="the newest")] = None,
    model_class: Annotated[
        str | None, option(MODEL, "CLASS", "Class of transformers, such as BertModel.", default="the one in config.json")
    ] = None,
    base_model: Annotated[
        str | None, option(MODEL, "ID", "Id on the hub of MODEL, for the card.", default="MODEL where that is one")
    ] = None,
    bits: Annotated[
        int | None, option(QUANTIZATION, "N", "Bits of an index, 1 to 8; int8 has 8.", default="4", check=number("bits", 1, 8))
    ] = None,
    bits_per_weight: BitsPerWeight = None,
    size: SizeOption = None,
    allocation: Annotated[
        Allocation | None,
        option(
            QUANTIZATION,
            "uniform|distortion",
            "How a budget is spent: the same bits for all weights, or those of the least squared error, for which every weight is"
            " read once more.",
            default="distortion with a budget, else uniform",
        ),
    ] = None,
    scheme: SchemeOption = Scheme.kmeans,
    granularity: GranularityOption = Granularity.tensor,
    group_rows: GroupRows = 8,
    preset: Annotated[str | None, option(QUANTIZATION, "NAME", f"A published system: {PRESETS}.")] = None,
    objective: ObjectiveOption = Objective.weights,
    calibration_file: Annotated[
        Path | None, option(QUANTIZATION, "FILE", "Texts for objective output: txt (a text a line), csv, tsv or jsonl.")
    ] = None,
    text_column: Annotated[str, option(QUANTIZATION, "NAME", "Column of the text in the calibration file.")] = "text",
    outlier_fraction: OutlierFraction = 0.0,
    row_scale: RowScale = False,
    skip: Annotated[
        list[str] | None,
        option(
            QUANTIZATION,
            "PATTERN",
            "Modules to leave as they are: a regular expression over whole components of their names, such"
            " as word_embeddings or 'layer.0.attention'; may be repeated.",
        ),
    ] = None,
    module_bits: Annotated[
        list[str] | None,
        option(
            QUANTIZATION,
            "PATTERN=BITS",
            "Other bits for some modules, such as pooler=8 or 'layer.[01]=6'; the first pattern that"
            " matches counts; may be repeated.",
        ),
    ] = None,
    seed: Annotated[int, option(QUANTIZATION, "N", "Seed of everything random.")] = 0,
    shard_size: Annotated[
        str,
        option(
            OUTPUT,
            "SIZE",
            "Largest file of the output, such as 500MB, 2GiB or 500_000_000.",
            check=size_of("shard_size"),
        ),
    ] = "256MB",
    device: Annotated[
        str, option(OUTPUT, "cpu|cuda|auto", "Where weights are clustered; auto: the GPU where there is a kernel for it.")
    ] = "auto",
    dry_run: Annotated[bool, option(OUTPUT, "", "Only show every tensor, its bits and sizes.", "--dry-run")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Cluster a checkpoint of any size, tensor by tensor; only objective "output" has the whole model in memory.

    --size and --bits-per-weight find the bits of every weight: one pass measures, one packs. The same command again resumes.
    Under torchrun the ranks share the work: torchrun --nproc-per-node 4 -m kmq_kernels.cli quantize MODEL -o OUT.
    """
    given = _module_bits(module_bits)
    refuse_both(bits, size, bits_per_weight)
    if allocation is None and (size or bits_per_weight) and preset != "hessian":
        allocation = Allocation.distortion
    if (objective is Objective.output) != (calibration_file is not None):
        needed = "a calibration file" if calibration_file is None else "no calibration file"
        raise ValueError(f"calibration_file: objective {objective.value!r} needs {needed}")
    texts = None if calibration_file is None else _texts(calibration_file, text_column, seed)
    from .. import checkpoint
    from ..files import parse_size
    from ..quantization import KMQConfig

    quieten(verbose)
    options: dict[str, Any] = {
        "bits": bits, "scheme": scheme.value, "granularity": granularity.value, "group_rows": group_rows, "preset": preset,
        "skip": skip, "module_bits": given, "outlier_fraction": outlier_fraction, "row_scale": row_scale, "seed": seed,
        "objective": objective.value,
    }  # fmt: skip
    budget: dict[str, Any] = {"size": size, "bits_per_weight": bits_per_weight, "allocation": allocation and allocation.value}
    config = KMQConfig(**Command.given(options), **{name: value for name, value in budget.items() if value is not None})
    largest = parse_size("shard_size", shard_size)

    def make_plan() -> Any:
        folder, root = _source(model, revision)
        where: dict[str, Any] = {"model_class": model_class, "root": root, "base_model": base_model or _embedded_id(model)}
        return checkpoint.make_plan(folder, config, shard_bytes=largest, **where)

    plan = checkpoint.in_child(make_plan)
    if dry_run:
        _say_notes(plan)
        _print_plan(checkpoint.decide(plan, checkpoint.choose_device(device, checkpoint.Ranks())), as_json)
        return
    batches = None if texts is None else _batches(plan.source, texts)
    with checkpoint.Ranks.of_environment() as job:
        if job.rank == 0:
            _say_notes(plan)
        with _progress() as on_progress:
            summary = checkpoint.quantize_checkpoint(
                plan, out, device=checkpoint.choose_device(device, job), ranks=job, on_progress=on_progress, calibration=batches
            )
        if job.rank == 0:
            _print_summary(summary, job.size, as_json)


def _say_notes(plan: Any) -> None:
    for name in plan.left_out:
        note(f"left out: {plan.model_class} has no {name}")
    for name in plan.files_left_out:
        note(f"left out: {name}, the model in another format")
    for sentence in plan.remarks:
        note(sentence)


def _source(model: str, revision: str | None) -> tuple[Path, Path | None]:
    """The folder of a model, and the root its links may lead to."""
    from .. import checkpoint

    if model == "minilm" and not Path(model).exists():
        from ..training import resolve_model

        model = resolve_model(model)
    return checkpoint.find_source(model, revision)


def _embedded_id(model: str) -> str | None:
    """The id on the hub of the model in the [demo] extra, where it is meant."""
    if model != "minilm" or Path(model).exists():
        return None
    from ..training import EMBEDDED_ID

    return EMBEDDED_ID


def _texts(path: Path, column: str, seed: int) -> list[str]:
    """The texts to calibrate with, each once, of many a sample; what was left out is said."""
    from ..tasks import read_texts

    file = read_texts(path, column)
    for sentence in file.note:
        note(sentence)
    texts = list(dict.fromkeys(file.texts))
    if len(texts) > CALIBRATION_TEXTS:
        note(f"{path}: {CALIBRATION_TEXTS} of {len(texts):,} texts are used, drawn with seed {seed}")
        texts = random.Random(seed).sample(texts, CALIBRATION_TEXTS)
    return texts


def _batches(folder: Path, texts: list[str]) -> list[dict[str, Any]]:
    """The texts as a model takes them, those of similar length together."""
    from .. import hf, training

    tokenizer, config = training.load_tokenizer(str(folder)), hf.model_config(folder)
    positions = getattr(config, "max_position_embeddings", None) or CALIBRATION_TOKENS
    padding = getattr(config, "pad_token_id", None)
    behind = padding + 1 if padding is not None and padding < 8 else 0  # RoBERTa and its kin count positions from there on
    longest = min(CALIBRATION_TOKENS, positions - behind)
    names = {"input_ids", "attention_mask", "token_type_ids"} & set(tokenizer.model_input_names)
    ordered = sorted(texts, key=lambda text: (len(text), text))
    made = []
    for first in range(0, len(ordered), CALIBRATION_BATCH):
        part = ordered[first : first + CALIBRATION_BATCH]
        tokens = tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        made.append({name: tokens[name] for name in sorted(names) if name in tokens})
    return made


def _module_bits(given: list[str] | None) -> dict[str, int] | None:
    found = {}
    for text in given or []:
        pattern, _, bits = text.rpartition("=")
        if not pattern or not bits.isdecimal():
            raise ValueError(f"module_bits: expected PATTERN=BITS, got {text!r}")
        found[pattern] = int(bits)
    return found or None


def _print_plan(plan: Any, as_json: bool) -> None:
    rows = [
        {
            "name": unit.name,
            "shape": list(unit.source.shape),
            "bits": unit.bits,
            "bytes_before": unit.source.nbytes,
            "bytes_after": unit.nbytes,
            "file": shard.name,
        }
        for shard in plan.shards
        for unit in shard.units
    ]
    before, after = (sum(row[key] for row in rows) for key in ("bytes_before", "bytes_after"))
    if as_json:
        facts = {"model_class": plan.model_class, "bytes_before": before, "bytes_after": after, "left_out": plan.left_out}
        print(json.dumps({**facts, "tensors": rows}))
        return
    shown = [
        (
            row["name"], "x".join(map(str, row["shape"])), "kept" if row["bits"] is None else row["bits"],
            f"{row['bytes_before']:,}", f"{row['bytes_after']:,}",
        )
        for row in rows
    ]  # fmt: skip
    print(table(("tensor", "shape", "bits", "bytes before", "bytes after"), shown, f"{plan.source} as {plan.model_class}"))
    files = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"
    print(f"\n{before:,} bytes, {after:,} after, in {files}; nothing was written")


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal: share, MB/s, remaining time, current tensor; in a log a line every half minute."""
    from rich import progress as bars
    from rich.console import Console

    screen = Console(stderr=True, markup=False, emoji=False)
    drawn = draws_bars()
    columns = (
        bars.BarColumn(), bars.TaskProgressColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    start = said = time.monotonic()
    with bars.Progress(*columns, console=screen, disable=not drawn, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(state: Any) -> None:
            nonlocal said
            bar.update(task, total=state.total, completed=state.done, description=state.tensor)
            now = time.monotonic()
            if not drawn and now - said > 30:
                said = now
                rate = (state.done - state.resumed) / (now - start)
                figures = f"{state.done / state.total:.1%}, {rate / 1e6:.0f} MB/s, {(state.total - state.done) / rate:.0f} s left"
                note(f"{figures}, {state.tensor}")

        yield show


def _print_summary(summary: Any, ranks: int, as_json: bool) -> None:
    times = summary.times
    facts = {**dataclasses.asdict(summary), "bits_per_weight": summary.bits_per_weight, "ranks": ranks}
    if as_json:
        print(json.dumps(facts))
        return
    budget = []
    if summary.size is not None:
        share = summary.file_bytes / summary.size
        budget = [("of the budget", f"{summary.file_bytes:,} of {summary.size:,} bytes on disk, {share:.1%}")]
    rows = [
        ("quantized", f"{summary.quantized_weights:,} weights"),
        ("bytes", f"{summary.bytes_before:,} before, {summary.bytes_after:,} after"),
        ("bits per weight", f"{summary.bits_per_weight:.3f}"),
        ("bits of weights", ", ".join(f"{count} of {bits}" for bits, count in summary.module_bits.items())),
        *budget,
        ("files of weights", f"{summary.shards}, {summary.shards_made} of them made {'now' if ranks == 1 else 'now by rank 0'}"),
    ]
    if summary.read_bytes:
        rate = summary.read_bytes / times.total / 1e6
        rows.append(("seconds", f"{times.total:.1f}: {rate:,.0f} MB/s read"))
        first = f"measuring {times.measure:.1f}, " if times.measure else ""
        parts = f"{first}waiting to read {times.read:.1f}, clustering {times.cluster:.1f}; writing beside {times.write:.1f}"
        rows.append(("of them", parts))
    rows.append(("peak memory", f"{summary.peak_bytes / 1e6:,.0f} MB"))
    print(pairs(rows, f"{summary.model_class}, {summary.weights:,} weights"))
    again = "made again from the source as it is now: the files beside the weights\n"
    print(f"\n{again if summary.side_files_made and not summary.shards_made else ''}complete, every file checked: {summary.out}")


def verify(
    out: Annotated[Path, argument("DIR", "Model folder, such as one that `kmq quantize` wrote.")],
    source: Annotated[str | None, option(MODEL, "MODEL", "Also check that it was made from this model, as that is now.")] = None,
    revision: Annotated[str | None, option(MODEL, "NAME", "Revision of a hub id for --source.", default="the newest")] = None,
    as_json: AsJson = False,
) -> None:
    """Check every file of a folder against its checksums, and every header against its file.

    Exit code 5: damaged.
    """
    from .. import checkpoint

    found = checkpoint.verify_checkpoint(out, *((None, None) if source is None else _source(source, revision)))
    if as_json:
        print(json.dumps(found))
        return
    checked = f"{found['files']} files match their checksums" if found["files"] else f"no {checkpoint.MANIFEST}, so no checksums"
    if source is not None:
        checked += f"; made from {found['source_tensors']} tensors of {source} as it is now"
    print(f"{out}: {found['tensors']} tensors, {found['bytes']:,} bytes, complete; {checked}")
