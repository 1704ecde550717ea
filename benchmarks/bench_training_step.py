"""A step of the second fine-tuning (stage 3) beside a step of ordinary fp32 fine-tuning: time, and peak memory above the model.

Both are the same MiniLM classifier with random weights, the same batches, fused AdamW, no gradient clipping; stage 3 has every
embedding and linear weight but the classifier in codebooks. Times: both models in one process, steps interleaved, the median of
the ratios of neighbours. Memory: a process of its own for each, the peak resident size over five steps above that of the loaded
model (Linux).
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import kmq_kernels as kmq


def classifier() -> nn.Module:
    """all-MiniLM-L6-v2's shape with 77 labels; dropout off, so that losses can be compared."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=77,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).train()


def prepare(kind: str, model: nn.Module, bits: int) -> torch.optim.Optimizer:
    """Makes `model` what the stage trains, and its optimizer."""
    if kind == "fp32":
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    kmq.quantize_(model, kmq.KMQConfig(bits=bits))
    codebooks = [p for name, p in model.named_parameters() if name.endswith("codebook")]
    others = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith("codebook")]
    groups = [{"params": others}, {"params": codebooks, "lr": 5e-4, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-4, fused=True)


def batch(size: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 30522, (size, length), generator=generator)
    labels = torch.randint(0, 77, (size,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> float:
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024


def peak(kind: str, bits: int, size: int, length: int, threads: int) -> dict[str, float]:
    """Peak memory of five steps above the loaded model, in bytes. To be run in a process that did nothing else."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:  # loaded as for training: no other form of the model is left in memory
        path = Path(folder) / "model.pt"
        made = subprocess.run([sys.executable, __file__, "--make", kind, str(path), "--bits", str(bits)], check=False)
        assert made.returncode == 0
        model = torch.load(path, weights_only=False)
    prepared = [p for p in model.parameters() if p.requires_grad]
    codebooks = [p for name, p in model.named_parameters() if name.endswith("codebook")]
    others = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith("codebook")]
    groups = [{"params": others}, {"params": codebooks, "weight_decay": 0.0}] if codebooks else prepared
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    with torch.no_grad():  # what PyTorch loads at its first product belongs to no stage
        model(**batch(1, 8, 0))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins here
    before = resident("VmRSS")
    for number in range(5):
        step(model, optimizer, batch(size, length, number))
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
    trained = sum(p.numel() for p in prepared)
    return {"model": sum(p.numel() * p.element_size() for p in model.parameters()), "peak": resident("VmHWM") - before,
            "optimizer": state, "trained": trained}  # fmt: skip


def times(bits: int, size: int, length: int, repeats: int, threads: int) -> dict[str, list[float]]:
    torch.set_num_threads(threads)
    models = {}
    for kind in ("fp32", "stage 3"):
        model = classifier()
        models[kind] = (model, prepare(kind, model, bits))
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    for number in range(repeats + 2):
        for kind, (model, optimizer) in models.items():
            inputs = batch(size, length, number)
            start = time.perf_counter()
            step(model, optimizer, inputs)
            if number >= 2:
                seconds[kind].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        model = classifier()
        prepare(arguments.make[0], model, arguments.bits)
        torch.save(model, arguments.make[1])
        return
    if arguments.peak:
        print(json.dumps(peak(arguments.peak, arguments.bits, arguments.batch, arguments.length, arguments.threads)))
        return
    seconds = times(arguments.bits, arguments.batch, arguments.length, arguments.repeats, arguments.threads)
    table = {}
    for kind in seconds:
        command = [sys.executable, __file__, "--peak", kind]
        for name in ("bits", "batch", "length", "threads"):
            command += [f"--{name}", str(getattr(arguments, name))]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
        table[kind] = json.loads(done.stdout.splitlines()[-1])
        table[kind]["ms"] = statistics.median(seconds[kind]) * 1e3
    ratio = statistics.median(b / a for a, b in zip(seconds["fp32"], seconds["stage 3"], strict=True))
    for kind, row in table.items():
        megabytes = "   ".join(f"{name} {row[name] / 1e6:.1f} MB" for name in ("model", "peak", "optimizer"))
        print(f"{kind:8} {row['ms']:7.1f} ms a step   {megabytes}   trained numbers {row['trained']:,}")
    print(f"ratio: time {ratio:.2f}, memory {table['stage 3']['peak'] / table['fp32']['peak']:.2f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"torch": torch.__version__, "ratio": ratio, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
