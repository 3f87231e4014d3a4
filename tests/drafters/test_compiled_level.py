"""A level in one call against the same level module by module."""

import pytest
import torch
from heads import heads_for
from tables import make_rows
from tiny import ARCHITECTURES, random_model, tiny

from headstart.speculation.params import SamplingParams
from headstart.speculation.tree import Kept
from headstart.target.cache import Seating
from headstart.target.kernels.library import library
from headstart.target.target import Target

pytestmark = pytest.mark.skipif(library() is None, reason="there are no compiled kernels for this processor, or no compiler")
KINDS = ("mtp", "mtp, hidden first", "eagle", "eagle3", "eagle3.1, 40 tokens")
TEXTS = [[5, 9, 3, 77, 12, 40, 8, 21, 33, 60], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [90, 2, 44, 7, 7, 13, 1, 50, 3, 9]]
ROOTS = (8, 5, 7)


def packed(dtype: torch.dtype) -> Target:
    target = Target(random_model(ARCHITECTURES["llama"](), dtype))
    target.choose_kernels()
    return target


def attached(target: Target, kind: str):
    """Heads that have read the texts up to their roots."""
    heads, seating = heads_for(target, kind), Seating(3, 200)
    for _ in ROOTS:
        seating.take(60)
    heads.attach(target, seating)
    torch.manual_seed(0)
    features = torch.randn(sum(ROOTS), 64 * len(heads.taps), dtype=target.dtype)
    pieces = tuple(tuple(text[: root + 1]) for text, root in zip(TEXTS, ROOTS, strict=True))
    heads.extend(Kept((0, 1, 2), pieces, (0, 0, 0), (), (), features, features.device))
    return heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_level_in_one_call_makes_the_same_drafts_bit_for_bit(kind, dtype):
    target = packed(dtype)
    heads = attached(target, kind)
    assert heads.compiled_level is not None
    params = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=0.8, top_p=0.9)]
    for depths in ((4, 0, 0), (4, 2, 3), (0, 3, 4)):  # rows end at different levels
        made = []
        for compiled in (heads.compiled_level, None):
            vars(heads)["compiled_level"] = compiled
            rows = make_rows(params, (1, 2, 3), target.vocab, root_positions=ROOTS, depths=depths, width=3, beam=4)
            made.append(heads.propose(rows))
        vars(heads).pop("compiled_level")
        one, other = made
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.parents.tolist() == other.parents.tolist()
        assert one.chances.tolist() == other.chances.tolist()
        assert one.max_depth == max(depths)


def test_the_call_is_what_runs_the_levels(monkeypatch):
    heads, calls = attached(packed(torch.float32), "mtp"), []
    run = heads.compiled_level._steps.run
    monkeypatch.setattr(heads.compiled_level._steps, "run", lambda *args: calls.append(args[0]) or run(*args))
    heads.propose(make_rows([SamplingParams()] * 3, range(3), 97, root_positions=ROOTS, depths=(3, 0, 0), width=2, beam=2))
    assert calls == [2, 2]


@pytest.mark.parametrize("kind", ["mtp, 3 modules", "mtp-parallel", "hydra++"])
def test_other_drafters_run_their_modules(kind):
    assert getattr(attached(packed(torch.float32), kind), "compiled_level", None) is None


def test_modules_that_are_not_compiled_run_one_by_one():
    assert attached(tiny(), "mtp").compiled_level is None  # float64
