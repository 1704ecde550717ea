"""What commands say, refuse and remember, in the words of the command line."""

import json
import os
import re
import stat
import subprocess
import sys

import huggingface_hub
import pytest
import tiny_task
from snapshots import assert_snapshot

from kmq_kernels import cli
from kmq_kernels import files as kmq_files
from kmq_kernels.files import CheckpointError, model_folder, parse_size


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT with its tokenizer, and a csv task it can learn."""
    tiny_task.write_task(tmp_path)
    return tmp_path


@pytest.fixture
def kmq(monkeypatch, capsys):
    """kmq(*arguments) -> exit code, standard output, standard error."""

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["kmq", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def files(folder):
    """The options of the task, and of a short run."""
    return ["--train-file", folder / "train.csv", "--validation-file", folder / "dev.csv", "--max-length", 8]


FEW = ["--steps", 2, "--second-steps", 1, "--batch-size", 8]


def settled(text, folder):
    """Text without what differs from run to run: the folder, and numbers in figures of the same width."""
    return re.sub(r"\d+\.\d+", lambda found: re.sub(r"\d", "#", found[0][-6:]), text.replace(str(folder), "FOLDER"))


def test_a_run_in_a_pipe_is_a_line_a_stage_and_a_table(kmq, folder, files, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, said = kmq("run", folder / "model", "-o", folder / "out", "--bits", 3, *FEW, *files)
    assert (code, said) == (0, "")
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == [
        "stage 1",
        "control",
        "kmeans-3bit, stage 2",
        "kmeans-3bit, stage 3",
    ]
    assert lines[4] == ""
    assert all(
        re.search(r": accuracy [01]\.\d{4}, \d+\.\d s, 0\.\d\d MB, \d+\.\d\d bits per weight$", line) for line in lines[:4]
    )
    assert "\033" not in out
    assert "\r" not in out
    assert max(map(len, lines[5:-1])) <= 80 + len(str(folder))
    # The folder knows its task, and a second command on it says what is finished.
    code, out, said = kmq("evaluate", folder / "out/kmeans-3bit/stage3", "--max-length", 8)
    assert (code, out.split()[0]) == (0, "accuracy")
    assert said == f"kmq: task: {folder / 'dev.csv'}, as {folder / 'out/task.json'} says\n"
    code, out, said = kmq("run", folder / "model", "-o", folder / "out", "--bits", 3, *FEW, *files, "--json")
    assert json.loads(out)["quantized"]["kmeans-3bit"]["stage3"]["metrics"]
    assert said.count("finished earlier") == 4
    for command in (["inspect", folder / "out/kmeans-3bit/stage3"], ["report", folder / "out"], ["inspect"]):
        code, out, said = kmq(*command, "--json")
        assert (code, said) == (0, "")
        json.loads(out)
    code, out, _ = kmq("inspect", folder / "out/kmeans-3bit/stage3")
    assert code == 0
    assert all(name in out for name in ("bert.encoder.layer.0-1:", "attention.self.query", "attention.output.dense"))
    code, out, _ = kmq("inspect", folder / "out/kmeans-3bit/stage3", "--all")
    assert "bert.encoder.layer.1.attention." in out


def test_finetune_and_evaluate_in_a_pipe(kmq, folder, files):
    code, out, said = kmq("finetune", folder / "model", "-o", folder / "tuned", "--steps", 2, *files)
    assert (code, said) == (0, "")
    assert_snapshot("finetune", settled(out, folder))
    code, out, said = kmq("finetune", folder / "tuned", "-o", folder / "more", "--steps", 1, *files, "--json")
    assert (code, said, list(json.loads(out))) == (0, "", ["accuracy"])
    code, out, _ = kmq("evaluate", folder / "more", "--validation-file", folder / "dev.csv", "--max-length", 8, "--json")
    assert (code, list(json.loads(out))) == (0, ["accuracy"])
    # Without a word about the task it is the folder's own.
    code, again, said = kmq("evaluate", folder / "more", "--max-length", 8, "--json")
    assert (code, json.loads(again)) == (0, json.loads(out))
    (folder / "more/task.json").unlink()
    code, _, said = kmq("evaluate", folder / "more", "--max-length", 8)
    assert code == 1
    assert said.splitlines() == [
        "kmq: task: banking77, for no other is named and the folder does not say",
        "kmq: banking77: the model has 2 classes (no, yes), the task has 77 (card_arrival, card_linking, exchange_rate,"
        " card_payment_wrong_exchange_rate, extra_charge_on_statement, ...)",
    ]


def test_a_refused_request_is_not_remembered(kmq, folder, files):
    out = folder / "out"
    wrong = [
        (["--size", "2KB"], "kmq: --size: the smallest possible for this model is"),
        (["--max-length", 100], "kmq: --max-length: the model has 40 positions, got 100"),
        (["--bits", 9], "kmq: --bits: expected an integer from 1 to 8, got 9"),
        (["--row-scale", "--granularity", "row"], "kmq: --row-scale: expected granularity"),
    ]
    for options, sentence in wrong:
        code, text, said = kmq("run", folder / "model", "-o", out, *FEW, *files, *options)
        assert (code, text) == (1, "")
        assert said.startswith(sentence)
        assert len(said.splitlines()) == 1
        assert not out.exists()
    code, _, said = kmq("run", folder / "modle", "-o", out, *FEW, *files)
    assert (code, said) == (1, f"kmq: {folder / 'modle'}: no such model folder; nearest in that folder: model\n")
    assert kmq("run", folder / "model", "-o", out, *FEW, *files, "--bits", 4)[0] == 0
    # The same on a finished folder: what is refused is not added to it.
    before = (out / "run.json").read_bytes()
    assert kmq("run", folder / "model", "-o", out, *FEW, *files, "--size", "2KB")[0] == 1
    assert (out / "run.json").read_bytes() == before
    code, text, _ = kmq("run", folder / "model", "-o", out, *FEW, *files, "--size", "50KB", "--no-control")
    assert code == 1  # without a control it is another run
    code, text, _ = kmq("run", folder / "model", "-o", out, *FEW, *files, "--size", "50KB")
    assert code == 0
    rows = [line.split()[0] for line in text.splitlines() if line.startswith("kmeans-") and "stage" not in line]
    assert rows == ["kmeans-4bit", "kmeans-uniform-50000bytes"]
    code, text, said = kmq("run", folder / "model", "-o", out, *FEW, *files, "--size", "60KB")
    assert "kmeans-uniform-50000bytes" in text
    assert "kmeans-uniform-60000bytes" in text
    assert "kmeans-uniform-60000bytes: the same bits for all modules use" in said or not said


def test_what_contradicts_itself(kmq, folder, files):
    code, _, said = kmq("run", folder / "model", "--size", "8MB", "--bits", 3, *files)
    assert (code, said) == (1, "kmq: --bits: --size 8MB finds the bits that fit it; give one of the two\n")
    code, _, said = kmq("run", folder / "model", "--task", "banking77", *files)
    assert (code, said) == (1, "kmq: --task: give either the task 'banking77' or own files, not both.\n")
    code, _, said = kmq("evaluate", folder / "model", "--task", "rte")
    assert (code, said) == (1, "kmq: --data-dir: the task rte needs a data folder that holds its GLUE files.\n")


SIZES = {"8MB": 8_000_000, "10MiB": 10_485_760, "8_000_000": 8_000_000, "8e6": 8_000_000}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes_mean_the_same_everywhere(text, size, kmq, bert, tmp_path):
    assert parse_size("size", text) == size
    code, out, _ = kmq("quantize", bert, "-o", tmp_path / "out", "--shard-size", text, "--dry-run", "--json")
    assert (code, len({tensor["file"] for tensor in json.loads(out)["tensors"]})) == (0, 1)


@pytest.mark.parametrize("text", ["much", "0", "-8MB", "8XB", "1.0000001", "MB", "", "nan", "8 MB extra"])
def test_what_is_no_size(text, kmq, bert, tmp_path):
    with pytest.raises(ValueError, match="size: expected a size such as 500MB, 2GB, 10MiB or 8_000_000, got"):
        parse_size("size", text)
    code, _, said = kmq("quantize", bert, "-o", tmp_path / "out", f"--shard-size={text}")
    assert code == 1
    assert said.startswith("kmq: --shard-size: expected a size such as")


@pytest.mark.parametrize("command", ["run", "quantize", "finetune"])
def test_exit_codes_are_the_same_in_all_commands(command, kmq, folder, tmp_path, monkeypatch):
    model, files = folder / "model", ["--train-file", folder / "train.csv", "--validation-file", folder / "dev.csv"]
    more = [] if command == "quantize" else [*files, "--steps", 1, "--max-length", 8]
    assert kmq(command, model, "-o", tmp_path / "out", "--colour")[0] == 2
    assert kmq(command, model, "-o", tmp_path / "out", "--seed", "x")[0] == 2
    assert kmq(command, tmp_path / "no/model", "-o", tmp_path / "out", *more)[0] == 1
    taken = tmp_path / "taken"
    taken.write_text("")
    code, _, said = kmq(command, model, "-o", taken / "out", *more)
    assert (code, len(said.splitlines())) == (3, 1)
    assert re.match(rf"kmq: {re.escape(str(taken))}\S*: cannot be written: (Not a directory|File exists)\b", said)


def test_usage_errors_are_one_line(kmq):
    code, out, said = kmq("run", "--colour", "red")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"kmq: No such option: --colour.*; kmq run --help shows its options\n", said)
    code, _, said = kmq("rnu")
    assert (code, len(said.splitlines())) == (2, 1)
    assert "kmq --help shows the commands" in said


def test_patterns_that_match_nothing_are_refused_with_the_nearest(kmq, bert, tmp_path):
    for option, argument in (("--skip", "poler"), ("--module-bits", "poler=8")):
        code, _, said = kmq("quantize", bert, "-o", tmp_path / "out", option, argument)
        assert code == 1
        assert said.startswith(f"kmq: {option}: 'poler' matches no embedding or linear layer of ")
        assert "nearest: pooler" in said
        assert not (tmp_path / "out").exists()
    assert kmq("quantize", bert, "-o", tmp_path / "out", "--skip", "classifier", "--dry-run")[0] == 0  # left in any case


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_decides_who_may_read(umask, kmq, folder, files):
    before = os.umask(umask)
    try:
        assert (
            kmq("run", folder / "model", "-o", folder / "out", *FEW, *files, "--weighting", "fisher", "--fisher-batches", 1)[0]
            == 0
        )
        assert kmq("quantize", folder / "model", "-o", folder / "packed")[0] == 0
    finally:
        os.umask(before)
    written = [path for name in ("out", "packed") for path in (folder / name).rglob("*") if path.is_file()]
    assert any(path.name == "fisher.safetensors" for path in written)
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in written} == {oct(0o666 & ~umask)}


def test_a_label_column_of_numbers_is_said_to_be_a_regression(kmq, folder):
    rows = "".join(f"good film,{i}.5\n" for i in range(8))
    (folder / "scores.csv").write_text("text,label\n" + rows)
    files = ["--train-file", folder / "scores.csv", "--validation-file", folder / "scores.csv", "--max-length", 8, "--steps", 1]
    code, out, said = kmq("finetune", folder / "model", "-o", folder / "out", *files)
    assert (code, out.split()[0]) == (0, "pearson")
    assert said.startswith("kmq: label column 'label': 8 different numbers, a regression; --problem classification for classes\n")


class Hub:
    """Counts what is asked of the hub."""

    def __init__(self, answer):
        self.asked, self.answer = [], answer

    def model_info(self, model, revision=None, timeout=None):
        self.asked.append((model, timeout))
        if self.answer is not None:
            raise self.answer


@pytest.mark.parametrize("model", ["./bert", "/no/such/bert", "~/bert", "a/b/c", "models/bert", "bert base"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    hub = Hub(None)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="no such model folder"):
        model_folder(model)
    assert hub.asked == []


def test_the_hub_is_asked_once_with_a_time_limit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Hub(OSError("no\nnetwork"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 3)
    with pytest.raises(CheckpointError, match=r"some/bert: no such model folder, and the hub does not give it \(no network\)"):
        model_folder("some/bert")
    assert hub.asked == [("some/bert", 3)]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    assert model_folder("some/bert") == tmp_path  # the cache has it
    hub.answer = None
    assert model_folder("some/bert") is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert model_folder("some/bert") == tmp_path
    assert hub.asked == []


IMPORTS = """
import json, sys
sys.argv = ["kmq", *{arguments!r}]
from kmq_kernels import cli
try:
    cli.main()
