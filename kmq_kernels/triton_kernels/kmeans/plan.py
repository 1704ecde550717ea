"""All problems of a model at once: histogram, solve, labels, in a fixed number of launches and without a word to the host.

A problem of more than SMALL values is counted in a histogram; a smaller one is sorted by one program (rows.py). Both end
in solve.py, on points. The histogram is the CPU engine's: its key of y = value - origin is the bit pattern of
|y| + scale without its low bits, with a sample's median and size as origin and scale: 2**bits bins up to `scale` and in each of
the next four octaves, then 8 an octave to the end of fp32. The low bits (8 of them) are summed beside the count in one 64-bit
integer, so a bin knows the mean of its members; for weights there are two such integers in fixed point. 16-bit values count
under their own bits. All sums of the histogram are integers: the order of the atomics does not matter.

Bins wider than the values differ cannot tell them apart. For values far out, and where few bins are occupied or some are too wide
for what lies in them, the smallest and the largest key of each bin are kept too: a bin whose two are equal stands for one value,
exactly. The others are split into parts, by the weight in them, and all is counted again, up to ROUNDS times. The launches of
these rounds are made in any case, and do nothing for problems that need none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...packing import BLOCK, row_bytes
from .. import worklist
from ..assign import TILE, assign_kernel, levels_of, options
from ..dequantize import on_device
from ..worklist import tile_list
from .edges import finish_kernel, mark_kernel, solve_kernel
from .histogram import (
    CHUNK,
    COUNT_TILE,
    FAR_BINS,
    HALF_KEYS,
    PART,
    ROUNDS,
    UNRESOLVED,
    VALUES_NOT_FINITE,
    WEIGHTS_NEGATIVE,
    WEIGHTS_NOT_FINITE,
    WEIGHTS_ZERO,
    count_kernel,
    look_kernel,
    sample_half_kernel,
    sample_kernel,
    split_kernel,
    weight_kernel,
    zoom_kernel,
)
from .rows import PROGRAMS, SMALL, SPLITS, launch_rows, part_for
from .solve import MOST_EXACT

MOST_VALUES = 1 << 28
SCRATCH_BYTES = 1 << 30  # that problems solved at the same time may use


def bits_for(num_centroids: int) -> int:
    """log2 of the bins an octave: a cluster near the mean is some 60 bins wide."""
    return 11 if num_centroids <= 16 else 12


def cells_for(num_centroids: int, small: bool, dtype: torch.dtype) -> int:
    """Half of the cells at most. Of a small problem each value can be one."""
    least = 2048 if small else 1024 if num_centroids > 16 or dtype != torch.float32 else 512
    return min(max(16 * num_centroids, least), 4096)


@dataclass
class _Wave:
    """Problems [begin, begin + P) of a plan, and the workspace they share with the other waves."""

    begin: int
    labels: worklist.WorkList
    tiles: worklist.WorkList  # of the counting passes
    scratch: dict[str, Tensor]


class Plan:
    """All of a clustering but the launches: allocated and listed once, then `launch` any number of times.

    values: contiguous matrices (rows, cols), one dtype (fp32, bf16, fp16), on one device; sample_weight: like them, fp32, or
    None; group_rows rows share a problem. small: problems are solved by one program each, on their sorted values, else by
    histogram. `launch` neither allocates nor asks the host anything, so that a CUDA graph can hold it; it then clusters what
    stands in the same memory. Outputs: labels, one tensor for each matrix; centroids (P, K), inertia, iterations, bound and
    status (P,) for all problems in order; what the bits of a status mean stands above.
    """

    def __init__(
        self,
        values: Sequence[Tensor],
        sample_weight: Sequence[Tensor] | None,
        num_centroids: int,
        group_rows: Sequence[int],
        *,
        packed: bool,
        small: bool = False,
        max_iter: int = 300,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        self.values, self.weights = list(values), None if sample_weight is None else list(sample_weight)
        self.K, self.packed, self.small, self.max_iter = num_centroids, packed, small, max_iter
        self.dtype, self.device, self.levels = values[0].dtype, values[0].device, levels_of(num_centroids)
        rows = torch.tensor([len(matrix) for matrix in values])
        cols = torch.tensor([matrix.shape[1] for matrix in values])
        step = torch.minimum(torch.tensor(list(group_rows)), rows)
        self.groups = (-(-rows // step)).tolist()
        owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(self.groups))
        first_row = tile_list(torch.tensor(self.groups))[1].long() * step[owner]
        held, cols = torch.minimum(step[owner], rows[owner] - first_row), cols[owner]
        count, problems = held * cols, len(owner)
        width = torch.tensor([row_bytes(m.shape[1], self.levels) if packed else m.shape[1] for m in values])
        self.labels = [m.new_empty((len(m), int(w)), dtype=torch.uint8) for m, w in zip(values, width, strict=True)]
        self.centroids = self._new((problems, num_centroids), torch.float32)
        self.pivots = self._new((problems, 1 << self.levels), torch.float32)
        self.inertia, self.bound = self._new((problems,), torch.float64), self._new((problems,), torch.float64)
        self.iterations, self.status = self._new((problems,), torch.int64), self._new((problems,), torch.int32)
        float_bins = 2 * ((5 << bits_for(num_centroids)) + FAR_BINS.value)
        self.bins = float_bins if self.dtype == torch.float32 else HALF_KEYS.value
        self.cells = cells_for(num_centroids, small, self.dtype)
        self.most_cells = 2 * self.cells + 32
        if small:
            self.bins = max(64, triton.next_power_of_2(int(count.max())))
            self.most_cells = min(self.most_cells, self.bins + 32)
        self.width = 128 if num_centroids <= 32 else 64  # of the windows, in places

        each = self._bytes_each()
        size = min(problems, problems if small else max(1, scratch_bytes // each))
        scratch = self._scratch(size)
        tiles = -(-(held * -(-cols // BLOCK)) // (TILE // BLOCK)) if packed else -(-count // TILE)
        self.waves = []
        for begin in range(0, problems, size):  # as many problems as their workspace allows
            part = slice(begin, begin + size)
            labels, counting = (
                worklist.build(
                    self.values, self.labels, self.weights, count[part], cols[part], owner[part],
                    first_row[part] * cols[part], first_row[part] * width[owner[part]], tiles_of[part],
                )
                for tiles_of in (tiles, -(-count // COUNT_TILE))
            )  # fmt: skip
            self.waves.append(_Wave(begin, labels, counting, scratch))
        self.error = self._new((max(wave.labels.tiles for wave in self.waves),), torch.float64)
        self.longest = int(count.max())
        if self.longest > (SMALL if small else MOST_VALUES):
            raise ValueError(f"values: expected at most {SMALL if small else MOST_VALUES} values a problem, got {self.longest}")

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _bytes_each(self) -> int:
        zoom = 16 + 12 * ROUNDS.value + 8 if self.dtype == torch.float32 else 0
        return self.bins * ((8 if self.weights is None else 16) + zoom + 32) + (1 << 19)

    def _scratch(self, P: int) -> dict[str, Tensor]:
        KP = 1 << self.levels
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "marks": ((2, P, self.K), torch.int8),
            "check": ((P,), torch.int32),
            "unit": ((P,), torch.float32),  # its inverse
        }
        solved = min(P, PROGRAMS) if self.small else P
        self.group_count = triton.next_power_of_2(-(-self.bins // 16))
        shapes |= {
            "points": ((solved, 4, self.bins + 16), torch.float64),
            "cells": ((solved, self.most_cells), torch.int32),
            "cell": ((solved, 5, self.most_cells), torch.float64),
            "grown": ((solved, self.group_count + 16), torch.float32),
            "bounds": ((solved, 2, KP + 2), torch.int32),
            "choice": ((solved, KP + 1, self.most_cells if MOST_EXACT.value >= KP else self.width), torch.int16),
            "best": ((solved, self.width), torch.float32),
            "c": ((solved, KP), torch.float64),
        }
        if not self.small:
            shapes |= {
                "bins": ((P, 1 if self.weights is None else 2, self.bins), torch.int64),
                "ends": ((P, 2, self.bins) if self.dtype == torch.float32 else (1,), torch.int64),
                "frame": ((P, 2), torch.float32),
                "middle": ((P,), torch.int32),
                "largest": ((P,), torch.int32),
                "zoom": ((P,), torch.int32),
                "first": ((P, ROUNDS.value, self.bins + 16) if self.dtype == torch.float32 else (1,), torch.int32),
                "map": ((P, ROUNDS.value, 2, self.bins) if self.dtype == torch.float32 else (1,), torch.float32),
                "low": ((P, self.bins) if self.dtype == torch.float32 else (1,), torch.float32),
                "width": ((P, self.bins) if self.dtype == torch.float32 else (1,), torch.float32),
            }
        return {name: self._new(*shape) for name, shape in shapes.items()}

    def launch(self) -> None:
        """Clusters: kernels and fills on the current stream, nothing else."""
        with on_device(self.status):
            self.status.zero_()
            for wave in self.waves:
                for name in ("marks", "check", "bins", "ends", "largest", "zoom"):
                    if name in wave.scratch:
                        wave.scratch[name].zero_()
                (self._sort if self.small else self._count)(wave)
                self._label(wave)

    def _part(self, wave: _Wave) -> list[Tensor]:
        end = wave.begin + len(wave.labels.table)
        whole = self.status, self.centroids, self.pivots, self.iterations, self.inertia, self.bound
        return [tensor[wave.begin : end] for tensor in whole]

    def _sort(self, wave: _Wave) -> None:
        status, centroids, pivots, iterations, _, _ = self._part(wave)
        launch_rows(
            wave.labels.table, status, centroids, pivots, wave.scratch["unit"], wave.scratch["marks"][0],
            wave.scratch["check"], iterations, wave.scratch, dtype=self.dtype,
            weighted=self.weights is not None, num_centroids=self.K, size=self.bins,
            count=self.cells, most_cells=self.most_cells, width=self.width, max_iter=self.max_iter,
        )  # fmt: skip

    def _count(self, wave: _Wave) -> None:
        status, centroids, pivots, iterations, _, _ = self._part(wave)
        scratch, table, tiles, P = wave.scratch, wave.labels.table, wave.tiles, len(wave.labels.table)
        weighted, floats = self.weights is not None, self.dtype == torch.float32
        dtype, bits = worklist.DTYPES[self.dtype], bits_for(self.K)
        frame, middle, largest, bins, ends = (scratch[name] for name in ("frame", "middle", "largest", "bins", "ends"))
        zoom, first, map, low, width = (scratch[name] for name in ("zoom", "first", "map", "low", "width"))
        if floats:
            sample_kernel[(P,)](table, frame, middle, BITS=bits, num_warps=8)
        else:
            sample_half_kernel[(P,)](table, middle, num_warps=8)
        listed = (table, tiles.problem, tiles.tile)
        if weighted:
            weight_kernel[(tiles.tiles,)](*listed, largest, status, TILE=COUNT_TILE, num_warps=8)
        flags = {"BITS": bits, "WEIGHTED": weighted, "num_warps": 8}
        count_kernel[(tiles.tiles,)](
            *listed, frame, middle, largest, status, bins, ends, self.bins, DTYPE=dtype, TILE=COUNT_TILE, **flags
        )
        if floats:
            look_kernel[(P,)](frame, bins, ends, zoom, self.bins, self.K, CHUNK=CHUNK, **flags)
            for turn in range(ROUNDS.value + 1):  # does nothing for problems whose bins are narrow enough
                if turn > 0:
                    split_kernel[(P,)](
                        frame, bins, ends, zoom, first, map, low, width, self.bins, self.K, ROUND=turn, CHUNK=CHUNK, **flags
                    )
                zoom_kernel[(tiles.tiles,)](
                    *listed, frame, largest, zoom, bins, ends, first, map, self.bins, ROUND=turn, TILE=COUNT_TILE, **flags
                )
        work = [scratch[name] for name in ("points", "cells", "cell", "grown", "bounds", "choice", "best", "c")]
        solve_kernel[(P,)](
            frame, status, bins, ends, zoom, low, width, *work,
            centroids, pivots, scratch["unit"], scratch["marks"][0], scratch["check"], iterations, self.bins,
            self.K, self.cells, self.most_cells, self.max_iter, DTYPE=dtype, BITS=bits, WEIGHTED=weighted,
            LEVELS=self.levels, WIDTH=self.width, GROUPS=self.group_count, CHUNK=CHUNK, SPLITS=SPLITS, PART=part_for(PART, bins),
            num_warps=8, maxnreg=255,
        )  # fmt: skip

    def _label(self, wave: _Wave) -> None:
        status, centroids, pivots, _, inertia, bound = self._part(wave)
        labels, (doubt, used), check = wave.labels, wave.scratch["marks"], wave.scratch["check"]
        assign_kernel[(labels.tiles,)](
            labels.table, labels.problem, labels.tile, pivots, centroids, wave.scratch["unit"], self.error, self.K,
            DTYPE=worklist.DTYPES[self.dtype], LEVELS=self.levels, TILE=TILE, PACKED=self.packed, ERROR=True,
            WEIGHTED=self.weights is not None, **options(self.packed),
        )  # fmt: skip
        mark_kernel[(wave.tiles.tiles,)](
            labels.table, wave.tiles.problem, wave.tiles.tile, pivots, doubt, used, check, self.K,
            DTYPE=worklist.DTYPES[self.dtype], LEVELS=self.levels, TILE=COUNT_TILE, num_warps=8,
        )  # fmt: skip
        finish_kernel[(len(labels.table),)](
            labels.table, wave.scratch["unit"], self.error, status, doubt, used, check, inertia, bound, self.K,
            len(labels.table), labels.tiles,
            KP=1 << self.levels, CHUNK=256, num_warps=4,
        )  # fmt: skip


def fault_of(status: int) -> int:
    """The number of the first fault in a status, as kmq::kmeans returns it: 0 for none, UNRESOLVED_FAULT for unresolved."""
    for fault, bit in enumerate((VALUES_NOT_FINITE, WEIGHTS_NOT_FINITE, WEIGHTS_NEGATIVE, WEIGHTS_ZERO, UNRESOLVED), 1):
        if status & bit.value:
            return fault
    return 0


UNRESOLVED_FAULT = 5


def kmeans(
    values: Sequence[Tensor],
    sample_weight: Sequence[Tensor | None],
    num_centroids: Sequence[int],
    group_rows: Sequence[int],
    packed: bool,
    max_iter: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Clusters matrices (rows, cols) of fp32, bf16 or fp16; group_rows rows share a problem, G for each matrix.

    Returns, for each matrix, labels (packed, or (rows, cols) uint8), centroids (G, K) fp32, inertia, iterations and bound (G,),
    and a fault: 0, or why its other results mean nothing (see fault_of), also where a problem has more than MOST_VALUES values,
    for which the counters of a histogram have no bits. Matrices alike in dtype, number of centroids, use of weights and size of
    problems share their launches. Asks the host once, at the end.
    """
    classes: dict[tuple[torch.dtype, int, bool, bool], list[int]] = {}
    out: list[list[Tensor]] = [[] for _ in values]
    faults = [0] * len(values)
    for i, matrix in enumerate(values):
        size = min(group_rows[i], len(matrix)) * matrix.shape[1]
        if size > MOST_VALUES:
            out[i], faults[i] = [matrix] * 5, UNRESOLVED_FAULT
            continue
        classes.setdefault((matrix.dtype, num_centroids[i], sample_weight[i] is not None, size <= SMALL), []).append(i)
    plans = []
    for (_, count, weighted, small), members in classes.items():
        weights = [sample_weight[i].float().contiguous() for i in members] if weighted else None  # type: ignore[union-attr]
        matrices, groups = [values[i].contiguous() for i in members], [group_rows[i] for i in members]
        plan = Plan(matrices, weights, count, groups, packed=packed, small=small, max_iter=max_iter)
        plan.launch()
        plans.append((plan, members))
    for plan, members in plans:
        parts = [t.split(plan.groups) for t in (plan.centroids, plan.inertia, plan.iterations, plan.bound)]
        status = plan.status.cpu().split(plan.groups)
        for n, i in enumerate(members):
            out[i] = [plan.labels[n], *(part[n] for part in parts)]
            whole = 0
            for bits in status[n].unique().tolist():
                whole |= bits
            faults[i] = fault_of(whole)
    return (*([one[part] for one in out] for part in range(5)), faults)  # type: ignore[return-value]
