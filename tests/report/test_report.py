"""The report: its figures, and the page in a headless browser (skipped where there is none)."""

import html
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from kmq_kernels import report
from kmq_kernels.report import charts, tables


def _stage(metric, bits, losses=(), **more):
    return {
        "metrics": {"accuracy": metric}, "seconds": 2.5, "evaluation_seconds": 1.0, "peak_memory_bytes": 5 * 10**8,
        "bits_per_weight": bits, "ratio": 32 / bits, "bytes_on_disk": int(1e6 * bits), "losses": list(losses), **more,
    }  # fmt: skip


def _layers(bits):
    names = ["bert.embeddings.word_embeddings", *(f"bert.encoder.layer.{i}.output.dense" for i in range(3)), "bert.pooler.dense"]
    if bits is None:
        histogram = {"low": -1.0, "high": 1.0, "counts": [i * (120 - i) for i in range(120)]}
        return [{"name": name, "shape": [30, 40], "bytes": 4800, "histogram": histogram} for name in names]
    return [
        {"name": name, "shape": [30, 40], "bits": bits, "codebooks": 1, "bytes": 100 * bits, "outliers": i, "row_scale": False,
         "centroids": [2 * k / (2**bits - 1) - 1 for k in range(2**bits)], "error": 0.3**bits * (i + 1)}
        for i, name in enumerate(names)
    ]  # fmt: skip


def _write_run(folder, task, seed, configs):
    quantized = {}
    for stage, bits in (("stage1", None), *(((f"{n}/stage{k}"), b) for n, b in configs.items() for k in (2, 3))):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "layers.json").write_text(json.dumps(_layers(bits)))
    for name, bits in configs.items():
        third = _stage(0.88 + 0.01 * seed - 0.1 / bits, bits + 0.1, [2 / (i + 1) for i in range(40)])
        after = None if name.startswith("fisher") else third
        quantized[name] = {"stage2": _stage(0.86 + 0.02 * seed - 0.3 / bits, bits + 0.1), "stage3": after}
    settings = {"steps": 40, "seed": seed}
    results = {
        "command": ["kmq", "run", "a model <with> \"quotes\"", "--task", task], "metric": "accuracy",
        "request": {"model": "tiny", "task": task, "rows": {"train": 5}, "stage1": settings, "stage3": settings,
                    "configs": {name: {"scheme": name.split("-")[0]} for name in configs}},
        "stage1": _stage(0.9 + 0.01 * seed, 32.0, [3 / (i + 1) for i in range(60)]), "control": _stage(0.91, 32.0),
        "quantized": quantized, "versions": {"torch": "2.13", "processor": "some <CPU>"},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))


CONFIGS = {"kmeans-1bit": 1, "kmeans-2bit": 2, "kmeans-8bit": 8, "linear-2bit": 2, "fisher-2.5bpw": 3}


@pytest.fixture
def folder(tmp_path):
    """Two tasks, two seeds, as a comparison leaves them."""
    for task in ("one", "two"):
        for seed in (0, 1):
            _write_run(tmp_path / f"{task}/seed{seed}", task, seed, CONFIGS)
    return tmp_path


def test_figures_are_means_and_standard_errors(folder):
    records = report.collect(folder)
    assert [(record.task, record.seed) for record in records] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    tables = report.summaries(records)
    assert [table.title for table in tables] == ["tiny on one: accuracy", "tiny on two: accuracy"]
    rows = {row[0]: row for row in tables[0].rows}
    assert rows["fp32 after stage 1"][1:4] == ("0.9050 ± 0.0050", "0.9100 ± 0.0000", "32.00")
    assert rows["kmeans-2bit"][1:4] == ("0.7200 ± 0.0100", "0.8350 ± 0.0050", "2.10")
    assert rows["fisher-2.5bpw"][2] == ""
    assert str(report.Value((0.25,))) == "0.2500"
    lines = report.markdown(tables[0]).splitlines()
    assert lines[2].startswith("| configuration | stage 2 |")
    assert "| kmeans-2bit | 0.7200 ± 0.0100 | 0.8350 ± 0.0050 | 2.10 | 2.10 | 2 | 2.5 | 2.5 | 500 |" in lines


def _edit(folder, change):
    file = folder / "results.json"
    results = json.loads(file.read_text())
    change(results)
    file.write_text(json.dumps(results))


