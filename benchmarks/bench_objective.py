"""What clustering against outputs gains over clustering weights: how near a quantized embedder stays to the one in fp32.

Without labels and without training. 400 sentences to calibrate with (200 of SST-2's and 200 of Banking77's training set), 300
others to measure (150 of SST-2's development set, 150 of Banking77's test set). Prints for each configuration the mean and the
least cosine of the mean-pooled embeddings to fp32, Spearman's correlation of the similarities of all pairs, and the seconds of
processor time and on the clock that quantization took.

    python benchmarks/bench_objective.py --data-dir DATA                       # DATA/sst2/*.tsv, DATA/banking77/*.csv
    python benchmarks/bench_objective.py --data-dir DATA --model MODEL --bits 2 --options '{"outlier_fraction": 0.005}'
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, logging

import kmq_kernels as kmq
from kmq_kernels.training import resolve_model

COLUMNS = ("configuration", "cosine, mean", "least", "Spearman", "processor s", "s")


def _sst2(path: Path) -> list[str]:
    with open(path, newline="") as file:
        return [row[0] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def _banking77(path: Path) -> list[str]:
    with open(path, newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def texts(data: Path) -> tuple[list[str], list[str]]:
    """Those to calibrate with and those to measure, drawn with seed 0."""

    def drawn(every: list[str], count: int) -> list[str]:
        return random.Random(0).sample(every, count)

    sst2, banking77 = data / "sst2", data / "banking77"
    calibration = drawn(_sst2(sst2 / "train.tsv"), 200) + drawn(_banking77(banking77 / "train.csv"), 200)
    return calibration, drawn(_sst2(sst2 / "dev.tsv"), 150) + drawn(_banking77(banking77 / "test.csv"), 150)


def batches(tokenizer: Any, sentences: list[str], size: int) -> list[dict[str, Tensor]]:
    """Batches of sentences of similar length."""
    ordered = sorted(sentences, key=len)
    options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    return [dict(tokenizer(ordered[i : i + size], **options)) for i in range(0, len(ordered), size)]


@torch.no_grad()
def embeddings(model: Any, measured: list[dict[str, Tensor]]) -> Tensor:
    """Mean-pooled and normalized, (texts, width)."""
    found = []
    for batch in measured:
        mask = batch["attention_mask"][..., None].float()
        found.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def nearness(found: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """Mean and least cosine, and Spearman's correlation of the similarities of all pairs."""
    cosine = (found * wanted).sum(1)
    one, other = torch.triu_indices(len(found), len(found), 1)

    def ranks(embedded: Tensor) -> Tensor:
        return (embedded[one] * embedded[other]).sum(1).argsort().argsort().double()

    correlation = torch.corrcoef(torch.stack([ranks(found), ranks(wanted)]))[0, 1]
    return float(cosine.mean()), float(cosine.min()), float(correlation)


def measured(arguments: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """A row of the table for each configuration."""
    path = resolve_model(arguments.model)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    calibration, others = texts(arguments.data_dir)
    fitted, held = batches(tokenizer, calibration, 16), batches(tokenizer, others, 32)
    wanted = embeddings(model, held)
    for granularity in arguments.granularity:
        for bits in arguments.bits:
            for objective in arguments.objective:
                quantized = copy.deepcopy(model)
                options = {"bits": bits, "granularity": granularity, "objective": objective, **arguments.options}
                processor, clock = time.process_time(), time.perf_counter()
                kmq.quantize_(quantized, kmq.KMQConfig(**options), calibration=fitted if objective == "output" else None)
                took = time.process_time() - processor, time.perf_counter() - clock
                figures = nearness(embeddings(quantized, held), wanted)
                more = "".join(f", {name}={value}" for name, value in arguments.options.items())
                name = f"{bits} bits, {granularity}, {objective}{more}"
                yield (name, *(f"{figure:.4f}" for figure in figures), *(f"{seconds:.0f}" for seconds in took))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--granularity", nargs="+", default=["tensor", "row"])
    parser.add_argument("--objective", nargs="+", default=["weights", "output"])
    parser.add_argument("--options", type=json.loads, default={}, help="other fields of KMQConfig, as JSON")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for row in measured(arguments):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
