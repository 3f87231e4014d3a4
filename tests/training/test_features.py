"""What the target makes of texts: the states of one text alone, whether computed in a batch or read from a store."""

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


LIBRARY = Dataset((text(5, 3, 9, 1, 4, 1, 5), text(2, 7, 1), text(8, 2, 8, 1, 8), text(6, 6)), (0, 1, 2), (3,))


@pytest.fixture
def online() -> Online:
    return Online(random_model(ARCHITECTURES["llama"](), torch.float32), TAPS)


@pytest.fixture
def store(online, tmp_path, monkeypatch) -> Store:
    """Of three shards."""
    monkeypatch.setattr(features, "SHARD_TOKENS", 8)
    return filled(tmp_path / "store", online)


def filled(folder, online, dataset=LIBRARY, target="talk", **more) -> Store:
    Store.claim(folder, online, dataset, target)
    return Store.filled(folder, online, dataset, **more)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_padding_on_the_right_changes_no_state_of_a_text(name):
    """Two texts side by side, and each alone; attention is causal, so there is no mask."""
    online = Online(random_model(ARCHITECTURES[name]()), TAPS)
    batch = online(LIBRARY.pad([0, 1]))
    for row in (0, 1):
        alone = online(LIBRARY.pad([row]))
        length = len(LIBRARY.texts[row].tokens)
        torch.testing.assert_close(batch.features[row, :length], alone.features[0])
        torch.testing.assert_close(batch.last_hidden[row, :length], alone.last_hidden[0])


def test_states_are_those_that_the_target_hands_to_a_drafter(online):
    """Taps count as in `Target.forward`; the last one's states project to the model's logits."""
    batch = online(LIBRARY.pad([0]))
    tokens = torch.tensor([LIBRARY.texts[0].tokens])
    with torch.no_grad():
        out = online.model(tokens, output_hidden_states=True)
    torch.testing.assert_close(batch.features[0], torch.cat([out.hidden_states[1], out.hidden_states[3]], -1)[0])
    torch.testing.assert_close(online.model.lm_head(batch.last_hidden), out.logits)
    target = Target(online.model)
    assert features.layers(TAPS, target.num_layers) == (0, 2)
    target.release()


def test_a_store_gives_what_the_model_gives(online, store):
    batch = LIBRARY.pad([0, 2])
    for read, computed in ((store(batch).features, online(batch).features), (store(batch).last_hidden, online(batch).last_hidden)):
        torch.testing.assert_close(read[batch.loss_mask], computed[batch.loss_mask])
    assert len(list(store.folder.glob("shard-*"))) == 3


def test_a_store_in_bfloat16_keeps_every_bit(tmp_path):
    online = Online(random_model(ARCHITECTURES["llama"](), torch.bfloat16), TAPS)
    batch = LIBRARY.pad([2])
    assert torch.equal(filled(tmp_path / "store", online)(batch).last_hidden, online(batch).last_hidden)


def test_a_second_run_asks_the_target_nothing(online, store, monkeypatch):
    monkeypatch.setattr(Online, "states", lambda *_: pytest.fail("the target was asked"))
    again = filled(store.folder, online)
    assert torch.equal(again(LIBRARY.pad([1])).last_hidden, store(LIBRARY.pad([1])).last_hidden)


def test_a_pass_that_was_cut_short_goes_on_where_it_ended(online, store):
    whole = store(LIBRARY.pad([0, 1, 2, 3])).last_hidden
    (store.folder / "shard-00001.safetensors").unlink()
    told = []
    again = filled(store.folder, online, on_progress=lambda done, of: told.append((done, of)))
    assert told == [(0, 1)]
    assert torch.equal(again(LIBRARY.pad([0, 1, 2, 3])).last_hidden, whole)


def test_two_processes_write_a_store_together(online, store, tmp_path):
    Store.claim(tmp_path / "two", online, LIBRARY, "talk")
    for rank in (0, 1):
        Store.filled(tmp_path / "two", online, LIBRARY, share=(rank, 2))
    both = [sorted(path.name for path in folder.iterdir()) for folder in (store.folder, tmp_path / "two")]
    assert both[0] == both[1]


# -- what is refused --


def test_a_store_of_something_else_is_refused(online, store):
    with pytest.raises(ValueError, match="of another run: target talk instead of walk; name another folder, or delete it"):
        filled(store.folder, online, target="walk")
    other = Dataset((text(5, 3, 9), *LIBRARY.texts[1:]), (0, 1, 2), (3,))
    with pytest.raises(ValueError, match=r"of another run: texts \w+ instead of \w+"):
        filled(store.folder, online, other)
    with pytest.raises(ValueError, match=r"layers \[0, 2\] instead of \[2\]"):
        filled(store.folder, Online(online.model, (-1,)))


def test_a_folder_with_other_things_is_refused(online, tmp_path):
    (tmp_path / "letters.txt").touch()
    with pytest.raises(ValueError, match=r"holds other things and no store.json; name a new folder"):
        filled(tmp_path, online)
    with pytest.raises(ValueError, match="cannot be used"):
        filled(tmp_path / "letters.txt" / "store", online)


def test_damage_is_named(online, store):
    (store.folder / "shard-00000.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is damaged .* delete it, and it is written again"):
        filled(store.folder, online)(LIBRARY.pad([0]))
    (store.folder / "store.json").write_text("{")
    with pytest.raises(ValueError, match=r"store.json is not JSON: .*; delete the folder"):
        filled(store.folder, online)


def test_a_disk_without_room_is_refused_before_any_work(online, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ValueError, match=r"features of 17 tokens need .* GiB in .*, where 0.0 are free"):
        filled(tmp_path / "store", online)


def test_a_disk_that_fills_up_leaves_no_half_shard(online, tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "save_file", full)
    with pytest.raises(ValueError, match="No space left on device; what is there stays, so make room and start again"):
        filled(tmp_path / "store", online)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["store.json"]
