"""What an engine would drop, ignore or change silently is refused in one sentence with the way out, and nothing is written."""

import errno
import json
import os

import pytest
import torch
from folders import write_model
from safetensors import SafetensorError
from saved_heads import BIASED, HIDDEN, LAYERS, NARROW, PLAIN, save_heads, tensors_of
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PhiConfig, PhiForCausalLM

from headstart.formats.exporting import export_heads
from headstart.formats.exports import EXPORTERS, base, exporter_for

LLAMA = BIASED | {"num_hidden_layers": 1, "attention_bias": False, "mlp_bias": False}
QWEN = {name: value for name, value in LLAMA.items() if name not in ("attention_bias", "mlp_bias")} | {"model_type": "qwen3"}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("target") / "talker", layers=LAYERS)


def refusal(heads, source, engine, out):
    """The sentence with which an export is refused."""
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        export_heads(heads, str(source), engine, out)
    assert not out.exists()
    return str(refused.value)


@pytest.mark.parametrize(
    ("engine", "method", "settings", "reason", "way_out"),
    [
        ("vllm", "eagle", {"bias": True}, "fc has a bias, which vLLM drops", "train eagle --set bias=false"),
        ("vllm", "eagle3", {"fc_bias": True}, "fc has a bias, which vLLM drops", "train eagle3 --set fc_bias=false"),
        ("speculators", "eagle3", {"fc_bias": True}, "speculators and vLLM drops", "--set fc_bias=false"),
        ("sglang", "eagle3", {"fc_bias": True}, "gives the attention a bias", "--set fc_bias=false"),
        ("sglang", "eagle3", {"norm_before_residual": True}, "state without its norm", "--set norm_before_residual=false"),
        ("sglang", "eagle3", PLAIN | {"norm_before_fc": True}, "drops input_norm.weight", "--set norm_before_fc=false"),
        ("sglang", "eagle3", {"taps": (3,)}, "leaves fc out without a word", "--set taps=[1,3,4]"),
        ("vllm", "eagle3", {"taps": (0, 3, 7)}, "(tap 7), which vLLM cannot tap", "--set taps=[1,3,4]"),
        ("sglang", "eagle3", {"taps": (0, 3, -1)}, "(tap 7), which SGLang cannot tap", "--set taps=[1,3,4]"),
        ("speculators", "eagle3", {"taps": (-1,)}, "cannot tap", "--set taps=[1,3,4]"),
        ("vllm", "eagle3", {"taps": (4, 1)}, "in ascending order", "--set taps=[1,4]"),
        ("sglang", "eagle3", {"taps": (4, 1, 3)}, "in ascending order", "--set taps=[1,3,4]"),
        ("vllm", "eagle3", {"block": QWEN}, "a layer of the type 'qwen3'", "--set block=null"),
        ("sglang", "eagle", {"block": QWEN}, "a layer of the type 'qwen3'", "--set block=null"),
        ("sglang", "eagle3", {"block": LLAMA | {"mlp_bias": True}}, "biases, which SGLang drops", "--set block=null"),
        ("sglang", "eagle3", {"block": LLAMA | {"num_hidden_layers": 2}}, "2 layers, and SGLang reads one", "--set block=null"),
        ("vllm", "eagle", {"block": LLAMA | {"num_hidden_layers": 2}}, "2 layers, and vLLM reads one", "--set block=null"),
        ("sglang", "eagle", {"embedding": "own"}, "replaces by the target's", "--set embedding=shared"),
        ("sglang", "eagle3", {"embedding": "own"}, "replaces by the target's", "--to vllm"),
        ("vllm", "eagle3", {"context": 100}, "first 100 positions", "--set context=null"),
        ("sglang", "eagle", {"context": 100}, "first 100 positions", "--set context=null"),
        ("speculators", "eagle3", {"block": {**NARROW, "num_hidden_layers": 1}, "embedding": "own"}, "size of 16", "--to vllm"),
        ("vllm", "hydra", {}, "vllm does not run hydra heads", "headstart itself runs them"),
        ("sglang", "medusa", {}, "sglang does not run medusa heads", "--to vllm or --to tgi"),
        ("tgi", "eagle3", {}, "tgi does not run eagle3 heads", "--to vllm or --to speculators or --to sglang"),
        ("speculators", "eagle", {}, "speculators 0.9.0 has no EAGLE-1", "--to vllm or --to sglang"),
        ("vllm", "mtp", {}, "only inside the target's checkpoint", "--to hf"),
        ("vllm", "mtp-parallel", {}, "vllm does not run mtp-parallel heads", "headstart itself runs them"),
    ],
)  # fmt: skip
def test_what_an_engine_would_lose_is_refused(tmp_path, target, engine, method, settings, reason, way_out):
    sentence = refusal(save_heads(tmp_path / "heads", target, method, **settings), target, engine, tmp_path / "export")
    assert reason in sentence
    assert way_out in sentence


