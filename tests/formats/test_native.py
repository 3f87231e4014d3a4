"""The native format: saved heads are loaded unchanged, invalid folders are refused by name, and a kill leaves complete heads."""

import errno
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from folders import write_model
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from headstart import formats
from headstart.drafters.registry import METHODS
from headstart.formats import TargetInfo, native

INFO = TargetInfo(name="org/talker", architecture="LlamaForCausalLM", hidden=4, vocab=6, layers=2, digest="0123", tokenizer="abcd")


class ToyConfig(BaseModel, extra="forbid"):
    width: int = 3


class Toy(nn.Module):
    """The smallest drafter that can be saved."""

    name = "toy"
    config_type = ToyConfig

    def __init__(self, config, hidden, vocab):
        super().__init__()
        self.config = config
        self.inner = nn.Linear(hidden, config.width)
        self.outer = nn.Linear(config.width, vocab, bias=False)


@pytest.fixture(autouse=True)
def toy_method(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", f"{__name__}:Toy")


@pytest.fixture
def heads(tmp_path):
    folder = tmp_path / "heads"
    formats.save(folder, toy(1), INFO, {"examples": 300})
    return folder


def toy(seed, width=3):
    torch.manual_seed(seed)
    return Toy(ToyConfig(width=width), INFO.hidden, INFO.vocab)


def is_same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- saved and loaded --


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_heads_are_loaded_bit_for_bit(tmp_path, dtype):
    drafter = toy(2, width=5).to(dtype)
    formats.save(tmp_path, drafter, INFO, {})
    loaded = formats.load(tmp_path, INFO)
    assert is_same(loaded, drafter)
    assert loaded.config == ToyConfig(width=5)
    assert not loaded.training


def test_loading_draws_no_random_numbers(heads):
    before = torch.get_rng_state()
    formats.load(heads)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_description_is_read_without_the_weights(heads):
    described = formats.describe(heads)
    assert (described.method, described.settings, described.target) == ("toy", {"width": 3}, INFO)
    assert described.training == {"examples": 300}


def test_the_card_names_the_target_and_the_command(heads):
    card = (heads / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/talker\nlibrary_name: headstart\ntags:\n- speculative-decoding\n- toy\n---\n")
    assert "--model org/talker --drafter" in card
    assert "- examples: 300" in card


def test_other_files_stay_and_the_plan_of_the_old_heads_is_removed(heads):
    (heads / "plan.json").write_text("{}")
    (heads / "log.jsonl").write_text("loss")
    formats.save(heads, toy(2), INFO, {})
    assert sorted(path.name for path in heads.iterdir()) == ["README.md", "config.json", "log.jsonl", "model.safetensors"]


# -- killed --


class Killed(BaseException):
    """Not caught by any handler, like SIGKILL."""


def kill_after(monkeypatch, module, name, calls):
    real, count = getattr(module, name), iter(range(calls))

    def killed(*args, **extra):
        if next(count, None) is None:
            raise Killed
        return real(*args, **extra)

    monkeypatch.setattr(module, name, killed)


@pytest.mark.parametrize(
    ("module", "name", "calls", "is_new"),
    [
        (native, "save_file", 0, False),
        (native, "card", 0, False),
        (os, "fsync", 0, False),
        (os, "fsync", 2, False),
        (os, "replace", 0, False),
        (os, "replace", 1, True),
        (Path, "unlink", 0, True),
        (os, "replace", 2, True),
    ],
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_heads_complete(heads, monkeypatch, module, name, calls, is_new):
    """The new heads have another size, so a mixture of both could not be loaded."""
    with monkeypatch.context() as patch:
        kill_after(patch, module, name, calls)
        patch.setattr(native.tempfile.TemporaryDirectory, "cleanup", lambda directory: directory._finalizer.detach())
        with pytest.raises(Killed):
            formats.save(heads, toy(2, width=7), INFO, {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*saving was interrupted")
        assert is_same(formats.load(heads, INFO), toy(2, width=7) if is_new else toy(1))


def test_the_next_save_removes_the_leftovers_of_a_killed_one(heads):
    (heads / ".saving-abc").mkdir()
    (heads / ".saving-abc" / "model.safetensors").write_text("half")
    formats.save(heads, toy(1), INFO, {})
    assert sorted(path.name for path in heads.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def no_space(*args, **extra):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_rust(*args, **extra):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("module", "name", "fails"),
    [(native, "save_file", no_space_in_rust), (Path, "write_text", no_space), (os, "replace", no_space), (Path, "mkdir", no_space)],
)
def test_a_full_disk_is_one_sentence_and_the_old_heads_are_untouched(heads, monkeypatch, module, name, fails):
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails)
        with pytest.raises(ValueError, match=r"cannot be written to .*No space left.*heads that were there are untouched"):
            formats.save(heads, toy(2), INFO, {})
    assert is_same(formats.load(heads), toy(1))
    assert sorted(path.name for path in heads.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_disk_that_fails_after_the_weights_are_replaced_has_complete_new_heads(heads, monkeypatch):
    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: real(a, b) if Path(b).name == "model.safetensors" else no_space())
        with pytest.raises(ValueError, match="the new heads are complete"):
            formats.save(heads, toy(2, width=7), INFO, {})
    with pytest.warns(UserWarning, match="saving was interrupted"):
        assert is_same(formats.load(heads), toy(2, width=7))


def test_an_edited_configuration_is_not_used_and_causes_a_warning(heads):
    edit(heads, training={"examples": 10**9})
    with pytest.warns(UserWarning, match=r"config\.json is not what was saved with the weights.*or it was edited"):
        assert formats.describe(heads).training == {"examples": 300}


def test_heads_never_replace_a_model(tmp_path):
    write_model(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds something else than heads"):
        formats.save(tmp_path, toy(1), INFO, {})
    assert (tmp_path / "model.safetensors").read_bytes() == before


# -- refused --


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": "red"}, "unknown key colour"),
        ({"version": 2}, "format version 2, and this headstart reads version 1"),
        ({"target": INFO.model_dump() | {"shoe": 1}}, r"unknown key target\.shoe"),
        ({"target": INFO.model_dump() | {"hidden": "4"}}, r"target\.hidden is '4'"),
        ({"target": {"name": "x"}}, r"lacks the key target\.architecture"),
        ({"format": "other"}, "holds no native heads"),
    ],
)
def test_an_invalid_configuration_is_refused_by_its_key(heads, changes, words):
    edit(heads, **changes)
    with pytest.raises(ValueError, match=words):
        formats.load(heads)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "telepathy"}, r"method 'telepathy' is unknown; there are .*toy"),
        ({"settings": {"width": 3, "depth": 2}}, "unknown key depth"),
        ({"settings": {"width": "many"}}, "width is 'many'"),
    ],
)
def test_settings_that_the_method_does_not_know_are_refused(heads, changes, words):
    edit(heads, **changes)
    save_file(load_file(heads / "model.safetensors"), heads / "model.safetensors")  # weights without a copy of the configuration
    with pytest.raises(ValueError, match=words):
        formats.load(heads)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("inner.bias"), r"lacks inner\.bias \[3\]"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "1 tensors that these heads have no place for, first more"),
        (lambda tensors: tensors.update({"inner.bias": torch.zeros(2)}), r"inner\.bias as \[2\], but these heads need \[3\]"),
        (lambda tensors: tensors.update({"inner.bias": torch.zeros(3, dtype=torch.int8)}), r"inner\.bias of type torch\.int8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(heads, change, words):
    tensors = load_file(heads / "model.safetensors")
    change(tensors)
    save_file(tensors, heads / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        formats.load(heads)


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"holds no heads: it has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"have no model\.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "damaged or cut short"),
    ],
)
def test_a_broken_folder_is_one_sentence(heads, breaks, words):
    breaks(heads)
    with pytest.raises(ValueError, match=words):
        formats.load(heads)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"hidden": 8}, "a hidden size of 4, but org/other has 8"),
        ({"vocab": 9}, "a vocabulary of 6, but org/other has 9"),
        ({"tokenizer": "efgh"}, "a tokenizer of abcd, but org/other has efgh"),
    ],
)
def test_heads_of_another_target_are_refused_with_both_values(heads, other, words):
    with pytest.raises(ValueError, match=words):
        formats.load(heads, INFO.model_copy(update={"name": "org/other"} | other))


def test_heads_for_other_weights_warn_and_name_the_command_that_measures_them(heads):
    with pytest.warns(UserWarning, match=r"digest 0123.*digest 4567.*inspect .* --probe"):
        formats.load(heads, INFO.model_copy(update={"digest": "4567"}))


def test_unknown_digests_and_tokenizers_are_not_compared(heads):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        formats.load(heads, INFO.model_copy(update={"digest": None, "tokenizer": None}))
