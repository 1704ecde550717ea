"""Embedders without labels: pooling and metrics by brute force, the stages of a run, what comes along, what is refused."""

import copy
import itertools
import json
import re

import pytest
import torch
from conftest import family_model
from scipy.stats import spearmanr
from tiny_task import WORDS, kmq_command, word_tokenizer
from transformers import AutoModel, AutoTokenizer

import kmq_kernels as kmq
from kmq_kernels import report, training
from kmq_kernels.files import CheckpointError
from kmq_kernels.layers import CodebookModule
from kmq_kernels.training import embedders, load_task
from kmq_kernels.training.embedders import EmbeddingMetrics, embeddings, pooled, pooling_of

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def write_embedder(folder, **pooling):
    """folder/model, a tiny encoder as sentence-transformers saves one, folder/corpus.txt (60 texts), folder/pairs.csv."""
    model = folder / "model"
    family_model("bert").bert.save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    (model / "1_Pooling").mkdir()
    options = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, **pooling}
    (model / "1_Pooling/config.json").write_text(json.dumps(options))
    (model / "modules.json").write_text(json.dumps(MODULES))
    (model / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    (model / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# A tiny encoder\n")
    generator = torch.Generator().manual_seed(0)

    def text():
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (2 + int(torch.randint(0, 5, (), generator=generator)),)))

    (folder / "corpus.txt").write_text("\n".join(dict.fromkeys(text() for _ in range(80))))
    rows = [f"{text()},{text()},{i % 5}" for i in range(12)]
    (folder / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny embedder with texts and pairs."""
    torch.manual_seed(0)
    return write_embedder(tmp_path_factory.mktemp("embedder"))


def _run(folder, out, steps=30, **options):
    task = load_task("texts", train_file=folder / "corpus.txt", pairs=folder / "pairs.csv")
    moving = training.TrainingSettings(
        steps=steps, batch_size=16, learning_rate=3e-4, max_length=12, distill=True, assignments="moving"
    )
    settings = {"configs": {"two": kmq.KMQConfig(bits=2, granularity="row")}, "stage3": moving, **options}
    return training.Run(str(folder / "model"), task, folder / out, **settings)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
@pytest.mark.parametrize("left", [False, True])
def test_pooling_takes_real_tokens_only(pooling, left):
    hidden = torch.randn(3, 5, 4, dtype=torch.float64)
    lengths = [5, 2, 1]
    mask = torch.tensor([[0] * (5 - n) + [1] * n if left else [1] * n + [0] * (5 - n) for n in lengths])
    found = pooled(hidden, mask, pooling)
    for row, n in enumerate(lengths):
        real = hidden[row, 5 - n :] if left else hidden[row, :n]
        expected = {"mean": real.mean(0), "cls": hidden[row, 0], "max": real.max(0).values, "lasttoken": real[-1]}[pooling]
        torch.testing.assert_close(found[row], expected)


def test_how_a_folder_pools(tmp_path):
    written = write_embedder(tmp_path) / "model"
    assert pooling_of(str(written)) == "mean"
    for options, expected in (
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, "lasttoken"),
        ({}, "mean"),
    ):
        (written / "1_Pooling/config.json").write_text(json.dumps(options))
        assert pooling_of(str(written)) == expected
    for options in (
        {"pooling_mode_weightedmean_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
    ):
        (written / "1_Pooling/config.json").write_text(json.dumps(options))
        with pytest.raises(
            training.PipelineError, match=r"config\.json: expected one way to pool, of mean, cls, max, lasttoken; got"
        ):
            pooling_of(str(written))
    (written / "modules.json").unlink()
    assert pooling_of(str(written)) == "mean"


def _by_brute_force(model, tokenizer, texts):
    """Normalized mean-pooled embeddings, a text at a time, without padding."""
    found = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, truncation=True, max_length=12, return_tensors="pt")).last_hidden_state
        found.append(torch.nn.functional.normalize(hidden[0].double().mean(0), dim=0))
    return torch.stack(found)


def test_stages_of_a_run(folder):
    run = _run(folder, "out")
    results = run()
    first, (second, third) = results["stage1"], results["quantized"]["two"].values()
    assert results["control"] is None
    assert first["losses"] == []
    assert first["metrics"]["mean_cosine"] == pytest.approx(1)
    assert second["metrics"]["mean_cosine"] < third["metrics"]["mean_cosine"] < 1

    tokenizer = training.load_tokenizer(str(folder / "model"))
    fp32, model = AutoModel.from_pretrained(folder / "model").eval(), kmq.load(folder / "out/two/stage3").eval()
    held = run.task.evaluation["held_out"]["text"]
    theirs, ours = (_by_brute_force(each, tokenizer, held) for each in (fp32, model))
    cosines = (ours * theirs).sum(1)
    pairs = [(i, j) for i in range(len(held)) for j in range(i)]
    similar = [[float(each[i] @ each[j]) for i, j in pairs] for each in (ours, theirs)]
    one, other = (_by_brute_force(model, tokenizer, run.task.pairs[name]) for name in ("text", "text_pair"))
    expected = {
        "mean_cosine": float(cosines.mean()),
        "worst_cosine": float(cosines.min()),
        "similarity_spearman": spearmanr(*similar).statistic,
        "pairs_spearman": spearmanr((one * other).sum(1), run.task.pairs["label"]).statistic,
    }
    assert third["metrics"] == pytest.approx(expected, abs=2e-3)

    # The model of the first stage is the one that was given, bit for bit.
    given = fp32.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in kmq.load(folder / "out/stage1").state_dict().items())


def test_similarities_of_many_texts_are_those_of_some(folder, monkeypatch):
    """As many pairs as memory has room for; the other metrics are of all texts. Modes of modules stay."""
    run = _run(folder, "none")
    model, tokenizer = (each.from_pretrained(folder / "model") for each in (AutoModel, AutoTokenizer))
    model.train().encoder.layer[0].eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embeddings.word_embeddings.weight += 0.02 * torch.randn_like(other.embeddings.word_embeddings.weight)
    held = run.task.evaluation["held_out"]["text"]
    full = EmbeddingMetrics(run.task, model, tokenizer, 12, "mean")(other)
    monkeypatch.setattr(embedders, "SIMILAR", 4)
    some = EmbeddingMetrics(run.task, model, tokenizer, 12, "mean")(other)
    assert {name for name in full if full[name] != some[name]} == {"similarity_spearman"}
    modes = [module.training for module in model.encoder.layer]
    assert (model.training, modes[0], all(modes[1:])) == (True, False, True)
    ours, theirs = (embeddings(each, tokenizer, held, 12, "mean") for each in (other, model))
    expected = []
    for chosen in itertools.combinations(range(len(held)), 4):
        pairs = list(itertools.combinations(chosen, 2))
        one, two = ([float(each[i] @ each[j]) for i, j in pairs] for each in (ours, theirs))
        expected.append(spearmanr(one, two).statistic)
    assert min(abs(value - some["similarity_spearman"]) for value in expected) < 1e-12


def test_everything_of_the_folder_comes_along_and_the_card_says_the_quality(folder):
    results = _run(folder, "out")()
    for stage in ("stage1", "two/stage2", "two/stage3"):
        for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
            assert (folder / "out" / stage / name).read_bytes() == (folder / "model" / name).read_bytes()
    card = (folder / "out/two/stage3/README.md").read_text()
    cosine = results["quantized"]["two"]["stage3"]["metrics"]["mean_cosine"]
    assert re.search(rf"\| mean cosine, held out of \S+/corpus.txt \| 1.0000 \| {cosine:.4f} \|", card)
    assert "datasets:" not in card  # own files are none of the hub
    assert "license: mit" in card.split("---")[1]
    assert "# A tiny encoder" in card
    (found,) = report.quality(report.collect(folder / "out"))
    assert found.columns == ("model", "mean cosine", "worst cosine", "similarity spearman", "pairs spearman")
    assert [row[0] for row in found.rows] == ["fp32", "two, stage 2", "two, stage 3"]
    assert found.rows[2][1] == f"{cosine:.4f}"
    assert f"<td>{cosine:.4f}</td>" in report.page(report.collect(folder / "out"))


def test_the_output_loads_in_sentence_transformers(folder):
    library = pytest.importorskip("sentence_transformers")
    _run(folder, "out")()
    texts = ["good film", "very bad food", "day"]
    path = folder / "out/two/stage3"
    loaded = library.SentenceTransformer(str(path), device="cpu")
    model, tokenizer = kmq.load(path).eval(), training.load_tokenizer(str(path))
    ours = embeddings(model, tokenizer, texts, 16, "mean")
    torch.testing.assert_close(torch.from_numpy(loaded.encode(texts)).double(), ours, rtol=1e-4, atol=1e-5)


def test_a_run_resumes_and_repeats(folder):
    _run(folder, "once")()
    announced = []
    _run(folder, "once", announce=announced.append)()
    assert all("finished earlier" in line for line in announced)
    _run(folder, "twice")()
    weights = [(folder / out / "two/stage3/model.safetensors").read_bytes() for out in ("once", "twice")]
    assert weights[0] == weights[1]


def test_commands(folder, tmp_path, monkeypatch, capsys):
    data = ["--task", "texts", "--train-file", folder / "corpus.txt", "--pairs", folder / "pairs.csv", "--max-length", 12]
    few = ["--second-steps", 2, "--batch-size", 8, "-o", tmp_path / "out"]
    assert kmq_command(monkeypatch, "run", folder / "model", *data, *few, "--bits", 2) == 0
    printed = capsys.readouterr().out
    assert "quality" in printed
    assert "kmeans-2bit-output, stage 3" in printed
    assert kmq_command(monkeypatch, "evaluate", tmp_path / "out/kmeans-2bit-output/stage3", "--max-length", 12, "--json") == 0
    metrics = json.loads(capsys.readouterr().out)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert metrics == pytest.approx(results["quantized"]["kmeans-2bit-output"]["stage3"]["metrics"], abs=1e-9)
    assert results["request"]["stage3_of"]["kmeans-2bit-output"]["assignments"] == "moving"

    plain = ["--scheme", "linear", "--scheme", "kmeans", "--objective", "weights", "--second-steps", 1, "--batch-size", 8]
    assert kmq_command(monkeypatch, "run", folder / "model", *data, *plain, "-o", tmp_path / "plain") == 0
    assert {path.name for path in (tmp_path / "plain").glob("*-4bit")} == {"linear-4bit", "kmeans-4bit"}
    assert "linear-4bit, stage 3" in capsys.readouterr().out

    second = tmp_path / "out/kmeans-2bit-output/stage2"
    alone = ["finetune", second, *data, "--steps", 2, "--batch-size", 8, "-o", tmp_path / "alone", "--json"]
    assert kmq_command(monkeypatch, *alone, "--teacher", folder / "model") == 0
    assert json.loads(capsys.readouterr().out).keys() == metrics.keys()
    assert (tmp_path / "alone/modules.json").is_file()
    assert any(isinstance(module, CodebookModule) for module in kmq.load(tmp_path / "alone").modules())
    for arguments, sentence in (
        ([*alone[:-3], "-o", tmp_path / "no"], "--teacher: the task texts needs the model in floating point"),
        (["evaluate", second, *data], None),
        (["evaluate", folder / "model", *data], "--teacher: embeddings are measured against the model in floating point"),
        (["evaluate", second, *data, "--compute", "int8"], "--compute: embeddings are measured with the layers as they are"),
        (["run", second, *data, *few[:-1], tmp_path / "no"], "MODEL: .* is quantized already"),
        (
            ["run", folder / "model", *data, *few[:-1], tmp_path / "no", "--weighting", "fisher"],
            "--weighting: sensitivities need",
        ),
        (["run", folder / "model", *data[:2], "-o", tmp_path / "no"], "--train-file: the task texts needs a file of texts"),
    ):
        code = kmq_command(monkeypatch, *arguments)
        error = capsys.readouterr().err
        assert (code, "Traceback" in error) == (1 if sentence else 0, False)
        if sentence:
            assert re.search(sentence, error), error


def test_teachers_that_do_not_belong_are_refused(folder, tmp_path):
    _run(folder, "out")()
    task = load_task("texts", train_file=folder / "corpus.txt")
    second, few = str(folder / "out/two/stage2"), training.TrainingSettings(steps=1, max_length=12)
    for name, options, sentence in (
        (
            "wide",
            {"intermediate_size": 64},
            r"teacher: encoder.layer.0.intermediate.dense is \(64, 32\), that of the model \(48, 32\)",
        ),
        ("flat", {"num_hidden_layers": 1}, "teacher: it has no layer encoder.layer.1.attention.self.query"),
    ):
        family_model("bert", **options).bert.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
        with pytest.raises(training.PipelineError, match=sentence):
            training.finetune_folder(second, task, few, tmp_path / "x", str(tmp_path / name))
    with pytest.raises(training.PipelineError, match="is quantized already"):
        training.finetune_folder(second, task, few, tmp_path / "x", second)
    with pytest.raises(CheckpointError, match=r"no model folder|has no"):
        training.finetune_folder(second, task, few, tmp_path / "x", str(tmp_path))