def test_runs_are_seeds_of_one_another_when_they_differ_in_nothing_else(tmp_path):
    """Six runs of one model and task name: two seeds, one of them twice; other steps; other data; another meaning of a name."""
    for name, seed in (("a/seed0", 0), ("a/seed1", 1), ("b/seed1", 1), ("c/steps", 0), ("d/data", 0), ("e/meaning", 0)):
        _write_run(tmp_path / name, "one", seed, {"kmeans-2bit": 2})
    _edit(tmp_path / "c/steps", lambda results: results["request"]["stage1"].update(steps=10))
    for name in ("a/seed0", "a/seed1", "b/seed1", "c/steps", "e/meaning"):
        _edit(tmp_path / name, lambda results: results["request"].update(data={"train": "aa"}))
    _edit(tmp_path / "d/data", lambda results: results["request"].update(data={"train": "bb"}))
    _edit(tmp_path / "e/meaning", lambda results: results["request"]["configs"]["kmeans-2bit"].update(init="random"))
    found = report.summaries(report.collect(tmp_path))
    assert [(table.title, table.rows[0][5]) for table in found] == [
        ("tiny on one (stage1 steps 40, in a): accuracy", "2"),
        ("tiny on one (stage1 steps 10): accuracy", "1"),
        ("tiny on one (stage1 steps 40, in data): accuracy", "1"),
        ("tiny on one (stage1 steps 40, configs kmeans-2bit init random): accuracy", "1"),
    ]
    assert found[0].rows[0][1] == "0.9050 ± 0.0050"  # of 0.90 and 0.91; counting seed 1 twice would make 0.9067
    assert found[0].rows[1][1] == "0.7200 ± 0.0100"
    page = report.page(report.collect(tmp_path))
    assert page.count("<section data-task") + page.count("data-task=") == 4
    assert "Settings: tiny on one (stage1 steps 10)" in page


def test_a_configuration_that_one_seed_lacks_keeps_them_together(tmp_path):
    _write_run(tmp_path / "seed0", "one", 0, {"kmeans-2bit": 2})
    _write_run(tmp_path / "seed1", "one", 1, {"kmeans-2bit": 2, "kmeans-8bit": 8})
    (table,) = report.summaries(report.collect(tmp_path))
    assert [(row[0], row[5]) for row in table.rows] == [("fp32 after stage 1", "2"), ("kmeans-2bit", "2"), ("kmeans-8bit", "1")]


def test_versions_and_commands_are_those_of_the_stages(folder):
    def made(results):
        for facts, torch in ((results["stage1"], "2.11"), (results["quantized"]["kmeans-2bit"]["stage2"], "2.13")):
            facts.update(versions={"torch": torch, "processor": "A"}, command=["kmq", "run", torch])

    _edit(folder / "one/seed0", made)
    shutil.rmtree(folder / "one/seed1")
    shutil.rmtree(folder / "two")
    text = html.unescape(report.page(report.collect(folder)))
    assert "2.11 (stage 1); 2.13 (kmeans-2bit, stage 2)" in text
    assert "<dd>A</dd>" in text
    assert "kmq run 2.11</pre>" in text
    assert "kmq run 2.13</pre>" in text
    assert "some <CPU>" not in text  # of the last command, which made none of them


def diverge(folder):
    """Stage 3 of one configuration diverged: as `kmq run` says it, and as an earlier version wrote it, with NaN."""
    nan = float("nan")
    stopped = {"stopped": "the loss is nan", "metrics": {}, "seconds": 1.0, "losses": [2.0, 1.0]}
    old = {**_stage(nan, 2.1), "losses": [2.0, nan]}
    _edit(folder / "one/seed0", lambda results: results["quantized"]["kmeans-2bit"].update(stage3=stopped))
    _edit(folder / "two/seed0", lambda results: results["quantized"]["kmeans-2bit"].update(stage3=old))
    file = folder / "two/seed0/kmeans-2bit/stage3/layers.json"
    layers = json.loads(file.read_text())
    layers[0].update(error=nan, centroids=[nan] * 4)
    file.write_text(json.dumps(layers))


def test_what_diverged_is_said_and_leaves_the_rest(folder):
    diverge(folder)
    for table in report.summaries(report.collect(folder)):
        rows = {row[0]: row for row in table.rows}
        assert rows["kmeans-2bit"][1:6] == ("0.7200 ± 0.0100", "0.8400 (1 diverged)", "2.10", "2.10", "2")
        assert rows["kmeans-8bit"][2] == "0.8725 ± 0.0050"
    page = report.write_report(folder).read_text()
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]

    def refuse(text):
        raise AssertionError(text)

    json.loads(data, parse_constant=refuse)


def test_markdown_keeps_bars_in_names():
    lines = report.markdown(report.Summary("t", ("a", "b"), (("x|y", "1"),))).splitlines()
    assert lines[-1] == "| x\\|y | 1 |"


