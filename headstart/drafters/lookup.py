"""Drafting without a model: the tokens that followed earlier occurrences of the text's last tokens. Must not import torch.

Prompt lookup (Saxena 2023) with a suffix automaton (SAM decoding, Hu et al. 2024) in place of a search: the longest suffix that
occurred before is always known, at a cost that does not grow with the text. Chances (acceptance probabilities) come from counts of
how often such tokens were right in this request, drafted or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from headstart.speculation.calibration import Calibration
from headstart.speculation.planner import Best, Planner
from headstart.speculation.rows import Rows
from headstart.speculation.tree import ROOT, Drafts, Kept

if TYPE_CHECKING:
    from headstart.target.cache import Seating
    from headstart.target.target import Target

Match = tuple[int, int]  # the automaton's state after reading a text, and how many of the text's last tokens it matches


class Follower(NamedTuple):
    """A token that followed an earlier occurrence of the text's last tokens.

    token: the token.
    length: how many of the last tokens it followed.
    rank: how many other tokens followed a longer match, or as long a match more recently.
    rivals: how many different tokens followed these `length` tokens, itself included.
    match: of the text with this token appended.
    """

    token: int
    length: int
    rank: int
    rivals: int
    match: Match


class SuffixAutomaton:
    """Every substring of a growing text, with the tokens that followed it (Blumer et al. 1985).

    A state stands for all substrings that end at the same positions. The followers of a state are its transitions: a dict in order
    of recency, the latest last, since a token is moved to the end whenever it follows again. A text of one repeated token has a
    chain of states as long as itself, so only the `_REACH` longest matches are kept in this order and read.
    """

    _REACH = 32

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._followers: list[dict[int, int]] = [{}]  # per state: token -> state
        self._links = [-1]  # per state: the state of its longest suffix that ends at more positions
        self._lengths = [0]  # per state: tokens in its longest substring
        self._last = 0  # the state of the whole text
        for token in tokens:
            self.extend(token)

    def extend(self, token: int) -> None:
        """Append one token. Amortised constant time, and at most `_REACH` steps to keep the order."""
        followers, links = self._followers, self._links
        self.tokens.append(token)
        new = self._add(self._lengths[self._last] + 1, {}, 0)
        state, self._last = self._last, new
        while state >= 0 and token not in followers[state]:
            followers[state][token] = new
            state = links[state]
        if state < 0:
            return
        links[new] = self._ending_here(state, token)
        for _ in range(self._REACH):
            if state < 0:
                return
            followers[state][token] = followers[state].pop(token)
            state = links[state]

    def _ending_here(self, state: int, token: int) -> int:
        """The state of `state`'s longest substring followed by `token`; split from another where longer substrings share that."""
        shared = self._followers[state][token]
        if self._lengths[shared] == self._lengths[state] + 1:
            return shared
        shorter = self._add(self._lengths[state] + 1, dict(self._followers[shared]), self._links[shared])
        self._links[shared] = shorter
        while state >= 0 and self._followers[state].get(token) == shared:
            self._followers[state][token] = shorter
            state = self._links[state]
        return shorter

    def _add(self, length: int, followers: dict[int, int], link: int) -> int:
        self._followers.append(followers)
        self._lengths.append(length)
        self._links.append(link)
        return len(self._lengths) - 1

    @property
    def end(self) -> Match:
        """The match of the text itself: its longest suffix that occurred before."""
        state = max(self._links[self._last], 0)
        return state, self._lengths[state]

    def followers(self, match: Match, count: int) -> list[Follower]:
        """Up to `count` different tokens that followed this match: longest match first, then the latest."""
        state, length = match
        followers: dict[int, Follower] = {}
        for _ in range(self._REACH):
            if state <= 0 or len(followers) == count:
                break
            length = min(length, self._lengths[state])
            transitions = self._followers[state]
            new = (token for token in reversed(transitions) if token not in followers)
            for token in islice(new, count - len(followers)):
                next_match = (transitions[token], length + 1)
                followers[token] = Follower(token, length, len(followers), len(transitions), next_match)
            state = self._links[state]
        return list(followers.values())


# Priors of `Record`, measured on stories, dialogues, answers, documentation and code (docs/log.md). Columns are by length of the
# match: 1, 2, 3, 4-7, 8-15, 16 and more tokens.
_LEVELS = (0, 0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 5)
_PRIORS = (
    (0.32, 0.50, 0.61, 0.65, 0.81, 0.89),  # the only token that ever followed
    (0.19, 0.27, 0.20, 0.28, 0.40, 0.40),  # the later of two
    (0.12, 0.16, 0.14, 0.15, 0.20, 0.20),  # the latest of more
    (0.09, 0.15, 0.15, 0.18, 0.20, 0.20),  # of a higher rank, where those before it were wrong
)


class Record:
    """How often followers of each kind were right in one request, lately: chances by Laplace's rule of succession, with priors.

    `learn` gets every token of the answer, whatever was drafted, so that a drafter that has stopped drafting for a text starts
    again when the text begins to repeat.
    """

    _PRIOR_TRIALS = 4.0
    _DECAY = 0.97  # weight of a trial one trial later: about the last thirty of a kind count

    def __init__(self) -> None:
        self._tried = [[0.0] * len(priors) for priors in _PRIORS]
        self._held = [[0.0] * len(priors) for priors in _PRIORS]

    def chance(self, follower: Follower) -> float:
        """The probability that the next token is this one, given that it is none of a lower rank."""
        kind, column = self.kind(follower)
        held = self._held[kind][column] + self._PRIOR_TRIALS * _PRIORS[kind][column]
        return held / (self._tried[kind][column] + self._PRIOR_TRIALS)

    def learn(self, followers: Iterable[Follower], token: int) -> None:
        """Count the followers of a text, by rank, given the token that came next."""
        for follower in followers:
            kind, column = self.kind(follower)
            is_right = follower.token == token
            self._tried[kind][column] = self._DECAY * self._tried[kind][column] + 1
            self._held[kind][column] = self._DECAY * self._held[kind][column] + is_right
            if is_right:
                return

    @staticmethod
    def kind(follower: Follower) -> tuple[int, int]:
        """Row and column of the tables in which it is counted."""
        kind = 3 if follower.rank else min(follower.rivals, 3) - 1
        return kind, _LEVELS[min(follower.length, 16)]


