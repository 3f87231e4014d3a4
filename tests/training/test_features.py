"""Features of the target: those of a text alone, whatever the batch it is in."""

import random

import pytest
import torch
from tiny import ARCHITECTURES, random_model

from headstart.target.target import Target
from headstart.training import features
from headstart.training.dataset import Dataset, Text
from headstart.training.features import Online

TAPS = (0, -1)


def text(*tokens: int) -> Text:
    return Text(tokens, (False, *[True] * (len(tokens) - 1)))


DATASET = Dataset((text(5, 3, 9, 1, 4, 1, 5), text(2, 7, 1), text(8, 2, 8, 1, 8), text(6, 6)), (0, 1, 2), (3,))


@pytest.fixture
def online() -> Online:
    return Online(random_model(ARCHITECTURES["llama"](), torch.float32), TAPS)


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


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_has_the_same_bits_in_every_batch(name):
    """On CPUs in float32; the lengths are no multiples of what kernels work on at a time."""
    online = Online(random_model(ARCHITECTURES[name](), torch.float32), TAPS)
    dice = random.Random(0)
    dataset = Dataset(tuple(text(*dice.choices(range(97), k=length)) for length in (2, 3, 17, 30, 63, 100, 128)), (), ())
    together = online(dataset.pad(range(7)))
    for row, one in enumerate(dataset.texts):
        alone = online(dataset.pad([row]))
        assert torch.equal(together.features[row, : len(one.tokens)], alone.features[0]), len(one.tokens)
        assert torch.equal(together.last_hidden[row, : len(one.tokens)], alone.last_hidden[0]), len(one.tokens)


def test_a_text_as_long_as_the_context_is_not_padded_beyond_it():
    config = ARCHITECTURES["gpt2"]()
    config.n_positions = 21
    online = Online(random_model(config, torch.float32), TAPS)
    assert online(Dataset((text(*range(21)),), (), ()).pad([0])).features.shape == (1, 21, 128)
