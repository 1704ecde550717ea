"""What an allocation of bits costs before stage 3: how far the predictions move from those of the stage-1 model.

Reads the stage-1 models of a finished `kmq run --compare`, quantizes each with uniform k-means at 2 and 3 bits and with the exact
allocations at an average of 2.5 and 3, and prints the Kullback-Leibler divergence (nats a text) from the fp32 model's predictions
on the evaluation set beside the task's metric: mean and standard error over the seeds. Both differ over the same models, so the
last column counts the seeds in which a configuration is nearer to fp32 than uniform 3 bits.

    python benchmarks/bench_allocation.py COMPARISON --task sst2 --data-dir DATA
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div
from transformers import AutoTokenizer, DataCollatorWithPadding, logging

import kmq_kernels as kmq
from kmq_kernels import sensitivity
from kmq_kernels.hf import load
from kmq_kernels.quantization import model_size
from kmq_kernels.report import Value
from kmq_kernels.training import calibration_batches, load_task, tokenize

CONFIGURATIONS = {
    "uniform, 2 bits": kmq.KMQConfig(bits=2),
    "uniform, 3 bits": kmq.KMQConfig(bits=3),
    "distortion, 2.5": kmq.KMQConfig(allocation="distortion", bits_per_weight=2.5),
    "fisher, 2.5": kmq.KMQConfig(allocation="fisher", bits_per_weight=2.5),
    "distortion, 3": kmq.KMQConfig(allocation="distortion", bits_per_weight=3.0),
    "fisher, 3": kmq.KMQConfig(allocation="fisher", bits_per_weight=3.0),
}
BATCH = 64


@torch.inference_mode()
def predictions(model: Any, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Log-probabilities (texts, labels) fp64."""
    outputs = [model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches]
    return torch.cat(outputs).double().log_softmax(-1)


def measure(run: Path, task: Any) -> dict[str, tuple[float, float, float]]:
    """Bits per weight, divergence and metric of every configuration on the stage-1 model of one run, and of that itself."""
    request = json.loads((run / "run.json").read_text())
    how, settings = request["sensitivity"], request["stage1"]
    tokenizer, first = AutoTokenizer.from_pretrained(run / "stage1"), load(run / "stage1").eval()
    tokens = tokenize(next(iter(task.evaluation.values())), tokenizer, settings["max_length"])
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]["input_ids"]))
    pad = DataCollatorWithPadding(tokenizer)
    batches = [dict(pad([tokens[i] for i in order[k : k + BATCH]])) for k in range(0, len(order), BATCH)]
    labels = torch.cat([batch["labels"] for batch in batches])
    drawn = calibration_batches(
        task, tokenizer, how["fisher_batch_size"], how["fisher_batches"], settings["max_length"], settings["seed"]
    )
    fisher = sensitivity.fisher_diagonal(first, drawn, path=run / "fisher.safetensors")
    weigh = sensitivity.importance(fisher)
    reference = predictions(first, batches)

    def facts(model: Any, found: torch.Tensor) -> tuple[float, float, float]:
        divergence = float(kl_div(found, reference, reduction="batchmean", log_target=True))
        metric = task.compute_metrics((found.numpy(), labels.numpy()))[task.metric]
        return model_size(model).bits_per_weight, divergence, metric

    results = {"fp32": facts(first, reference)}
    for name, config in CONFIGURATIONS.items():
        model = load(run / "stage1")
        kmq.quantize_(model, config, sample_weight=weigh if config.needs_fisher else None, progress=False)
        results[name] = facts(model, predictions(model.eval(), batches))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    logging.disable_progress_bar()
    task = load_task(given.task, data_dir=given.data_dir)
    runs = sorted((given.comparison / task.name).glob("seed*"))
    if not runs:
        parser.error(f"{given.comparison}: no runs of {task.name} in it")
    found = [measure(run, task) for run in runs]
    columns = ("bits per weight", "divergence from fp32", task.metric, "nearer than uniform, 3 bits")
    print(f"| {task.name}, {len(runs)} seeds | {' | '.join(columns)} |")
    print("|---|---|---|---|---|")
    for name in found[0]:
        bits, divergence, metric = (Value(tuple(each[name][part] for each in found)) for part in range(3))
        nearer = sum(each[name][1] < each["uniform, 3 bits"][1] for each in found)
        print(f"| {name} | {bits.mean:.2f} | {divergence} | {metric} | {nearer} of {len(runs)} |")


if __name__ == "__main__":
    main()
