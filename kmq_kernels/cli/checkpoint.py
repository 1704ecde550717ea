"""`kmq quantize` and `kmq verify`: checkpoints of any size from the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .options import Granularity, ModelArg, OutOption, Scheme, Seed, console, given, parse_bytes


def quantize(
    model: ModelArg,
    out: OutOption,
    bits: Annotated[int, typer.Option(help="Bits of an index, 1 to 8; int8 has 8.")] = 4,
    scheme: Scheme = Scheme.kmeans,
    granularity: Granularity = Granularity.tensor,
    group_rows: Annotated[int, typer.Option(help="Rows of a group.")] = 8,
    preset: Annotated[str | None, typer.Option(help="A system of the source: paper, linear or int8.")] = None,
    outlier_fraction: Annotated[float, typer.Option(help="Share of each weight that is kept exactly.")] = 0.0,
    row_scale: Annotated[bool, typer.Option(help="A factor for each row beside the shared codebook.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="Pattern of module names to leave; may be repeated.")] = None,
    module_bits: Annotated[list[str] | None, typer.Option(help="PATTERN=BITS for some modules; may be repeated.")] = None,
    seed: Seed = 0,
    model_class: Annotated[str | None, typer.Option(help="Class of transformers. [default: the one in config.json]")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of the output, such as 500MB or 2GB.")] = "256MB",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU where clustering has a kernel for it.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show every tensor, its bits and sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Cluster a checkpoint of any size, tensor by tensor, without building the model. The same command again resumes.

    Under torchrun the ranks share the work: torchrun --nproc-per-node 4 -m kmq_kernels.cli quantize MODEL -o OUT.

    Exit codes: 0 done, 1 refused, 2 usage, 3 the output cannot be written, 4 a rank died, 5 damaged output, 130 interrupted.
    """
    from .. import checkpoint
    from ..quantization import KMQConfig

    options: dict[str, Any] = {
        "bits": bits, "scheme": scheme.value, "granularity": granularity.value, "group_rows": group_rows, "preset": preset,
        "skip": skip, "module_bits": _module_bits(module_bits), "outlier_fraction": outlier_fraction, "row_scale": row_scale,
        "seed": seed,
    }  # fmt: skip
    config = KMQConfig(**given(options))
    shard_bytes = parse_bytes("shard-size", shard_size)

    def make_plan() -> Any:
        folder, root = _source(model, revision)
        return checkpoint.make_plan(folder, config, model_class=model_class, shard_bytes=shard_bytes, root=root)

    plan = checkpoint.in_child(make_plan)
    if dry_run:
        _print_notes(plan)
        _print_plan(plan, as_json)
        return
    with checkpoint.Ranks.of_environment() as job:
        if job.rank == 0:
            _print_notes(plan)
        with _progress() as on_progress:
            summary = checkpoint.quantize_checkpoint(
                plan, out, device=checkpoint.choose_device(device, job), ranks=job, on_progress=on_progress
            )
        if job.rank == 0:
            _print_summary(summary, job.size, as_json)


def _source(model: str, revision: str | None) -> tuple[Path, Path | None]:
    """The folder of a model, and the root its links may lead to."""
    from .. import checkpoint

    if model == "minilm" and not Path(model).exists():
        from ..training import resolve_model

        model = resolve_model(model)
    return checkpoint.find_source(model, revision)


def _module_bits(given: list[str] | None) -> dict[str, int] | None:
    found = {}
    for text in given or []:
        pattern, _, bits = text.rpartition("=")
        if not pattern or not bits.isdecimal():
            raise ValueError(f"module-bits: expected PATTERN=BITS, got {text!r}")
        found[pattern] = int(bits)
    return found or None


def _print_notes(plan: Any) -> None:
    for name in plan.left_out:
        print(f"kmq: left out: {plan.model_class} has no {name}", file=sys.stderr)
    for name in plan.files_left_out:
        print(f"kmq: left out: {name}, the model in another format", file=sys.stderr)
    for sentence in plan.remarks:
        print(f"kmq: {sentence}", file=sys.stderr)


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
    table = Table(title=f"{plan.source} as {plan.model_class}")
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "bits", "bytes before", "after"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        kept = "kept" if row["bits"] is None else str(row["bits"])
        shape = "x".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, kept, f"{row['bytes_before']:,}", f"{row['bytes_after']:,}")
    console.print(table)
    files = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"
    console.print(f"{before:,} bytes, {after:,} after, in {files}; nothing was written")


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal: share, MB/s, remaining time, current tensor; in a log a line every half minute."""
    from rich import progress as bars

    screen = Console(stderr=True, markup=False, emoji=False)
    columns = (
        bars.BarColumn(), bars.TaskProgressColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    start = said = time.monotonic()
    with bars.Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(state: Any) -> None:
            nonlocal said
            bar.update(task, total=state.total, completed=state.done, description=state.tensor)
            now = time.monotonic()
            if not screen.is_terminal and now - said > 30:
                said = now
                rate = (state.done - state.resumed) / (now - start)
                figures = f"{state.done / state.total:.1%}, {rate / 1e6:.0f} MB/s, {(state.total - state.done) / rate:.0f} s left"
                print(f"kmq: {figures}, {state.tensor}", file=sys.stderr, flush=True)

        yield show


def _print_summary(summary: Any, ranks: int, as_json: bool) -> None:
    times = summary.times
    facts = {**dataclasses.asdict(summary), "bits_per_weight": summary.bits_per_weight, "ranks": ranks}
    if as_json:
        print(json.dumps(facts))
        return
    table = Table("", "", title=f"{summary.model_class}, {summary.weights:,} weights", show_header=False)
    table.add_row("quantized", f"{summary.quantized_weights:,} weights")
    table.add_row("bytes", f"{summary.bytes_before:,} before, {summary.bytes_after:,} after")
    table.add_row("bits per weight", f"{summary.bits_per_weight:.3f}")
    by = "now" if ranks == 1 else "now by rank 0"
    table.add_row("files of weights", f"{summary.shards}, {summary.shards_made} of them made {by}")
    if summary.shards_made:
        rate = summary.read_bytes / times.total / 1e6
        table.add_row("seconds", f"{times.total:.1f}: {rate:,.0f} MB/s read")
        parts = f"waiting to read {times.read:.1f}, clustering {times.cluster:.1f}; writing beside {times.write:.1f}"
        table.add_row("of them", parts)
    table.add_row("peak memory", f"{summary.peak_bytes / 1e6:,.0f} MB")
    console.print(table)
    if summary.side_files_made and not summary.shards_made:
        console.print("made again from the source as it is now: the files beside the weights")
    console.print(f"complete, every file checked: {summary.out}", soft_wrap=True)


def verify(
    out: Annotated[Path, typer.Argument(help="Model folder, such as one that `kmq quantize` wrote.")],
    source: Annotated[str | None, typer.Option(help="Also check that it was made from this model, as that is now.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id for --source.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every file of a folder against its checksums, and every header against its file. Exit code 5: damaged."""
    from .. import checkpoint

    found = checkpoint.verify_checkpoint(out, *((None, None) if source is None else _source(source, revision)))
    if as_json:
        print(json.dumps(found))
        return
    checked = f"{found['files']} files match their checksums" if found["files"] else f"no {checkpoint.MANIFEST}, so no checksums"
    if source is not None:
        checked += f"; made from {found['source_tensors']} tensors of {source} as it is now"
    console.print(f"{out}: {found['tensors']} tensors, {found['bytes']:,} bytes, complete; {checked}", soft_wrap=True)
