"""The embedded tasks of 500 tokens and more: `pages`, `page_clips`, and `page_totals` (sums, hard on purpose).

`prompts` makes numbered questions for RL and evaluation, `lesson` an endless stream for supervised training. Both are
pure functions of their arguments. Clips of `prompts` are real mp4 files in a cache, those of `lesson` are not.
"""

from __future__ import annotations

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.types import Prompt
from zipr1.data import drawn
from zipr1.data.digits import glyphs
from zipr1.data.pages.drawing import SHEET_ROWS, Scene, draw_clip, draw_page
from zipr1.data.pages.forms import ROWS
from zipr1.data.pages.questions import KINDS, Question, draw, draw_second, vocabulary

__all__ = ["HELDOUT_SHARE", "MIX", "TASKS", "lesson", "prompts", "vocabulary"]

TASKS = tuple(KINDS)
MIX = {"pages": 0.5, "page_clips": 0.3, "page_totals": 0.2}
HELDOUT_SHARE = {"page_totals": 0.25}
# The random streams of this family, apart from those of the digits: with lessons, and with prompts.
_LESSON, _PROMPTS = 200, 201
_TRIES = 1000
# How often a lesson asks each kind about a page or a clip.
_LESSON_KINDS = {
    "image": ("amount",) * 4 + ("row",) * 3 + ("ticked",) * 3 + ("ticks", "date", "larger"),
    "video": ("amount",) * 4 + ("row",) * 2 + ("ticked",) * 2 + ("sheet",) * 2,
}


def prompts(
    split: str, task: str, pictures: int, questions_per_picture: int, seed: int
) -> list[Prompt]:
    """`pictures` x `questions_per_picture` prompts from the hands of one split; kinds take turns.

    Picture i is the same however many pictures are asked for. Ids are `task/split/picture/question`.
    """

    def scene(rng: np.random.Generator, kinds: list[str]) -> drawn.Drawn:
        bank = glyphs.bank(split)
        shown = draw_clip(rng, bank) if task == "page_clips" else draw_page(rng, bank)
        return shown, _ask(rng, shown, task, kinds)

    stream = [seed, _PROMPTS]
    return drawn.prompts(
        split, tuple(glyphs.SPLITS), task, KINDS, pictures, questions_per_picture, stream, scene
    )


def lesson(
    seed: int,
    step: int,
    pictures: int,
    video_share: float,
    size: int,
    hard_share: float,
    questions: int = 16,
) -> list[tuple[Scene, list[tuple[str, str]]]]:
    """`pictures` fresh scenes of training hands with `questions` different (question, answer) pairs each.

    size: most rows of a page, at most 20; a half of it at least. Below 6 pages are small, and clips have 1 or 2 sheets.
    video_share: of the scenes, 0 to 1. hard_share: of a page's questions that are totals.
    """
    rng = np.random.default_rng([seed, _LESSON, step])
    bank = glyphs.bank("train")
    videos = int(pictures * video_share + rng.random())
    most = min(size, ROWS[1])
    made = []
    for index in range(pictures):
        if index < videos:
            short = None if most >= ROWS[0] else (int(rng.integers(1, 3)), min(most, SHEET_ROWS[1]))
            scene = draw_clip(rng, bank, short)
        else:
            scene = draw_page(rng, bank, int(rng.integers(-(-most // 2), most + 1)))
        made.append((scene, _many(rng, scene, questions, hard_share)))
    return made


def _ask(
    rng: np.random.Generator, scene: Scene, task: str, kinds: list[str]
) -> list[tuple[Question, ...]]:
    """For each kind a question of its own with its turns."""
    forms = [sheet.form for sheet in scene.sheets]
    openings = [kind for kind in KINDS[task] if kind != "second"]
    asked: list[tuple[Question, ...]] = []
    for kind in kinds:
        used = {turns[-1].text for turns in asked}
        for _ in range(_TRIES):
            turns: tuple[Question, ...] | None
            if kind == "second":
                turns = draw_second(forms, rng, openings, used)
            else:
                one = draw(forms, rng, kind, used)
                turns = None if one is None else (one,)
            if turns is not None:
                asked.append(turns)
                break
        else:
            raise InputError(
                f"{task}: no page has {len(kinds)} different questions; ask fewer questions per picture"
            )
    return asked


def _many(
    rng: np.random.Generator, scene: Scene, number: int, hard_share: float
) -> list[tuple[str, str]]:
    """Different questions, fewer than `number` where there are no more."""
    forms = [sheet.form for sheet in scene.sheets]
    rows = sum(len(form.rows) for form in forms)
    kinds = _LESSON_KINDS[scene.kind]
    used: set[str] = set()
    last: set[str] = set()
    pairs: list[tuple[str, str]] = []
    for _ in range(2 * number):
        hard = scene.kind == "image" and rng.random() < hard_share
        kind = "total" if hard else kinds[int(rng.integers(len(kinds)))]
        question = draw(forms, rng, kind, used)
        # Neighbours may become two turns of one conversation: of the same row, one would answer the other.
        repeated = rows > 1 and question is not None and last & set(question.about)
        if question is None or repeated or len(pairs) == number:
            continue
        used.add(question.text)
        pairs.append((question.text, question.answer))
        last = set(question.about)
    return pairs
