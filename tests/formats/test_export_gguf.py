"""GGUF files for llama.cpp: names against the `gguf` package, weights against the reader of transformers, tokens, round trips."""

import json
import re

import gguf
import pytest
import torch
import transformers as hf
from exports import assert_same_heads, eagle3, exported, mtp, refusal, subject_of
from folders import write_model
from tiny_tokenizers import TOKENIZERS

from headstart import formats
from headstart.formats.exports.gguf_vocab import rules_of
from headstart.formats.gguf_file import GgufFile
from headstart.formats.gguf_names import ARCHITECTURES, HEADS, deinterleave, expert_of, interleave
from headstart.formats.importing import import_heads

LAYERS = 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), layers=LAYERS)


@pytest.fixture(scope="module")
def files(llama, tmp_path_factory):
    """A subject of EAGLE-3 heads, and the folder of its export. Tests must not change it."""
    folder = tmp_path_factory.mktemp("export") / "gguf"
    subject = subject_of(llama, eagle3)
    return subject, folder, exported(subject, "gguf", folder)


def qwen(folder, **config):
    """A folder with a tiny Qwen 3."""
    write_model(folder)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
    settings = {"vocab_size": 320, "num_hidden_layers": LAYERS, "max_position_embeddings": 256, "eos_token_id": 0} | sizes | config
    hf.Qwen3ForCausalLM(hf.Qwen3Config(**settings)).save_pretrained(folder)
    return folder


# -- names and rows --


@pytest.mark.parametrize("kind", ["llama", "qwen3", "glm4_moe"])
def test_names_are_those_of_the_gguf_package(publish, tmp_path, kind):
    architecture = ARCHITECTURES[kind]
    known = gguf.get_tensor_name_map(next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name), 9)
    model = {"llama": write_model, "qwen3": qwen}.get(kind, lambda _: publish(kind).folder)(tmp_path)
    names = formats.weights.safe_in(model).shapes
    assert len(names) >= 20
    for name in names:
        stacked = expert_of(name)[0] if expert_of(name) else name
        theirs = architecture.to_gguf(stacked)
        corrected = stacked.replace("e_score_correction_bias", "e_score_correction.bias")
        assert theirs == known.get_name(corrected, try_suffixes=(".weight", ".bias"))
        assert architecture.from_gguf(theirs) == stacked


def test_a_tensor_without_a_place_is_refused():
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_norm\.weight has no place in llama.cpp's architecture llama"):
        ARCHITECTURES["llama"].to_gguf("model.layers.0.self_attn.q_norm.weight")


