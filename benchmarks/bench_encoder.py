"""Whole encoders at 4 bits against the same model in fp32: time of a forward pass, resident memory after loading.

    python benchmarks/bench_encoder.py MODEL_DIR [--bits 4] [--sizes 1x16 1x128] [--repeats 15] [--json out.json]

Time: one process, both models in turn in shuffled order, random token ids without padding, torch.inference_mode; the ratio is the
median over repeats of (time of fp32) / (time of ours). Two models in turn find less of their weights in the cache than one alone.
Memory: the model is saved in both forms and each is loaded by a fresh process, with kmq.load and AutoModel.from_pretrained; the
growth of its resident set by the load and one forward pass of a single token is compared. Before anything is timed the packed
model must agree with its own dequantized copy.
"""

import argparse
import copy
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModel

import kmq_kernels as kmq

SIZES = ["1x16", "1x128", "8x128", "32x64"]
TOLERANCE = 1e-4  # largest difference of a hidden state from the dequantized model's, whose states are about 1

RESIDENT = """
import gc, sys, torch, kmq_kernels, transformers
from transformers import AutoModel
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
torch.set_num_threads(1)
with torch.inference_mode():
    # What the libraries themselves load at first use is not the model's.
    tiny = transformers.BertConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    transformers.BertModel(tiny)(torch.ones(1, 1, dtype=torch.long))
    gc.collect()
    before = resident()
    model = kmq_kernels.load(sys.argv[1]) if sys.argv[2] == "kmq" else AutoModel.from_pretrained(sys.argv[1])
    model.eval()(torch.ones(1, 1, dtype=torch.long))
    # Pages of a mapped file count when they are read, so every parameter is.
    for parameter in model.parameters():
        parameter.float().sum() if parameter.dtype.is_floating_point else parameter.max()
    gc.collect()
    print(resident() - before)
"""


def resident_growth(folder: Path, loader: str) -> int:
    done = subprocess.run([sys.executable, "-c", RESIDENT, str(folder), loader], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="batch x tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    dense = AutoModel.from_pretrained(args.model, dtype=torch.float32).eval()
    packed = copy.deepcopy(dense)
    kmq.quantize_(packed, kmq.KMQConfig(bits=args.bits))
    rows = []
    with torch.inference_mode():
        ids = torch.randint(5, dense.config.vocab_size, (2, 24))
        decoded = kmq.dequantize_(copy.deepcopy(packed))
        difference = float((packed(ids).last_hidden_state - decoded(ids).last_hidden_state).abs().max())
        if not difference <= TOLERANCE:
            raise SystemExit(f"differs from its dequantized copy by {difference:.1e}, not timed")
        del decoded
        for size in args.sizes:
            batch, tokens = map(int, size.split("x"))
            ids = torch.randint(5, dense.config.vocab_size, (batch, tokens))
            times: dict[str, list[float]] = {"fp32": [], "kmq": []}
            for _ in range(args.repeats):
                for name, model in random.sample([("fp32", dense), ("kmq", packed)], 2):
                    start = time.perf_counter()
                    model(ids)
                    times[name].append(time.perf_counter() - start)
            ms = {name: statistics.median(t) * 1e3 for name, t in times.items()}
            ratio = statistics.median(a / b for a, b in zip(times["fp32"], times["kmq"], strict=True))
            rows.append({"size": size, **ms, "ratio": ratio})
            print(f"{args.model.name} {size:>7}  fp32 {ms['fp32']:8.2f} ms   kmq {ms['kmq']:8.2f} ms   {ratio:5.2f}x", flush=True)
    memory = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("fp32", dense), ("kmq", packed)):
            model.save_pretrained(Path(folder) / name)
        del dense, packed, model
        for name in ("fp32", "kmq"):
            memory[name] = resident_growth(Path(folder) / name, name)
    print(
        f"{args.model.name} resident  fp32 {memory['fp32'] / 2**20:.1f} MiB   kmq {memory['kmq'] / 2**20:.1f} MiB"
        f"   {memory['kmq'] / memory['fp32']:.3f}"
    )
    if args.json:
        facts = {"threads": args.threads, "torch": torch.__version__, "build": kmq.build_info()["extension"], "bits": args.bits}
        args.json.write_text(json.dumps({"conditions": facts, "rows": rows, "resident": memory}, indent=1))


if __name__ == "__main__":
    main()
