"""Every test of training starts without an accelerator of another test."""

import pytest


@pytest.fixture(autouse=True)
def _one_accelerator(one_accelerator_at_a_time):
    return
