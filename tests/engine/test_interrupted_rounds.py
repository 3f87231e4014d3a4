"""A round counts as a whole or not at all: interrupted at any statement, the next round starts from the state before it."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from heads import heads_for
from scripted import AsDrafted, Scripted, asks, check_empty, decode, random_trees, texts
from tiny import VOCAB, cut, tiny

import headstart
from headstart.drafters.draft_model import ModelDrafter
from headstart.drafters.lookup import Lookup
from headstart.engine.engine import Engine
from headstart.engine.savepoint import Savepoint
from headstart.engine.scheduler import Request
from headstart.engine.state import EngineState
from headstart.speculation.params import SamplingParams
from headstart.speculation.planner import Best
from headstart.speculation.tree import Kept
from headstart.text.text_stream import Piece

PACKAGE = str(Path(headstart.__file__).parent)
CHUNK = 6

Statement = tuple[str, int]  # a file of the package, and a line


class Interruption(BaseException):
    """Raised as by a signal handler: not an `Exception`."""


@dataclass
class Interrupter:
    """Raises `Interruption` once, at the first statement for which `chooses` is true, within its `with` block."""

    chooses: Callable[[Statement], bool]
    interrupted_at: Statement | None = None

    def __enter__(self) -> "Interrupter":
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        # A thread gives up the engine in a `finally` block, between whose statements no signal handler runs.
        is_ours = name.startswith(PACKAGE) and not name.endswith("exclusive.py")
        return self._line if is_ours else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        statement = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and self.interrupted_at is None and self.chooses(statement):
            self.interrupted_at = statement
            raise Interruption(statement)
        return self._line


@cache
def target():
    return tiny("gpt2")  # in fp64 throughout: other models round to fp32 in their norms


@cache
def requests():
    """Prompts of several chunks and of one token, penalties, log-probabilities, and an answer of one token."""
    made = asks(VOCAB, [14, 1, 9, 5, 20, 3], [14, 11, 1, 12, 9, 10], SamplingParams(temperature=1.0, logprobs=2))
    made[0] = replace(made[0], params=replace(made[0].params, repetition_penalty=1.3, presence_penalty=0.5))
    return tuple(made)


@cache
def plain():
    return decode(target(), requests())[0]


def scripted():
    """A drafter whose trees depend on the text alone, so that a round that is repeated has the same trees."""

    def script(coming, limit):
        return random_trees(VOCAB, 10, seed=len(coming), skill=0.8)(coming, limit)

    return Scripted(script, texts(requests(), plain()))


def engine_with(kind: str) -> Engine:
    drafters = {
        "none": lambda: None,
        "lookup": lambda: Lookup(floor=0.01, min_gain=0.0),
        "scripted": scripted,
        "model": lambda: ModelDrafter(cut(target().model, 2)),
    }
    drafter = drafters[kind]() if kind in drafters else heads_for(target(), kind)
    planner = AsDrafted(10, 5) if kind == "scripted" else Best(nodes=6, depth=3, width=2, beam=2)
    return Engine(target(), drafter, planner if drafter else None, max_rows=3, chunk=CHUNK)


def queued(engine: Engine) -> list[Any]:
    """The requests, and one that forks from the first."""
    running = [engine.add(ask.prompt, ask.params) for ask in requests()]
    first = requests()[0]
    return [*running, engine.add(first.prompt, first.params, leader=running[0])]


def results(requests: list[Any]) -> list[Any]:
    """All that a caller gets of the requests."""
    return [(r.output, r.guessed, r.finish_reason, r.logprobs, r.stats.rounds, r.stats.tried, r.stats.held) for r in requests]


def check_between_rounds(engine: Engine) -> None:
    engine.seating.check()
    for request in engine.scheduler.running:
        assert engine.cache.lengths[request.seat] == request.scored
    assert all(request.seat is None and request.scored == 0 for request in engine.scheduler.waiting)
    assert sorted(engine.seating.taken) == sorted(request.seat for request in engine.scheduler.running)


def undisturbed(kind: str) -> list[Any]:
    engine = engine_with(kind)
    running = queued(engine)
    while not engine.is_idle:
        engine.step()
    assert [request.output for request in running[:-1]] == plain()
    assert kind in ("none", "lookup") or engine.stats.tau > 1.2, "too little is kept for a test of kept drafts"
    return results(running)


def disturbed(kind: str, chooses: Callable[[Statement], bool]) -> tuple[list[Any], int]:
    """As `undisturbed`, but every round is interrupted once and then repeated. Also returns how many were interrupted."""
    engine = engine_with(kind)
    running, count = queued(engine), 0
    while not engine.is_idle:
        interrupter = Interrupter(chooses)
        try:
            with interrupter:
                engine.step()
        except Interruption:
            count += 1
        check_between_rounds(engine)
        if interrupter.interrupted_at is not None:
            engine.step()
            check_between_rounds(engine)
    check_empty(engine)
    assert all(request.drafts for request in running), "the drafter was given up"
    return results(running), count


def check_same(kind: str, actual: list[Any], expected: list[Any]) -> None:
    for one, other in zip(actual, expected, strict=True):
        if kind == "lookup":  # the chances that it had learned are lost with its text
            one, other = (one[0], one[2], one[3]), (other[0], other[2], other[3])
            assert one[:2] == other[:2]
            logprobs = [line[0] for line in one[2]], [line[0] for line in other[2]]
            assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-12)
        else:
            assert one == other  # to the bit: the same rounds, hence the same forwards


def interrupt_everywhere(kind: str, is_included: Callable[[str], bool], most: int = 50) -> int:
    """Run the requests repeatedly, each time with other statements interrupted, until none is left. Returns their number."""
    expected = undisturbed(kind)
    done: set[Statement] = set()

    def chooses(statement: Statement) -> bool:
        if statement in done or not is_included(statement[0]):
            return False
        done.add(statement)
        return True

    for _ in range(most):
        actual, count = disturbed(kind, chooses)
        check_same(kind, actual, expected)
        if not count:
            return len(done)
    raise AssertionError(f"{len(done)} statements were interrupted, and more are left")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "lookup", "eagle3"])
def test_a_round_that_fails_at_any_statement_leaves_all_answers_equal(kind):
    assert interrupt_everywhere(kind, lambda name: True) > 300


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "medusa", "hydra++", "mtp, 3 modules", "mtp-parallel", "eagle"])
def test_a_round_that_fails_at_any_statement_of_the_drafter_leaves_all_answers_equal(kind):
    stateless = ("grow.py", "llama_layer.py", "__init__.py")
    assert interrupt_everywhere(kind, lambda name: "/drafters/" in name and not name.endswith(stateless)) > 20


@pytest.mark.parametrize("kind", ["none", "scripted", "lookup", "model", "mtp", "eagle3"])
def test_rounds_that_fail_anywhere_leave_all_answers_equal(kind):
    """Random statements, at any of the times that they run."""
    rng = random.Random(5)
    left = [rng.randrange(800)]

    def chooses(statement: Statement) -> bool:
        left[0] -= 1
        if left[0] > 0:
            return False
        left[0] = rng.randrange(2500)
        return True

    actual, count = disturbed(kind, chooses)
    check_same(kind, actual, undisturbed(kind))
    assert count > 10


# -- errors of drafters and text streams ------------------------------------------------------------------------------------


class FailingDrafter(Lookup):
    """Learns a part of what it is told, then runs out of memory, in those calls of `extend` for which `fails` is true."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__(floor=0.01, min_gain=0.0)
        self.fails, self.num_calls = fails, 0

    def extend(self, kept: Kept) -> None:
        self.num_calls += 1
        if self.fails(self.num_calls):
            half = replace(kept, texts=tuple(text[: 1 + len(text) // 2] for text in kept.texts))
            super().extend(half)
            raise MemoryError("no memory for the text")
        super().extend(kept)


class FailingReader(FailingDrafter):
    """As `FailingDrafter`, with taps: features (tapped hidden states) are not computed again, so no text can be told again."""

    taps = (-1,)


FAILURES = [(lambda call: call in (5, 30), True), (lambda call: call > 9, False)]


@pytest.mark.parametrize("kind", [FailingDrafter, FailingReader])
@pytest.mark.parametrize(("fails", "recovers"), FAILURES, ids=["at times", "for good"])
def test_a_drafter_that_fails_halfway_changes_no_answer(kind, fails, recovers):
    engine = Engine(target(), kind(fails), max_rows=3, chunk=CHUNK)
    running, errors = queued(engine), 0
    while not engine.is_idle:
        try:
            engine.step()
        except MemoryError:
            errors += 1
        check_between_rounds(engine)
    check_empty(engine)
    assert [request.output for request in running[:-1]] == plain()
    assert errors
    assert recovers == running[-1].drafts, "it drafts again, or it was given up"
    if kind is FailingDrafter:
        assert recovers == all(request.drafts for request in running)


class BrokenStream:
    """A text stream that fails at a token."""

    def __init__(self, after: int) -> None:
        self.left = after

    def copy(self):
        return BrokenStream(self.left)

    def push(self, token_ids):
        self.left -= len(token_ids)
        if self.left <= 0:
            raise LookupError("there is no text for this token")
        return Piece("x" * len(token_ids), len(token_ids))

    def flush(self):
        return Piece("", 0)


def test_a_text_stream_that_fails_ends_its_own_request_only():
    engine = Engine(target(), scripted(), AsDrafted(10, 5), max_rows=3, chunk=CHUNK)
    broken = engine.add([1, 2, 3], SamplingParams(max_tokens=9, temperature=1.0, seed=3), stream=BrokenStream(4))
    running, errors = queued(engine), []
    while not engine.is_idle:
        try:
            engine.step()
        except LookupError as error:
            errors.append(str(error))
    check_empty(engine)
    assert errors == ["there is no text for this token"]
    assert (broken.finish_reason, len(broken.output) < 4) == ("error", True)
    assert [request.output for request in running[:-1]] == plain()
    assert {request.finish_reason for request in running} == {"length"}


def test_an_interrupted_abort_is_completed_later():
    """A second Ctrl-C, while the requests of an interrupted answer are being ended."""
    done: set[Statement] = set()

    def chooses(statement: Statement) -> bool:
        is_new = statement not in done
        done.add(statement)
        return is_new

    for _ in range(200):
        engine = Engine(target(), Lookup(), max_rows=2)
        first, second = (engine.add(ask.prompt, ask.params) for ask in requests()[1:3])
        engine.step()
        interrupter = Interrupter(chooses)
        try:
            with interrupter:
                engine.abort(first)
        except Interruption:
            pass
        while not engine.is_idle:
            engine.step()
        check_empty(engine)
        assert second.output == plain()[2]
        if interrupter.interrupted_at is None:
            break
    assert len(done) > 20
    assert first.finish_reason == "abort"


def test_an_interrupted_abort_deep_in_the_queue_leaves_the_queue_as_it_was(monkeypatch):
    engine = Engine(target(), None, max_rows=2)
    made = [engine.add([1, 2], SamplingParams(max_tokens=3)) for _ in range(9)]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(EngineState, "_count", raise_interruption)
        with pytest.raises(Interruption):
            engine.abort(made[6])
    engine.state.finish_interrupted()
    assert (list(engine.scheduler.waiting), made[6].finish_reason) == (made[2:], None)
    list(engine.run())
    check_empty(engine)
    assert [request.finish_reason for request in made] == ["length"] * 6 + ["abort"] + ["length"] * 2


def raise_interruption(state: EngineState) -> None:
    raise Interruption


@dataclass
class Counted:
    """Counts the steps of iterations over a queue."""

    waiting: deque[Request]
    num_read: int = 0

    def __len__(self) -> int:
        return len(self.waiting)

    def __iter__(self) -> Iterator[Request]:
        for request in self.waiting:
            self.num_read += 1
            yield request


@pytest.mark.parametrize("length", [10, 1000])
def test_a_savepoint_of_a_round_reads_no_more_of_the_queue_than_there_are_seats(length):
    engine = Engine(target(), None, max_rows=2)
    for _ in range(length):
        engine.add([1, 2], SamplingParams(max_tokens=3))
    counted = Counted(engine.scheduler.waiting)
    engine.scheduler.waiting = counted
    savepoint = Savepoint(engine.scheduler, engine.cache, engine.state.prefixes)
    assert (counted.num_read, len(savepoint.requests)) == (2, 2)
