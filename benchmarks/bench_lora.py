"""LoRA on a packed MiniLM beside LoRA on the same MiniLM in fp32: accuracy on Banking77, bytes of the base, peak memory.

    python benchmarks/bench_lora.py [--steps 300] [--bits 4] [--targets all-linear] [--threads 1]

Both see the same batches in the same order from the same classification layer; each runs in a process of its own. The standard
error is that of the accuracy on the test texts, sqrt(p (1 - p) / n). Needs peft.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--targets", default="all-linear", help="all-linear, or names with commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", choices=["fp32", "packed"], help="run only this one and print JSON")
    return parser.parse_args()


def run(given):
    """Trains one adapter and returns its figures."""
    from peft import LoraConfig, get_peft_model
    from transformers import get_linear_schedule_with_warmup

    import kmq_kernels as kmq
    from kmq_kernels.quantization import model_size
    from kmq_kernels.tasks import load_task
    from kmq_kernels.training import load_for_task, resolve_model

    torch.set_num_threads(given.threads)
    task = load_task("banking77")
    model, tokenizer = load_for_task(resolve_model("minilm"), task, given.seed)
    if given.base == "packed":
        kmq.quantize_(model, kmq.KMQConfig(bits=given.bits))
    base = model_size(model)
    targets = given.targets if given.targets == "all-linear" else given.targets.split(",")
    config = LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=given.rank, lora_alpha=2 * given.rank)
    torch.manual_seed(given.seed)
    wrapped = get_peft_model(model, config)

    def batch(rows):
        texts = tokenizer(list(rows["text"]), padding=True, truncation=True, max_length=given.max_length, return_tensors="pt")
        return texts, torch.tensor(rows["label"])

    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, given.rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, given.steps // 10, given.steps)
    order = torch.Generator().manual_seed(given.seed)
    wrapped.train()
    start = time.perf_counter()
    for step in range(given.steps):
        rows = torch.randint(len(task.train), (given.batch,), generator=order).tolist()
        texts, labels = batch(task.train[rows])
        loss = torch.nn.functional.cross_entropy(wrapped(**texts).logits, labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"{given.base}: step {step + 1}, loss {float(loss):.3f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    wrapped.eval()
    test, right = task.evaluation["test"], 0
    with torch.no_grad():
        for at in range(0, len(test), 64):
            texts, labels = batch(test[at : at + 64])
            right += int((wrapped(**texts).logits.argmax(-1) == labels).sum())
    accuracy = right / len(test)
    return {
        "accuracy": accuracy,
        "standard_error": (accuracy * (1 - accuracy) / len(test)) ** 0.5,
        "base_bytes": base.total_bytes,
        "trained": sum(p.numel() for p in trained),
        "peak_bytes": peak,
        "seconds": seconds,
    }


def main():
    given = options()
    if given.base is not None:
        print(json.dumps(run(given)))
        return
    found = {}
    for base in ("fp32", "packed"):
        command = [sys.executable, __file__, *sys.argv[1:], "--base", base]
        found[base] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    print(f"LoRA on Banking77, {given.steps} steps of {given.batch} texts, rank {given.rank}, {given.targets}, seed {given.seed}")
    print("| base | bytes of the base | trained values | accuracy | standard error | peak memory, MB | seconds |")
    print("|---|---|---|---|---|---|---|")
    for base, one in found.items():
        name = "fp32" if base == "fp32" else f"{given.bits} bits, packed"
        size = f"{one['base_bytes']:,} | {one['trained']:,}"
        quality = f"{one['accuracy']:.4f} | {one['standard_error']:.4f}"
        print(f"| {name} | {size} | {quality} | {one['peak_bytes'] / 1e6:,.0f} | {one['seconds']:.0f} |")
    difference = found["packed"]["accuracy"] - found["fp32"]["accuracy"]
    error = sum(one["standard_error"] ** 2 for one in found.values()) ** 0.5
    print(f"\npacked - fp32: {difference:+.4f}; standard error of the difference {error:.4f}")


if __name__ == "__main__":
    main()