def test_a_bias_of_zeros_is_no_reason_to_refuse(tmp_path, target):
    from safetensors.torch import save_file

    from headstart.formats import native

    heads = save_heads(tmp_path / "heads", target, "eagle", bias=True)
    text = (heads / "config.json").read_text()
    tensors = tensors_of(heads) | {"fc.bias": torch.zeros(HIDDEN)}
    save_file(tensors, heads / native.WEIGHTS, metadata={"format": "pt", "headstart": text})
    export_heads(heads, str(target), "vllm", tmp_path / "export")
    assert not tensors_of(tmp_path / "export")["fc.bias"].any()


def with_model(folder, model):
    """A folder with another model, and the tokenizer of `write_model`."""
    write_model(folder)
    model.save_pretrained(folder)
    return folder


def test_a_scaled_embedding_can_only_be_the_heads_own(tmp_path):
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=16, max_position_embeddings=256)
    source = with_model(tmp_path / "gemma", Gemma3ForCausalLM(config))
    for engine, method in (("vllm", "eagle"), ("vllm", "eagle3"), ("speculators", "eagle3"), ("sglang", "eagle3")):
        heads = save_heads(tmp_path / f"{engine}-{method}", source, method, taps=(0, 1, 2)) if method == "eagle3" else save_heads(
            tmp_path / f"{engine}-{method}", source, method
        )  # fmt: skip
        sentence = refusal(heads, source, engine, tmp_path / "export")
        assert "changes its embeddings" in sentence
        assert "--set embedding=own" in sentence
    own = save_heads(tmp_path / "own", source, "eagle3", taps=(0, 1, 2), embedding="own")
    export_heads(own, str(source), "vllm", tmp_path / "export")
    assert "embed_tokens.weight" in tensors_of(tmp_path / "export")


