"""kmq quantize: the same bytes as in memory, for any ranks, after any interruption; strangers' files are refused."""

import contextlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, family_config, family_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, BertModel

import kmq_kernels as kmq
from kmq_kernels import checkpoint, cli, tensor_files
from kmq_kernels.checkpoint import DamagedError, OutputError, quantize_checkpoint, verify_checkpoint
from kmq_kernels.checkpoint_plan import find_source, make_plan
from kmq_kernels.tensor_files import CheckpointError


def quantize(source, out, *, model_class=None, shard_bytes=256_000_000, on_progress=None, **options):
    plan = make_plan(Path(source), kmq.KMQConfig(**options), model_class=model_class, shard_bytes=shard_bytes)
    return quantize_checkpoint(plan, Path(out), on_progress=on_progress)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def in_memory(auto, source, out, **options):
    model = auto.from_pretrained(source)
    kmq.quantize_(model, kmq.KMQConfig(**options))
    model.save_pretrained(out)


def assert_same_model(one, other):
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture
def bert(tmp_path):
    """A small BERT classifier folder, with a file beside the weights."""
    family_model("bert").save_pretrained(tmp_path / "source")
    (tmp_path / "source/vocab.txt").write_text("[PAD]\n")
    return tmp_path / "source"


@pytest.fixture(scope="session")
def sharded(tmp_path_factory):
    """An encoder of 20 MB in 5 files, and the options that quantize it into about a dozen."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(4)
    sizes = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 64}
    config = BertConfig(num_hidden_layers=6, num_attention_heads=4, **sizes)
    BertModel(config).save_pretrained(folder, max_shard_size="5MB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder, {"bits": 4, "shard_bytes": 250_000}


# The same bytes as quantize_ and save_pretrained


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bytes_as_in_memory(family, tmp_path):
    family_model(family).save_pretrained(tmp_path / "dense")
    in_memory(AutoModelForSequenceClassification, tmp_path / "dense", tmp_path / "one", bits=3)
    quantize(tmp_path / "dense", tmp_path / "two", bits=3)
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "electra", "deberta-v2", "mpnet", "distilbert"])
def test_same_bytes_for_tied_heads(family, tmp_path, ids):
    family_model(family, "MaskedLM").save_pretrained(tmp_path / "dense")
    in_memory(AutoModelForMaskedLM, tmp_path / "dense", tmp_path / "one", bits=4)
    quantize(tmp_path / "dense", tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")
    expected = AutoModelForMaskedLM.from_pretrained(tmp_path / "one")(ids).logits
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path / "two")(ids).logits, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "scheme": "linear"},
        {"bits": 4, "granularity": "row"},
        {"bits": 3, "granularity": "group", "group_rows": 5},
        {"preset": "paper", "bits": 4},
        {"preset": "int8"},
        {"bits": 3, "outlier_fraction": 0.01, "row_scale": True},
        {"bits": 4, "skip": [r"encoder\.layer\.1"], "module_bits": {"query": 2, "classifier": 8}},
    ],
)
def test_same_bytes_for_every_option(options, bert, tmp_path):
    in_memory(AutoModelForSequenceClassification, bert, tmp_path / "one", **options)
    quantize(bert, tmp_path / "two", **options)
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("named", [True, False])
def test_same_bytes_for_other_dtypes(dtype, named, bert, tmp_path):
    """The dtype is config.json's; where it names none, that of the tensors."""
    AutoModelForSequenceClassification.from_pretrained(bert).to(dtype).save_pretrained(bert)
    if not named:
        config = json.loads((bert / "config.json").read_text())
        del config["dtype"]
        (bert / "config.json").write_text(json.dumps(config))
    in_memory(AutoModelForSequenceClassification, bert, tmp_path / "one", bits=4)
    quantize(bert, tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


def test_a_dtype_that_the_tensors_do_not_have(bert, tmp_path):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    in_memory(AutoModelForSequenceClassification, bert, tmp_path / "one", bits=4)
    quantize(bert, tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("head", ["base of a classifier", "classifier of a base"])
def test_base_and_headed_checkpoints(head, bert, tmp_path):
    """The prefix of the base model is added or taken away, and an encoder that claims a head is an encoder."""
    if head == "base of a classifier":
        in_memory(AutoModel, bert, tmp_path / "one", bits=4)
        quantize(bert, tmp_path / "two", bits=4, model_class="BertModel")
    else:
        config = json.loads((bert / "config.json").read_text())
        AutoModel.from_pretrained(bert).save_pretrained(bert)
        (bert / "config.json").write_text(json.dumps(config))
        in_memory(AutoModel, bert, tmp_path / "one", bits=4)
        quantize(bert, tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_legacy_names(bert, tmp_path, ids):
    quantize(bert, tmp_path / "one", bits=4)

    def change(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)

    rewrite(bert, change)
    quantize(bert, tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("same", [True, False])
def test_tied_weights_that_are_stored_twice(same, tmp_path):
    """Equal ones are tied, as config.json says; different ones are not, as in from_pretrained."""
    family_model("bert", "MaskedLM").save_pretrained(tmp_path / "dense")

    def change(tensors):
        weight = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.weight"] = weight.clone() if same else weight + 1

    rewrite(tmp_path / "dense", change)
    in_memory(AutoModelForMaskedLM, tmp_path / "dense", tmp_path / "one", bits=4)
    quantize(tmp_path / "dense", tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


def test_only_the_tied_head_is_stored(tmp_path):
    family_model("bert", "MaskedLM").save_pretrained(tmp_path / "dense")
    quantize(tmp_path / "dense", tmp_path / "one", bits=4)
    head, embedding = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    rewrite(tmp_path / "dense", lambda tensors: tensors.update({head: tensors.pop(embedding)}))
    quantize(tmp_path / "dense", tmp_path / "two", bits=4)
    assert_same_model(tmp_path / "one", tmp_path / "two")


def test_many_files_hold_the_same_tensors(sharded, tmp_path):
    source, options = sharded
    in_memory(AutoModel, source, tmp_path / "one", bits=4)
    quantize(source, tmp_path / "two", **options)
    files = sorted(tmp_path.glob("two/*.safetensors"))
    assert len(files) > 8
    assert max(file.stat().st_size for file in files[1:]) < 300_000
    expected = load_file(tmp_path / "one/model.safetensors")
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((tmp_path / "two/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    ids = torch.arange(12)[None]
    for load in (kmq.load, AutoModel.from_pretrained):
        assert torch.equal(load(tmp_path / "two")(ids).pooler_output, kmq.load(tmp_path / "one")(ids).pooler_output)


def test_shards_are_filled_in_the_order_of_layers(sharded):
    source, options = sharded
    plan = make_plan(source, kmq.KMQConfig(), shard_bytes=options["shard_bytes"])
    layers = [int(unit.name.split(".")[2]) for unit in plan.units if unit.name.startswith("encoder.layer")]
    assert layers == sorted(layers)
    for unit in plan.units:
        assert len({shard.name for shard in plan.shards for other in shard.units if other is unit}) == 1


# Interruption


DRIVER = """
import json, os, random, signal, socket, sys, time
from pathlib import Path
import torch, kmq_kernels as kmq
from kmq_kernels.checkpoint import quantize_checkpoint
from kmq_kernels.checkpoint_plan import make_plan
from kmq_kernels.ranks import Ranks
source, options = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(1)
make_plan(source, kmq.KMQConfig())  # imports what the children need

def command(out, pause=0.0):
    shard_bytes = options.get("shard_bytes", 256_000_000)
    plan = make_plan(source, kmq.KMQConfig(bits=options["bits"]), shard_bytes=shard_bytes)
    with Ranks.of_environment() as ranks:
        quantize_checkpoint(plan, Path(out), ranks=ranks, on_progress=lambda _: time.sleep(pause))

def start(out, rank=None, size=1, port=0, **more):
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 9
    try:
        if rank is not None:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        command(out, **more)
        code = 0
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = getattr(error, "exit_code", 1)
    finally:
        os._exit(code)

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def together(out, size, **more):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(out, rank, size, port, **more) for rank in range(size)]

def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
"""

KILLS = """
folder, trials = Path(sys.argv[3]), int(sys.argv[4])
begin = time.monotonic()
assert end(start(folder / "whole")) == 0
length = time.monotonic() - begin
expected = content(folder / "whole")
chance = random.Random(int(sys.argv[5]))
finished = []
for trial in range(trials):
    out = folder / f"trial{trial}"
    for _ in range(chance.choice([1, 1, 2, 4])):
        child = start(out)
        time.sleep(chance.uniform(0, 1.05 * length))
        os.kill(child, signal.SIGKILL)
        end(child)
    finished.append(len(list(out.glob("*.safetensors"))))
    for path in out.glob("*.safetensors") if out.exists() else ():  # whatever has its name is complete
        assert path.read_bytes() == expected[path.name], path
    assert end(start(out)) == 0
    assert content(out) == expected, trial
print(json.dumps({"finished": finished, "shards": sum(name.endswith(".safetensors") for name in expected)}))
"""

RANKS = """
folder = Path(sys.argv[3])
assert end(start(folder / "whole")) == 0
expected = content(folder / "whole")
for size in map(int, sys.argv[4].split(",")):
    codes = [end(child) for child in together(folder / f"of{size}", size)]
    assert codes == [0] * size, codes
    assert content(folder / f"of{size}") == expected
    assert content(folder / f"of{size}").keys() == expected.keys()
print(json.dumps({"files": len(expected)}))
"""

DEATH = """
folder = Path(sys.argv[3])
assert end(start(folder / "whole")) == 0
children = together(folder / "out", 2, pause=0.5)
while len(list((folder / "out").glob("*.safetensors"))) < 2:
    time.sleep(0.02)
os.kill(children[1], signal.SIGKILL)
begin = time.monotonic()
codes = [end(child) for child in children]
waited = time.monotonic() - begin
made = len(list((folder / "out").glob("*.safetensors")))
assert [end(child) for child in together(folder / "out", 2)] == [0, 0]
assert content(folder / "out") == content(folder / "whole")
print(json.dumps({"codes": codes, "waited": waited, "made": made, "pid": children[1]}))
"""


def drive(code, sharded, *arguments):
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])}
    source, options = sharded
    command = [sys.executable, "-c", DRIVER + code, str(source), json.dumps(options), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_killed_at_any_moment(sharded, tmp_path):
    result, _ = drive(KILLS, sharded, tmp_path, 5, 1)
    assert result["shards"] > 8
    assert any(0 < finished < result["shards"] for finished in result["finished"])


@pytest.mark.slow
def test_killed_thirty_times(sharded, tmp_path):
    result, _ = drive(KILLS, sharded, tmp_path, 30, time.time_ns() % 10**6)
    print(result)


def test_ranks_make_the_same_files(sharded, tmp_path):
    drive(RANKS, sharded, tmp_path, "2,4")


def test_a_rank_that_dies_is_named(sharded, tmp_path):
    result, said = drive(DEATH, sharded, tmp_path)
    assert result["codes"] == [4, -signal.SIGKILL]
    assert f"rank 1 (process {result['pid']} on" in said
    assert result["waited"] < 20
    assert result["made"] >= 2


def test_another_command_on_the_same_folder(sharded, bert, tmp_path):
    source, options = sharded

    class Stop(Exception):
        pass

    def stop(progress):
        raise Stop

    with pytest.raises(Stop):
        quantize(source, tmp_path / "out", on_progress=stop, **options)
    before = content(tmp_path / "out")
    for other, sentence in [
        ({**options, "bits": 3}, "bits 4, this asks for 3"),
        ({**options, "shard_bytes": 300_000}, "shard_bytes 250000"),
        ({**options, "skip": ["pooler"]}, "skip None"),
    ]:
        with pytest.raises(CheckpointError, match=sentence):
            quantize(source, tmp_path / "out", **other)
    with pytest.raises(CheckpointError, match="model_class 'BertModel'"):
        quantize(bert, tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match="unfinished"):
        verify_checkpoint(tmp_path / "out")
    assert content(tmp_path / "out") == before
    quantize(source, tmp_path / "out", **options)
    done = content(tmp_path / "out")
    quantize(source, tmp_path / "whole", **options)
    assert done == content(tmp_path / "whole")
    assert not (tmp_path / "out/.kmq").exists()
    with pytest.raises(CheckpointError, match="bits 4, this asks for 3"):
        quantize(source, tmp_path / "out", **{**options, "bits": 3})
    assert quantize(source, tmp_path / "out", **options).shards_made == 0
    assert content(tmp_path / "out") == done


def test_a_source_that_changed(sharded, tmp_path):
    source, options = sharded
    shutil.copytree(source, tmp_path / "source")
    with pytest.raises(ZeroDivisionError):
        quantize(tmp_path / "source", tmp_path / "out", on_progress=lambda _: 1 / 0, **options)
    file = next((tmp_path / "source").glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=f"begun from another {file.name}"):
        quantize(tmp_path / "source", tmp_path / "out", **options)


def test_folders_that_are_no_output(bert, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    inside = "in one another"
    for out, sentence in [(tmp_path / "full", "choose another folder"), (bert, inside), (bert / "out", inside)]:
        before = content(out) if out.exists() else {}
        with pytest.raises(CheckpointError, match=sentence):
            quantize(bert, out)
        assert (content(out) if out.exists() else {}) == before
    shutil.copytree(bert, tmp_path / "packed")
    quantize(bert, tmp_path / "one")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(tmp_path / "one", tmp_path / "two")


def test_two_at_a_time(sharded, tmp_path):
    source, options = sharded

    def again(progress):
        with pytest.raises(CheckpointError, match="another run is writing"):
            quantize(source, tmp_path / "out", **options)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quantize(source, tmp_path / "out", on_progress=again, **options)
    quantize(source, tmp_path / "out", **options)


def test_damage_is_found_and_repaired(sharded, tmp_path):
    source, options = sharded
    quantize(source, tmp_path / "out", **options)
    before = content(tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out")["files"] == len(before) - 1
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[-7] ^= 4
    shard.write_bytes(data)
    for check in (lambda: verify_checkpoint(tmp_path / "out"), lambda: quantize(source, tmp_path / "out", **options)):
        with pytest.raises(DamagedError, match=f"{shard.name} does not match its checksum"):
            check()
    for name in (shard.name, "config.json"):
        (tmp_path / "out" / name).unlink()
        with pytest.raises(DamagedError, match="is missing"):
            verify_checkpoint(tmp_path / "out")
        assert quantize(source, tmp_path / "out", **options).shards_made == (name == shard.name)
        assert content(tmp_path / "out") == before
    (tmp_path / "out/.kmq").mkdir()  # what a kill leaves after the manifest is there
    (tmp_path / "out/.kmq/lock").touch()
    assert quantize(source, tmp_path / "out", **options).shards_made == 0
    assert content(tmp_path / "out") == before


def test_nan_in_a_weight(bert, tmp_path):
    def change(tensors):
        tensors["bert.encoder.layer.1.output.dense.weight"][3, 4] = torch.nan

    rewrite(bert, change)
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight: NaN or Inf"):
        quantize(bert, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


MOUNTED = """
set -e
mkdir -p "$1"
mount -t tmpfs -o size=$2 tmpfs "$1"
[ "$3" = ro ] && mount -o remount,ro "$1"
shift 3
set +e
"$@"
echo "code $?"
cd "$OUT" && find . -name '*.safetensors'
"""


def on_small_disk(source, options, folder, size, mode, out):
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")]), "OUT": str(folder)}
    run = ["unshare", "-rm", "sh", "-c", MOUNTED, "sh", str(folder), size, mode]
    if subprocess.run([*run, "true"], capture_output=True, env=env, check=False).returncode != 0:
        pytest.skip("no private mounts here")
    command = [sys.executable, "-m", "kmq_kernels.cli", "quantize", str(source), "-o", str(out)]
    done = subprocess.run([*run, *command, *options], env=env, capture_output=True, text=True, timeout=500, check=False)
    code, *files = done.stdout.split("code ")[1].split()
    sentences = [line for line in done.stderr.splitlines() if not line.startswith("kmq: left out")]
    assert len(sentences) == 1, done.stderr
    return int(code), files, sentences[0]


def test_full_disk(sharded, tmp_path):
    source, _ = sharded
    code, files, sentence = on_small_disk(source, ["--shard-size", "250KB"], tmp_path / "disk", "1m", "rw", tmp_path / "disk/out")
    assert (code, files) == (3, [])
    assert "needs" in sentence
    assert "MB free" in sentence


def test_disk_that_fills_up_meanwhile(sharded, tmp_path, monkeypatch):
    """The free space looked enough, and was not: the shards that are finished stay, nothing partial has a name."""
    source, options = sharded
    quantize(source, tmp_path / "whole", **options)
    real, left = os.pwrite, [900_000]

    def pwrite(descriptor, data, at):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match="No space left on device"):
        quantize(source, tmp_path / "out", **options)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert files
    assert all(file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes() for file in files)
    assert not (tmp_path / "out/config.json").exists()
    assert not list((tmp_path / "out/.kmq").glob("*.partial"))
    monkeypatch.undo()
    quantize(source, tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_read_only_target(sharded, tmp_path):
    code, files, sentence = on_small_disk(sharded[0], [], tmp_path / "disk", "64m", "ro", tmp_path / "disk/out")
    assert (code, files) == (3, [])
    assert "Read-only file system" in sentence


# Strangers' files


@pytest.fixture
def strange(tmp_path):
    """A folder of two weight files and an index, to be damaged."""
    torch.manual_seed(5)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    BertModel(config).save_pretrained(tmp_path / "strange", max_shard_size="30KB")
    assert len(list((tmp_path / "strange").glob("*.safetensors"))) >= 2
    return tmp_path / "strange"


def header_of(file):
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def store(file, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def flip(file, chance, begin=0):
    data = bytearray(file.read_bytes())
    data[chance.randrange(begin, len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def mutate_header(chance, file):
    header, data = header_of(file)
    names = [name for name in header if name != "__metadata__"]
    entry = header[chance.choice(names)]
    kind = chance.randrange(12)
    if kind == 0:  # a bit, beyond the metadata, which says nothing that counts
        raw = bytearray(file.read_bytes())
        at = chance.randrange(raw.index(b"}") + 1, len(raw) - len(data))
        raw[at] ^= 1 << chance.randrange(8)
        file.write_bytes(raw)
        return
    if kind == 1:
        file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])
        return
    if kind == 2:
        store(file, header, data, chance.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(json.dumps(header)) + len(data) + 9]))
        return
    if kind == 3:
        entry["data_offsets"] = [chance.randrange(-5, 2**40), chance.randrange(-5, 2**66)]
    elif kind == 4:
        entry["data_offsets"] = [entry["data_offsets"][0] + 4, entry["data_offsets"][1] + 4]
    elif kind == 5:
        entry["shape"] = chance.choice([[2**62, 2**62], [-1, 4], [2**40], [1.5], ["3"], [True], None, [2**40] * 60, [0]])
    elif kind == 6:
        entry["dtype"] = chance.choice(["F31", "", None, 7, "F64", "F16", "U8"])
    elif kind == 7:
        del entry[chance.choice(["dtype", "shape", "data_offsets"])]
    elif kind == 8:  # a name twice
        text = json.dumps(header, separators=(",", ":"))
        name = json.dumps(chance.choice(names))
        store(file, (text[:-1] + f",{name}:{json.dumps(entry)}}}").encode(), data)
        return
    elif kind == 9:
        text = chance.choice([b"", b"{", b"[]", b"null", b"7", b"[" * 20000, b"\xff\xfe", b'{"a":NaN}', b"{}" + b"x"])
        store(file, text, data)
        return
    elif kind == 10:
        data = chance.choice([data + b"\0", data[:-1], data + bytes(4096), b""])
    else:
        other = header.pop(chance.choice(names))
        header[chance.choice(["x", "\0", "..", "encoder.layer.9.output.dense.weight"])] = other
    store(file, header, data)


def mutate_index(chance, folder):
    path = folder / "model.safetensors.index.json"
    index = {"weight_map": json.loads(path.read_text())["weight_map"]}
    name = chance.choice(sorted(index["weight_map"]))
    kind = chance.randrange(7)
    if kind == 0:
        path.write_text(json.dumps(index, separators=(",", ":")))
        flip(path, chance)
        return
    if kind == 1:
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size - 2)])
        return
    if kind == 2:
        outside = folder.parent / "outside.safetensors"
        shutil.copy(folder / index["weight_map"][name], outside)
        ways = ["../outside.safetensors", str(outside), "x/../../outside.safetensors", "..", "", "."]
        index["weight_map"][name] = chance.choice(ways)
    elif kind == 3:
        index["weight_map"][name] = chance.choice(["model-9.safetensors", "config.json", "\0.safetensors", 5, None, ["a"]])
    elif kind == 4:
        index["weight_map"]["no.such.weight"] = index["weight_map"][name]
    elif kind == 5:
        files = sorted(set(index["weight_map"].values()))
        index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])
    else:
        maps = ['{"weight_map": []}', '{"weight_map": 3}', '{"weight_map": {}}']
        path.write_text(chance.choice(["", "[]", "{}", "[" * 50000, *maps]))
        return
    path.write_text(json.dumps(index))


def test_three_hundred_damaged_checkpoints(strange, tmp_path):
    """Each is refused with a sentence, quickly, and no file makes us allocate more than twice its size."""
    import tracemalloc

    quantize(strange, tmp_path / "packed", shard_bytes=4000)
    verify_checkpoint(tmp_path / "packed")
    chance = random.Random(7)
    kinds = {"header": 0, "index": 0, "output": 0}
    for turn in range(300):
        kind = chance.choice(["header", "header", "index", "output"])
        kinds[kind] += 1
        work = tmp_path / f"turn{turn}"
        shutil.copytree(strange if kind != "output" else tmp_path / "packed", work)
        if kind == "header":
            mutate_header(chance, chance.choice(sorted(work.glob("*.safetensors"))))
        elif kind == "index":
            mutate_index(chance, work)
        else:
            file = chance.choice([path for path in sorted(work.rglob("*")) if path.is_file()])
            if chance.randrange(2):
                flip(file, chance)
            else:
                file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])
        size = sum(path.stat().st_size for path in work.rglob("*"))
        before = content(work)
        tracemalloc.start()
        begin = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            verify_checkpoint(work) if kind == "output" else quantize(work, tmp_path / "out", shard_bytes=4000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.monotonic() - begin < 5
        assert len(str(caught.value)) > 20, (turn, kind)
        assert "\n" not in str(caught.value)
        assert peak < 2 * size + 20_000_000
        assert content(work) == before
        assert not list((tmp_path / "out").glob("*.safetensors"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(work)
    assert min(kinds.values()) > 40


def test_a_header_of_many_values_is_not_parsed(tmp_path):
    """30 MB of brackets would become 600 MB of lists."""
    import tracemalloc

    text = b'{"a":[' + b"[]," * 10_000_000 + b"[]]}"
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="values in"):
        tensor_files.read_header(tmp_path / "model.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(text)


def test_links_pipes_and_pickles(bert, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (bert / "notes.txt").symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        quantize(bert, tmp_path / "out")
    (bert / "notes.txt").unlink()
    (bert / "notes.txt").symlink_to(bert / "vocab.txt")
    quantize(bert, tmp_path / "out")
    assert not (tmp_path / "out/notes.txt").is_symlink()
    assert (tmp_path / "out/notes.txt").read_text() == "[PAD]\n"
    (bert / "notes.txt").unlink()
    (bert / "model.safetensors").rename(tmp_path / "model.safetensors")
    (bert / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        quantize(bert, tmp_path / "out2")
    (bert / "model.safetensors").unlink()
    os.mkfifo(bert / "model.safetensors")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        quantize(bert, tmp_path / "out2")
    (bert / "model.safetensors").unlink()
    (bert / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*convert it with"):
        quantize(bert, tmp_path / "out2")
    shutil.copy(bert / "pytorch_model.bin", bert / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        quantize(bert, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"hidden_size": 64}, "config.json asks for"),
        ({"hidden_size": 2**40}, "hidden_size is"),
        ({"num_attention_heads": 0}, "does not describe a Bert"),
        ({"num_hidden_layers": 3}, r"needs bert\.encoder\.layer\.2.* more, which the checkpoint does not hold"),
        ({"architectures": ["os.system"]}, "no model class os.system"),
        ({"architectures": ["AutoConfig"]}, "no model class AutoConfig"),
        ({"model_type": "no-such"}, "transformers cannot read it"),
        ({"dtype": "uint8"}, "dtype 'uint8'"),
        ({"dtype": 5}, "dtype 5"),
    ],
)
def test_configurations_that_do_not_fit(change, sentence, bert, tmp_path):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=sentence):
        quantize(bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_the_class_does_not_have_are_named(bert, tmp_path):
    rewrite(bert, lambda tensors: tensors.update({"extra.weight": torch.zeros(3)}))
    plan = make_plan(bert, kmq.KMQConfig())
    assert plan.left_out == ("extra.weight",)


def test_headers_are_those_of_safetensors(tmp_path):
    """Every dtype, empty tensors, names that need escapes: the same header as save_file writes."""
    chance = random.Random(3)
    tensors = {}
    for i in range(40):
        dtype = chance.choice(list(tensor_files.DTYPE_NAMES))
        shape = tuple(chance.choice([0, 1, 3, 8]) for _ in range(chance.randrange(3)))
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        tensor = torch.arange(nbytes, dtype=torch.uint8).view(dtype).view(shape) if nbytes else torch.empty(shape, dtype=dtype)
        tensors[chance.choice(["a", "é", '"', "\n", "层", "/"]) + f".{i}"] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = [(n, tensor_files.DTYPE_NAMES[t.dtype], tuple(t.shape), t.nbytes) for n, t in tensors.items()]
    start, at = tensor_files.header_bytes(entries)
    assert (tmp_path / "model.safetensors").read_bytes().startswith(start)
    read = tensor_files.read_header(tmp_path / "model.safetensors")
    assert {name: tensor.begin for name, tensor in read.items()} == at


# The command


def run_cli(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["kmq", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code or 0, *capsys.readouterr()


def test_command_line(sharded, tmp_path, capsys, monkeypatch):
    source, _ = sharded
    out = tmp_path / "out"
    options = ["--bits", 3, "--module-bits", "pooler=8", "--skip", "word_embeddings", "--shard-size", "300KB"]
    code, text, _ = run_cli(capsys, monkeypatch, "quantize", source, "-o", out, *options, "--dry-run", "--json")
    plan = json.loads(text)
    assert code == 0
    assert not out.exists()
    bits = {tensor["name"]: tensor["bits"] for tensor in plan["tensors"]}
    assert bits["pooler.dense.weight"] == 8
    assert bits["embeddings.word_embeddings.weight"] is None
    assert bits["encoder.layer.0.attention.self.query.weight"] == 3
    code, text, _ = run_cli(capsys, monkeypatch, "quantize", source, "-o", out, *options, "--dry-run")
    assert "nothing was written" in " ".join(text.split())
    code, text, _ = run_cli(capsys, monkeypatch, "quantize", source, "-o", out, *options, "--json")
    summary = json.loads(text)
    assert code == 0
    assert summary["bytes_after"] == plan["bytes_after"]
    files = sorted(out.glob("*.safetensors"))
    assert summary["bytes_after"] == sum(sum(tensor.nbytes for tensor in load_file(file).values()) for file in files)
    code, text, _ = run_cli(capsys, monkeypatch, "quantize", source, "-o", out, *options)
    assert code == 0
    assert "bits per weight" in text
    code, text, _ = run_cli(capsys, monkeypatch, "verify", out, "--json")
    assert json.loads(text)["files"] > len(files)
    assert run_cli(capsys, monkeypatch, "quantize", source, "-o", out)[0] == 1
    files[0].write_bytes(files[0].read_bytes()[:-1])
    code, _, said = run_cli(capsys, monkeypatch, "verify", out)
    assert code == 5
    assert said.startswith("kmq: ")
    assert len(said.splitlines()) == 1
    for wrong in (["--bits", 9], ["--shard-size", "much"], ["--module-bits", "pooler"], ["--device", "tpu"]):
        assert run_cli(capsys, monkeypatch, "quantize", source, "-o", tmp_path / "x", *wrong)[0] == 1
    assert run_cli(capsys, monkeypatch, "quantize", tmp_path / "nowhere/at/all", "-o", tmp_path / "x")[0] == 1


def test_hub_id(sharded, tmp_path, monkeypatch):
    """A snapshot in the cache of the hub is links into the repository's folder; they are followed, others are not."""
    import huggingface_hub

    source, options = sharded
    repository = tmp_path / "models--someone--encoder"
    snapshot = repository / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in source.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    folder, root = find_source("someone/encoder")
    plan = make_plan(folder, kmq.KMQConfig(), shard_bytes=options["shard_bytes"], root=root)
    quantize_checkpoint(plan, tmp_path / "one")
    quantize(source, tmp_path / "two", **options)
    for name, data in content(tmp_path / "two").items():
        assert (tmp_path / "one" / name).read_bytes() == data, name
    (snapshot / "vocab.txt").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        make_plan(folder, kmq.KMQConfig(), root=root)
    assert find_source(str(source)) == (source, None)
    monkeypatch.undo()
    with contextlib.suppress(ImportError), pytest.raises(CheckpointError, match="the hub does not give it"):
        find_source("no-one/no-such-model")


def test_other_files_come_along(bert, tmp_path):
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling/config.json").write_text("{}")
    (bert / "README.md").write_text("---\nlicense: mit\ntags:\n- obsolete\nlanguage:\n- de\n---\n# My model\n")
    (bert / "pytorch_model.bin").write_bytes(b"pickle")
    (bert / ".gitattributes").write_text("*")
    quantize(bert, tmp_path / "out")
    names = set(content(tmp_path / "out"))
    assert names == {"README.md", "config.json", checkpoint.MANIFEST, "model.safetensors", "vocab.txt", "1_Pooling/config.json"}
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: kmq_kernels\n")
    assert "license: mit\nlanguage:\n- de\n---\n" in card
    assert "# My model" in card
    assert "obsolete" not in card


def test_config_of_another_class(tmp_path):
    """family_config alone: a folder without weights is refused."""
    family_config("bert").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no weights"):
        make_plan(tmp_path, kmq.KMQConfig())
