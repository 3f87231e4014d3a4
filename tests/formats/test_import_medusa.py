"""Published Medusa heads: in every layout, their logits equal the authors' formula; errors in them are named."""

import json

import pytest
import torch
from folders import write_model
from published import HIDDEN, VOCAB, ImportTrial, random, write
from published_medusa import by_formula, numbered, parts, vllm
from safetensors.torch import load_file, save_file

from headstart import formats


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return ImportTrial(write_model(tmp_path_factory.mktemp("target") / "talker"))


def assert_same(actual, expected):
    expected = list(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


# -- every layout --


@pytest.mark.parametrize(("heads", "layers"), [(5, 1), (2, 3)])
@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_logits_of_the_authors_heads_equal_the_papers_formula(trial, tmp_path, heads, layers, file):
    drawn = parts(heads, layers)
    write(tmp_path, file, numbered(drawn), medusa_num_heads=heads, medusa_num_layers=layers)
    assert_same(trial.logits(tmp_path), by_formula(trial, drawn))


def test_tgi_version_2_uses_the_targets_lm_head(trial, tmp_path):
    drawn = parts(3, 1)
    write(tmp_path, "medusa_lm_head.safetensors", numbered(drawn, project=False), version="2")
    assert_same(trial.logits(tmp_path), by_formula(trial, drawn, project=False))


@pytest.mark.parametrize("prefix", ["", "medusa_heads."])
@pytest.mark.parametrize("linear", ["", "linear."])
def test_logits_of_vllm_heads_equal_the_papers_formula(trial, tmp_path, prefix, linear):
    drawn = parts(3, 2)
    write(tmp_path, "model.safetensors", vllm(drawn, prefix, linear), num_heads=3, num_hidden_layers=2, medusa_fc_bias=True)
    assert_same(trial.logits(tmp_path), by_formula(trial, drawn))


def test_vllm_heads_may_have_no_biases(trial, tmp_path):
    drawn = parts(2, 1)
    write(tmp_path, "model.safetensors", vllm(drawn, bias=False), medusa_fc_bias=False)
    assert_same(trial.logits(tmp_path), by_formula(trial, drawn, bias=False))


def test_vllm_heads_may_share_one_projection(trial, tmp_path):
    drawn = parts(2, 1)
    drawn[1] = (drawn[1][0], drawn[0][1])
    tensors = {name: tensor for name, tensor in vllm(drawn).items() if "lm_heads" not in name}
    write(tmp_path, "model.safetensors", tensors | {"lm_head.weight": drawn[0][1]}, original_lm_head=True)
    assert_same(trial.logits(tmp_path), by_formula(trial, drawn))


@pytest.mark.parametrize("shards", ["safetensors", "bin", None])
def test_heads_inside_a_complete_model_are_imported(trial, tmp_path, shards):
    """The model in the same folder is the target."""
    drawn = parts(2, 1)
    folder = write_model(tmp_path / "whole")
    heads, trunk = numbered(drawn, "medusa_head."), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards is None:
        save_file(heads | trunk, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        write_shards(folder, [heads, trunk], shards)
    assert_same(trial.logits(folder), by_formula(trial, drawn))
    detected = formats.detect(folder)
    assert (detected.kind, detected.is_target, detected.target) == ("medusa", True, str(folder))


def write_shards(folder, shards, kind):
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = {}
    for number, tensors in enumerate(shards):
        file = f"{stem}-0000{number}.{kind}"
        save_file(tensors, folder / file) if kind == "safetensors" else torch.save(tensors, folder / file)
        names |= dict.fromkeys(tensors, file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": names}))


def test_one_block_under_several_names_becomes_several_blocks(trial, tmp_path):
    """The authors' code repeats one module object; its file has equal duplicates, which share their memory here."""
    [(blocks, projection)] = parts(1, 1)
    drawn = [(blocks * 3, projection)]
    write(tmp_path, "medusa_lm_head.pt", numbered(drawn))
    heads = formats.published_in(tmp_path).read(trial.target_info, trial.model.config)
    storages = {parameter.untyped_storage().data_ptr() for parameter in heads.parameters()}
    assert len(storages) == len(list(heads.parameters())) == 7
    assert_same(trial.logits(tmp_path), by_formula(trial, drawn))


def test_a_file_written_before_torch_1_6_is_read(trial, tmp_path):
    drawn = parts(2, 1)
    torch.save(numbered(drawn), tmp_path / "medusa_lm_head.pt", _use_new_zipfile_serialization=False)
    assert_same(trial.logits(tmp_path / "medusa_lm_head.pt"), by_formula(trial, drawn))


def test_tensors_decide_over_the_configuration(tmp_path):
    """As published: the 13B heads' configuration says 2, the file has 5."""
    write(tmp_path, "medusa_lm_head.pt", numbered(parts(5, 1)), medusa_num_heads=2, base_model_name_or_path="org/talker-13b")
    detected = formats.detect(tmp_path)
    assert (detected.num_heads, detected.num_layers, detected.hidden, detected.vocab) == (5, 1, HIDDEN, VOCAB)
    assert detected.parameters == 5 * (HIDDEN * HIDDEN + HIDDEN + VOCAB * HIDDEN)
    assert detected.notes == ("their config.json says medusa_num_heads = 2, their tensors 5; the tensors count",)
    assert detected.command == f"headstart import {tmp_path} --target org/talker-13b --out FOLDER"


def test_imported_heads_are_saved_and_loaded_bit_for_bit(trial, tmp_path):
    drawn = parts(2, 1)
    write(tmp_path / "theirs", "medusa_lm_head.pt", {name: tensor.half() for name, tensor in numbered(drawn).items()})
    heads = formats.published_in(tmp_path / "theirs").read(trial.target_info, trial.model.config)
    formats.save(tmp_path / "ours", heads, trial.target_info, {})
    loaded = formats.load(tmp_path / "ours", trial.target_info).state_dict()
    assert torch.equal(loaded["heads.1.projection.weight"], drawn[1][1].half())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in heads.state_dict().items())


# -- refused --


def changed(tmp_path, change, **config):
    tensors = numbered(parts(2, 2))
    change(tensors)
    return write(tmp_path, "medusa_lm_head.pt", tensors, **config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("1.2.weight"), r"1.2.weight is missing"),
        (lambda tensors: tensors.pop("0.1.linear.bias"), "0.1.linear.bias is missing"),
        (lambda tensors: tensors.pop("0.1.linear.weight"), "0.1.linear.weight is missing"),
        (lambda tensors: tensors.update({"0.3.weight": random(2)}), "has no place in Medusa heads: 0.3.weight"),
        (lambda tensors: tensors.update({"1.0.linear.bias": random(7)}), "1.0.linear.bias has the shape [7] and should have [32]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(trial, tmp_path, change, words):
    assert words in trial.refusal(changed(tmp_path, change))
    assert any(words in problem for problem in formats.detect(tmp_path).problems)


def test_another_hidden_size_is_refused_with_both_sizes(trial, tmp_path):
    torch.manual_seed(0)
    write(tmp_path, "medusa_lm_head.pt", numbered([([(random(8, 8), random(8))], random(VOCAB, 8))]))
    assert "a hidden size of 8, but the target talker has 32" in trial.refusal(tmp_path)


def test_another_vocabulary_is_refused_with_both_sizes(trial, tmp_path):
    write(tmp_path, "medusa_lm_head.pt", numbered(parts(2, 1, vocab=97)))
    assert "a vocabulary of 97, but the target talker has 320" in trial.refusal(tmp_path)


def test_a_part_of_the_vocabulary_is_refused(trial, tmp_path):
    write(tmp_path, "model.safetensors", vllm(parts(1, 1, vocab=97)) | {"token_map": torch.arange(97)})
    assert "to a part of the vocabulary" in trial.refusal(tmp_path) or "a vocabulary of 97" in trial.refusal(tmp_path)


def test_scaled_logits_are_refused(trial, tmp_path):
    write(tmp_path, "model.safetensors", vllm(parts(1, 1)), logit_scale=0.5)
    assert "scales logits by 0.5" in trial.refusal(tmp_path)


def test_an_implausible_number_of_heads_is_refused(trial, tmp_path):
    write(tmp_path, "medusa_lm_head.pt", {"999.0.linear.weight": random(HIDDEN, HIDDEN)})
    assert "1000 heads" in trial.refusal(tmp_path)


def test_quantized_heads_are_refused(trial, tmp_path):
    write(tmp_path, "medusa_lm_head.pt", {name: tensor.to(torch.int8) for name, tensor in numbered(parts(1, 1)).items()})
    assert "is of type torch.int8; quantized heads cannot be imported" in trial.refusal(tmp_path)


@pytest.mark.parametrize("shape", [(), (7,), (0, 0), (2, 2, 2)])
def test_a_block_that_is_no_matrix_is_refused(trial, tmp_path, shape):
    write(tmp_path, "medusa_lm_head.pt", {"0.0.linear.weight": torch.zeros(shape)})
    assert f"has the shape {list(shape)} and should be a matrix" in trial.refusal(tmp_path)


class Command:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_code_in_a_pickle_is_not_run(trial, tmp_path, capsys):
    torch.save({"0.0.linear.weight": Command()}, tmp_path / "medusa_lm_head.pt")
    assert "wants to run print when it is read; code of others is never run here" in trial.refusal(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"half a file", b"PK\x03\x04 half a zip"])
def test_a_damaged_file_is_one_sentence(trial, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in trial.refusal(tmp_path)


def test_a_file_of_something_else_is_one_sentence(trial, tmp_path):
    torch.save([1, 2, 3], tmp_path / "medusa_lm_head.pt")
    assert "something else than tensors by name" in trial.refusal(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../elsewhere.bin"}}, "not in its folder"),
        ({}, "no index"),
        ({"weight_map": {"a": "gone.bin"}}, "gone.bin"),
    ],
)
def test_a_broken_index_is_one_sentence(trial, tmp_path, index, words):
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert words in trial.refusal(tmp_path)
