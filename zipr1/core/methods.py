"""What lowers the kept share: the terms that `efficiency.method` of a recipe names."""

from __future__ import annotations

import difflib

from zipr1.core.errors import InputError

METHODS: dict[str, str] = {
    "answers": "the efficiency reward multiplies the answer's log-probability (arXiv 2504.18579)",
    "cut": "the reward multiplies the log-probability of the kept counts: a score function",
    "pathwise": "the expected kept share is differentiated through the scores",
    "through": "the losses are, to first order: what a kept token is worth pulls on its score",
}


def parse(method: str) -> frozenset[str]:
    """Names of `METHODS` in a sum such as `cut+pathwise`; InputError for any other name."""
    names = [name.strip() for name in method.split("+")]
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise InputError(
                f"efficiency.method '{method}': no method '{name}'{hint} "
                f"Allowed: {', '.join(METHODS)}, or a sum such as cut+pathwise"
            )
    return frozenset(names)
