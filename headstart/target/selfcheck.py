"""Does a model that is scored as a forest say what it says of its own accord? Asked once, when it is loaded.

Nothing may pass from token to token but by its attention, and nothing backwards. Then a tree is compared with the sequential
text, by the attention the model came with, and two rows together with each alone, one of them beyond a sliding window. In half
precision the measure is the model's own noise: what becomes of its logits when every embedding is off by one rounding. This
file knows the question. It refuses to know how a forest is scored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.speculation.tree import Drafts, merge
from headstart.target.attention import Probe
from headstart.target.cache import Seating

if TYPE_CHECKING:
    from headstart.target.target import Target

MAX_CHECK = 600  # tokens; a longer window is not run into at load
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}  # of the largest difference, in standard deviations of the logits
NOISES = 3.0  # in half precision: a tree differs by less than 2 times the noise, and mostly by more than 15 if something is wrong
FEW_NOISES = 0.3  # where the same numbers are added in the same order, and only experts' batches differ
MOST = 0.25  # standard deviations; no noise allows more
ATTEMPTS = 3  # in half precision, where a near-tie of experts can turn into another answer by itself
BEFORE = 8  # tokens before the branches that must not change with them


def self_check(target: Target) -> None:
    """Raises ValueError, naming the model and the reason, where the model cannot be served exactly."""
    windows = [limit for window in target.windows for limit in (window.sliding, window.chunk) if limit is not None]
    beyond = min((limit + 5 for limit in windows), default=24)
    length = min(beyond if beyond <= MAX_CHECK else 24, target.context - 8)
    if length < 4:
        return
    if mixers := _convolutions(target):
        _refuse(target, _beside_attention(mixers))
    attempts = 1 if target.dtype in TOLERANCE else ATTEMPTS
    complaints = (_complaint(target, length, seed) for seed in range(attempts))
    if all(complaint is not None and (last := complaint) for complaint in complaints):
        _refuse(target, last)


def _refuse(target: Target, why: str) -> None:
    target.release()
    raise ValueError(f"{target.name} ({type(target.model).__name__}) cannot be a target: {why}")


def _complaint(target: Target, length: int, seed: int) -> str | None:
    """What is wrong with a model, found by texts of up to `length` tokens that are drawn from a seed; None if nothing is."""
    texts, branches = _draw(target, (length, max(3, length // 2)), seed)
    own = [_own_logits(target, text, branches) for text in texts]
    noise = None if target.dtype in TOLERANCE else _noise(target, texts[1], branches[0], own[1][0])
    few = TOLERANCE[target.dtype] if noise is None else FEW_NOISES * noise
    many = TOLERANCE[target.dtype] if noise is None else min(NOISES * noise, MOST)
    if not _gap(*_neighbours_changed(target, seed)) <= few:
        return _beside_attention(_mixers(target, seed))
    if not _gap(*_turned(target, seed)) <= few:
        return "it counts the places of tokens by itself and not by position_ids, and in a tree these differ"
    before = [[logits[:-3] for logits in both] for both in own]
    if not max(float(_gaps(*both).median()) for both in before) <= few:
        return "its attention sees later tokens too: what it says of a text changes with the tokens that follow"
    for rows in ([0, 1], [0], [1]):
        found = _tree_logits(target, [texts[row] for row in rows], branches)
        for row, logits in zip(rows, found, strict=True):
            gap = _gap(torch.cat([own[row][0][-3:], own[row][1][-2:]]), logits)
            if not gap <= many:
                what = "two rows together" if len(rows) > 1 else "a tree"
                return (
                    f"{what} scored at once differs from the sequential text by {gap:.2g} standard deviations of its logits "
                    f"(allowed: {many:.2g})"
                )
    return None


def _beside_attention(mixers: list[str]) -> str:
    who = ", ".join(mixers) or "some module"
    return (
        f"beside its attention, {who} carries a state from token to token (recurrent or convolutional), which a tree cannot share"
    )


def holds_to_the_bit(target: Target) -> bool:
    """Whether logits have the same bits in a crowd of trees and one token at a time: the whole model, with its kernels.

    Two rows, their prompts read at once, with a tree behind each; then each row alone, its prompt cut elsewhere, one branch.
    """
    length = min(24, target.context - 8)
    if length < 4:
        return True
    texts, branches = _draw(target, (length, max(3, length // 2)), 0)
    crowd = _tree_logits(target, texts, branches)
    for text, branch, found, nodes in zip(texts, branches, crowd, ([0, 1, 2], [0, 3, 4]), strict=True):
        if not torch.equal(found[nodes], _one_by_one(target, text, branch)):
            return False
    return True


def _draw(target: Target, sizes: tuple[int, ...], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Random texts of these sizes, and two branches of two tokens to hang on each."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[list[int]] = [torch.randint(0, target.vocab, (size,), generator=generator).tolist() for size in sizes]
    branches: list[list[int]] = torch.randint(0, target.vocab, (2, 2), generator=generator).tolist()
    branches[1][0] = (branches[0][0] + 1) % target.vocab  # siblings are distinct
    return texts, branches


def _one_by_one(target: Target, text: list[int], branch: list[int]) -> Tensor:
    """[1 + branch, vocab]: the prompt in two parts, then root and branch, one node a forward."""
    seating = Seating(1, len(text) + len(branch) + 1)
    cache, seats = target.new_cache(seating), [seating.take(seating.num_slots) or 0]
    lines: list[Tensor] = []
    cut = (len(text) - 1) // 3
    for stem in (text[:cut], text[cut:-1], text[-1:], *([token] for token in branch)):
        if stem:
            forest = merge([stem], [cache.lengths[seats[0]]], [True], Drafts.none(target.device), target.min_nodes)
            lines.append(target.score(forest, cache, seats).logits[:1])
            cache.commit(seats, forest.stems, [()])
    return torch.cat(lines[-1 - len(branch) :])


def _own_logits(target: Target, text: list[int], branches: list[list[int]]) -> list[Tensor]:
    """Of each branch behind the text, [before + 1 + 2, vocab] by the model's own attention: up to `BEFORE` tokens before the root,
    root, and the branch's two nodes."""
    first = max(0, len(text) - 1 - BEFORE)
    with target.original() as model:
        return [
            model(input_ids=torch.tensor([text + branch], device=target.device), use_cache=False).logits[0, first:]
            for branch in branches
        ]


