"""Every help page and every table at 80 columns and piped, as texts; names and numbers are never cut."""

import re
import sys

import pytest
from snapshots import assert_snapshot

from kmq_kernels import cli, report
from kmq_kernels.cli import layout, show
from kmq_kernels.cli.checkpoint import _print_plan, _print_summary
from kmq_kernels.cli.results import results_table, summary_table
from kmq_kernels.cli.training import _print_metrics

COMMANDS = ("", "run", "finetune", "evaluate", "quantize", "verify", "bench", "compare", "inspect", "report")


@pytest.fixture(autouse=True)
def _piped(monkeypatch):
    """80 columns, no terminal."""
    monkeypatch.setenv("COLUMNS", "80")


def help_page(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kmq", *filter(None, [command]), "--help"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_pages(command, monkeypatch, capsys):
    page = help_page(command, monkeypatch, capsys)
    assert_snapshot(f"help-{command or 'kmq'}", page)
    assert max(map(len, page.splitlines())) <= 80
    assert "\033" not in page
    assert "…" not in page


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_every_option_has_a_sentence_and_its_default(command, monkeypatch, capsys):
    page = help_page(command, monkeypatch, capsys)
    entries = re.split(r"\n  (?=-|[A-Z])", page.partition("\nModel\n")[2])
    assert len(entries) >= 3
    for entry in entries:
        text = " ".join(entry.split())
        if text.startswith("--help"):
            continue
        assert re.search(r"\. \[(default: .+|required)\]|\) \[default: .+\]", text), text


@pytest.mark.parametrize("command", ["run", "finetune", "evaluate", "quantize"])
@pytest.mark.parametrize("columns", [40, 120])
def test_no_name_is_cut_at_other_widths(command, columns, monkeypatch, capsys):
    wide = help_page(command, monkeypatch, capsys)
    monkeypatch.setenv("COLUMNS", str(columns))
    page = help_page(command, monkeypatch, capsys)
    assert set(re.findall(r"--[a-z-]+", wide)) == set(re.findall(r"--[a-z-]+", page))


def stage(metric, seconds, ratio=1.0, size=90_980_000):
    facts = {"metrics": {"matthews_correlation": metric}, "seconds": seconds, "bits_per_weight": 32 / ratio, "ratio": ratio}
    return {**facts, "bytes_on_disk": int(size / ratio), "peak_memory_bytes": 1_234_000_000}


RESULTS = {
    "metric": "matthews_correlation",
    "request": {"model": "/data/models/all-minilm-l6-v2", "task": "reviews/train.csv", "stage1": {"seed": 0}, "configs": {}},
    "stage1": stage(0.8692, 139.2),
    "control": stage(0.8617, 12.3),
    "quantized": {
        "kmeans-4bit": {"stage2": stage(0.8705, 0.12, 7.85), "stage3": stage(0.8666, 9.4, 7.85)},
        "kmeans-distortion-8000000bytes": {"stage2": stage(-0.0102, 10.26, 11.4), "stage3": None},
        "kmeans-distortion-8500000bytes": {"stage2": stage(0.7, 10.26, 11.4), "stage3": None},
        "kmeans-2bit": {"stage2": None, "stage3": None},  # asked for, and not finished yet
    },
}


def test_table_of_a_run(monkeypatch):
    assert_snapshot("table-run", results_table(RESULTS) + "\n")
    monkeypatch.setenv("COLUMNS", "120")
    assert_snapshot("table-run-120", results_table(RESULTS) + "\n")
    monkeypatch.setenv("COLUMNS", "50")
    assert_snapshot("table-run-50", results_table(RESULTS) + "\n")


def test_table_of_a_comparison(monkeypatch):
    records = []
    for seed, value in ((0, 0.85), (1, 0.87)):
        request = {**RESULTS["request"], "stage1": {"seed": seed}}
        quantized = {
            **RESULTS["quantized"],
            "kmeans-4bit": {"stage2": stage(value, 0.1, 7.85), "stage3": stage(value, 9.0, 7.85)},
        }
        records.append(report.tables.Record(None, {**RESULTS, "request": request, "quantized": quantized}))
    (summary,) = report.summaries(records)
    assert_snapshot("table-comparison", summary_table(summary) + "\n")
    monkeypatch.setenv("COLUMNS", "120")
    assert_snapshot("table-comparison-120", summary_table(summary) + "\n")


def layers(prefix, blocks, names, hidden=384, vocabulary=30522):
    shared = {"bits": 4, "codebooks": 1}
    found = [
        {"name": f"{prefix}embeddings.{name}", "kind": "CodebookEmbedding", "shape": [rows, hidden], **shared}
        for name, rows in (("word_embeddings", vocabulary), ("position_embeddings", 512))
    ] + [
        {"name": f"{prefix}encoder.layer.{block}.{name}", "kind": "CodebookLinear", "shape": shape, **shared}
        for block in range(blocks)
        for name, shape in names
    ]
    return [{**layer, "bytes": layer["shape"][0] * layer["shape"][1] // 2 + 64} for layer in found]


MINILM = [
    *((f"attention.{name}", [384, 384]) for name in ("self.query", "self.key", "self.value", "output.dense")),
    ("intermediate.dense", [1536, 384]),
    ("output.dense", [384, 1536]),
]
MPNET = [
    *((f"attention.attn.{name}", [768, 768]) for name in "qkvo"),
    ("intermediate.dense", [3072, 768]),
    ("output.dense", [768, 3072]),
]


@pytest.mark.parametrize(
    ("name", "prefix", "blocks", "parts", "hidden"), [("minilm", "bert.", 6, MINILM, 384), ("mpnet", "mpnet.", 12, MPNET, 768)]
)
def test_tables_of_layers(name, prefix, blocks, parts, hidden, monkeypatch):
    given = layers(prefix, blocks, parts, hidden)
    text = show.layers_table(given, "some/folder")
    assert_snapshot(f"table-inspect-{name}", text + "\n")
    joined = " ".join(text.split())
    assert all(part.rpartition(".")[2] in joined for part, _ in parts)
    every = show.layers_table(given, "some/folder", every=True)
    wide = len(every.splitlines()[2].split()[0])
    squeezed = "".join(line[:wide].strip() for line in every.splitlines()[3:])
    assert len(every.splitlines()) > len(given)
    if name == "minilm":
        assert_snapshot("table-inspect-all", every + "\n")
    assert squeezed == "".join(layer["name"] for layer in given)  # whole names, folded at most
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        assert max(map(len, show.layers_table(given, "some/folder").splitlines())) <= int(columns)


def test_layers_that_differ_do_not_share_a_row():
    given = layers("", 3, [("dense", [4, 4])])
    given[-1] = {**given[-1], "bits": 8}
    rows = show.layers_table(given, "").splitlines()
    assert [row.split()[0] for row in rows if row.startswith("encoder")] == ["encoder.layer.0-1:", "encoder.layer.2.dense"]
    assert show.shared_name(["a.0.x", "a.2.x", "a.0.y"]) == "a.0,2: x; a.0: y"
    assert show.shared_name(["a.0.b.0.x", "a.1.b.0.x"]) == "a.0-1: b.0.x"
    assert show.shared_name(["a.x", "b.x"]) == "a.x, b.x"


class Plan:
    """What `_print_plan` reads of a plan."""

    source, model_class, left_out = "some/folder", "BertModel", ()

    class Shard:
        name = "model.safetensors"

    def __init__(self):
        self.shards = [self.Shard()]
        self.shards[0].units = [unit(name, [30522, 384], bits) for name, bits in (("embeddings.word_embeddings.weight", 4),)]
        self.shards[0].units += [unit("encoder.layer.0.attention.output.LayerNorm.weight", [384], None)]


def unit(name, shape, bits):
    nbytes = 4 * (shape[0] * shape[-1] if len(shape) > 1 else shape[0])
    source = type("Source", (), {"shape": tuple(shape), "nbytes": nbytes})
    return type("Unit", (), {"name": name, "source": source, "bits": bits, "nbytes": nbytes // 8 if bits else nbytes})


def test_tables_of_quantize(capsys):
    _print_plan(Plan(), as_json=False)
    assert_snapshot("table-quantize-dry-run", capsys.readouterr().out)
    from kmq_kernels.checkpoint.quantize import Summary, Times

    times = Times()
    times.total, times.measure, times.read, times.cluster, times.write = 9.5, 7.0, 0.5, 1.5, 0.25
    numbers = {"weights": 22_713_216, "quantized_weights": 22_565_376, "bytes_before": 90_852_864, "bytes_after": 11_877_312}
    files = {
        "shards": 2,
        "shards_made": 1,
        "side_files_made": True,
        "read_bytes": 90_852_864,
        "clustered_weights": 22_565_376,
        "measured_weights": 22_565_376,
        "file_bytes": 11_890_112,
        "size": 12_000_000,
        "module_bits": {3: 20, 4: 40},
        "peak_bytes": 612_000_000,
    }
    _print_summary(Summary(out="packed", model_class="BertModel", times=times, **numbers, **files), 1, as_json=False)
    assert_snapshot("table-quantize", capsys.readouterr().out)


def test_metrics(capsys):
    _print_metrics({"accuracy": 0.5, "f1": 2 / 3, "validation_matched/accuracy": 0.5}, as_json=False)
    assert_snapshot("table-metrics", capsys.readouterr().out)


def test_a_table_folds_names_and_headings_and_never_numbers():
    columns = ("layer", "a long heading", "bytes")
    name = "encoder.layer.10.attention.self.query_projection"
    text = layout.table(columns, [(name, "1,234,567", "12,345,678,901")], total=56)
    assert max(map(len, text.splitlines())) <= 56
    assert "1,234,567  12,345,678,901" in text
    assert re.sub(r"\s|1,234,567|12,345,678,901", "", text).endswith(name)
    blocks = layout.table(columns, [(name, "1,234,567", "12,345,678,901")], total=40)
    assert blocks.splitlines()[-2:] == ["  a long heading: 1,234,567", "  bytes: 12,345,678,901"]
    assert layout.table(("a", "b"), []).splitlines() == ["a  b", "-  -"]


class Terminal:
    """Standard output of a person."""

    def isatty(self):
        return True


def test_bold_only_where_it_is_shown(monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert layout.bold("x") == "x"
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert layout.bold("x") == "\033[1mx\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert layout.bold("x") == "x"
