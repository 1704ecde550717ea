"""Stage 3 at 1 to 3 bits: assignments fixed and moving, plain and distilled, and embedders without labels.

Runs `kmq run` for every task and seed, as far as it is not finished in OUT, and prints the tables in Markdown: accuracy (for CoLA
Matthews' correlation) of Banking77, SST-2 and CoLA beside the fp32 control of as many steps; mean and worst cosine, and
Spearman of all similarities, of MiniLM's embeddings on 300 sentences (150 of SST-2's dev set, 150 of Banking77's test set) after
stage 3 on 10,000 others without labels. `--fields` goes into every k-means configuration. `--list` chooses the configurations:

    chosen      moving and distilled: 2 bits per tensor and a row, 3 bits per tensor, and 1 bit a row on Banking77
    ablation    2 bits, one seed: fixed and moving, plain and distilled, codebooks from the weights and from outputs
    full        1 to 3 bits, fixed and moving, and linear beside k-means, which takes hours

    python benchmarks/bench_low_bits.py --data DATA -o OUT
    python benchmarks/bench_low_bits.py --data DATA -o OUT --tasks banking77 --list ablation
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from kmq_kernels import report

STAGE1 = {  # steps and learning rate of stage 1
    "banking77": ["--steps", "450", "--learning-rate", "3e-4"],
    "sst2": ["--steps", "400", "--learning-rate", "1e-4"],
    "cola": ["--steps", "800", "--learning-rate", "1e-4"],
}
HELD_OUT, CORPUS = 150, 5000  # sentences of each of the two sources


def variant(bits: int, granularity: str, assignments: str, distill: bool, **fields: Any) -> dict[str, Any]:
    """An entry of a list for `kmq run --compare`."""
    scheme = fields.get("scheme", "kmeans")
    start = "-outputs" if fields.get("objective") == "output" else ""
    name = f"{scheme}{start}-{granularity}-{assignments}-{'distilled' if distill else 'plain'}-{bits}bit"
    own = {"bits": bits, "granularity": granularity, "assignments": assignments, "distill": distill}
    return {"name": name, **own, **fields}


def chosen(fields: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """What low bits are for: moving and distilled."""
    pairs = [(2, "tensor"), (2, "row"), (3, "tensor"), *([(1, "row")] if task == "banking77" else [])]
    return [variant(bits, granularity, "moving", True, **fields) for bits, granularity in pairs]


def ablation(fields: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """2 bits per tensor, everything with everything."""
    return [
        variant(2, "tensor", assignments, distill, **{**fields, "objective": objective})
        for objective in ("weights", "output")
        for assignments in ("moving", "fixed")
        for distill in (True, False)
    ]


def full(fields: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """1 to 3 bits: moving and distilled, fixed and plain (the method as it was), and linear beside k-means, same steps."""
    found = []
    for bits in (1, 2, 3):
        for granularity in ("tensor", "row"):
            found.append(variant(bits, granularity, "moving", True, **fields))
            found.append(variant(bits, granularity, "fixed", False, **fields))
        found.append(variant(bits, "tensor", "moving", True, scheme="linear"))
        found.append(variant(bits, "tensor", "fixed", False, scheme="linear"))
    return found


LISTS = {"chosen": chosen, "ablation": ablation, "full": full}


def sentences(data: Path, folder: Path) -> tuple[Path, Path]:
    """Files of 10,000 sentences to train on and of 300 others to measure on: half of SST-2, half of Banking77."""

    def sst2(name: str) -> list[str]:
        lines = (data / "sst2" / name).read_text(encoding="utf-8").splitlines()
        return [line.split("\t")[0].strip() for line in lines if not line.startswith("sentence\t")]

    def banking77(name: str) -> list[str]:
        with open(data / "banking77" / name, encoding="utf-8", newline="") as file:
            return [" ".join(row["text"].split()) for row in csv.DictReader(file)]

    draw = random.Random(0)
    train = draw.sample(sst2("train.tsv"), CORPUS) + draw.sample(banking77("train.csv"), CORPUS)
    draw.shuffle(train)
    held = draw.sample(sst2("dev.tsv"), HELD_OUT) + draw.sample(banking77("test.csv"), HELD_OUT)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.txt", folder / "held_out.txt"
    for path, texts in zip(paths, (train, held), strict=True):
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return paths


def kmq_run(*arguments: str) -> None:
    """`kmq run`, in a process of its own."""
    subprocess.run([sys.executable, "-m", "kmq_kernels.cli", "run", "minilm", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sst2/, cola/ and banking77/")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=[*STAGE1, "texts"], default=[*STAGE1, "texts"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of stage 3 and of the control")
    parser.add_argument("--list", choices=LISTS, default="chosen", dest="configurations")
    parser.add_argument("--fields", type=json.loads, default={}, help="further fields of KMQConfig, as JSON")
    args = parser.parse_args()
    seeds = "1" if args.configurations == "ablation" else str(args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    stage3 = ["--second-steps", str(args.steps), "--seeds", seeds, "--max-length", "48"]
    for task in args.tasks:
        if task == "texts":
            train, held = sentences(args.data, args.out / "sentences")
            kinds = [(2, "moving"), (3, "fixed"), (4, "fixed"), (3, "moving"), (2, "fixed")]
            entries = [variant(bits, "row", kind, True, **{"objective": "output", **args.fields}) for bits, kind in kinds]
            (args.out / "embedders.json").write_text(json.dumps(entries, indent=1))
            own = ["--train-file", str(train), "--validation-file", str(held), "--compare", str(args.out / "embedders.json")]
            kmq_run("--task", "texts", *own, *stage3, "-o", str(args.out / "texts"))
        else:
            listed = args.out / f"{args.configurations}_{task}.json"
            listed.write_text(json.dumps(LISTS[args.configurations](args.fields, task), indent=1))
            where = [] if task == "banking77" else ["--data-dir", str(args.data)]
            kmq_run("--task", task, *where, *STAGE1[task], *stage3, "--compare", str(listed), "-o", str(args.out / "labelled"))
    for folder in (args.out / "labelled", args.out / "texts"):
        if folder.is_dir():
            records = report.collect(folder)
            for summary in [*report.summaries(records), *filter(None, report.quality(records))]:
                print(report.markdown(summary))


if __name__ == "__main__":
    main()
