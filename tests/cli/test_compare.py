"""kmq compare: two folders on the same texts."""

import json
import shutil
import sys

import pytest
import tiny_task
import torch

import kmq_kernels as kmq
from kmq_kernels import cli
from kmq_kernels.cli.compare import differences

TEXTS = ["good film", "very bad food", "not fine day", "poor", "very very good day"]


@pytest.fixture
def folders(tmp_path):
    """A model, the same in 3 bits, and a file of texts."""
    tiny_task.write_task(tmp_path)
    shutil.copytree(tmp_path / "model", tmp_path / "packed")
    model = kmq.load(tmp_path / "model")
    kmq.quantize_(model, kmq.KMQConfig(bits=3))
    model.save_pretrained(tmp_path / "packed")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    return tmp_path


def run(capsys, *arguments):
    before, sys.argv = sys.argv, ["kmq", "compare", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as done:
            cli.main()
    finally:
        sys.argv = before
    return done.value.code or 0, *capsys.readouterr()


def test_a_model_beside_its_packed_form(folders, capsys):
    options = ["--texts", folders / "texts.txt", "--repeats", 1]
    code, out, _ = run(capsys, folders / "model", folders / "packed", *options, "--json")
    found = json.loads(out)
    assert (code, found["texts"]) == (0, 5)
    assert 0.5 < found["worst_cosine"] <= found["mean_cosine"] < 1
    assert found["bytes"][0] > 2 * found["bytes"][1]
    one, other = (kmq.load(folders / name).eval() for name in ("model", "packed"))
    tokenizer = tiny_task.word_tokenizer()
    with torch.no_grad():  # text by text, without padding
        states, classes = [], []
        for model in (one, other):
            batches = [tokenizer(text, return_tensors="pt") for text in TEXTS]
            states.append(torch.stack([model.bert(**batch)[0][0].mean(0) for batch in batches]).double())
            classes.append(torch.stack([model(**batch).logits[0].argmax() for batch in batches]))
    cosine = torch.cosine_similarity(*states, -1)
    assert found["worst_cosine"] == pytest.approx(float(cosine.min()), abs=1e-5)
    assert found["other_predictions"] == int((classes[0] != classes[1]).sum())
    code, out, _ = run(capsys, folders / "model", folders / "model", *options)
    assert code == 0
    assert "mean 1.00000, worst 1.00000" in out
    assert "0 of 5" in out


def test_differences_by_hand():
    one = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    found = differences((one, torch.tensor([0, 1, 1])), (other, torch.tensor([0, 0, 1])))
    half = 0.5**0.5
    assert found["mean_cosine"] == pytest.approx((1 + 0 + half) / 3)
    assert found["worst_cosine"] == 0
    assert found["similarity_error"] == pytest.approx((1 + half + half) / 3)  # pairs 0 1, 0 2, 1 2
    assert found["other_predictions"] == 1
    narrow = differences((one, None), (one[:, :1], torch.tensor([0, 1, 1])))
    assert (narrow["mean_cosine"], narrow["other_predictions"]) == (None, None)


def test_what_cannot_be_compared(folders, capsys):
    tiny_task.word_tokenizer(tiny_task.WORDS[::-1]).save_pretrained(folders / "packed")
    code, _, said = run(capsys, folders / "model", folders / "packed", "--texts", folders / "texts.txt")
    assert code == 1
    assert f"{folders / 'packed'} has another tokenizer than {folders / 'model'} (line 1 of the texts" in said
    code, _, said = run(capsys, folders / "model", folders / "model", "--texts", folders / "none.txt")
    assert (code, said) == (1, f"kmq: --texts: no such file: {folders / 'none.txt'}\n")
    (folders / "empty.txt").write_text("\n\n")
    code, _, said = run(capsys, folders / "model", folders / "model", "--texts", folders / "empty.txt")
    assert code == 1
    assert said.startswith("kmq: --texts: expected lines of text")
