"""How a picture or clip is written in a prompt: runs of placeholders, and the text that a family puts among them.

A spelling is a list of text and of numbers: a number is that many placeholders. It takes the place of the one
placeholder that a chat template writes, before the text is tokenised.
"""

from __future__ import annotations

from collections.abc import Callable

from zipr1.models.visual import Visual

Spelling = list[str | int]
Spell = Callable[[Visual], Spelling]


def plain(visual: Visual) -> Spelling:
    """Placeholders alone."""
    return [visual.tokens]


def timed(visual: Visual) -> Spelling:
    """A clip as Qwen3-VL reads it: before each pair of frames the second at which it is shown, and its placeholders
    between the marks of a picture. A picture: placeholders alone."""
    if visual.kind == "image":
        return [visual.tokens]
    each = visual.tokens // len(visual.times)
    out: Spelling = []
    for second in visual.times:
        out += [f"<{second:.1f} seconds><|vision_start|>", each, "<|vision_end|>"]
    return out


def by_rows(visual: Visual) -> Spelling:
    """A picture as SmolVLM reads it: its tiles with the names of their row and column, a line for each row, and the
    whole picture behind them; or that alone."""
    mark = "<fake_token_around_image>"
    rows, columns = visual.tiles
    each = visual.tokens // (rows * columns + 1)
    out: Spelling = []
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            out += [f"{mark}<row_{row}_col_{column}>", each]
        out.append("\n")
    return [*out, "\n" * bool(rows) + f"{mark}<global-img>", each, mark]


def between(before: str, after: str) -> Spell:
    """Placeholders between two marks."""
    return lambda visual: [before, visual.tokens, after]
