"""The card of a quantized model: README.md with the metadata that the hub reads, how to load it, its size, what was measured."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBRARY = "kmq_kernels"
MARK = "<!-- written by kmq_kernels -->"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")
# What of the source's metadata is true of the quantized model as well.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
_BELOW = "## The model it was made from"
_SENTENCE_CLASSES = ("SentenceTransformer", "CrossEncoder", "SparseEncoder")


@dataclasses.dataclass(frozen=True)
class Quality:
    """Metrics of a task, by the names of `evaluate`, of the quantized model and of the one in fp32 that it was made from.

    dataset, dataset_name: the id on the hub (of own files, which are not `on_hub`: their name) and what people call it.
    task_type: the hub's word.
    """

    dataset: str
    dataset_name: str
    task_type: str
    metrics: dict[str, float]
    fp32: dict[str, float] | None = None
    on_hub: bool = True


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card says of a model. bits: how many weights have so many bits; bytes_before: in the dtype of the source."""

    bits: dict[int, int]
    scheme: str
    weights: int
    bytes_before: int
    bytes_after: int
    made_by: str

    @property
    def summary(self) -> str:
        """In one sentence."""
        widths = [f"{width}" for width in sorted(self.bits)]
        spread = widths[0] if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        kind = "k-means clusters" if self.scheme == "kmeans" else "bins of equal width"
        one = "1 bit" if spread == "1" else f"{spread} bits"
        return f"{kind}, {one} an index, made by `{self.made_by}`"


def hub_id(source: str) -> str | None:
    """The id on the hub of a model given as `source`: an id, or a snapshot in the hub's cache; None for other folders."""
    if found := _SNAPSHOT.search(str(source)):
        return f"{found[1]}/{found[2]}"
    return str(source) if _HUB_ID.fullmatch(str(source)) and not Path(source).exists() else None


def card(
    facts: Facts,
    *,
    base_model: str | None = None,
    source_card: str | None = None,
    quality: Quality | None = None,
    sentence_class: str | None = None,
    name: str | None = None,
) -> str:
    """The text of README.md.

    base_model: id on the hub of the source. source_card: the README.md of the source; licence, languages, task and datasets in
    its metadata are kept, and its text below. quality: what was measured; its task is the model's. sentence_class: the class of
    sentence-transformers that the folder is saved for. name: the model's, for the model-index.
    """
    before, text = _parted(source_card or "")
    if MARK in text:  # it was made from what was made by this package
        text = text.partition(_BELOW)[2].strip()
    base = base_model or before.get("base_model")
    name = name or (str(base) if isinstance(base, str) else "model").rpartition("/")[2]
    library = ["sentence-transformers"] if sentence_class is not None else []
    head = _metadata(facts, before, base, quality, library, f"{name}-{min(facts.bits, default=0)}bit")
    body = [MARK, f"# {name}, quantized", "", f"Packed with `kmq_kernels`: {facts.summary}.", "", *_loading(sentence_class), ""]
    body += _sizes(facts, quality)
    if text.strip():
        body += ["", _BELOW, "", text.strip()]
    return f"---\n{head}---\n" + "\n".join(body) + "\n"


