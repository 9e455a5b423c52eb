"""The final part of an answer: the inside of its last <answer> tags or \\boxed{}, the thinking before it left out."""

from __future__ import annotations

import re

_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.IGNORECASE | re.DOTALL)
_THOUGHT = re.compile(r"\A.*</think>", re.IGNORECASE | re.DOTALL)
_UNFINISHED = re.compile(r"<think>.*\Z", re.IGNORECASE | re.DOTALL)
_BOXES = (r"\boxed{", r"\fbox{")
# What LaTeX wraps around words: \text{cat}, \mathrm{cat}, \textbf{cat}.
_WRAPPED = re.compile(r"\\(?:text\w*|math\w+)\s*\{([^{}]*)\}")


def final(text: str) -> str:
    """The answer proper, stripped: in tags (the last that hold something), then in a box inside of them; the whole text
    where there is neither.

    A tag that was never closed (the answer was cut at its longest) counts up to the end; so does a box. Thinking that
    was never closed is no answer.
    """
    if tagged := _TAGGED.findall(text):
        text = next((inside for inside in reversed(tagged) if inside.strip()), "")
    else:
        text = _UNFINISHED.sub("", _THOUGHT.sub("", text))
    inside = boxed(text)
    if inside is not None:
        text = inside
        while (plainer := _WRAPPED.sub(r"\1", text)) != text:
            text = plainer
    return text.strip().strip("$").strip()


def boxed(text: str) -> str | None:
    """The inside of the last box, braces balanced ("\\boxed{\\frac{1}{2}}"), or None where there is no box."""
    start, length = max((text.rfind(box), len(box)) for box in _BOXES)
    if start < 0:
        return None
    depth, begin = 1, start + length
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return text[begin:]