class _Draft(NamedTuple):
    """A candidate, ordered for a heap: the likeliest first, then the one that was added first."""

    negative_chance: float
    order: int
    token: int
    parent: int
    depth: int
    match: Match


class _Text:
    """The text of one seat, and how often followers were right in it."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.automaton = SuffixAutomaton(tokens)
        self.record = Record()
        self.is_answer = False  # followers in the prompt are not counted: its repetitions say little about the answer's

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens; in an answer, count which followers were right."""
        for token in tokens:
            if self.is_answer:
                self.record.learn(self.automaton.followers(self.automaton.end, 4), token)
            self.automaton.extend(token)

    def grow(self, depth: int, rows: Rows, floor: float) -> list[_Draft]:
        """The likeliest candidates, best first and so parents before children; none with a chance below `floor`."""
        heap: list[_Draft] = []
        candidates: list[_Draft] = []
        expanded = [0] * depth
        self._push_children(heap, _Draft(-1.0, 0, -1, ROOT, 0, self.automaton.end), ROOT, rows.plan.width, floor)
        while heap and len(candidates) < rows.plan.nodes:
            draft = heappop(heap)
            candidates.append(draft)
            if draft.depth < depth and expanded[draft.depth] < rows.plan.beam:
                expanded[draft.depth] += 1
                self._push_children(heap, draft, len(candidates) - 1, rows.plan.width, floor)
        return candidates

    def _push_children(self, heap: list[_Draft], draft: _Draft, index: int, width: int, floor: float) -> None:
        left = -draft.negative_chance  # probability that the draft is kept and no earlier child is
        for follower in self.automaton.followers(draft.match, width):
            chance = left * self.record.chance(follower)
            left -= chance
            if chance >= floor:
                order = index * width + follower.rank
                heappush(heap, _Draft(-chance, order, follower.token, index, draft.depth + 1, follower.match))


class Lookup:
    """Drafts the tokens that followed earlier occurrences of the text's last tokens.

    floor: candidates with a lower chance (acceptance probability) are left out.
    min_gain: a row whose candidates together promise fewer kept tokens is not drafted for; so a text without repetitions costs only
        a few microseconds per token.

    Raises ValueError where `floor` is not in (0, 1) or `min_gain` is negative.
    """

    name = "lookup"
    taps: tuple[int, ...] = ()
    slot_bytes = 0
    planner: Planner = Best(nodes=15, depth=15, width=3, beam=1)
    # On texts that repeat themselves little (docs/log.md): for what is decided before drafting; chances come from the record.
    calibration = Calibration((0.0,), ((1.0,),), (((0.15, 0.03), (0.6, 0.05)),))

    def __init__(self, floor: float = 0.08, min_gain: float = 0.25) -> None:
        if not 0 < floor < 1:
            raise ValueError(f"floor is {floor}; the chance below which a candidate is left out must be in (0, 1)")
        if min_gain < 0:
            raise ValueError(f"min_gain is {min_gain}; the kept tokens that a draft must promise cannot be negative")
        self.floor = floor
        self.min_gain = min_gain
        self._texts: dict[int, _Text] = {}

    def attach(self, target: Target, seating: Seating) -> None:
        """Forget all texts."""
        self._texts = {}

    def extend(self, kept: Kept) -> None:
        """Append the kept tokens to the texts of their seats, without those that these have already."""
        for seat, tokens, start in zip(kept.seats, kept.texts, kept.starts, strict=True):
            text = self._texts.setdefault(seat, _Text())
            num_known = len(text.automaton.tokens) - start
            assert 0 <= num_known <= len(tokens), f"seat {seat} knows {num_known} of {len(tokens)} tokens from {start} on"
            text.extend(tokens[num_known:])

    def propose(self, rows: Rows) -> Drafts:
        """Drafts on the CPU, row after row, for the rows whose candidates promise `min_gain` kept tokens."""
        drafts: list[tuple[int, int, int, int, float]] = []  # token, parent, row, depth, chance
        for row in rows.drafting:
            text = self._texts[rows.seats[row]]
            text.is_answer = True
            candidates = text.grow(rows.depths[row], rows, self.floor)
            if -sum(draft.negative_chance for draft in candidates) < self.min_gain:
                continue
            first = len(drafts)
            for negative_chance, _, token, parent, depth, _ in candidates:
                drafts.append((token, ROOT if parent == ROOT else first + parent, row, depth, -negative_chance))
        if not drafts:
            return Drafts.none()
        tokens, parents, row_ids, depths, chances = zip(*drafts, strict=True)
        return Drafts.of(tokens, parents, row_ids, depths, chances)

    def fork(self, source: int, seat: int, length: int) -> None:
        """Copy the first `length` tokens of one seat's text to another seat, without its counts."""
        self._texts[seat] = _Text(self._texts[source].automaton.tokens[:length])

    def free(self, seat: int) -> None:
        """Forget a seat's text."""
        self._texts.pop(seat, None)
