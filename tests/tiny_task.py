"""A tiny BERT with its tokenizer and a csv task it can learn: what tests of whole commands run on."""

import torch
from conftest import family_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kmq_kernels import cli

WORDS = ["good", "bad", "fine", "poor", "film", "day", "food", "very", "not"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_tokenizer(words=WORDS):
    """A tokenizer of whole words, in the manner of BERT."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def write_task(folder, **config):
    """folder/model, folder/train.csv (64 rows) and folder/dev.csv (32 rows, labels no and yes)."""
    named = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    family_model("bert", **{**named, **config}).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    for name, rows in (("train", 64), ("dev", 32)):
        lines = ["text,label"]
        for i in range(rows):
            noun = WORDS[4 + int(torch.randint(0, 3, (), generator=generator))]
            lines.append(f"{'very ' * (i % 3)}{('good', 'bad', 'fine', 'poor')[i % 4]} {noun},{('yes', 'no')[i % 2]}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")


def kmq_command(monkeypatch, *arguments):
    """The exit code of the command `kmq` with these arguments, run in this process."""
    monkeypatch.setattr("sys.argv", ["kmq", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0
