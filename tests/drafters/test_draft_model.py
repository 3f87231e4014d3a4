"""The draft model: its tokens must be the target's; the vocabularies may be padded to different sizes."""

import pytest
import torch
from folders import write_model, write_tokenizer
from transformers import AutoModelForCausalLM

from headstart.drafters.draft_model import ModelDrafter
from headstart.engine.drafter_loading import make
from headstart.engine.engine import Engine
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best, Chain
from headstart.target.target import Target

TOKENS = 320  # of the tokenizer
PROMPTS = [[7, 30, 2, 311], [9, 8, 250, 19, 5]]


def padded(folder, vocab, layers):
    """A model whose embedding has more rows than the tokenizer has tokens, and which gives these rows no lower logits."""
    write_model(folder, TOKENS, layers)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.resize_token_embeddings(vocab, mean_resizing=False)
        model.get_input_embeddings().weight.data[TOKENS:] = torch.randn(vocab - TOKENS, 32) * 0.2
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with one tokenizer, by the size of their vocabulary; the larger it is, the more layers."""
    home = tmp_path_factory.mktemp("padded")
    return {vocab: padded(home / str(vocab), vocab, layers) for vocab, layers in ((336, 1), (352, 2), (400, 3))}


@pytest.fixture(scope="module")
def targets(folders):
    return {vocab: Target.load(folder, dtype="float64", device="cpu") for vocab, folder in folders.items()}


def decode(target, drafter, planner, temperature, accept="coupled"):
    engine = Engine(target, drafter, planner, accept=accept)
    params = SamplingParams(max_tokens=40, temperature=temperature, ignore_eos=True)
    requests = [engine.add(prompt, params, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    for _ in engine.run():
        pass
    return [list(request.output) for request in requests], engine.stats.drafts


def record_tokens(drafter):
    """The set of tokens that a drafter proposes from now on."""
    original, proposed = drafter.propose, set()

    def propose(rows):
        drafts = original(rows)
        proposed.update(drafts.tokens.tolist())
        return drafts

    drafter.propose = propose
    return proposed


TREE = Best(nodes=9, depth=3, width=3, beam=3)


@pytest.mark.parametrize(
    ("planner", "accept"),
    [(Chain(3), "coupled"), (TREE, "coupled"), (TREE, "rejection")],
    ids=["chain", "tree", "tree, rejection"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("wide", "narrow"), [(352, 400), (352, 336)], ids=["the draft is wider", "the target is wider"])
def test_models_padded_to_different_sizes_draft_for_each_other(targets, wide, narrow, temperature, planner, accept):
    target, drafter = targets[wide], ModelDrafter(targets[narrow], has_same_tokens=True)
    expected, _ = decode(target, None, None, temperature)
    proposed = record_tokens(drafter)
    actual, drafts = decode(target, drafter, planner, temperature, accept)
    assert drafts > 0
    assert max(proposed) < min(wide, narrow)
    if accept == "coupled" or temperature == 0:
        assert actual == expected
    if temperature == 1 and narrow < wide:
        assert max(max(text) for text in actual) >= narrow, "no text has a token that the draft model lacks"


def test_models_of_one_tokenizer_are_known_to_have_the_same_tokens(folders, targets):
    drafter = make(f"model:{folders[400]}", targets[352])
    assert drafter.has_same_tokens
    actual, drafts = decode(targets[352], drafter, None, 0.0)
    assert actual == decode(targets[352], None, None, 0.0)[0]
    assert drafts > 0


@pytest.mark.parametrize("vocab", [352, 400])
def test_a_token_added_to_one_tokenizer_is_accepted_where_the_sizes_agree(targets, tmp_path, vocab):
    folder = padded(tmp_path / "more", vocab, 1)
    tokenizer = write_tokenizer(folder, TOKENS)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder)
    drafter = make(f"model:{folder}", targets[352])
    if vocab == 352:
        Engine(targets[352], drafter)
    else:
        with pytest.raises(ValueError, match=r"has a vocabulary of 400 tokens, target .* one of 352"):
            Engine(targets[352], drafter)


def test_an_id_that_stands_for_another_token_is_named_in_the_error(targets, tmp_path):
    folder = padded(tmp_path / "other", 352, 1)
    tokenizer = write_tokenizer(folder, TOKENS - 1)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"have different tokenizers: token 319 is '<\|new\|>' for the drafter and .* for the target"
    ):
        make(f"model:{folder}", targets[352])


@pytest.mark.parametrize("whose", ["drafter", "target"])
def test_without_a_tokenizer_beside_either_the_sizes_must_agree(folders, targets, tmp_path, whose):
    bare = padded(tmp_path / "bare", 400, 1)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    target = targets[352] if whose == "drafter" else Target.load(bare, dtype="float64", device="cpu")
    draft = bare if whose == "drafter" else folders[352]
    with pytest.raises(ValueError, match=r"has a vocabulary of .* a model can only draft for a target with the same tokenizer"):
        Engine(target, make(f"model:{draft}", target))
