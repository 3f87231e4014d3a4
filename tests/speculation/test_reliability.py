"""How reliable chances are: counted in bins, the error as published, by drafter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headstart.speculation.calibration import expected_calibration_error
from headstart.speculation.reliability import Compared, Reliability, by_name, count_all

DRAFTS = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=40)


def counted(drafts):
    record = Reliability()
    for chance, is_kept in drafts:
        record.add(chance, is_kept)
    return record


@given(DRAFTS)
def test_the_error_is_the_expected_calibration_error(drafts):
    chances, kept = zip(*drafts, strict=True)
    expected = expected_calibration_error(torch.tensor(chances, dtype=torch.float64), torch.tensor(kept))
    assert counted(drafts).error == pytest.approx(expected)


def test_two_records_add_up_to_the_record_of_all_drafts():
    one, other = [(0.05, True), (1.0, True)], [(0.05, False), (0.55, True)]
    assert counted(one) + counted(other) == counted(one + other)


def test_a_bin_has_its_mean_chance_and_the_share_that_was_kept():
    record = counted([(0.25, True), (0.27, False), (0.9, True)])
    assert record.as_dict()["bins"] == [
        {"chance": pytest.approx(0.26), "kept": 0.5, "count": 2},
        {"chance": pytest.approx(0.9), "kept": 1.0, "count": 1},
    ]
    assert Reliability().as_dict() == {"error": None, "bins": []}


def test_drafts_count_for_their_drafter_and_joined_drafters_also_together():
    records = {}
    count_all(records, [Compared(0, 0.5, True), Compared(1, 0.5, False), Compared(1, 0.7, True)])
    named = by_name(records, ["lookup", "mtp"])
    assert {name: sum(record.counts) for name, record in named.items()} == {"all": 3, "lookup": 1, "mtp": 2}
    assert by_name({0: records[0]}, ["lookup"]) == {"lookup": records[0]}
    assert by_name({}, ["lookup"]) == {}
