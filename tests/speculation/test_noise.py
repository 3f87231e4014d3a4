"""The counter-based noise: uniform, independent, and the same bits in every batch and on every device."""

import math

import pytest
import torch
from scipy import stats

from headstart.speculation.noise import MOST_BLOCKS, NoiseOfTexts, gumbel, mix, noise_key, noise_keys, signed, uniform, uniform_bits

EDGE_SEEDS = (0, 1, -1, 2**63 - 1, 2**63, 2**64 - 1)
TOKENS = torch.arange(4096)


def keys(seeds, positions) -> torch.Tensor:
    """[seeds, positions] keys."""
    pairs = torch.cartesian_prod(torch.tensor([signed(seed) for seed in seeds]), torch.tensor(list(positions)))
    return noise_keys(pairs[:, 0], pairs[:, 1]).reshape(len(seeds), -1)


def grid(seeds=range(16), positions=range(16), tokens=TOKENS) -> torch.Tensor:
    """[seeds, positions, tokens] uniforms."""
    return uniform(keys(list(seeds), positions)[..., None], tokens)


@pytest.mark.parametrize("seed", EDGE_SEEDS)
def test_noise_is_uniform_for_edge_seeds_too(seed):
    sample = grid([seed], range(32)).flatten().numpy()
    assert stats.kstest(sample, "uniform").pvalue > 1e-3
    assert stats.chisquare(torch.histc(torch.from_numpy(sample), 256, 0, 1).numpy()).pvalue > 1e-3


def test_each_of_the_32_bits_is_a_fair_coin():
    bits = uniform_bits(keys(range(16), range(16))[..., None], TOKENS).flatten()
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**32
    share = torch.stack([(bits >> bit & 1).double().mean() for bit in range(32)])
    assert float((share - 0.5).abs().max()) < 4.5 * 0.5 / math.sqrt(len(bits))


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seeds", "positions", "tokens"])
@pytest.mark.parametrize("lag", [1, 2, 8])
def test_neighbours_are_independent(axis, lag):
    sample = grid()
    one = sample.narrow(axis, 0, sample.shape[axis] - lag).flatten()
    other = sample.narrow(axis, lag, sample.shape[axis] - lag).flatten()
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 4.5 / math.sqrt(len(one))
    cells = (one * 32).long() * 32 + (other * 32).long()  # joint distribution on a 2-D grid
    assert stats.chisquare(torch.bincount(cells, minlength=1024).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("seeds", [[0, 2**63], [5, mix(5, 0)], [mix(5, 0), mix(5, 1)], [1, 2**32 + 1], [-1, 0]])
def test_noise_of_similar_seeds_is_independent(seeds):
    one, other = grid(seeds, range(32)).flatten(1)
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 4.5 / math.sqrt(len(one))
    assert int((one == other).sum()) < 3


def test_the_stream_of_a_position_is_not_that_of_its_neighbour_shifted():
    one, other = (stream[0].tolist() for stream in grid([3], range(2)).split(1, 1))
    assert not {*one[0]} & {*other[0]}


def test_gumbel_noise_follows_the_gumbel_distribution():
    sample = gumbel(keys(range(8), range(16))[..., None], TOKENS).flatten().numpy()
    assert stats.kstest(sample, "gumbel_r").pvalue > 1e-3


def test_large_gumbel_noise_is_as_frequent_as_in_theory():
    sample = gumbel(keys(range(64), range(16))[..., None], TOKENS)  # 4 million
    for limit in (2.0, 4.0, 6.0, 8.0, 10.0):
        expected = sample.numel() * -math.expm1(-math.exp(-limit))
        assert abs(int((sample > limit).sum()) - expected) < 4.5 * math.sqrt(expected)
    best = sample.amax(-1).flatten().double() - math.log(len(TOKENS))  # the maximum of a line is Gumbel distributed again, shifted
    assert stats.kstest(best.numpy(), "gumbel_r").pvalue > 1e-3


def test_the_extreme_bits_give_finite_noise():
    from headstart.speculation import noise

    bits = torch.tensor([0, 1, 2**24, 2**32 - 2, 2**32 - 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "uniform_bits", lambda keys, ids: bits)
        gumbels = noise.gumbel(bits, bits)
        uniforms = noise.uniform(bits, bits)
    expected = [-math.log(-math.log1p(-(bit + 0.5) / 2**32)) for bit in (0, 1, 2**24)]
    assert gumbels[:3].tolist() == pytest.approx(expected, rel=1e-6)
    assert gumbels[3:].tolist() == pytest.approx([-2.812] * 2, abs=1e-3)  # cut here
    assert float(uniforms.min()) > 0
    assert float(uniforms.max()) < 1


def test_noise_is_the_same_bits_in_any_batch_order_and_shape():
    seeds, positions = torch.arange(12), torch.arange(12) * 3
    together = gumbel(noise_keys(seeds, positions)[:, None], TOKENS)
    order, some = torch.randperm(12, generator=torch.Generator().manual_seed(0)), torch.tensor([4000, 7, 7, 0])
    assert torch.equal(gumbel(noise_keys(seeds[order], positions[order])[:, None], TOKENS), together[order])
    assert torch.equal(gumbel(noise_keys(seeds, positions)[:, None], some), together[:, some])
    alone = [gumbel(noise_keys(seeds[row : row + 1], positions[row]), TOKENS[token]) for row, token in ((3, 5), (11, 4095))]
    assert [float(value) for value in alone] == [float(together[3, 5]), float(together[11, 4095])]


@pytest.mark.parametrize("vocab", [5, 1000, 4096, 4099, 40_000])
def test_noise_that_is_kept_is_that_of_each_seed_and_position_alone(vocab):
    """As rounds that draft in vain ask for it; for two texts with one seed, and until some is lost."""
    kept = NoiseOfTexts()
    for root in (0, 1, 2, 9, 10, 200, 3):
        for level in (1, 2, 3):
            places = [(7, root + level), (2**64 - 1, 3 * root + level), (7, root + level)]
            alone = [gumbel(torch.tensor([[noise_key(*place)]]), torch.arange(vocab)) for place in places]
            assert torch.equal(kept.at(places, vocab, torch.device("cpu")), torch.cat(alone))
            assert torch.equal(kept.at(places[1:2], vocab, torch.device("cpu")), alone[1])
    assert len(kept._blocks) <= 3 * MOST_BLOCKS


@pytest.mark.parametrize("seed", EDGE_SEEDS)
def test_the_host_makes_the_same_keys_as_the_device(seed):
    positions = [0, 1, 4095, 2**40]
    assert keys([seed], positions)[0].tolist() == [noise_key(seed, position) for position in positions]


def test_minus_one_is_the_largest_unsigned_seed():
    assert noise_key(-1, 3) == noise_key(2**64 - 1, 3)
    assert mix(-1, 3) == mix(2**64 - 1, 3)


def test_keys_do_not_collide():
    seeds = [*range(1000), *(2**63 + seed for seed in range(1000)), *(mix(7, sample) for sample in range(1000))]
    all_keys = keys(seeds, range(100))
    assert len(all_keys.unique()) == all_keys.numel()


def test_every_answer_of_a_request_has_its_own_seed():
    seeds = {mix(mix(seed, prompt), sample) for seed in (0, 1, 2**64 - 1) for prompt in range(40) for sample in range(40)}
    assert len(seeds) == 3 * 40 * 40
    assert all(0 <= seed < 2**64 for seed in seeds)
