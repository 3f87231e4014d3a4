"""benchmarks/int8.py: speed, perplexity and acceptance of rounded weights."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import int8

from headstart.target.kernels.library import library
from headstart.target.loading import digest, embedded
from headstart.target.target import Target

pytestmark = pytest.mark.skipif(
    library() is None or library().level == "avx512", reason="there are no integer products for this processor, or no compiler"
)


def test_log_probabilities_are_those_of_the_model(model_folder):
    target = Target.load(model_folder, dtype="float32")
    tokens = [3, 5, 7, 11, 13]
    with torch.inference_mode():
        logits = target.model(torch.tensor([tokens])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(int8.log_probabilities(target, tokens), expected, rtol=1e-4, atol=1e-4)


def test_rounded_weights_are_compared_with_stored_ones(monkeypatch, capsys):
    monkeypatch.setattr(int8, "SHAPES", ((64, 96),))
    monkeypatch.setattr(int8, "WEIGHT_BYTES", 1e5)
    monkeypatch.setattr(sys, "argv", ["int8.py", "--limit", "1", "--tokens", "6", "--repeat", "1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # heads still fit a model whose weights were rounded
        int8.main()
    *_, first, _, last = capsys.readouterr().out.splitlines()
    stored, rounded = (float(line.split("perplexity ")[1].split()[0]) for line in (first, last))
    assert rounded == pytest.approx(stored, rel=0.02)
    assert rounded != stored


def test_the_digest_of_a_rounded_model_is_that_of_its_stored_weights():
    stored, rounded = (Target.load(embedded("target"), weights=weights).model for weights in ("stored", "int8"))
    assert digest(rounded) == digest(stored)
    assert not torch.equal(rounded.lm_head.weight, stored.lm_head.weight)
