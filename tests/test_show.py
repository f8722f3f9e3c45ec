"""What people see of results."""

import pytest

from miaobi import show


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1.0 min"), (1598, "26.6 min"), (3600, "1.0 h")]
)
def test_times_are_in_units_that_suit_them(seconds: float, shown: str):
    assert show.duration(seconds) == shown
