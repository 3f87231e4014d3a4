"""The queue before the engines."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.serve.queueing import FairQueue, QueueFull

LANES = ("one", "two")


@dataclass(eq=False)
class FakeJob:
    user: str
    lane: str


def job(user, lane="one"):
    return FakeJob(user, lane)


def take_all(queue, lane="one"):
    taken = []
    while (next_job := queue.take(lane)) is not None:
        taken.append(next_job)
    return taken


def test_users_take_turns_whatever_they_have_queued():
    queue = FairQueue(20, 2)
    queue.put([job("many") for _ in range(5)])
    queue.put([job("few")])
    assert [job.user for job in take_all(queue)] == ["many", "few", "many", "many", "many", "many"]


def test_a_users_own_jobs_keep_their_order():
    queue, jobs = FairQueue(20, 2), [job("me") for _ in range(4)]
    queue.put(jobs)
    assert take_all(queue) == jobs


def test_jobs_beyond_the_bound_are_refused_all_together_and_told_when_to_come_back():
    queue = FairQueue(3, 1)
    queue.put([job("a"), job("a")])
    queue.learn(100.0)
    with pytest.raises(QueueFull, match="2 answers wait already, of at most 3") as error:
        queue.put([job("b"), job("b")])
    assert error.value.retry_after > 10
    assert len(queue) == 2
    queue.put([job("b")])


def test_a_lane_takes_its_own_jobs_only():
    queue = FairQueue(9, 1)
    queue.put([job("a", "two")])
    assert queue.take("one") is None
    assert queue.has_jobs("two")
    assert not queue.has_jobs("one")
    assert len(take_all(queue, "two")) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ptr"), st.sampled_from("abc"), st.sampled_from(LANES)), max_size=60))
def test_whatever_happens_every_job_is_taken_or_removed_once(actions):
    queue, waiting, seen = FairQueue(10, 2), [], []
    for action, user, lane in actions:
        if action == "p" and len(queue) < 10:
            waiting.append(job(user, lane))
            queue.put(waiting[-1:])
        elif action == "t" and (taken := queue.take(lane)) is not None:
            assert taken.lane == lane
            waiting.remove(taken)
            seen.append(taken)
        elif action == "r" and waiting:
            assert queue.remove([waiting[-1], *seen]) == seen
            seen.append(waiting.pop())
        assert len(queue) == len(waiting)
    assert {id(job) for job in queue.clear()} == {id(job) for job in waiting}
    assert len(queue) == 0
