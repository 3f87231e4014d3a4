"""Drafting without a model: what followed the last time these words stood in the prompt or the answer.

Prompt lookup (Saxena 2023) with a suffix automaton (SAM decoding, Hu et al. 2024) in place of a search: the longest suffix that
occurred before is known at any time, in time that does not grow with the text. Chances come from counts: how often such
followers turned out right in this request, whether they were drafted or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from headstart.speculation.planner import Best, Planner
from headstart.speculation.rows import Rows
from headstart.speculation.tree import ROOT, Drafts, Kept

if TYPE_CHECKING:
    from headstart.target.cache import Seating
    from headstart.target.target import Target

Place = tuple[int, int]  # where reading has come to: a state of the automaton, and how many of the last tokens it matches


class Follower(NamedTuple):
    """A token that came after the last `length` tokens before.

    rank: how many others came after as many or more, more recently. rivals: how many different tokens came after these
    `length`. place: where reading goes on after it.
    """

    token: int
    length: int
    rank: int
    rivals: int
    place: Place


class SuffixAutomaton:
    """Every substring of a growing text, with the tokens that followed it, the latest last (Blumer et al. 1985).

    A state stands for all substrings that end at the same places. `followers` of a state are its transitions: a dict, kept in
    order of recency by putting a token back at its end whenever it follows again. A text of one token over and over has a
    chain of states as long as itself; only the `_REACH` longest matches are kept in order and looked at.
    """

    _REACH = 32

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._followers: list[dict[int, int]] = [{}]  # per state: token -> state
        self._links = [-1]  # per state: that of its longest suffix which ends at more places
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
        """The state of `state`'s longest substring and `token`; split off where it shared one with longer substrings."""
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
    def end(self) -> Place:
        """The longest suffix of the text that occurred before."""
        state = max(self._links[self._last], 0)
        return state, self._lengths[state]

    def followers(self, place: Place, count: int) -> list[Follower]:
        """Up to `count` different tokens that came after this place before: longest match first, then the latest."""
        state, length = place
        found: dict[int, Follower] = {}
        for _ in range(self._REACH):
            if state <= 0 or len(found) == count:
                break
            length = min(length, self._lengths[state])
            after = self._followers[state]
            new = (token for token in reversed(after) if token not in found)
            for token in islice(new, count - len(found)):
                found[token] = Follower(token, length, len(found), len(after), (after[token], length + 1))
            state = self._links[state]
        return list(found.values())


# Priors of `Record`, measured on stories, dialogues, answers, documentation and code (docs/log.md); tables are by length of the
# match: 1, 2, 3, 4-7, 8-15, 16 and more tokens.
_LEVELS = (0, 0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 5)
_PRIORS = (
    (0.32, 0.50, 0.61, 0.65, 0.81, 0.89),  # the only token that ever followed
    (0.19, 0.27, 0.20, 0.28, 0.40, 0.40),  # the later of two
    (0.12, 0.16, 0.14, 0.15, 0.20, 0.20),  # the latest of more
    (0.09, 0.15, 0.15, 0.18, 0.20, 0.20),  # a next best, if those before it were wrong
)


class Record:
    """How followers of each kind fared in one request, lately: chances by Laplace's rule of succession, with priors.

    `learn` is told of every token of the answer, whatever was drafted, so that a drafter that has fallen silent still notices
    when the text begins to repeat.
    """

    _PRIOR_TRIALS = 4.0
    _MEMORY = 0.97  # what a trial still counts one trial later: about the last thirty of a kind matter

    def __init__(self) -> None:
        self._tried = [[0.0] * len(line) for line in _PRIORS]
        self._held = [[0.0] * len(line) for line in _PRIORS]

    def chance(self, follower: Follower) -> float:
        """The chance that the next token is this one, given that it is none of a lower rank."""
        kind, level = self.kind(follower)
        held = self._held[kind][level] + self._PRIOR_TRIALS * _PRIORS[kind][level]
        return held / (self._tried[kind][level] + self._PRIOR_TRIALS)

    def learn(self, followers: Iterable[Follower], token: int) -> None:
        """`followers` of a place, by rank, and the token that really came."""
        for follower in followers:
            kind, level = self.kind(follower)
            is_right = follower.token == token
            self._tried[kind][level] = self._MEMORY * self._tried[kind][level] + 1
            self._held[kind][level] = self._MEMORY * self._held[kind][level] + is_right
            if is_right:
                return

    @staticmethod
    def kind(follower: Follower) -> tuple[int, int]:
        """Where its trials are counted: which line of the table, which column."""
        kind = 3 if follower.rank else min(follower.rivals, 3) - 1
        return kind, _LEVELS[min(follower.length, 16)]


