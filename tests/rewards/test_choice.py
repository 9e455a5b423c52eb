"""`choice` on awkward answers: what a careful marker would say that each settles on."""

from __future__ import annotations

import pytest

from zipr1.rewards.choice import choice, letter

# What is said -> the letter, the letters, or None where nothing is settled.
CASES = {
    # The pronoun is no option.
    "I'd go with B": "B",
    "I'm sure it's B": "B",
    "I\u2019d pick C": "C",
    "I think C": "C",
    "I would say D": "D",
    "I": "I",
    "The answer is I.": "I",
    "It is I": "I",
    # Options are gone through, then one is chosen.
    "A: wrong. B: right. The answer is B": "B",
    "A: wrong. B: right.": "B",
    "A, B, C and D are options; the answer is C": "C",
    "Option A is wrong; option B is right": "B",
    "option B is wrong; option C is right": "C",
    "A is wrong, B is wrong, so C": "C",
    "A is incorrect because it is too small. B is correct.": "B",
    "A isn't it. B is too small. It must be C.": "C",
    "Looking at A, it is red. The answer is D because it is blue.": "D",
    "Both A and C look alike, but the answer is C": "C",
    "(A) is false, (B) is false, (C) is true": "C",
    "The answer is B. The answer is C.": "C",  # the last word counts
    "The answer is A. Wait, no. The answer is D.": "D",
    "B? No, C": "C",
    "If the answer is A, the cat is red. It is not. So the answer is B.": "B",
    # What is denied is not chosen.
    "answer B is incorrect": None,
    "Not B": None,
    "It can't be B": None,
    "I would not choose B": None,
    "Don't pick A; pick B": "B",
    "neither A nor B; C": "C",
    "C rather than D": "C",
    "The wrong answer is B": None,
    "The answer is C, not D": "C",
    "It is not option A, it is option C": "C",
    "Rule out A. Then B remains.": "B",
    "The answer is clearly not B": None,
    # Hedging, and lists of what may be chosen.
    "A;B": "AB",  # both, which is neither alone
    "(B) dog (C) cat": None,
    "option C or D": None,
    "A or B": None,
    "The answer is either B or C": None,
    "B/C": "BC",
    "It is A or maybe B": None,
    "A. a dog\nB. a cat\nC. a bird": None,
    "A) dog B) cat C) bird D) fish": None,
    "either A or B is correct": None,
    "A, B or C": None,
    "Perhaps B, perhaps C": None,
    # Small letters, other scripts, marks.
    "b is right": "B",
    "b": "B",
    "b.": "B",
    "(c)": "C",
    "the answer is (d)": "D",
    "answer: c": "C",
    "I think it is b.": "B",
    "a dog": None,
    "\u0412": "B",  # Cyrillic
    "\u0421.": "C",  # Cyrillic
    "\u0391": "A",  # Greek
    "\uff22\uff0e": "B",  # wide
    "\u24b7": "B",  # in a circle
    "選B": "B",
    "答案是C": "C",
    "故选：D。": "D",
    "**Answer:** B": "B",
    "Answer B": "B",
    "### Final answer: C": "C",
    "ANSWER IS D": "D",
    "`B`": "B",
    "[B]": "B",
    "{B}": "B",
    "B)": "B",
    "<B>": "B",
    "B!": "B",
    "B -> a cat": "B",
    "B - a cat": "B",
    "B: a cat": "B",
    "Option B: a cat": "B",
    "The correct option is C": "C",
    "The best choice would be option D.": "D",
    "My answer is: (B) a cat": "B",
    "My final choice: B": "B",
    "I'm going with option A.": "A",
    "The letter is B": "B",
    "The answer must be B.": "B",
    "The answer is probably B.": "B",
    "The answer is most likely (C).": "C",
    r"\boxed{\textbf{(B)}\ 12}": "B",
    r"$\boxed{\text{B. a cat}}$": "B",
    "B. A dog, not a cat": "B",
    "C, because A is too small": "C",
    "C because A is too small": "C",
    "B\n\nA is too small, C is too large.": "B",
    "B\n\nA. too small\nB. fits\nC. too large": "B",
    "B\n(A) too small\n(C) too large": "B",
    "A is not the answer, B is": "B",
    "I believe the answer is 'D'": "D",
    "The answer could be A or B. I'd say A.": "A",
    "Between B and C, B is better.": "B",
    "A vs B": None,
    "The answer is b because a is small": "B",
    "Ответ: В": "B",
    "Réponse : B": "B",
    "So I'd eliminate A, B and D. C remains.": "C",
    "A, B, and D are wrong.": None,
    "I, II and III": None,
    # Several that are right.
    "both b and c": "BC",
    "A, C": "AC",
    "AC": "AC",
    "A and C": "AC",
    "C, A": "AC",
    "(A)(C)": "AC",
    "(A) and (C)": "AC",
    "The answers are A and C.": "AC",
    "Answer: A, C": "AC",
    "ABD": "ABD",
    "A, B and D": "ABD",
    "Both A and C are correct": "AC",
    r"\boxed{A, C}": "AC",
    # No letters of an option.
    "BAD": None,
    "A dog": None,
    "A TV": None,
    "30 °C": None,
    "C++": None,
    "Vitamin C": None,
    "A T-shirt": None,
    "The U.S.": None,
    "None of the above": None,
    "N/A": None,
    "a cat": None,
    "": None,
    "42": None,
    "J. Smith": "J",  # as "B. a cat": no one can tell
}


@pytest.mark.parametrize(("said", "settled"), CASES.items())
def test_letter(said, settled):
    assert letter(said) == settled
    if settled:
        assert choice(said, settled) == 1
    for wrong in set("ABCD") - {settled}:
        assert choice(said, wrong) == 0


# As above, where the right answer is written in one way or another.
@pytest.mark.parametrize(
    "wanted", ["C", "c", "(C)", "C.", "C. a cat", "<answer>C</answer>", r"\boxed{C}", "C) It is C"]
)
@pytest.mark.parametrize("said", ["C", "The answer is C", "(c)", "C. a cat"])
def test_the_right_answer_in_any_form(said, wanted):
    assert choice(said, wanted) == 1
    assert choice("D", wanted) == 0


@pytest.mark.parametrize("wanted", ["AC", "A, C", "C, A", "A and C", "(A), (C)", "A;C"])
def test_several_right_answers_in_any_form(wanted):
    for said in ("AC", "A, C", "A and C", "The answer is A and C", "C and A", "(A)(C)"):
        assert choice(said, wanted) == 1
    for said in ("A", "C", "ABC", "A, B", "A or C", "AB", "ABCD"):
        assert choice(said, wanted) == 0