def _parted(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card; metadata that cannot be read is left in the text."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not (text.startswith("---\n") and "\n---" in text[3:]):
        return {}, text
    import yaml

    front, _, rest = text[4:].partition("\n---")
    try:
        found = yaml.safe_load(front)
    except yaml.YAMLError:
        return {}, text
    if not isinstance(found, dict):
        return {}, text
    if "language" in found:  # YAML takes Norwegian for a truth value
        given = found["language"] if isinstance(found["language"], list) else [found["language"]]
        found["language"] = ["no" if one is False else one for one in given]
    return found, rest.partition("\n")[2]


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [value] if isinstance(value, str) else []


def _metadata(facts: Facts, before: dict[str, Any], base: Any, quality: Quality | None, libraries: list[str], name: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    kept = {key: before[key] for key in _KEPT if before.get(key)}
    widths = [f"{bits}-bit" for bits in sorted(facts.bits)]
    tags = dict.fromkeys(["kmq", "quantized", *widths, *libraries])
    if quality is not None and quality.on_hub and _HUB_ID.fullmatch(quality.dataset):
        kept["datasets"] = list(dict.fromkeys([*_listed(kept.get("datasets")), quality.dataset]))
    results = None
    if quality is not None:
        kept |= {"pipeline_tag": quality.task_type, "metrics": list(quality.metrics)}  # the task of this model, not of its source
        results = [
            EvalResult(
                task_type=quality.task_type,
                dataset_type=quality.dataset,
                dataset_name=quality.dataset_name,
                metric_type=metric,
                metric_value=round(value, 5),
            )
            for metric, value in quality.metrics.items()
        ]
    if base:
        kept |= {"base_model": base, "base_model_relation": "quantized"}
    data = ModelCardData(library_name=LIBRARY, tags=list(tags), model_name=name, eval_results=results, **kept)
    return data.to_yaml(line_break="\n") + "\n"


def _loading(sentence_class: str | None) -> list[str]:
    """How to load it, as Markdown."""
    lines = ["import kmq_kernels as kmq", 'model = kmq.load("path/to/this/folder")']
    if sentence_class is not None:
        lines = [
            "import kmq_kernels  # reads the packed weights",
            f"from sentence_transformers import {sentence_class}",
            "",
            f'model = {sentence_class}("path/to/this/folder")',
        ]
    said = (
        "Import the package before loading: without it transformers cannot read the packed weights and starts from random ones."
    )
    return [said, "", "```python", *lines, "```"]


def _sizes(facts: Facts, quality: Quality | None) -> list[str]:
    """A table of sizes and of what was measured, as Markdown."""
    counts = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(facts.bits.items()))
    before, after = (8 * size / max(facts.weights, 1) for size in (facts.bytes_before, facts.bytes_after))
    rows = [
        "| | source | this model |",
        "|---|---|---|",
        f"| bytes of all tensors | {facts.bytes_before:,} | {facts.bytes_after:,} |",
        f"| bits per weight, everything counted | {before:.2f} | {after:.2f} |",
    ]
    if quality is not None:
        for metric, value in quality.metrics.items():
            given = (quality.fp32 or {}).get(metric)
            fp32 = "not measured" if given is None else f"{given:.4f}"
            rows.append(f"| {metric.replace('_', ' ')}, {quality.dataset_name} | {fp32} | {value:.4f} |")
    measured = [] if quality is not None else ["", "Quality: not measured."]
    return [*rows, "", f"Weights: {counts}.", *measured]


def write_card(folder: Path, text: str) -> bool:
    """Writes README.md, unless there is one that this package did not write; says whether it did."""
    path = folder / "README.md"
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    path.write_text(text, encoding="utf-8")
    return True


def base_of(folder: Path) -> str | None:
    """The id on the hub of the model that a packed folder was made from, as its card says; None where it does not."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    base = _parted(text)[0].get("base_model") if MARK in text else None
    return base if isinstance(base, str) else None


def source_card(source: Any) -> str | None:
    """The README.md of a model that was given as a folder or a hub id, from the disk or the hub's cache; None without one."""
    path = Path(str(source)) / "README.md"
    if not path.is_file() and hub_id(str(source)) == str(source):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(str(source), "README.md")
        path = Path(cached) if isinstance(cached, str) else path
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


SENTENCE_CONFIG = "config_sentence_transformers.json"
# What sentence-transformers asks of before it loads a module: a module of ours that is there once the package is imported.
REQUIRED = "kmq_kernels.hf"
_REQUIREMENT = {
    "specifier": "",
    "reason": "It is there once `import kmq_kernels` has run: write that line before the model is loaded, for without it"
    " transformers cannot read the packed weights and starts from random ones.",
}


def sentence_class(content: dict[str, Any]) -> str:
    """The class of sentence-transformers that a folder with this config_sentence_transformers.json is for."""
    named = content.get("model_type")
    return named if named in _SENTENCE_CLASSES else _SENTENCE_CLASSES[0]


def with_requirement(content: dict[str, Any]) -> dict[str, Any]:
    """A config_sentence_transformers.json with which sentence-transformers refuses to load the folder before we are imported."""
    given = content.get("requirements")
    return {**content, "requirements": {**(given if isinstance(given, dict) else {}), REQUIRED: _REQUIREMENT}}


def require(folder: Path, read: Callable[[Path], Any]) -> str | None:
    """Puts the requirement into a folder of sentence-transformers; the class it is for, None where it is no such folder."""
    path = folder / SENTENCE_CONFIG
    if not path.is_file():
        return None
    found = read(path)
    content = found if isinstance(found, dict) else {}
    path.write_text(json.dumps(with_requirement(content), indent=2, sort_keys=True), encoding="utf-8")
    return sentence_class(content)
