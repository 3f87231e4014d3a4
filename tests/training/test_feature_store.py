"""A feature store: training on it is training beside the target, it survives being killed, and errors are one sentence."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, random_model
from training_runs import assert_same_bits, log
from typer.testing import CliRunner

from headstart.cli import app
from headstart.formats import describe_target
from headstart.target.embed_head import EmbedHead
from headstart.target.loading import load_model
from headstart.training import feature_writer, setup, stored_target
from headstart.training.dataset import Dataset, Text
from headstart.training.feature_store import MANIFEST, Manifest, Store, Stored, complete_store, shard_file, shard_key
from headstart.training.feature_writer import Writer
from headstart.training.features import Online
from headstart.training.run_config import FeaturesConfig
from headstart.training.stored_target import StoredEmbedHead, load_without_layers
from headstart.training.train import resolve, train
from headstart.training.write_features import write_features

TAPS = (0, -1)
CPU = torch.device("cpu")


def text(*tokens: int) -> Text:
    return Text(tokens, (False, *[True] * (len(tokens) - 1)))


DATASET = Dataset((text(5, 3, 9, 1, 4, 1, 5), text(2, 7, 1), text(8, 2, 8, 1, 8), text(6, 6)), (0, 1, 2), (3,))


@pytest.fixture
def online() -> Online:
    return Online(random_model(ARCHITECTURES["llama"](), torch.float32), TAPS)


@pytest.fixture
def store(online, tmp_path, monkeypatch) -> Store:
    """A store of three shards."""
    monkeypatch.setattr(feature_writer, "SHARD_TOKENS", 8)
    return filled(tmp_path / "store", online)


def writer(folder, online, dataset=DATASET) -> Writer:
    return Writer(folder, online, dataset, describe_target(online.model), 128)


def filled(folder, online, dataset=DATASET, report=lambda sentence: None) -> Store:
    return writer(folder, online, dataset).fill(Accelerator(cpu=True), report)


@pytest.fixture
def written(asked, tmp_path, model_folder, data):
    """Features of the tiny model for the layers of eagle3, in float32."""

    def write(**keys):
        base = {"data": (data,), "target": str(model_folder), "out": tmp_path / "features", "methods": ("eagle3",), "device": "cpu"}
        return write_features(FeaturesConfig(**(base | {"dtype": "float32", "threads": 1} | keys)))

    return write


# -- the same as the target --


def test_a_store_gives_the_hidden_states_of_the_model_to_the_bit(online, store):
    batch = DATASET.pad([0, 2])
    read, computed = Stored(store, TAPS, CPU)(batch), online(batch)
    for row, index in enumerate(batch.indices):
        length = len(DATASET.texts[index].tokens)
        assert torch.equal(read.features[row, :length], computed.features[row, :length])
        assert torch.equal(read.last_hidden[row, :length], computed.last_hidden[row, :length])
    assert len(list(store.folder.glob("shard-*"))) == 3
    assert store.texts() == list(DATASET.texts)


def test_a_store_in_bfloat16_keeps_every_bit(tmp_path):
    online = Online(random_model(ARCHITECTURES["llama"](), torch.bfloat16), TAPS)
    batch = DATASET.pad([2])
    assert torch.equal(Stored(filled(tmp_path / "store", online), TAPS, CPU)(batch).last_hidden, online(batch).last_hidden)


@pytest.mark.parametrize("method", ["eagle3", "medusa", "hydra"])
def test_training_on_features_is_training_beside_the_target_to_the_bit(asked, written, tmp_path, monkeypatch, method):
    """With the data of the run, and with the texts of the store alone; no layer of the target is loaded."""
    run = {"method": method, "settings": None, "dtype": "float32", "held_out": 0.2, "eval_every": 3}
    train(resolve(None, asked(**run, out=tmp_path / "live")))
    written(methods=("eagle3", method))
    monkeypatch.setattr(setup, "load_model", lambda *_: pytest.fail("the target was loaded"))
    monkeypatch.setattr(stored_target, "load_model", lambda *_: pytest.fail("the target was loaded"))
    for name, data in (("with-data", {}), ("alone", {"data": None})):
        train(resolve(None, asked(**run, out=tmp_path / name, features=tmp_path / "features", **data)))
        assert_same_bits(tmp_path / "live", tmp_path / name, name)
        for key in ("loss", "held_out_loss", "gradient"):
            assert log(tmp_path / name, key) == log(tmp_path / "live", key)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "deepseek_v3", "cohere"])
def test_a_target_without_layers_embeds_and_projects_like_the_whole_one(tmp_path, monkeypatch, name):
    """Its digest, too, is that of the whole one; scaled embeddings and logits are kept."""
    random_model(ARCHITECTURES[name](), torch.float32).save_pretrained(tmp_path / "model")
    whole = load_model(tmp_path / "model", device="cpu")
    store = filled(tmp_path / "store", Online(whole, TAPS))
    monkeypatch.setattr(stored_target, "load_model", lambda *_: pytest.fail("all of it was loaded"))
    part = load_without_layers(str(tmp_path / "model"), store, "cpu")
    one, other = EmbedHead(whole), StoredEmbedHead(part, whole.get_output_embeddings().out_features)
    assert describe_target(part) == describe_target(whole)
    assert torch.equal(one.embed(torch.arange(97)), other.embed(torch.arange(97)))
    states = torch.randn(3, one.hidden)
    assert torch.equal(one.logits(states), other.logits(states))
    assert part.num_parameters() < whole.num_parameters() / 1.5


def test_a_target_under_other_names_is_loaded_whole(online, tmp_path, monkeypatch):
    online.model.save_pretrained(tmp_path / "model")
    store = filled(tmp_path / "store", Online(load_model(tmp_path / "model", device="cpu"), TAPS))
    expected = load_without_layers(str(tmp_path / "model"), store, "cpu").state_dict()
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    actual = load_without_layers(str(tmp_path / "model"), store, "cpu").state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_shard_says_what_it_holds(store):
    with safe_open(shard_file(store.folder, 1), framework="pt") as shard:
        assert set(shard.keys()) == {"tokens", "loss_mask", "lengths", "states"}
        assert shard.get_tensor("tokens").tolist() == [2, 7, 1, 8, 2, 8, 1, 8]
        assert shard.get_tensor("loss_mask").tolist() == [0, 1, 1, 0, 1, 1, 1, 1]
        assert shard.get_tensor("lengths").tolist() == [3, 5]
        assert shard.get_tensor("states").shape == (8, 2, 64)
        assert json.loads(shard.metadata()["target"])["digest"] == store.manifest.target.digest


# -- interruptions --


def test_an_interrupted_pass_computes_only_the_missing_shards(online, store):
    before = [store.states(index) for index in range(4)]
    shard_file(store.folder, 1).unlink()
    (store.folder / ".shard-00001.safetensors.17").write_text("left by a killed process")
    sentences = []
    again = filled(store.folder, online, report=sentences.append)
    assert [sentence for sentence in sentences if "shard" in sentence] == ["features: shard 1 of 1"]
    assert all(torch.equal(again.states(index), states) for index, states in enumerate(before))
    assert sorted(path.name[:5] for path in store.folder.iterdir()) == ["shard"] * 3 + ["store"]


def test_a_second_run_does_not_run_the_target(online, store, monkeypatch):
    monkeypatch.setattr(Online, "states", lambda *_: pytest.fail("the target was run"))
    assert torch.equal(filled(store.folder, online).states(1), store.states(1))


def test_two_processes_write_a_store_together_and_run_the_target_equally_often(online, store, tmp_path, monkeypatch):
    """Where the target is divided among them, each forward needs both."""
    counts, states = [], Online.states
    monkeypatch.setattr(Online, "states", lambda *arguments: (counts.append(rank), states(*arguments))[1])
    both = writer(tmp_path / "two", online)
    both.claim()
    for rank in (0, 1):
        process = type("Process", (), {"process_index": rank, "num_processes": 2})
        for number in both._mine([0, 1, 2], process):
            both.write(number)
    assert counts.count(0) == counts.count(1) == 2
    both.finish()
    other = complete_store(tmp_path / "two")
    assert other.manifest == Manifest.read(store.folder)
    assert other.texts() == store.texts()
    assert all(torch.equal(other.states(index), store.states(index)) for index in range(4))


def test_a_full_disk_leaves_whole_shards_and_loses_nothing(online, store, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    shard_file(store.folder, 2).unlink()
    monkeypatch.setattr(feature_writer, "save_file", full)
    with pytest.raises(ValueError, match="No space left on device; what is there stays, so make room and start again"):
        filled(store.folder, online)
    assert sorted(path.name[:11] for path in store.folder.iterdir()) == ["shard-00000", "shard-00001", "store.json"]


def test_a_store_that_training_began_is_continued_by_training(asked, tmp_path):
    """A folder that is not marked as complete: the target writes the rest."""
    train(resolve(None, asked(out=tmp_path / "one", features=tmp_path / "features")))
    manifest = Manifest.read(tmp_path / "features")
    assert manifest.is_complete
    (tmp_path / "features" / MANIFEST).write_text(manifest.model_copy(update={"is_complete": False}).model_dump_json())
    shard_file(tmp_path / "features", 0).unlink()
    train(resolve(None, asked(out=tmp_path / "two", features=tmp_path / "features")))
    assert_same_bits(tmp_path / "one", tmp_path / "two")


# -- errors --


def test_other_weights_than_those_of_the_features_are_refused(asked, written, tmp_path, model_folder):
    written()
    shutil.copytree(model_folder, tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"are of target \(digest \w+\), and the target .*tuned has other weights \(digest \w+\); name"
    ):
        train(resolve(None, asked(method="eagle3", settings=None, target=str(tmp_path / "tuned"), features=tmp_path / "features")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"method": "eagle3", "settings": {"taps": [0]}},
            "these heads read layer 0, and the features in .* are of the layers 1; write",
        ),
        ({"dtype": "float64"}, "dtype is float64, and the features in .* were written with float32; leave dtype out"),
        ({"length": 16}, "length is 16, and the features in .* were written with 256; leave length out"),
        ({"decode_every": 3}, "its layers are not loaded; leave it out"),
        ({"data": None, "held_out": "other.jsonl"}, "held_out is other.jsonl, and the texts are those of the features"),
    ],
)
def test_a_run_that_does_not_fit_the_features_is_one_sentence(asked, written, tmp_path, change, words):
    written(methods=())
    with pytest.raises(ValueError, match=words):
        train(resolve(None, asked(**{"features": tmp_path / "features", **change})), decode=lambda *_: 1.0)


def test_other_texts_than_those_of_the_features_are_refused(asked, written, tmp_path, data):
    written()
    (tmp_path / "fewer.jsonl").write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(
        ValueError, match=r"of 16 texts \(from chats.jsonl, cut at 256 tokens\), and the data gives 15 others; leave"
    ):
        train(resolve(None, asked(data=[tmp_path / "fewer.jsonl"], features=tmp_path / "features")))


def test_neither_data_nor_features_is_one_sentence(asked, tmp_path):
    with pytest.raises(ValueError, match="data is missing; name files of texts, or with features a store"):
        resolve(None, asked(data=None, features=tmp_path / "nowhere"))


def test_a_missing_shard_is_named(online, store):
    shard_file(store.folder, 1).unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing \(1 of 3 are\); write it again"):
        complete_store(store.folder)


def test_a_store_of_another_run_is_refused(online, store):
    other = Dataset((text(5, 3, 9), *DATASET.texts[1:]), (0, 1, 2), (3,))
    with pytest.raises(ValueError, match=r"of another run: texts \w+ instead of \w+; name another folder, or delete it"):
        filled(store.folder, online, other)
    with pytest.raises(ValueError, match="layers 0,2 instead of 2"):
        filled(store.folder, Online(online.model, (-1,)))
    with pytest.raises(ValueError, match=r"target \w+ \(\w+\) instead of \w+ \(\w+\)"):
        filled(store.folder, Online(random_model(ARCHITECTURES["qwen3"](), torch.float32), TAPS))


def test_a_folder_with_other_files_is_refused(online, tmp_path):
    (tmp_path / "letters.txt").touch()
    with pytest.raises(ValueError, match=r"holds other things and no store.json; name a new folder"):
        filled(tmp_path, online)
    with pytest.raises(ValueError, match="cannot be used"):
        filled(tmp_path / "letters.txt" / "store", online)


def test_a_damaged_file_is_named(online, store):
    shard_file(store.folder, 0).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is damaged .* delete it, and write it again"):
        Store(store.folder, store.manifest).states(0)
    shutil.copy(shard_file(store.folder, 1), shard_file(store.folder, 0))
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is of another store"):
        Store(store.folder, store.manifest).states(0)
    (store.folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"store.json is not JSON: .*; delete the folder"):
        complete_store(store.folder)
    (store.folder / MANIFEST).write_text('{"version": 1}')
    with pytest.raises(ValueError, match=r"is of no store that can be read \(version: .*\); delete the folder"):
        complete_store(store.folder)


def test_a_disk_without_room_is_refused_before_anything_is_computed(online, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    sentences = []
    with pytest.raises(ValueError, match=r"the features that are missing need 0.0000 GiB in .*, where 0.0000 are free; make room"):
        filled(tmp_path / "store", online, report=sentences.append)
    assert sentences == [writer(tmp_path / "store", online).announcement([0])]
    assert "17 tokens, 2 layers of 64 in float32" in sentences[0]
    assert not list((tmp_path / "store").glob("shard-*"))


def test_the_command_writes_a_store_and_says_what_is_in_it(tmp_path, model_folder, data):
    out = tmp_path / "features"
    options = ["--target", str(model_folder), "--method", "medusa", "--taps", "0", "--device", "cpu", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, ["features", str(data), *options])
    assert result.exit_code == 0, result.output
    described = json.loads(result.stdout)
    assert described["layers"] == [0, 1]
    assert described["is_complete"]
    assert described["bytes"] == described["num_tokens"] * 2 * 32 * 4
    assert complete_store(out).manifest.data == ("chats.jsonl",)
    assert shard_key(complete_store(out).manifest, 0).startswith("0 target ")


def test_an_unknown_method_is_refused_before_the_target_is_loaded(tmp_path, data):
    result = CliRunner().invoke(app, ["features", str(data), "--target", "nowhere", "--method", "medoza", "--out", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "method 'medoza' is unknown" in result.stderr
