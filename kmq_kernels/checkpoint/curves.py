"""The first pass of a budget: the error of each weight at 1 to 8 bits, from which the bits of all follow.

A curve is noted as soon as its weight is measured, below OUT/.kmq/curves, with the SHA-256 of the tensor it was measured on; a
run that was killed goes on with the next one. The finished output has all of them in kmq_curves.json.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..files import CheckpointError, read_json
from ..quantization import BITS, distortion_curves
from .plan import StreamPlan, Unit
from .stream import Ahead, as_matrix, batch_bytes, batches, output_errors, read_batch, write_file

CURVES = "kmq_curves.json"


class Curve(NamedTuple):
    """errors: the sum of (weight - decoded)**2 at 1 to 8 bits. source: SHA-256 of the tensor in its file."""

    errors: tuple[float, ...]
    source: str


def measure(
    plan: StreamPlan,
    units: Sequence[Unit],
    state: Path | None,
    device: str,
    known: dict[str, str],
    on_batch: Callable[[list[Unit]], None],
) -> dict[str, Curve]:
    """The curves of units, by name, each noted in the folder `state` (None: nowhere) before the next batch is read.

    known: SHA-256 that tensors must have, by name. Raises CheckpointError where one cannot be read, OutputError where a curve
    cannot be noted, and ValueError naming a weight with NaN or Inf.
    """
    found: dict[str, Curve] = {}
    work = list(batches(units, batch_bytes(plan.units)))
    ahead = Ahead()
    with ThreadPoolExecutor(1) as reader:
        try:
            ready = [reader.submit(ahead.fetch, [unit.source for unit in batch]) for batch in work[:1]]
            for i, batch in enumerate(work):
                sources = [unit.source for unit in batch]
                ready += [reader.submit(ahead.fetch, [unit.source for unit in following]) for following in work[i + 1 : i + 2]]
                digests = ready[i].result()
                tensors = read_batch(batch, digests, known)
                matrices = [as_matrix(unit, tensor.to(unit.dtype)) for unit, tensor in zip(batch, tensors, strict=True)]
                names = [unit.name for unit in batch]
                errors = distortion_curves([matrix.to(device) for matrix in matrices], plan.config, names=names)
                ahead.unchanged(sources)
                del tensors, matrices
                ahead.drop(sources)
                for unit, row in zip(batch, errors.tolist(), strict=True):
                    found[unit.name] = Curve(tuple(row), digests[unit.source.name])
                    if state is not None:
                        note_curve(state, unit.name, found[unit.name])
                on_batch(batch)
        except BaseException:
            ahead.stopped = True
            reader.shutdown(cancel_futures=True)
            raise
    return found


def note_curve(state: Path, name: str, curve: Curve) -> None:
    """Notes a curve in the folder of an unfinished output."""
    folder = state / "curves"
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
        record = {"name": name, **curve._asdict()}
        write_file(folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json", json.dumps(record).encode(), folder)


def noted_curves(state: Path, plan: StreamPlan) -> dict[str, Curve]:
    """The curves that an earlier run noted for the units that a plan has measured, by name."""
    names = {unit.name for unit in plan.measured}
    found = {}
    for path in sorted((state / "curves").glob("*.json")):
        record = read_json(path)
        if isinstance(record, dict) and record.get("name") in names and (curve := _curve(record)) is not None:
            found[record["name"]] = curve
    for partial in (state / "curves").glob("*.partial"):
        partial.unlink()
    return found


def _curve(record: dict[str, Any]) -> Curve | None:
    errors, source = record.get("errors"), record.get("source")
    if not isinstance(errors, list) or len(errors) != len(BITS) or not isinstance(source, str):
        return None
    if not all(isinstance(error, float) and 0 <= error < math.inf for error in errors):
        return None
    return Curve(tuple(errors), source)


def curves_json(plan: StreamPlan, curves: dict[str, Curve]) -> str:
    """What kmq_curves.json holds: for each weight that a decided plan measured, its bits, and its bytes and errors at 1 to 8."""
    assert plan.undecided is not None
    assert plan.undecided.budget is not None
    budget, bits = plan.undecided.budget, {unit.name: unit.bits for unit in plan.units}
    weights = {
        name: {"bits": bits[name], "bytes": costs, **curves[name]._asdict()}
        for name, costs in zip(budget.parameters, budget.costs, strict=True)
    }
    content = {"format": 1, "budget": budget.whole, "room": budget.room, "weights": weights}
    return json.dumps(content, indent=1) + "\n"


def read_curves(path: Path, plan: StreamPlan) -> dict[str, Curve]:
    """The curves in a kmq_curves.json; raises CheckpointError where it does not have those that a plan has measured."""
    content = read_json(path)
    weights = content.get("weights") if isinstance(content, dict) else None
    found = {}
    for unit in plan.measured:
        record = weights.get(unit.name) if isinstance(weights, dict) else None
        curve = _curve(record) if isinstance(record, dict) else None
        if curve is None:
            raise CheckpointError(f"{path}: it has no curve of {unit.name}; remove that file and give the same command again")
        found[unit.name] = curve
    return found