def test_series_ticks_and_smoothing():
    assert [tables.family(name) for name in (*CONFIGS, "int8", "a-3-b")] == [
        "kmeans", "kmeans", "kmeans", "linear", "fisher", "int8", "a-3-b",
    ]  # fmt: skip
    assert charts.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(0.83, 0.91) == [0.84, 0.86, 0.88, 0.9]
    assert charts.ticks(2.0, 2.0) == [2.0]
    assert charts.smooth([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
    assert charts.finite([1.0, 2.0, float("nan"), 3.0]) == [1.0, 2.0]


class _Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.stack, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in ("meta", "link", "input"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_self_contained_and_well_formed(folder):
    path = report.write_report(folder)
    assert path == folder / "report.html"
    page = path.read_text()
    reader = _Reader()
    reader.feed(page)
    assert reader.stack == []
    assert reader.links == ["data:,"]
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", page)
    text = "".join(reader.text)
    assert "kmq run 'a model <with> \"quotes\"' --task one" in text
    assert "some <CPU>" in text
    assert page.count("<title>kmeans-2bit, stage 3: 0.8350") == 2
    assert sorted(p.name for p in folder.iterdir()) == ["one", "report.html", "two"]
    assert report.write_report(folder).read_text() == page


def test_a_run_that_is_not_finished_can_be_reported(folder):
    file = folder / "one/seed1/results.json"
    results = json.loads(file.read_text())
    results["control"], results["quantized"]["kmeans-1bit"] = None, {"stage2": None, "stage3": None}
    file.write_text(json.dumps(results))
    (folder / "one/seed0/kmeans-2bit/stage2/layers.json").unlink()
    assert "kmeans-2bit" in report.page(report.collect(folder))


@pytest.mark.parametrize("content", ["{", "[]", '{"request": {}}'])
def test_a_damaged_result_is_named(folder, content):
    (folder / "two/seed0/results.json").write_text(content)
    with pytest.raises(report.ReportError, match=r"two/seed0/results\.json: not the results of a run"):
        report.write_report(folder)
    assert not (folder / "report.html").exists()


def test_folder_without_results(tmp_path):
    with pytest.raises(report.ReportError, match="no results of `kmq run`"):
        report.collect(tmp_path)


BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)

# Runs in the page after its own script: chooses a tensor and a configuration, hides a series, and says what is then there.
PROBE = """
<script>
const seen = { errors: window.problems };
const pick = (id, value) => { const s = document.getElementById(id); s.value = value; s.dispatchEvent(new Event("change")); };
const bars = () => document.querySelectorAll("#histogram0 rect").length;
const lines = () => document.querySelectorAll("#histogram0 line[stroke='#d55e00']").length;
try {
  seen.tasks = document.querySelectorAll("section[data-task]").length;
  seen.bars = bars();
  pick("configuration0", "kmeans-2bit");
  seen.two = lines();
  pick("configuration0", "kmeans-8bit");
  seen.eight = lines();
  pick("tensor0", "bert.pooler.dense");
  seen.facts = document.getElementById("facts0").textContent;
  pick("stage0", "stage3");
  document.querySelector("#map0 button[data-name='bert.encoder.layer.1.output.dense']").click();
  seen.tensor = document.getElementById("tensor0").value;
  seen.focus = document.activeElement.dataset.name;
  const box = document.querySelector("[data-toggle=kmeans]");
  box.click();
  seen.hidden = [...document.querySelectorAll("#task0 .series[data-series=kmeans]")].every((g) => g.style.display === "none");
  seen.others = [...document.querySelectorAll("#task0 .series[data-series=linear]")].every((g) => g.style.display === "");
  seen.wide = document.documentElement.scrollWidth <= window.innerWidth;
  seen.reachable = [...document.querySelectorAll("select, button, input, a")].every((e) => e.tabIndex >= 0);
} catch (error) { window.problems.push(String(error)); }
document.documentElement.dataset.seen = JSON.stringify(seen);
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "diverged"), [(1200, False), (500, False), (1200, True)])
def test_page_in_a_browser(folder, width, diverged, tmp_path_factory):
    if diverged:
        diverge(folder)
    page = report.write_report(folder).read_text()
    catch = "<script>window.problems = []; window.onerror = (m) => { window.problems.push(m); };</script>"
    page = page.replace("<head>", f"<head>{catch}", 1).replace("</body>", f"{PROBE}</body>")
    (folder / "probe.html").write_text(page)
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900",
         f"--user-data-dir={tmp_path_factory.mktemp('browser')}", "--virtual-time-budget=4000", "--dump-dom",
         (folder / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not re.search(r"CONSOLE.*", done.stderr)
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', done.stdout).group(1)))
    assert seen.pop("errors") == []
    facts = seen.pop("facts")
    assert facts.startswith("bert.pooler.dense: 30 x 40, 8 bits, one codebook, 4 values kept exactly; 800 bytes; error")
    assert seen == {
        "tasks": 2, "bars": 120, "two": 4, "eight": 256, "tensor": "bert.encoder.layer.1.output.dense",
        "focus": "bert.encoder.layer.1.output.dense", "hidden": True, "others": True, "wide": True, "reachable": True,
    }  # fmt: skip