def test_an_lm_head_with_a_bias_can_only_be_the_heads_own(tmp_path):
    config = PhiConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    source = with_model(tmp_path / "phi", PhiForCausalLM(config))
    heads = save_heads(tmp_path / "shared", source, "medusa", projection="shared", num_layers=2)
    assert "--set projection=own" in refusal(heads, source, "vllm", tmp_path / "export")
    assert "--set projection=own" in refusal(heads, source, "tgi", tmp_path / "export")
    heads = save_heads(tmp_path / "eagle", source, "eagle")
    assert "an LM head with a bias" in refusal(heads, source, "vllm", tmp_path / "export")
    export_heads(save_heads(tmp_path / "own", source, "medusa"), str(source), "vllm", tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").exists()


def test_a_target_whose_layers_sglang_counts_in_another_way_needs_the_usual_ones(tmp_path):
    config = PhiConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    source = with_model(tmp_path / "phi", PhiForCausalLM(config))
    heads = save_heads(tmp_path / "heads", source, "eagle3", taps=(0, 2, 5))
    sentence = refusal(heads, source, "sglang", tmp_path / "export")
    assert "how SGLang counts them for PhiForCausalLM is not known" in sentence
    assert "--set taps=[1,3,4]" in sentence
    export_heads(save_heads(tmp_path / "usual", source, "eagle3", taps=(1, 3, 4)), str(source), "sglang", tmp_path / "export")


def test_heads_of_another_target_are_refused(tmp_path, target):
    other = write_model(tmp_path / "other", vocab=300)
    sentence = refusal(save_heads(tmp_path / "heads", target, "medusa"), other, "tgi", tmp_path / "export")
    assert "made for talker with a vocabulary of 320, but other has 300" in sentence


def test_an_unknown_engine_names_the_known_ones():
    with pytest.raises(ValueError, match="--to is 'triton'; heads can be exported to vllm, speculators, sglang, tgi"):
        exporter_for("triton", "eagle3")


def test_every_method_that_an_engine_lacks_has_one_sentence():
    from headstart.drafters.registry import METHODS

    for engine, exporter in EXPORTERS.items():
        for method in METHODS:
            if method not in exporter.methods:
                with pytest.raises(ValueError, match=r"^[^\n]+$"):
                    exporter_for(engine, method)


# -- the folder --


@pytest.fixture
def export(tmp_path, target):
    """Heads, and an export of them."""
    heads, out = save_heads(tmp_path / "heads", target, "medusa"), tmp_path / "export"
    export_heads(heads, str(target), "vllm", out)
    return heads, out


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_export_holds_four_files_and_leaves_nothing_beside_it(export):
    _, out = export
    assert sorted(content(out)) == ["README.md", "config.json", "conformance.json", "model.safetensors"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["export", "heads"]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_an_export_replaces_an_earlier_one_and_nothing_else(export, target, tmp_path):
    heads, out = export
    export_heads(heads, str(target), "tgi", out)
    assert sorted(content(out)) == ["README.md", "config.json", "conformance.json", "medusa_lm_head.safetensors"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds an export and notes\.txt, which is no part of it; name another folder"):
        export_heads(heads, str(target), "vllm", out)
    for folder in (heads, target):
        before = content(folder)
        with pytest.raises(ValueError, match="holds something else than an export of headstart; name another folder"):
            export_heads(heads, str(target), "vllm", folder)
        assert content(folder) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        export_heads(heads, str(target), "vllm", tmp_path / "file")


def no_space(*args, **extra):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_rust(*args, **extra):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(("module", "name", "fails"), [(base, "save_file", no_space_in_rust), (os, "fsync", no_space)])
def test_a_full_disk_is_one_sentence_and_leaves_everything_as_it_was(export, target, monkeypatch, module, name, fails):
    heads, out = export
    before = content(out)
    monkeypatch.setattr(module, name, fails)
    for folder in (out, out.with_name("new")):
        with pytest.raises(ValueError, match=r"cannot be written to .*No space left.*what was there is unchanged; free space"):
            export_heads(heads, str(target), "tgi", folder)
    assert content(out) == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["export", "heads"]


def test_a_disk_that_fails_at_the_last_step_leaves_the_earlier_export(export, target, monkeypatch):
    heads, out = export
    before, real, calls = content(out), os.replace, []

    def fails_second(source, destination):
        calls.append(destination)
        return no_space() if len(calls) == 2 else real(source, destination)

    monkeypatch.setattr(os, "replace", fails_second)
    with pytest.raises(ValueError, match="what was there is unchanged"):
        export_heads(heads, str(target), "tgi", out)
    assert content(out) == before


def test_a_folder_that_cannot_be_made_is_one_sentence(export, target, tmp_path):
    heads, _ = export
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^[^\n]+cannot be written to [^\n]+$"):
        export_heads(heads, str(target), "vllm", tmp_path / "file" / "export")


def test_a_report_of_a_later_version_is_refused_when_imported(export, target, tmp_path):
    from headstart.formats.importing import import_heads

    _, out = export
    report = json.loads((out / "conformance.json").read_text())
    for changed, message in (
        ({"version": 2}, "is of version 2"),
        ({"settings": {"num_heads": -1, "colour": 1}}, "unknown key colour"),
    ):
        (out / "conformance.json").write_text(json.dumps(report | changed))
        with pytest.raises(ValueError, match=message):
            import_heads(str(out), str(target), str(tmp_path / "back"))