class _Draft(NamedTuple):
    """A candidate, in the order of a heap: the most promising first, then the first found."""

    doubt: float  # minus the chance
    number: int
    token: int
    parent: int
    depth: int
    place: Place


class _Text:
    """What is known of one seat: its text and how guesses fared in it."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.automaton = SuffixAutomaton(tokens)
        self.record = Record()
        self.is_answer = False  # a prompt teaches words, but its repetitions say little about the answer's

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if self.is_answer:
                self.record.learn(self.automaton.followers(self.automaton.end, 4), token)
            self.automaton.extend(token)

    def grow(self, depth: int, rows: Rows, floor: float) -> list[_Draft]:
        """The most promising candidates, best first, hence parents before children; none below `floor`."""
        heap: list[_Draft] = []
        grown: list[_Draft] = []
        expanded = [0] * depth
        self._push_children(heap, _Draft(-1.0, 0, -1, ROOT, 0, self.automaton.end), ROOT, rows.plan.width, floor)
        while heap and len(grown) < rows.plan.nodes:
            draft = heappop(heap)
            grown.append(draft)
            if draft.depth < depth and expanded[draft.depth] < rows.plan.beam:
                expanded[draft.depth] += 1
                self._push_children(heap, draft, len(grown) - 1, rows.plan.width, floor)
        return grown

    def _push_children(self, heap: list[_Draft], draft: _Draft, number: int, width: int, floor: float) -> None:
        left = -draft.doubt  # the chance that the draft is kept and no earlier child is
        for follower in self.automaton.followers(draft.place, width):
            chance = left * self.record.chance(follower)
            left -= chance
            if chance >= floor:
                order = number * width + follower.rank
                heappush(heap, _Draft(-chance, order, follower.token, number, draft.depth + 1, follower.place))


class Lookup:
    """Drafts what followed before.

    floor: candidates less likely than that are left out. min_gain: a row whose candidates together promise fewer kept tokens is
    not drafted for; so a text without repetition costs a few microseconds per token and nothing else.
    """

    name = "lookup"
    taps: tuple[int, ...] = ()
    slot_bytes = 0
    planner: Planner = Best(nodes=15, depth=15, width=3, beam=1)

    def __init__(self, floor: float = 0.08, min_gain: float = 0.25) -> None:
        if not 0 < floor < 1:
            raise ValueError(f"floor is {floor}; the chance below which a candidate is left out must be in (0, 1)")
        if min_gain < 0:
            raise ValueError(f"min_gain is {min_gain}; the kept tokens that a draft must promise cannot be negative")
        self.floor = floor
        self.min_gain = min_gain
        self._texts: dict[int, _Text] = {}

    def attach(self, target: Target, seating: Seating) -> None:
        self._texts = {}

    def extend(self, kept: Kept) -> None:
        for seat, tokens, start in zip(kept.seats, kept.texts, kept.starts, strict=True):
            text = self._texts.setdefault(seat, _Text())
            num_known = len(text.automaton.tokens) - start
            assert 0 <= num_known <= len(tokens), f"seat {seat} knows {num_known} of {len(tokens)} tokens from {start} on"
            text.extend(tokens[num_known:])

    def propose(self, rows: Rows) -> Drafts:
        drafts: list[tuple[int, int, int, int, float]] = []  # token, parent, row, depth, chance
        for row in rows.drafting:
            text = self._texts[rows.seats[row]]
            text.is_answer = True
            grown = text.grow(rows.depths[row], rows, self.floor)
            if -sum(draft.doubt for draft in grown) < self.min_gain:
                continue
            first = len(drafts)
            for doubt, _, token, parent, level, _ in grown:
                drafts.append((token, ROOT if parent == ROOT else first + parent, row, level, -doubt))
        if not drafts:
            return Drafts.none()
        tokens, parents, row_ids, depths, chances = zip(*drafts, strict=True)
        return Drafts.of(tokens, parents, row_ids, depths, chances)

    def fork(self, source: int, seat: int, length: int) -> None:
        self._texts[seat] = _Text(self._texts[source].automaton.tokens[:length])

    def free(self, seat: int) -> None:
        self._texts.pop(seat, None)
