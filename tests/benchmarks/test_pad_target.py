"""benchmarks/pad_target.py: a target padded with zeros has the logits of the small one, at the cost of its own size."""

import sys
from pathlib import Path

import pytest
import torch
from folders import write_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from headstart.target.tokenizer_loading import load_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import pad_target


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pad_target.py", *map(str, arguments)])
    pad_target.main()


@pytest.mark.parametrize(("tied", "kv_heads"), [(True, 4), (False, 2), (False, 1)])
@pytest.mark.parametrize(("hidden", "mlp", "layers"), [(128, 96, 2), (64, 160, 2), (64, 96, 6), (192, 200, 4)])
def test_a_padded_model_has_the_logits_of_the_small_one(hidden, mlp, layers, tied, kv_heads):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, tie_word_embeddings=tied, initializer_range=0.2, attention_bias=True, rms_norm_eps=0.1,
    )  # fmt: skip
    small = LlamaForCausalLM(config).double()
    for name, weight in small.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    large = pad_target.padded(small, hidden, mlp, layers)
    tokens = torch.randint(0, 97, (2, 20))
    torch.testing.assert_close(large(tokens).logits, small(tokens).logits, rtol=0, atol=1e-4)  # norms are in float32
    assert (large.config.hidden_size, large.config.intermediate_size, len(large.model.layers)) == (hidden, mlp, layers)
    assert large.model.layers[-1].self_attn.q_proj.weight.shape == (hidden, hidden)


def test_a_written_target_answers_as_the_source_does_and_has_its_tokenizer_and_dtype(tmp_path, monkeypatch, capsys):
    source = write_model(tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(source).bfloat16().save_pretrained(source)
    run(monkeypatch, source, tmp_path / "out", "--hidden", 128, "--mlp", 96, "--layers", 4)  # 128 is 32 * 4: no norm is rounded
    assert "logits differ by" in capsys.readouterr().out
    small, large = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    assert large.dtype == torch.bfloat16
    assert large.num_parameters() > 4 * small.num_parameters()
    tokenizers = [load_tokenizer(folder) for folder in (source, tmp_path / "out")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    ids = tokenizers[1](["The cat said to the sea"], return_tensors="pt").input_ids
    answers = [model.float().generate(ids, do_sample=False, max_new_tokens=20) for model in (small, large)]
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--hidden", 48, "multiple of 32"), ("--hidden", 0, "32 or more"), ("--mlp", 63, "64 or more"), ("--layers", 3, "of 2")],
)
def test_sizes_that_the_source_does_not_fit_into_are_refused(option, value, words, tmp_path, monkeypatch, capsys):
    source = write_model(tmp_path / "source")
    with pytest.raises(SystemExit):
        run(monkeypatch, source, tmp_path / "out", option, value)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_padding_that_changes_the_logits_is_not_written(tmp_path, monkeypatch, capsys):
    source = write_model(tmp_path / "source")
    monkeypatch.setattr(pad_target.math, "sqrt", lambda ratio: 1.0)  # norms that do not shrink
    with pytest.raises(SystemExit):
        run(monkeypatch, source, tmp_path / "out", "--hidden", 64)
    assert "padding changed the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
