"""The embedded tasks: `digits` (pictures), `moving_digits` (clips) and `hard_digits` (sums, hard on purpose).

`prompts` makes numbered questions for RL and evaluation, `lesson` an endless stream for supervised training. Both are
pure functions of their arguments. Clips of `prompts` are real mp4 files in a cache, those of `lesson` are not.
"""

from __future__ import annotations

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.types import Prompt
from zipr1.data import drawn
from zipr1.data.digits import glyphs
from zipr1.data.digits.questions import KINDS, Question, catalogue, draw, draw_second, vocabulary
from zipr1.data.digits.scenes import Scene, draw_image, draw_video

__all__ = ["HELDOUT_SHARE", "MIX", "TASKS", "lesson", "prompts", "vocabulary"]

TASKS = tuple(KINDS)
MIX = {"digits": 0.4, "moving_digits": 0.4, "hard_digits": 0.2}
HELDOUT_SHARE = {"hard_digits": 0.25}
_LESSON = 100  # keeps the random streams of lessons apart from those of prompts
_TRIES = 1000


def prompts(
    split: str, task: str, pictures: int, questions_per_picture: int, seed: int
) -> list[Prompt]:
    """`pictures` x `questions_per_picture` prompts from the digits of one split; kinds take turns.

    Picture i is the same however many pictures are asked for. Ids are `task/split/picture/question`.
    """

    def scene(rng: np.random.Generator, kinds: list[str]) -> drawn.Drawn:
        return _draw_with(rng, glyphs.bank(split), task, kinds)

    return drawn.prompts(
        split, tuple(glyphs.SPLITS), task, KINDS, pictures, questions_per_picture, [seed], scene
    )


def lesson(
    seed: int,
    step: int,
    pictures: int,
    video_share: float,
    size: int,
    hard_share: float,
    questions: int = 8,
) -> list[tuple[Scene, list[tuple[str, str]]]]:
    """`pictures` fresh scenes of training digits with `questions` (question, answer) pairs each.

    video_share: of the scenes, 0 to 1. hard_share: of an image's questions that are sums. size: most digits in a scene,
    1 to 6 (clips show at most 3). A scene with few digits has fewer questions.
    """
    rng = np.random.default_rng([seed, 0, _LESSON, step])
    bank = glyphs.bank("train")
    videos = int(pictures * video_share + rng.random())
    made = []
    for index in range(pictures):
        low, high = (2, 3) if index < videos else (2, 6)
        count = int(rng.integers(min(low, size), min(high, size) + 1))
        scene = (draw_video if index < videos else draw_image)(rng, bank, count)
        made.append((scene, _many(scene, rng, questions, hard_share)))
    return made


def _draw_with(
    rng: np.random.Generator, bank: glyphs.Bank, task: str, kinds: list[str]
) -> tuple[Scene, list[tuple[Question, ...]]]:
    """A scene about which all the kinds can be asked, and for each kind a question of its own with its turns."""
    for _ in range(_TRIES):
        scene = draw_video(rng, bank) if task == "moving_digits" else draw_image(rng, bank)
        by_kind = catalogue(scene)
        asked: list[tuple[Question, ...]] = []
        for kind in kinds:
            used = {turns[-1].text for turns in asked}
            if kind == "second":
                turns: tuple[Question, ...] | None = draw_second(by_kind, rng, used)
            else:
                one = draw(by_kind, rng, kind, used)
                turns = None if one is None else (one,)
            if turns is None:
                break
            asked.append(turns)
        else:
            return scene, asked
    raise InputError(
        f"{task}: no scene has {len(kinds)} different questions; ask fewer questions per picture"
    )


def _many(
    scene: Scene, rng: np.random.Generator, number: int, hard_share: float
) -> list[tuple[str, str]]:
    """Different questions in turn of kind, no more than two of them about counts: most counts are of nothing."""
    by_kind = catalogue(scene)
    easy = [kind for kind in by_kind if kind != "sum"]
    left = {kind: 2 if kind == "count" else number for kind in easy}
    order: list[str] = []
    used: set[str] = set()
    pairs: list[tuple[str, str]] = []
    while len(pairs) < number:
        hard = "sum" in by_kind and rng.random() < hard_share
        if not hard and not order:
            order = [easy[i] for i in rng.permutation(len(easy)) if left[easy[i]]]
            if not order:
                break
        kind = "sum" if hard else order.pop()
        question = draw(by_kind, rng, kind, used)
        if question is not None:
            used.add(question.text)
            pairs.append((question.text, question.answer))
        elif hard_share == 1:
            break  # there are no more sums, and nothing else is asked for
        if kind != "sum":
            left[kind] = left[kind] - 1 if question is not None else 0
    return pairs
