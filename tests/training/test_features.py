"""Features of the target: those of a text alone, whether computed in a batch or read from a store."""

import shutil

import pytest
import torch
from tiny import ARCHITECTURES, random_model

from headstart.target.target import Target
from headstart.training import features
from headstart.training.dataset import Dataset, Text
from headstart.training.features import Online, Store

TAPS = (0, -1)


def text(*tokens: int) -> Text:
    return Text(tokens, (False, *[True] * (len(tokens) - 1)))


DATASET = Dataset((text(5, 3, 9, 1, 4, 1, 5), text(2, 7, 1), text(8, 2, 8, 1, 8), text(6, 6)), (0, 1, 2), (3,))


@pytest.fixture
def online() -> Online:
    return Online(random_model(ARCHITECTURES["llama"](), torch.float32), TAPS)


@pytest.fixture
def store(online, tmp_path, monkeypatch) -> Store:
    """A store of three shards."""
    monkeypatch.setattr(features, "SHARD_TOKENS", 8)
    return filled(tmp_path / "store", online)


def filled(folder, online, dataset=DATASET, target="talk", **more) -> Store:
    Store.claim(folder, online, dataset, target)
    return Store.filled(folder, online, dataset, **more)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_right_padding_changes_no_hidden_state_of_a_text(name):
    """Two texts in a batch, and each alone; attention is causal, so there is no attention mask."""
    online = Online(random_model(ARCHITECTURES[name]()), TAPS)
    batch = online(DATASET.pad([0, 1]))
    for row in (0, 1):
        alone = online(DATASET.pad([row]))
        length = len(DATASET.texts[row].tokens)
        torch.testing.assert_close(batch.features[row, :length], alone.features[0])
        torch.testing.assert_close(batch.last_hidden[row, :length], alone.last_hidden[0])


def test_features_are_those_that_the_target_gives_a_drafter(online):
    """Taps count as in `Target.forward`; the last one's states project to the model's logits."""
    batch = online(DATASET.pad([0]))
    tokens = torch.tensor([DATASET.texts[0].tokens])
    with torch.no_grad():
        out = online.model(tokens, output_hidden_states=True)
    torch.testing.assert_close(batch.features[0], torch.cat([out.hidden_states[1], out.hidden_states[3]], -1)[0])
    torch.testing.assert_close(online.model.lm_head(batch.last_hidden), out.logits)
    target = Target(online.model)
    assert features.layers(TAPS, target.num_layers) == (0, 2)
    target.release()


def test_a_store_gives_the_hidden_states_of_the_model(online, store):
    batch = DATASET.pad([0, 2])
    for read, computed in ((store(batch).features, online(batch).features), (store(batch).last_hidden, online(batch).last_hidden)):
        torch.testing.assert_close(read[batch.loss_mask], computed[batch.loss_mask])
    assert len(list(store.folder.glob("shard-*"))) == 3


def test_a_store_in_bfloat16_keeps_every_bit(tmp_path):
    online = Online(random_model(ARCHITECTURES["llama"](), torch.bfloat16), TAPS)
    batch = DATASET.pad([2])
    assert torch.equal(filled(tmp_path / "store", online)(batch).last_hidden, online(batch).last_hidden)


def test_a_second_run_does_not_run_the_target(online, store, monkeypatch):
    monkeypatch.setattr(Online, "states", lambda *_: pytest.fail("the target was run"))
    again = filled(store.folder, online)
    assert torch.equal(again(DATASET.pad([1])).last_hidden, store(DATASET.pad([1])).last_hidden)


def test_an_interrupted_pass_computes_only_the_missing_shards(online, store):
    before = store(DATASET.pad([0, 1, 2, 3])).last_hidden
    (store.folder / "shard-00001.safetensors").unlink()
    progress = []
    again = filled(store.folder, online, on_progress=lambda done, of: progress.append((done, of)))
    assert progress == [(0, 1)]
    assert torch.equal(again(DATASET.pad([0, 1, 2, 3])).last_hidden, before)


def test_two_processes_write_a_store_together(online, store, tmp_path):
    Store.claim(tmp_path / "two", online, DATASET, "talk")
    for rank in (0, 1):
        Store.filled(tmp_path / "two", online, DATASET, share=(rank, 2))
    both = [sorted(path.name for path in folder.iterdir()) for folder in (store.folder, tmp_path / "two")]
    assert both[0] == both[1]


# -- errors --


def test_a_store_of_another_run_is_refused(online, store):
    with pytest.raises(ValueError, match="of another run: target talk instead of walk; name another folder, or delete it"):
        filled(store.folder, online, target="walk")
    other = Dataset((text(5, 3, 9), *DATASET.texts[1:]), (0, 1, 2), (3,))
    with pytest.raises(ValueError, match=r"of another run: texts \w+ instead of \w+"):
        filled(store.folder, online, other)
    with pytest.raises(ValueError, match=r"layers \[0, 2\] instead of \[2\]"):
        filled(store.folder, Online(online.model, (-1,)))


def test_a_folder_with_other_files_is_refused(online, tmp_path):
    (tmp_path / "letters.txt").touch()
    with pytest.raises(ValueError, match=r"holds other things and no store.json; name a new folder"):
        filled(tmp_path, online)
    with pytest.raises(ValueError, match="cannot be used"):
        filled(tmp_path / "letters.txt" / "store", online)


def test_a_damaged_file_is_named(online, store):
    (store.folder / "shard-00000.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is damaged .* delete it, and it is written again"):
        filled(store.folder, online)(DATASET.pad([0]))
    (store.folder / "store.json").write_text("{")
    with pytest.raises(ValueError, match=r"store.json is not JSON: .*; delete the folder"):
        filled(store.folder, online)


def test_a_disk_without_room_is_refused_before_anything_is_computed(online, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ValueError, match=r"features of 17 tokens need .* GiB in .*, where 0.0 are free"):
        filled(tmp_path / "store", online)


def test_a_full_disk_leaves_no_incomplete_shard(online, tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "save_file", full)
    with pytest.raises(ValueError, match="No space left on device; what is there stays, so make room and start again"):
        filled(tmp_path / "store", online)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["store.json"]
