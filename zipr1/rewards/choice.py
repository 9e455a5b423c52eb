"""Multiple choice: the letter that an answer settles on, or the letters where several are right."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from zipr1.rewards.final import final

# How far around a letter is looked for what is said of it, in characters.
WINDOW = 60
# Capitals of other scripts that look like ours: where the text has no words of those scripts, and at its end.
_ALIKE = str.maketrans("АВСЕНКМОРТХΑΒΕΗΙΚΜΝΟΡΤΧ", "ABCEHKMOPTXABEHIKMNOPTX")
_OTHER_WORDS = re.compile(r"[\u0370-\u04ff]{2}")
_OTHER_END = re.compile(r"(?<!\w)[\u0391-\u03a9\u0410-\u042f](?=\W*\Z)")
_ROMAN = re.compile(r"\b(?:II|III|IV)\b")

# A letter that is no part of a word, a name or a formula (not of "it's", "C++", "U.S.", "°C", "T-shirt"); or several.
_MENTION = re.compile(
    r"(?<![A-Za-z0-9À-ɏ°])(?<![A-Za-z]')(?<![A-Za-z0-9][.-])([A-Za-z]|[A-J]{2,6})"
    r"(?![A-Za-z0-9À-ɏ+#]|[-.'][A-Za-z0-9])"
)
# Words: "A dog", "A TV", "I think". Letters: "A is", "I because".
_VERB = r"(?:is|was|are|were|because|since|as|and|or|but|seems|looks|matches|fits|shows|has|would|must|can|vs)\b"
_ARTICLE = re.compile(rf" (?!{_VERB})(?:[a-z]|[A-Z]{{2}}|[A-Z]-[a-z])")
_PRONOUN = re.compile(r" (?!(?:is|because|since)\b)[a-z]")
_NO_OPTION = re.compile(r"\b(?:vitamin|hepatitis) $", re.IGNORECASE)
# A small letter is one where this follows, and what comes before speaks of a choice.
_SMALL = re.compile(
    r"\s*(?:[)\].:,;!]|\Z)|[)\]]? (?:is|was|seems|looks|would|must|because|since)\b"
)
_PAIR = re.compile(r" (?:and|or|&) [a-z](?![A-Za-z'])")
_LEADING = re.compile(r"[)\].:,;!>\"']|\s*\Z|\s*\n")
_LABEL = re.compile(r"\)|[.:]\s")

# Between two letters that are said together ("A; B", "(A)(B)"), in the second group as alternatives ("A or B").
_TOGETHER = re.compile(
    r"[)\].\"]* ?(?:([,;/&+]|,? ?\band\b)|(,? ?\bor\b|\bvs\b\.?)) ?[(\[\"]*|[)\]]+ ?[(\[]+",
    re.IGNORECASE,
)
# Behind a letter that begins a clause of its own: "B, C is wrong".
_CLAUSE = re.compile(r"[)\]]? (?:is|was|isn't|wasn't|seems|looks|has|shows|would|does|doesn't)\b")

# Before a letter.
_OF_OPTIONS = r"(?:(?:options?|choices?|letters?|answers?)\b)?[^A-Za-z0-9]{0,6}\Z"
_CHOSEN = re.compile(
    r"(?:\banswers?\b|\b(?:correct|right|best|final|my) (?:option|choice|letter|one)s?\b|答案)(?: ?\([^()]*\))?\W{0,6}"
    r"(?:(?:is|are|was|would be|should be|must be|has to be|be)\b|[:=是为])"
    r"(?: (?:\w+ly|most likely|thus|then|indeed|just|both)\b)?\W{0,6}(?:the )?(?:(?:correct|right|best) )?"
    rf"{_OF_OPTIONS}"
    r"|\b(?:choose|chose|pick|picked|select|selected|go with|going with|went with|settle on|opt for"
    r"|I say|I'd say|I would say)\W{1,6}(?:the )?"
    rf"{_OF_OPTIONS}"
    rf"|\b(?:answer|ans)[^\w,.;?]{{1,6}}(?:(?:option|choice|letter)\b)?[^A-Za-z0-9]{{0,6}}\Z|[选選][择擇]?\W{{0,4}}\Z",
    re.IGNORECASE,
)
_UNCHOSEN = re.compile(
    r"(?:\b(?:not|never|cannot)|n't) (?:(?:to|want|be|going|the|really) ){0,3}\Z|\b(?:wrong|incorrect|false|worst) \Z",
    re.IGNORECASE,
)
_OPTION = re.compile(r"\b(?:option|choice)s?\b[^A-Za-z0-9]{0,6}(?:is\b)?[^A-Za-z0-9]{0,6}\Z", re.I)
_DENIED = re.compile(
    r"(?:\b(?:not|nor|neither|never|cannot|rather than|instead of|except|eliminated?|excluded?|rejected|rules? out"
    r"|ruled out)|n't) (?:(?:the|be|option|choice|answer|letter|necessarily|really) ){0,3}[(\[\"]*\Z",
    re.IGNORECASE,
)
# Behind it.
_IS = r"[)\]]?(?:\s?:|,? (?:is|was|are|were|seems|looks|would be|must be|can be)) (?:(?:\w+ly|also|both|the) ){0,2}"
_WRONG = re.compile(
    rf"{_IS}(?:wrong|incorrect|false|not\b|too\b|impossible|ruled out|eliminated|excluded|out\b|no\b)"
    r"|[)\]]? (?:isn't|wasn't|aren't|cannot|can't|doesn't|does not|won't)\b",
    re.IGNORECASE,
)
_RIGHT = re.compile(rf"{_IS}(?:right|correct|true|best|better|answer|yes)\b", re.IGNORECASE)


class _Said(NamedTuple):
    """letters: one or more, in the order of the alphabet. either: alternatives. start, end: where."""

    letters: str
    either: bool
    start: int
    end: int


def letter(text: str) -> str | None:
    """The chosen letter in upper case, several as "AC" where they are said together, or None where none is settled on.

    Looked for in this order, leaving out what is called wrong: after "answer is", "I choose" and the like (the last
    time), at the start ("B", "(b)", "B. a cat"; but no list of options), what is called right, what is called an
    option, and last a letter that stands alone. Where two differ, or stand as "A or B", nothing is settled.
    """
    text = _prepared(text)
    said = _said(text)
    standing = [one for one in said if not _wrong(text, one)]
    chosen = [one for one in standing if _CHOSEN.search(_before(text, one))]
    if chosen:
        return _one(chosen[-1:])
    if standing and _leads(text, standing[0]):
        first = text[: text.find("\n")] if "\n" in text else text
        listed = {one.letters for one in said if _LABEL.match(text, one.end)}
        if len(listed) < 2 or len(first.strip(" ()[]<>\"'.:,")) == 1:
            return _one(standing[:1])
        return _one([one for one in standing if _RIGHT.match(text, one.end)])
    for test in (
        lambda one: _RIGHT.match(text, one.end),
        lambda one: _OPTION.search(_before(text, one)),
        lambda one: text[one.end : one.end + 1] != "?",
    ):
        if found := [one for one in standing if test(one)]:
            return _one(found)
    return _one(standing)


def choice(prediction: str, reference: str) -> float:
    """1.0 if both settle on the same letter, or on the same letters, else 0.0."""
    heard = letter(prediction)
    return float(heard is not None and heard == letter(reference))


def _prepared(text: str) -> str:
    text = unicodedata.normalize("NFKC", final(text)).replace("’", "'")
    if not _OTHER_WORDS.search(text):
        text = text.translate(_ALIKE)
    else:
        text = _OTHER_END.sub(lambda match: match[0].translate(_ALIKE), text)
    if _ROMAN.search(text):
        text = re.sub(r"\bI\b", " ", text)
    text = re.sub(r"\\[A-Za-z]+", " ", text)
    text = re.sub(r"[*_`${}\\]+|\bN/A\b", " ", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


def _said(text: str) -> list[_Said]:
    """The letters of a text, those that are said together as one."""
    said: list[_Said] = []
    for match in _MENTION.finditer(text):
        one = _Said(match[0].upper(), False, match.start(), match.end())
        near = said and one.start - said[-1].end < WINDOW
        joint = _TOGETHER.fullmatch(text, said[-1].end, one.start) if near else None
        if not _is_letter(text, match[0], one, joint is not None):
            continue
        last = said[-1] if said else one
        apart = joint and not joint[2] and _CLAUSE.match(text, one.end)
        apart = apart or (joint and joint[1] == ";" and _DENIED.search(_before(text, last)))
        if joint and not apart:
            letters = "".join(sorted({*last.letters, *one.letters}))
            said[-1] = _Said(letters, last.either or bool(joint[2]), last.start, one.end)
        else:
            said.append(one)
    return said


def _is_letter(text: str, written: str, one: _Said, joint: bool) -> bool:
    """Whether it is a letter and no word."""
    before = _before(text, one)
    asked = bool(_CHOSEN.search(before) or _OPTION.search(before))
    if _NO_OPTION.search(before):
        return False
    if len(written) > 1:
        # "AC", but no word: in the order of the alphabet, and where a choice is said.
        ordered = "".join(sorted(set(written))) == written
        return ordered and (asked or (not before.strip("([<\"'") and _leads(text, one)))
    if written == "I":
        return not _PRONOUN.match(text, one.end)
    if written == "A":
        return asked or not _ARTICLE.match(text, one.end)
    if written.isupper():
        return True
    if _PAIR.match(text, one.end):  # "a and c"
        return True
    if not _SMALL.match(text, one.end):
        return False
    closed = before[-1:] in "([" and text[one.end : one.end + 1] in (")", "]")
    ends = not text[one.end : one.end + 3].strip(").!\"'") and written not in "ai"
    return asked or joint or closed or ends or not before.strip("([<\"'")


def _before(text: str, one: _Said) -> str:
    return text[max(0, one.start - WINDOW) : one.start]


def _wrong(text: str, one: _Said) -> bool:
    before = _before(text, one)
    if _WRONG.match(text, one.end) or _DENIED.search(before):
        return True
    chosen = _CHOSEN.search(before)
    return bool(chosen and _UNCHOSEN.search(before[: chosen.start()]))


def _leads(text: str, one: _Said) -> bool:
    """Whether it stands at the start, with a mark or the end of the line behind it."""
    start = one.start < WINDOW and not text[: one.start].strip("([<\"' ")
    return start and bool(_LEADING.match(text, one.end))


def _one(said: list[_Said]) -> str | None:
    """What all of them say."""
    letters = {one.letters for one in said}
    return letters.pop() if len(letters) == 1 and not any(one.either for one in said) else None
