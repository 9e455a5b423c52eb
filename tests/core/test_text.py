"""Text for people: one line, whatever came."""

import pytest

from zipr1.core.text import duration, mib, one_line, reason, size


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (725, "12 min 5 s"), (11_220, "3 h 7 min")]
)  # fmt: skip
def test_duration(seconds, expected):
    assert duration(seconds) == expected


def test_the_reason_of_an_error_is_one_short_line():
    assert reason(ValueError("no  such\n\tfile")) == "no such file"
    assert reason(ValueError("x" * 300)) == "x" * 200 and reason(ValueError("abc"), 2) == "ab"
    assert one_line(" a\nb ") == "a b" and len(one_line("x" * 300)) == 300


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (100 * 2**20, "100 MiB"), (2**40, "1,024 GiB")],
)  # fmt: skip
def test_size(count, expected):
    assert size(count) == expected
    assert mib(1234.5 * 2**20) == "1,234.5"
