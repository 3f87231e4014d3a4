"""Every test of training begins without an accelerator."""

import pytest


@pytest.fixture(autouse=True)
def _one_accelerator(one_accelerator_at_a_time):
    return
