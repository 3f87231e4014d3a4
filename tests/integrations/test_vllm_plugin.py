"""The plug-in for vLLM: its chains are those of this package's heads, and what it takes from vLLM. vLLM itself is not installed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from heads import heads_for
from tiny import ARCHITECTURES, random_model, tiny

from headstart.engine.engine import Engine
from headstart.formats import describe_target, save
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Chain

sys.path.append(str(Path(__file__).parents[2] / "integrations" / "vllm"))

from headstart_vllm import Proposer, proposer
from headstart_vllm.heads import Target, read

PROMPT, DRAFTS = (3, 1, 4, 1, 5, 9, 2, 6), 4


@pytest.fixture(params=["medusa", "medusa, shared", "hydra"])
def kind(request):
    return request.param


def saved(kind, folder):
    """Heads whose guesses are sometimes right, in a folder."""
    save(folder, heads_for(tiny(), kind, noise=0.02), describe_target(tiny().model), {})
    return folder


def config(folder, hidden=64, drafts=DRAFTS):
    """What the plug-in reads of vLLM's configuration."""
    return SimpleNamespace(
        additional_config={"headstart_heads": str(folder)},
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts),
        model_config=SimpleNamespace(
            dtype=torch.float64, get_hidden_size=lambda: hidden, get_vocab_size=lambda: tiny().embed_head.vocab
        ),
    )


class Model(torch.nn.Module):
    """A target with the two functions of vLLM's models that the plug-in calls."""

    def __init__(self):
        super().__init__()
        self.model = random_model(ARCHITECTURES["llama"]())

    def embed_input_ids(self, ids):
        return self.model.get_input_embeddings()(ids)

    def compute_logits(self, states):
        return self.model.lm_head(states)

    @torch.inference_mode()
    def states(self, text):
        """The last hidden states of a text: [length, hidden]."""
        return self.model.model(torch.tensor([text])).last_hidden_state[0]


def connected(folder, monkeypatch):
    """A proposer with its target loaded."""
    monkeypatch.setattr(proposer, "connect", lambda: None)
    one = Proposer(config(folder))
    one.load_model(Model())
    return one


def test_its_chains_are_kept_as_those_of_this_engine_in_every_round(kind, tmp_path, monkeypatch):
    engine = Engine(tiny(), heads_for(tiny(), kind, noise=0.02), Chain(DRAFTS), max_rows=1)
    request = engine.add(PROMPT, SamplingParams(max_tokens=40, temperature=0.0))
    for _ in engine.run():
        pass
    text, one = [*PROMPT, *request.output], connected(saved(kind, tmp_path / "heads"), monkeypatch)
    states, known, rounds = Model().states(text), len(PROMPT) + 1, [1]
    while known < len(text):
        (drafts,) = one.propose_from([[text[known - 1]]], states[known - 2 : known - 1], None)
        coming = text[known:]
        kept = next((index for index, pair in enumerate(zip(drafts, coming, strict=False)) if pair[0] != pair[1]), len(drafts))
        rounds.append(min(kept + 1, len(coming)))
        known += rounds[-1]
    assert rounds == [part.tokens for part in request.rounds if part.tokens]
    assert max(rounds) > 1


def test_each_request_drafts_from_the_state_of_its_last_kept_token(tmp_path, monkeypatch):
    one = connected(saved("hydra", tmp_path / "heads"), monkeypatch)
    states, target = torch.randn(9, 64, dtype=torch.float64), Target(one._target.embed, one._target.logits)
    # 2 of 4 drafts kept, a prompt that is not read to the end, no drafts, all 2 drafts kept: 5 + 1 + 1 + 3 rows, less the last.
    sampled, verified = [[7, 8, 9], [], [5], [1, 2, 3]], [4, 0, 0, 2]
    states = torch.randn(10, 64, dtype=torch.float64)
    drafts = one.propose_from(sampled, states, verified)
    expected = read(tmp_path / "heads").to("cpu", torch.float64).draft(states[[2, 6, 9]], torch.tensor([9, 5, 3]), DRAFTS, target)
    assert drafts == [expected[0].tolist(), [], *expected[1:].tolist()]
    assert one.propose_from([[], []], states, None) == [[], []]


def test_only_its_own_proposer_gets_hidden_states(tmp_path, monkeypatch):
    def asked(self, scheduler_output, sampled_token_ids, hidden_states, sample_hidden_states, spec_decode_metadata, more=None):
        return "vLLM's own"

    wrapped = proposer.with_hidden_states(asked)
    one = connected(saved("medusa", tmp_path / "heads"), monkeypatch)
    states = torch.randn(3, 64, dtype=torch.float64)
    metadata = SimpleNamespace(num_draft_tokens=[2])
    assert wrapped(SimpleNamespace(drafter=object()), None, [[1]], None, states, metadata) == "vLLM's own"
    assert wrapped(SimpleNamespace(drafter=one), None, [[1, 2]], None, states, metadata) == one.propose_from([[1, 2]], states, [2])
    assert wrapped(SimpleNamespace(drafter=one), None, [[1]], None, states[:1], spec_decode_metadata=None)[0]


def test_a_vllm_that_calls_proposers_in_another_way_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="gives proposers no sample_hidden_states"):
        proposer.with_hidden_states(lambda self, sampled_token_ids, hidden_states: None)
    with pytest.raises(RuntimeError, match="in a way that headstart-vllm does not know"):
        connected(saved("medusa", tmp_path / "heads"), monkeypatch).propose([[1]], None, None)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hidden": 32}, "hidden size of 64 and a vocabulary of .* the target has 32"),
        ({"drafts": 5}, "num_speculative_tokens is 5, but these are 4 heads; lower it to 4"),
    ],
)
def test_heads_that_do_not_fit_are_refused(settings, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        Proposer(config(saved("medusa", tmp_path / "heads"), **settings))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [("hydra++", r"holds hydra\+\+ heads, but only medusa and hydra"), ("eagle", "holds eagle heads"), (None, "holds no heads")],
)
def test_other_folders_are_refused(kind, sentence, tmp_path):
    folder = tmp_path / "heads" if kind is None else saved(kind, tmp_path / "heads")
    with pytest.raises(ValueError, match=sentence):
        read(folder)
    nameless = config(folder)
    nameless.additional_config = {}
    with pytest.raises(ValueError, match="the folder of the heads is missing; pass --additional-config"):
        Proposer(nameless)
