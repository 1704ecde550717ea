"""Damaged model folders: after any change of a packed one, kmq.load gives the same model or one sentence, nothing else."""

import json
import random
import shutil
import string

import pytest
import torch
from checkpoints import quantize
from conftest import family_model

import kmq_kernels as kmq
from kmq_kernels.files import DTYPES, CheckpointError

# Fields of config.json that say how a model computes, not what it is made of: with another value there the folder describes
# another model, which is as whole as this one. Only checksums tell (see test_with_checksums_every_change_is_seen).
BEHAVIOUR = {
    "attention_probs_dropout_prob", "bos_token_id", "classifier_dropout", "eos_token_id", "hidden_act", "hidden_dropout_prob",
    "initializer_range", "is_decoder", "layer_norm_eps", "num_attention_heads", "pad_token_id", "tie_word_embeddings",
    "use_cache", "add_cross_attention", "transformers_version", "id2label", "label2id",
}  # fmt: skip
JUNK = [None, True, -1, 0, 1, 3, 7, 2**40, 1.5, "", "x", "row", [], ["x"], {}, {"x": 2}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Packed folders, one file and many, and what their models are."""
    root = tmp_path_factory.mktemp("packed")
    family_model("bert").save_pretrained(root / "source")
    options = {"bits": 3, "granularity": "group", "group_rows": 7, "outlier_fraction": 0.02, "skip": ["position_embeddings"]}
    quantize(root / "source", root / "one", **options)
    quantize(root / "source", root / "many", shard_bytes=6000, bits=4, module_bits={"query": 2})
    assert len(list(root.glob("many/*.safetensors"))) > 3
    return {name: (root / name, kmq.load(root / name).state_dict()) for name in ("one", "many")}


def read_file(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_file(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def header_byte(rng, file, folder):
    data = bytearray(file.read_bytes())
    at = rng.randrange(8 + int.from_bytes(data[:8], "little"))
    data[at] = rng.choice([data[at] ^ (1 << rng.randrange(8)), rng.randrange(256)])
    file.write_bytes(data)


def cut(rng, file, folder):
    data = file.read_bytes()
    file.write_bytes(rng.choice([data[: rng.randrange(len(data))], data + b"\0" * rng.randrange(1, 9)]))


def of_header(change):
    def mutate(rng, file, folder):
        header, data = read_file(file)
        names = [name for name in header if name != "__metadata__"]
        change(rng, header, rng.choice(names), names)
        write_file(file, header, data)

    mutate.__name__ = change.__name__
    return mutate


@of_header
def shape(rng, header, name, names):
    now = header[name]["shape"]
    choices = [now[::-1], [*now, 1], [1, *now], now[:-1], [*now[:-1], now[-1] + 1], [*now[:-1], 0], [-1], "x", [2**62], [1.5]]
    header[name]["shape"] = rng.choice([*choices, header[rng.choice(names)]["shape"]])


@of_header
def renamed(rng, header, name, names):
    at = rng.randrange(len(name))
    flipped = name[:at] + chr(ord(name[at]) ^ (1 << rng.randrange(7))) + name[at + 1 :]
    other = rng.choice(["", "x", f"{name}.x", f"bert.{name}", name.removeprefix("bert."), name.rpartition(".")[0]])
    header[rng.choice([flipped, other])] = header.pop(name)


@of_header
def dropped(rng, header, name, names):
    del header[name]


@of_header
def offsets(rng, header, name, names):
    begin, end = header[name]["data_offsets"]
    by = rng.choice([1, 4, -4, 64, 2**40])
    choices = [[begin + by, end + by], [begin, end + by], [end, begin], [begin], None, [begin, "x"]]
    header[name]["data_offsets"] = rng.choice(choices)


@of_header
def dtype(rng, header, name, names):
    header[name]["dtype"] = rng.choice([*(other for other in DTYPES if other != header[name]["dtype"]), "", None])


@of_header
def entry(rng, header, name, names):
    header[name] = rng.choice([None, [], {}, {**header[name], "x": 1}, {"dtype": "F32"}])


def of_config(change):
    def mutate(rng, file, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(change(rng, config)))

    mutate.__name__ = change.__name__
    return mutate


@of_config
def quantization_value(rng, config):
    table = config["quantization_config"]
    name = rng.choice(list(table))
    words = ["linear", "kmeans", "tensor", "row", "group", "paper", "int8", "mean", "fisher"]
    table[name] = rng.choice([*JUNK, *words, [5], {"query": 3}, {"(": 4}])
    return config


@of_config
def quantization_key(rng, config):
    table = config["quantization_config"]
    if rng.random() < 0.5:
        del table[rng.choice(list(table))]
    else:
        table["".join(rng.choices(string.ascii_lowercase, k=4))] = rng.choice(JUNK)
    return config


@of_config
def config_value(rng, config):
    name = rng.choice([name for name in config if name not in BEHAVIOUR])
    words = ["BertModel", "RobertaForSequenceClassification", "AutoTokenizer", "bert", "roberta", "float16", "int8"]
    config[name] = rng.choice([*JUNK, *words, [rng.choice(words)]])
    return config


@of_config
def config_key(rng, config):
    name = rng.choice([name for name in config if name not in BEHAVIOUR])
    config[rng.choice(["x", name.upper()])] = config.pop(name)
    return config


@of_config
def whole_config(rng, config):
    return rng.choice([*JUNK, {"model_type": "bert"}, {**config, "quantization_config": rng.choice(JUNK)}])


def config_byte(rng, file, folder):
    path = folder / rng.choice([name for name in ("config.json", "model.safetensors.index.json") if (folder / name).exists()])
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if path.name == "config.json":  # a digit or a letter can make another value of a field of BEHAVIOUR
        data = data[:at] if rng.random() < 0.5 else data[:at] + rng.choice([b"{", b"}", b'"', b",", b"\xff"]) + data[at + 1 :]
    else:
        data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


MUTATIONS = [
    header_byte, cut, shape, renamed, dropped, offsets, dtype, entry, quantization_value, quantization_key, config_value,
    config_key, whole_config, config_byte,
]  # fmt: skip


def check(seed, folders, tmp_path):
    """Applies the mutation of a seed; what is wrong with the outcome, None where nothing is."""
    rng = random.Random(seed)
    source, expected = folders[rng.choice(sorted(folders))]
    folder = tmp_path / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    mutate = MUTATIONS[seed % len(MUTATIONS)]
    mutate(rng, rng.choice(sorted(folder.glob("*.safetensors"))), folder)
    try:
        found = kmq.load(folder).state_dict()
    except CheckpointError as error:
        sentence = str(error)
        if "\n" in sentence or len(sentence) > 700 or str(folder) not in sentence:
            return f"{seed} {mutate.__name__}: {sentence!r}"
        return None
    except Exception as error:
        return f"{seed} {mutate.__name__}: {type(error).__name__}: {error}"
    if found.keys() != expected.keys() or not all(torch.equal(found[name], expected[name]) for name in expected):
        return f"{seed} {mutate.__name__}: another model"
    return None


def test_the_same_model_or_one_sentence(folders, tmp_path):
    assert [fault for seed in range(10 * len(MUTATIONS)) if (fault := check(seed, folders, tmp_path))] == []


@pytest.mark.slow
def test_the_same_model_or_one_sentence_a_thousand_times(folders, tmp_path):
    assert [fault for seed in range(10_000, 11_008) if (fault := check(seed, folders, tmp_path))] == []


def test_with_checksums_every_change_is_seen(folders, tmp_path):
    """verify=True: any other byte in any file of the folder, also in values of tensors, and a file more or less."""
    rng = random.Random(7)
    for name, (source, _) in folders.items():
        kmq.load(source, verify=True)
        files = sorted(path.name for path in source.iterdir() if path.is_file())
        for file in files * 2:
            folder = tmp_path / "mutant"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            data = bytearray((folder / file).read_bytes())
            at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
            (folder / file).write_bytes(data)
            with pytest.raises(CheckpointError) as caught:
                kmq.load(folder, verify=True)
            assert "\n" not in str(caught.value), (name, file)
    shutil.copy(folders["one"][0] / "model.safetensors", folder / "model.safetensors")  # read instead of the files of the index
    for file in files:
        shutil.copy(folders["many"][0] / file, folder / file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not in the manifest"):
        kmq.load(folder, verify=True)


def test_verify_needs_checksums(tmp_path):
    family_model("bert").save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"it has no kmq_manifest\.json, so there are no checksums to verify"):
        kmq.load(tmp_path / "plain", verify=True)
