"""`kmq compare`: two model folders, packed or not, on the same texts."""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

from .bench import mean_states, text_batches
from .layout import pairs
from .messages import quieten
from .options import DATA, MEASUREMENT, AsJson, Verbose, argument, number, option

PAIRS = 2000  # texts of which all pairs are looked at


def refuse_other_tokens(first: str, second: str, texts: list[str], max_length: int) -> None:
    """Raises ValueError where two models do not see the same tokens in the same texts."""
    from ..training import load_tokenizer

    one, other = load_tokenizer(first), load_tokenizer(second)
    options = {"truncation": True, "max_length": max_length}
    mine, theirs = (tokenizer(texts, **options)["input_ids"] for tokenizer in (one, other))
    place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
    if place is not None:
        raise ValueError(
            f"B: {second} has another tokenizer than {first} (line {place + 1} of the texts has other tokens), so a difference"
            " of outputs would not be one of the models"
        )


def _outputs(model: Any, batches: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Mean states of each text (texts, hidden) fp64 and, where the model has classes, the number of its class (texts,)."""
    import torch

    base = getattr(model, model.base_model_prefix, model)
    states, classes = [], []
    for batch in batches:
        states.append(mean_states(base, batch).double())
        if base is not model:
            logits = getattr(model(**batch), "logits", None)
            if logits is not None and logits.dim() == 2 and logits.shape[1] > 1:
                classes.append(logits.argmax(-1))
    return torch.cat(states), torch.cat(classes) if classes else None


def _similarities(states: Any) -> Any:
    """Cosine of every pair of different texts."""
    import torch

    scaled = torch.nn.functional.normalize(states[:PAIRS], dim=-1)
    above = torch.ones(len(scaled), len(scaled), dtype=torch.bool).triu(1)
    return (scaled @ scaled.t())[above]


def differences(one: Any, other: Any) -> dict[str, float | int | None]:
    """How far outputs (see `_outputs`) of two models are apart.

    mean_cosine, worst_cosine: between the states of a text (None where these have not the same width). similarity_error,
    similarity_correlation: mean absolute difference, and Pearson's correlation, of the cosines of all pairs of texts.
    other_predictions: texts that are given another class (None where one of the models has none).
    """
    import torch

    (mine, classes), (theirs, others) = one, other
    found: dict[str, float | int | None] = {"mean_cosine": None, "worst_cosine": None}
    if mine.shape == theirs.shape:
        cosine = torch.cosine_similarity(mine, theirs, -1)
        found |= {"mean_cosine": float(cosine.mean()), "worst_cosine": float(cosine.min())}
    a, b = _similarities(mine), _similarities(theirs)
    found["similarity_error"] = float((a - b).abs().mean()) if len(a) else None
    spread = bool(len(a) > 1 and a.std() > 0 and b.std() > 0)
    found["similarity_correlation"] = float(torch.corrcoef(torch.stack([a, b]))[0, 1]) if spread else None
    same = classes is not None and others is not None
    found["other_predictions"] = int((classes != others).sum()) if same else None
    return found


def compare(
    a: Annotated[str, argument("A", "Model folder, packed or not; hub id; 'minilm'.")],
    b: Annotated[str, argument("B", "The model to compare with it.")],
    texts: Annotated[Path, option(DATA, "FILE", "File with a text a line.")],
    max_length: Annotated[int, option(DATA, "N", "Tokens a text is cut to.", check=number("max_length", 1))] = 128,
    repeats: Annotated[int, option(MEASUREMENT, "N", "Times that each model runs the texts.", check=number("repeats", 1))] = 5,
    threads: Annotated[int | None, option(MEASUREMENT, "N", "Threads.", default="torch's", check=number("threads", 1))] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Outputs, size and speed of two models on the same texts.

    Models with different tokenizers are refused.
    """
    import torch

    from .. import hf
    from ..quantization import model_size
    from ..training import resolve_model

    quieten(verbose)
    if not texts.is_file():
        raise ValueError(f"texts: no such file: {texts}")
    if threads is not None:
        torch.set_num_threads(threads)
    folders = [resolve_model(model) for model in (a, b)]
    lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"texts: expected lines of text in {texts}, got none")
    refuse_other_tokens(folders[0], folders[1], lines, max_length)
    models = [hf.load(folder).to(torch.float32).eval() for folder in folders]
    longest = min([max_length, *(getattr(model.config, "max_position_embeddings", 512) - 2 for model in models)])
    batches = text_batches(folders[0], texts, longest)
    random.seed(0)
    times: list[list[float]] = [[], []]
    with torch.inference_mode():
        outputs = [_outputs(model, batches) for model in models]
        for _ in range(repeats):
            for i in random.sample((0, 1), 2):
                start = time.perf_counter()
                for batch in batches:
                    models[i](**batch)
                times[i].append(time.perf_counter() - start)
    found: dict[str, Any] = {"texts": len(lines), **differences(*outputs)}
    found["bytes"] = [model_size(model).total_bytes for model in models]
    found["texts_per_second"] = [len(lines) / statistics.median(each) for each in times]
    found["speed"] = statistics.median(x / y for x, y in zip(*times, strict=True))
    found["threads"] = torch.get_num_threads()
    if as_json:
        print(json.dumps({"a": a, "b": b, **found}))
        return
    print(pairs(_rows(found), f"{b} beside {a}, {found['texts']:,} texts, {found['threads']} threads"))


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What is shown."""

    def number_of(name: str) -> str:
        return "-" if found[name] is None else f"{found[name]:.5f}"

    others, (before, after), (slow, fast) = found["other_predictions"], found["bytes"], found["texts_per_second"]
    return [
        ("cosine of a text", f"mean {number_of('mean_cosine')}, worst {number_of('worst_cosine')}"),
        (
            "similarity of pairs",
            f"mean difference {number_of('similarity_error')}, correlation {number_of('similarity_correlation')}",
        ),
        ("other predictions", "no classes in both" if others is None else f"{others} of {found['texts']}"),
        ("bytes", f"{before:,}, {after:,} ({before / max(after, 1):.2f} times smaller)"),
        ("texts a second", f"{slow:.1f}, {fast:.1f} (speed {found['speed']:.2f}, median of paired ratios)"),
    ]