def _noise(target: Target, text: list[int], branch: list[int], expected: Tensor) -> float:
    """What a rounding of every embedding makes of the model's own logits, in standard deviations: the middle one of its nodes."""
    generator = torch.Generator().manual_seed(0)
    step = torch.finfo(target.dtype).eps

    def off_by_one(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        signs = torch.randint(0, 2, out.shape, generator=generator) * 2 - 1
        return out * (1 + step * signs.to(out))

    hook = target.model.get_input_embeddings().register_forward_hook(off_by_one)
    try:
        (found,) = _own_logits(target, text, [branch])
    finally:
        hook.remove()
    return max(step, float(_gaps(expected, found).median()))


def _gaps(expected: Tensor, found: Tensor) -> Tensor:
    """[nodes]: the root of the mean square of each node's differences, in standard deviations of the expected logits."""
    expected = expected.double()
    return (expected - found.double()).square().mean(-1).sqrt() / expected.std()


def _gap(expected: Tensor, found: Tensor) -> float:
    """The largest difference; in half precision, where single ones are chance, that of the worst node."""
    if expected.dtype in TOLERANCE:
        return float((expected.double() - found.double()).abs().max() / expected.double().std())
    return float(_gaps(expected, found).max())


# -- what passes beside the attention ---------------------------------------------------------------------------------------


def _convolutions(target: Target) -> list[str]:
    """The kinds of modules that take part in a text and own a convolution along it, whatever its weights are."""
    owners = [
        module
        for module in target.model.modules()
        if any(isinstance(child, nn.Conv1d) and child.kernel_size[0] > 1 for child in module.children())
    ]
    ran: list[str] = []
    hooks = [module.register_forward_hook(lambda module, _args, _out: ran.append(type(module).__name__)) for module in owners]
    try:
        target.examined([0, 1] * (BEFORE // 2), Probe())
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(set(ran))


def _neighbours(target: Target, seed: int) -> tuple[list[int], list[int]]:
    """Two texts with the same first and last token."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randint(0, target.vocab, (2, BEFORE), generator=generator).tolist()
    return one, [one[0], *other[1:-1], one[-1]]


def _neighbours_changed(target: Target, seed: int) -> tuple[Tensor, Tensor]:
    """[2, vocab] each: first and last token of two such texts, of which every token attends to itself only."""
    one, other = (target.examined(text, Probe(alone=True))[:: BEFORE - 1] for text in _neighbours(target, seed))
    return one, other


def _turned(target: Target, seed: int) -> tuple[Tensor, Tensor]:
    """[tokens, vocab] each: a text whose tokens attend to themselves only, and the same with its last token and position first."""
    text, _ = _neighbours(target, seed)
    forwards = target.examined(text, Probe(alone=True))
    backwards = target.examined(text[::-1], Probe(alone=True), list(range(len(text)))[::-1])
    return forwards, backwards.flip(0)


def _mixers(target: Target, seed: int) -> list[str]:
    """The first module whose first or last token comes out changed where both came in the same; empty where none is that clear."""
    records = [_records(target, text) for text in _neighbours(target, seed)]
    for (name, given, made), (_, other_given, other_made) in zip(*records, strict=True):
        if given and _alike(given, other_given) and not _alike(made, other_made):
            return [name]
    return []


def _records(target: Target, text: list[int]) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """Of every module, in the order in which they end: its kind, and the first and last token of what came in and out."""
    records: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def ends(values: Any) -> list[Tensor]:
        tensors = [value for value in values if isinstance(value, Tensor) and value.ndim > 2 and value.shape[1] == len(text)]
        return [value[0, :: len(text) - 1] for value in tensors]

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        made = out if isinstance(out, tuple | list) else (out,)
        records.append((type(module).__name__, ends([*args, *kwargs.values()]), ends(made)))

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in target.model.modules()]
    try:
        target.examined(text, Probe(alone=True))
    finally:
        for hook in hooks:
            hook.remove()
    return records


def _alike(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


# -- a forest ---------------------------------------------------------------------------------------------------------------


def _tree_logits(target: Target, texts: list[list[int]], branches: list[list[int]]) -> list[Tensor]:
    """The same nodes by two forwards of forests: the prompts without their roots, then roots and both branches at once."""
    capacity = max(map(len, texts)) + 8
    seating = Seating(len(texts), capacity * len(texts))
    cache = target.new_cache(seating)
    seats = [seating.take(capacity) or 0 for _ in texts]
    prompts = merge(
        [text[:-1] for text in texts], [0] * len(texts), [False] * len(texts), Drafts.none(target.device), target.min_nodes
    )
    target.score(prompts, cache, seats)
    cache.commit(seats, prompts.stems, [()] * len(texts))
    tokens = [token for branch in branches for token in branch]
    rows = [row for row in range(len(texts)) for _ in tokens]
    parents = [parent + 4 * row if parent >= 0 else parent for row in range(len(texts)) for parent in (-1, 0, -1, 2)]
    drafts = Drafts.of(tokens * len(texts), parents, rows, [1, 2, 1, 2] * len(texts), [1.0] * len(rows), device=target.device)
    forest = merge([text[-1:] for text in texts], [len(text) - 1 for text in texts], [True] * len(texts), drafts, target.min_nodes)
    return list(target.score(forest, cache, seats).logits[: 5 * len(texts)].split(5))