def test_rows_of_queries_are_reordered_and_back():
    rows = torch.arange(16)[:, None]
    assert interleave(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(deinterleave(interleave(rows, 2), 2), rows)


# -- EAGLE-3 --


def test_the_draft_model_says_what_llama_cpp_reads(files):
    subject, folder, _ = files
    draft = GgufFile(folder / "draft.gguf")
    assert draft.architecture == "eagle3"
    expected = {
        "target_layers": [1, 2, 3],
        "target_hidden_size": 32,
        "block_count": 1,
        "embedding_length": 32,
        "context_length": 256,
    }
    expected |= {"attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 16, "rope.freq_base": 10000.0}
    expected |= {"norm_before_residual": False, "norm_before_fc": False, "attention.layer_norm_rms_epsilon": 1e-6}
    assert {key: draft.field(f"%s.{key}") for key in expected} == expected
    assert torch.equal(draft["d2t"], subject.heads.ids)  # ids themselves, not offsets
    assert draft.shapes["fc.weight"] == (32, 96)
    assert draft.shapes["blk.0.attn_q.weight"] == (32, 64)
    assert {"blk.0.attn_norm_2.weight", "output.weight", "output_norm.weight"} <= draft.shapes.keys()


def test_what_was_placed_is_in_the_files_bit_for_bit(files):
    subject, folder, placed = files
    draft = GgufFile(folder / "draft.gguf")
    assert {entry.ours for entry in placed} == subject.heads.state_dict().keys()
    for entry in placed:
        again = type(entry).of(entry.ours, entry.theirs, entry.file, draft[entry.theirs], entry.how)
        assert again == entry


@pytest.mark.parametrize(
    "settings",
    [{}, {"draft_vocab": None, "norm_before_fc": True}, {"norm_before_residual": True, "embedding": "own"}],
    ids=["draft vocabulary", "all tokens, a norm before fc", "own embedding"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eagle3_heads_are_imported_bit_for_bit(llama, tmp_path, settings, dtype):
    model = hf.AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    model.save_pretrained(tmp_path / "target")
    hf.AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "target")
    subject = subject_of(tmp_path / "target", eagle3, **settings)
    exported(subject, "gguf", tmp_path / "gguf")
    back = assert_same_heads(subject, tmp_path / "gguf" / "draft.gguf", llama, tmp_path / "heads")
    named = {"taps", "draft_vocab", "embedding", "fc_norm", "norm_output", "norm_before_fc", "norm_before_residual"}
    assert back.config.model_dump(include=named) == subject.config.model_dump(include=named)
    assert back.block.config.rope_parameters == subject.heads.block.config.rope_parameters
    assert back.block.config.rms_norm_eps == subject.heads.block.config.rms_norm_eps


def test_the_folder_of_an_export_is_imported_like_its_file(files, llama, tmp_path):
    subject, folder, _ = files
    assert_same_heads(subject, folder, llama, tmp_path / "heads")
    detected = formats.detect(folder)
    assert (detected.method, detected.layout, detected.draft_vocab) == ("eagle3", "EAGLE-3 heads as llama.cpp stores them", 40)


def test_llama_3_positions_become_factors_and_are_imported_again(llama, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    block = subject_of(llama, eagle3).config.block | {"rope_parameters": rope, "max_position_embeddings": 256}
    subject = subject_of(llama, eagle3, block=block)
    exported(subject, "gguf", tmp_path / "gguf")
    factors = GgufFile(tmp_path / "gguf" / "draft.gguf")["rope_freqs.weight"]
    plain = 5000.0 ** -(torch.arange(8) / 8)
    torch.testing.assert_close(plain / factors, subject.heads.block.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert factors.max() == 4
    back = assert_same_heads(subject, tmp_path / "gguf" / "draft.gguf", llama, tmp_path / "heads")
    assert back.block.config.rope_parameters == rope


# -- the target --


@pytest.mark.parametrize("make", [lambda folder: write_model(folder, layers=LAYERS), qwen])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_transformers_reads_the_same_target_from_the_file(tmp_path, make, dtype):
    """transformers reads GGUF files too, with its own table of names and its own order of rows."""
    source = make(tmp_path / "target")
    exported(subject_of(source, eagle3, dtype), "gguf", tmp_path / "gguf")
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", config=hf.AutoConfig.from_pretrained(source)
    )
    expected = hf.AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    for name, tensor in theirs.state_dict().items():
        is_matrix = tensor.dim() > 1 and dtype is not None
        assert torch.equal(tensor.float(), expected[name].to(dtype).float() if is_matrix else expected[name]), name


def test_the_tokens_of_the_file_are_the_tokenizers(files, llama):
    _, folder, _ = files
    tokenizer = hf.AutoTokenizer.from_pretrained(llama)
    for name in ("draft.gguf", "model.gguf"):
        file = GgufFile(folder / name)
        tokens = file.field("tokenizer.ggml.tokens")
        assert {text: index for index, text in enumerate(tokens)} == tokenizer.get_vocab()
        kinds = file.field("tokenizer.ggml.token_type")
        assert {tokens[index] for index, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL} == {
            *tokenizer.all_special_tokens
        } | {
            "<|user|>",
            "<|assistant|>",
            "<|system|>",
        }
        assert file.field("tokenizer.ggml.pre") == "gpt-2"
        assert file.field("tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
        assert file.field("tokenizer.ggml.add_bos_token") is False
        merges = json.loads((llama / "tokenizer.json").read_text())["model"]["merges"]
        assert file.field("tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]


def test_rules_of_splitting_are_recognised():
    def of(*steps, **model):
        return rules_of({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps]}, "model": model})

    letters = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    plain = letters | {"use_regex": False}
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    assert of(letters) == "gpt-2"
    assert of({"type": "Digits", "individual_digits": True}, letters) == "smollm"
    assert of({"type": "Digits", "individual_digits": False}, letters) is None
    assert of(split, plain, ignore_merges=True) == "llama-bpe"
    assert of(split, plain, ignore_merges=False) == "smaug-bpe"
    assert of(split | {"behavior": "Removed"}, plain) is None
    assert of({**split, "pattern": {"Regex": words.replace("{1,3}", "")}}, plain) == "qwen2"
    assert of(split, letters) is None
    assert of(letters | {"add_prefix_space": True}) is None


# -- MTP modules --


def test_modules_are_written_behind_the_layers_and_imported_bit_for_bit(publish, tmp_path):
    source = publish("glm4_moe").folder
    subject = subject_of(source, mtp)
    placed = exported(subject, "gguf", tmp_path / "gguf")
    model = GgufFile(tmp_path / "gguf" / "model.gguf")
    assert (model.architecture, model.field("%s.block_count"), model.field("%s.nextn_predict_layers")) == ("glm4moe", 4, 1)
    assert model.shapes["blk.3.nextn.eh_proj.weight"] == (64, 128)
    assert model.shapes["blk.3.ffn_gate_exps.weight"] == (4, 32, 64)
    assert {entry.ours for entry in placed} == subject.heads.state_dict().keys()
    for entry in placed:
        assert type(entry).of(entry.ours, entry.theirs, entry.file, model[entry.theirs], entry.how) == entry
    assert_same_heads(subject, tmp_path / "gguf", source, tmp_path / "heads")


def test_a_gguf_file_is_no_target(publish, tmp_path):
    exported(subject_of(publish("glm4_moe").folder, mtp), "gguf", tmp_path / "gguf")
    with pytest.raises(ValueError, match="name it with --target"):
        import_heads(str(tmp_path / "gguf" / "model.gguf"), None, str(tmp_path / "heads"))


# -- refusals --

OUT = "--set fc_norm=false --set norm_output=false"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fc_norm": True}, f"fc_norm is true.*{OUT}"),
        ({"norm_output": True}, f"norm_output is true.*{OUT}"),
        ({"taps": (0, 2)}, "read 2 layers of the target, and llama.cpp exactly 3"),
        ({"taps": (0, 1, LAYERS - 1)}, "the target's last, whose output llama.cpp does not give"),
        ({"fc_bias": True}, "fc_bias is true.*--set fc_bias=false"),
        ({"context": 100}, "draft up to position 100 only"),
    ],
)
def test_settings_that_llama_cpp_lacks_are_refused(llama, settings, message):
    assert re.search(message, refusal(subject_of(llama, eagle3, **settings), "gguf"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers of their layer is 2"),
        ({"attention_bias": True}, "attention_bias of their layer is True"),
        ({"model_type": "qwen3"}, "model_type of their layer is 'qwen3', and llama.cpp's is 'llama'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "of type 'yarn'"),
    ],
)
def test_layers_that_llama_cpp_lacks_are_refused(llama, changed, message):
    block = subject_of(llama, eagle3).config.block | changed
    assert message in refusal(subject_of(llama, eagle3, block=block), "gguf")


def test_other_models_are_refused(publish, llama, tmp_path):
    assert "a 'deepseek_v3' model cannot be written" in refusal(subject_of(publish("deepseek_v3").folder, mtp), "gguf")
    tapped = subject_of(publish("glm4_moe").folder, eagle3, taps=(0, 1, -1))
    assert "does not give the inputs of its layers" in refusal(tapped, "gguf")
    assert "no MTP modules in its architecture llama" in refusal(subject_of(llama, mtp), "gguf")
    assert "llama.cpp runs one" in refusal(subject_of(publish("glm4_moe").folder, mtp, num_modules=2), "gguf")
    window = qwen(tmp_path / "window", use_sliding_window=True, sliding_window=16, max_window_layers=0)
    assert "sliding_window of this 'qwen3' model is 16" in refusal(subject_of(window, eagle3), "gguf")


@pytest.mark.parametrize(
    ("kind", "message"),
    [("byte_fallback", "only byte-level BPE can be written"), ("metaspace", "only byte-level BPE can be written")],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(llama, tmp_path, kind, message):
    write_model(tmp_path, layers=LAYERS)
    TOKENIZERS[kind].save_pretrained(tmp_path)
    sentence = refusal(subject_of(tmp_path, eagle3), "gguf")
    assert message in sentence
    assert "convert_hf_to_gguf.py" in sentence


def test_rules_that_llama_cpp_lacks_are_refused(tmp_path):
    write_model(tmp_path, layers=LAYERS)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert "rules that llama.cpp does not have (Whitespace)" in refusal(subject_of(tmp_path, eagle3), "gguf")


def test_a_damaged_file_is_one_sentence(files, tmp_path, llama):
    _, folder, _ = files
    (tmp_path / "draft.gguf").write_bytes((folder / "draft.gguf").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"draft\.gguf is damaged or no GGUF file.*copy it again"):
        import_heads(str(tmp_path / "draft.gguf"), str(llama), str(tmp_path / "heads"))


def test_quantized_heads_are_refused(files, tmp_path, llama):
    _, folder, _ = files
    reader, path = gguf.GGUFReader(folder / "draft.gguf"), tmp_path / "draft.gguf"
    writer = gguf.GGUFWriter(path, "eagle3")
    for name in ("embedding_length", "attention.head_count", "attention.head_count_kv", "vocab_size", "feed_forward_length"):
        writer.add_uint32(f"eagle3.{name}", int(reader.fields[f"eagle3.{name}"].contents()))
    writer.add_array("eagle3.target_layers", [1, 2, 3])
    for tensor in reader.tensors:
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.name == "fc.weight" else tensor.tensor_type
        data = gguf.quants.quantize(tensor.data, kind) if tensor.name == "fc.weight" else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"fc.weight in .* is quantized to Q8_0; quantized heads cannot be imported"):
        import_heads(str(path), str(llama), str(tmp_path / "heads"))


def test_the_names_of_heads_are_unique():
    assert len({*HEADS.outside.values()}) == len(HEADS.outside)