except SystemExit as done:
    code = done.code or 0
heavy = ("torch", "transformers", "datasets", "pandas", "sklearn", "scipy", "triton", "rich.console")
print(json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["run", "--help"], 0),
        (["quantize", "--help"], 0),
        (["run", "--colour", "red"], 2),
        (["run", "--bits", "9"], 1),
        (["run", "--scheme", "round"], 2),
        (["run", "--size", "much"], 1),
        (["quantize", "x", "-o", "y", "--group-rows", "0"], 1),
        (["run", "./nowhere"], 1),
        (["finetune", "nowhere", "-o", "out"], 1),  # HF_HUB_OFFLINE is set
        (["run", "--task", "poetry"], 1),
        (["finetune", "--train-file", "no.csv", "--validation-file", "no.csv"], 1),
    ],
)
def test_nothing_heavy_is_imported_to_show_help_or_to_refuse(arguments, code, run_python):
    assert run_python(IMPORTS.format(arguments=arguments)) == [code, []]


def test_a_reader_that_has_seen_enough(folder):
    command = [sys.executable, "-m", "kmq_kernels.cli", "run", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert said == b""


def test_doors_that_import_on_first_use_list_the_same_names_three_times():
    import kmq_kernels

    for module in (kmq_kernels, kmq_files):
        assert set(module.__all__) <= set(dir(module))
        assert all(getattr(module, name) is not None for name in module.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
            module.nonsense  # noqa: B018
