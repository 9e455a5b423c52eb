"""The embedded tasks: the same everywhere, right answers, disjoint handwriting, balanced questions."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from zipr1.core.errors import InputError, RunError
from zipr1.core.recipe import Data
from zipr1.core.types import Prompt
from zipr1.data import drawn, embedded, video
from zipr1.data.digits import glyphs, questions, scenes, tasks
from zipr1.data.media import load_media
from zipr1.data.sources import load

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ZIPR1_CACHE", str(tmp_path_factory.getbasetemp() / "clips"))


@pytest.fixture(scope="module")
def bank():
    return glyphs.bank("validation")


def _draw(make, bank, number, **options):
    return [make(np.random.default_rng([9, i]), bank, **options) for i in range(number)]


FINGERPRINT = """
import hashlib
from zipr1.data.digits import tasks
h = hashlib.sha256()
for scene, pairs in tasks.lesson(3, 5, 6, 0.5, 6, 0.2):
    h.update(scene.pixels.tobytes()); h.update(repr((scene.objects, pairs)).encode())
for p in tasks.prompts("test", "digits", 3, 2, 1):
    h.update(p.media[0].source.tobytes()); h.update(repr((p.id, p.messages, p.answer)).encode())
print(h.hexdigest())
"""


def test_two_processes_draw_the_same_pixels_and_questions():
    def run(hash_seed):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", FINGERPRINT], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("1") == run("2")


def test_lessons_and_prompts_depend_on_their_seeds():
    def pixels(seed, step):
        pairs = tasks.lesson(seed, step, 2, 0.5, 6, 0.2)
        return hashlib.sha256(b"".join(scene.pixels.tobytes() for scene, _ in pairs)).hexdigest()

    assert len({pixels(0, 0), pixels(0, 1), pixels(1, 0)}) == 3
    one, two = (tasks.prompts("test", "digits", 1, 1, seed)[0] for seed in (1, 2))
    assert not np.array_equal(one.media[0].source, two.media[0].source)
    few, many = (tasks.prompts("test", "digits", n, 2, 1) for n in (2, 4))
    assert [p.answer for p in few] == [p.answer for p in many[: len(few)]]


def test_splits_are_disjoint_and_stratified():
    rows = glyphs.split_rows()
    assert {name: len(r) for name, r in rows.items()} == glyphs.SPLITS
    assert sorted(np.concatenate(list(rows.values()))) == list(range(1797))
    _, labels = glyphs.load_digits()
    for name, chosen in rows.items():
        share = np.bincount(labels[chosen], minlength=10) / len(chosen)
        assert np.abs(share - np.bincount(labels) / 1797).max() < 0.012, name


def test_the_asset_holds_what_its_labels_say():
    images, labels = glyphs.load_digits()
    assert images.dtype == np.uint8
    assert images.shape == (1797, 8, 8)
    assert images.max() == 16
    train, test = (glyphs.split_rows()[name] for name in ("train", "test"))
    known = images[train].reshape(-1, 64).astype(int)
    asked = images[test].reshape(-1, 64).astype(int)
    nearest = ((asked[:, None] - known[None]) ** 2).sum(-1).argmin(1)
    assert (labels[train][nearest] == labels[test]).mean() > 0.96


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_image_scenes_show_each_digit_in_its_own_cell_and_colour(bank, count):
    for scene in _draw(scenes.draw_image, bank, 15, count=count):
        assert scene.pixels.shape == (128, 128, 3)
        assert scene.pixels.dtype == np.uint8
        assert len({o.cells for o in scene.objects}) == len(scene.objects) == count
        for o in scene.objects:
            assert _seen_colour(scene.pixels, o.cells[0]) == o.colour


@pytest.mark.parametrize("count", [1, 2, 3])
def test_clips_show_each_digit_when_and_where_it_should_be(bank, count):
    for scene in _draw(scenes.draw_video, bank, 15, count=count):
        steps = len(scene.pixels) // 2
        assert scene.pixels.shape == (2 * steps, 96, 96, 3)
        assert 4 <= steps <= 6
        assert (
            len({o.colour for o in scene.objects}) == len({o.start for o in scene.objects}) == count
        )
        assert len({len(o.cells) for o in scene.objects}) == 1
        assert min(o.start for o in scene.objects) == 0
        assert max(o.start + len(o.cells) for o in scene.objects) == steps
        taken = [(o.start + k, cell) for o in scene.objects for k, cell in enumerate(o.cells)]
        assert len(set(taken)) == len(taken)
        for o in scene.objects:
            assert all(0 <= x < 6 for cell in o.cells for x in cell)
            # Every pair of frames moves the ink 2 x 3 px, every step one cell: seen in the pixels, not in the label.
            here = [
                _centre(scene.pixels[f], o.colour)
                for f in range(2 * steps)
                if f // 2 - o.start in range(len(o.cells))
            ]
            moved = here[-1] - here[0]
            way = {(0, -1): "left", (0, 1): "right", (-1, 0): "top", (1, 0): "bottom"}
            assert way[tuple(int(x) for x in np.sign(np.round(moved / 8)))] == o.direction
            assert np.abs(here[1] - here[0]).sum() == pytest.approx(6, abs=2.5)


def _ink(pixels, colour):
    """Mask of pixels that are bright and nearest in hue to the colour."""
    values = pixels.astype(float)
    bright = np.ptp(values, axis=-1) > 70
    names = list(scenes.COLOURS)
    targets = np.array([scenes.COLOURS[n] for n in names], float)
    unit = values / np.linalg.norm(values, axis=-1, keepdims=True).clip(1)
    targets /= np.linalg.norm(targets, axis=-1, keepdims=True)
    return bright & ((unit @ targets.T).argmax(-1) == names.index(colour))


def _centre(frame, colour):
    return np.argwhere(_ink(frame, colour)).mean(0)


def _seen_colour(pixels, cell):
    window = pixels[cell[0] * 16 : cell[0] * 16 + 16, cell[1] * 16 : cell[1] * 16 + 16]
    return max(scenes.COLOURS, key=lambda name: _ink(window, name).sum())


def _answer(scene, text):
    """The answer worked out from the objects alone: a second implementation of questions.py."""
    words = text.rstrip("?").split()
    objects = scene.objects

    def coloured(colour):
        return [o for o in objects if o.colour == colour]

    if text.startswith("what color"):
        (found,) = [o for o in objects if WORDS[o.value] == words[-1]]
        return found.colour
    if text.startswith("which digit is"):
        (found,) = coloured(words[-1])
        return WORDS[found.value]
    if text.startswith("how many"):
        number = len(coloured(words[2]))
        noun = "digit" if number == 1 else "digits"
        return f"{['no', 'one', 'two', 'three'][number]} {words[2]} {noun}"
    if text.startswith("what is"):
        (one,), (two,) = coloured(words[3]), coloured(words[7])
        teens = questions.NUMBERS[10:]
        return [*WORDS, *teens][one.value + two.value]
    if text.startswith("which way"):
        (found,) = coloured(words[4])
        (r0, c0), (r1, c1) = found.cells[0], found.cells[-1]
        side = ("bottom" if r1 > r0 else "top") if r1 != r0 else ("right" if c1 > c0 else "left")
        return f"to the {side}"
    pick = {"first": min, "last": max}[words[-1]]
    return WORDS[pick(objects, key=lambda o: o.start).value]


@pytest.mark.parametrize("make", [scenes.draw_image, scenes.draw_video])
def test_every_answer_follows_from_the_objects(bank, make):
    seen = set()
    allowed = set(tasks.vocabulary())
    for scene in _draw(make, bank, 60):
        for kind, found in questions.catalogue(scene).items():
            seen.add(kind)
            for q in found:
                assert q.answer == _answer(scene, q.text)
                assert set(q.text.replace("?", " ?").split()) | set(q.answer.split()) <= allowed
    image = make is scenes.draw_image
    wanted = {"count", "sum"} if image else {"direction", "first", "last"}
    assert seen == {"colour", "digit"} | wanted


@pytest.mark.parametrize("task", tasks.TASKS)
def test_kinds_and_answers_are_balanced(task, monkeypatch):
    monkeypatch.setattr(drawn, "media", lambda scene: None)  # no clip has to be encoded to count
    made = tasks.prompts("validation", task, 180, 4, 5)
    kinds = Counter(p.kind for p in made)
    assert set(kinds) == set(questions.KINDS[task])
    assert max(kinds.values()) - min(kinds.values()) <= 1
    most = {"count": 0.4, "direction": 0.36, "colour": 0.28}
    for kind, number in kinds.items():
        answers = Counter(
            p.answer.split()[0 if kind == "count" else -1] for p in made if p.kind == kind
        )
        assert answers.most_common(1)[0][1] / number < most.get(kind, 0.22), (kind, answers)
    if task == "digits":
        counts = {p.answer.split()[0] for p in made if p.kind == "count"}
        assert counts == {"no", "one", "two", "three"}


@pytest.mark.parametrize("task", ["digits", "moving_digits"])
def test_a_second_turn_asks_about_another_object(task):
    made = [p for p in tasks.prompts("validation", task, 40, 4, 5) if p.kind == "second"]
    assert len(made) >= 20
    for p in made:
        assert [m["role"] for m in p.messages] == ["user", "assistant", "user"]
        kind = "image" if task == "digits" else "video"
        assert [c["type"] for c in p.messages[0]["content"]] == [kind, "text"]
        first, given, last = (m["content"][-1]["text"] for m in p.messages)
        assert first != last
        # Neither what was named in the first turn nor its answer may be what the second turn is about.
        if not first.startswith(("how", "which way")):
            asked = last.rstrip("?").split()[-1]
            assert (asked, p.answer) not in {
                (first.rstrip("?").split()[-1], given),
                (given, first.rstrip("?").split()[-1]),
            }


def test_lesson_asks_different_questions_within_its_limits():
    for scene, pairs in tasks.lesson(0, 0, 12, 0.5, 3, 0.5, questions=8):
        assert 1 <= len(scene.objects) <= 3
        # A scene of few digits has fewer questions, and counts, most of them of nothing, are two at most.
        assert 3 <= len(pairs) <= 8
        assert sum(text.startswith("how many") for text, _ in pairs) <= 2
        assert all(answer == _answer(scene, text) for text, answer in pairs)
        assert len({text for text, _ in pairs}) == len(pairs)
    kinds = Counter(s.kind for s, _ in tasks.lesson(0, 1, 12, 0.5, 3, 0.5))
    assert kinds["video"] in (6, 7)
    easy = [t for _, pairs in tasks.lesson(0, 2, 20, 0.0, 6, 0.0) for t, _ in pairs]
    assert not any(t.startswith("what is") for t in easy)


def test_clips_survive_the_codec_and_are_cached():
    made = tasks.prompts("validation", "moving_digits", 4, 2, 11)
    key = [11, list(glyphs.SPLITS).index("validation"), tasks.TASKS.index("moving_digits"), 0]
    scene = scenes.draw_video(np.random.default_rng(key), glyphs.bank("validation"))
    path = made[0].media[0].source
    frames, fps = load_media(made[0].media[0], max_frames=16, fps=None)
    assert fps == pytest.approx(4.0)
    assert frames.shape == scene.pixels.shape
    assert np.abs(frames.astype(int) - scene.pixels).mean() < 2.5
    for o in scene.objects:
        for step, cell in enumerate(o.cells):
            assert _seen_colour(frames[2 * (o.start + step)], cell) == o.colour
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert tasks.prompts("validation", "moving_digits", 1, 2, 11)[0].media[0].source == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert not [p for p in path.parent.iterdir() if not p.stem.isalnum()]
    path.write_bytes(b"")
    tasks.prompts("validation", "moving_digits", 1, 2, 11)
    assert np.array_equal(video.read(path)[0], frames)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ZIPR1_CACHE", str(tmp_path / "file" / "clips"))
    with pytest.raises(RunError, match="set ZIPR1_CACHE"):
        tasks.prompts("validation", "moving_digits", 1, 1, 0)


def test_train_prompts_follow_the_mix_and_the_seed():
    data = Data(prompts=50, mix={"digits": 3, "hard_digits": 2, "moving_digits": 0})
    made = load(data, "train", 4)
    assert Counter(p.task for p in made) == {"digits": 30, "hard_digits": 20}
    assert [p.id for p in made] == [p.id for p in load(data, "train", 4)]
    other = load(data, "train", 5)
    assert [p.id for p in made] != [p.id for p in other]
    assert max(Counter(p.picture for p in made).values()) == 4
    assert all("/train/" in p.id for p in made)
    assert len({p.id for p in made}) == 50


@pytest.mark.parametrize(
    ("mix", "number", "counts"),
    [
        # 10/3 each: the one that is left over goes to the first of equal remainders.
        ({"digits": 1, "moving_digits": 1, "hard_digits": 1}, 10, [4, 3, 3]),
        # 7.28, 5.88, 0.84: the largest remainders are those of the last two.
        ({"digits": 0.52, "moving_digits": 0.42, "hard_digits": 0.06}, 14, [7, 6, 1]),
        ({"digits": 0, "moving_digits": 2, "hard_digits": 0}, 3, [0, 3, 0]),
    ],
)
def test_a_mix_is_split_by_the_largest_remainders(mix, number, counts):
    made = Counter(p.task for p in load(Data(prompts=number, mix=mix), "train", 0))
    assert [made[task] for task in mix] == counts


def test_heldout_questions_are_the_same_for_all_runs():
    data = Data(heldout_prompts=44, mix={"digits": 1})
    made = load(data, "heldout", 0)
    assert Counter(p.task for p in made) == {"digits": 44, "moving_digits": 44, "hard_digits": 40}
    again = load(Data(heldout_prompts=44), "heldout", 7)
    assert [(p.id, p.messages, p.answer) for p in made] == [
        (p.id, p.messages, p.answer) for p in again
    ]
    assert all("/test/" in p.id for p in made)
    tuning = load(Data(heldout_prompts=4, heldout="validation"), "heldout", 0)
    assert all("/validation/" in p.id for p in tuning)


def test_a_second_family_joins_by_one_line(monkeypatch):
    """Its name is a source, and its tasks stand in the mix beside the digits."""

    def prompts(split, task, pictures, questions_per_picture, seed):
        return [
            Prompt(f"{task}/{split}/{seed}/{i}", [], (), "", task)
            for i in range(pictures * questions_per_picture)
        ]

    family = SimpleNamespace(
        TASKS=("circles", "squares"), HELDOUT_SHARE={"squares": 0.5}, prompts=prompts
    )
    monkeypatch.setitem(embedded.SOURCES, "shapes", family)
    mixed = Data(prompts=50, heldout_prompts=100, mix={"digits": 3, "squares": 2, "circles": 0})
    made = load(mixed, "train", 4)
    assert Counter(p.task for p in made) == {"digits": 30, "squares": 20}
    # Held out are all tasks of the source's family, and those of others that are trained.
    asked = Counter(p.task for p in load(mixed, "heldout", 0))
    digits = {"digits": 100, "moving_digits": 100, "hard_digits": 40}
    assert asked == {**digits, "squares": 50}
    alone = Data(source="shapes", heldout_prompts=100, mix={"circles": 1})
    assert Counter(p.task for p in load(alone, "heldout", 0)) == {"circles": 100, "squares": 50}
    assert {p.id.split("/")[1] for p in load(alone, "train", 4)} == {"train"}
    with pytest.raises(InputError, match=r"unknown task 'circle'; did you mean 'circles'\?"):
        load(Data(mix={"circle": 1}), "train", 0)
    with pytest.raises(
        InputError, match=r"data source 'shape': unknown; allowed: digits, pages, shapes,"
    ):
        load(Data(source="shape"), "train", 0)


def test_no_two_families_have_a_task_of_the_same_name():
    tasks_of_all = [task for family in embedded.SOURCES.values() for task in family.TASKS]
    assert len(tasks_of_all) == len(set(tasks_of_all)) > 0
    for family in embedded.SOURCES.values():
        assert set(family.HELDOUT_SHARE) <= set(family.TASKS)


@pytest.mark.parametrize(
    ("data", "split", "words"),
    [
        (Data(mix={"digit": 1}), "train", ["'digit'", "did you mean 'digits'?", "moving_digits"]),
        (Data(mix={"digits": 1, "hard_digit": 1}), "heldout", ["did you mean 'hard_digits'?"]),
        (Data(mix={"digits": 0}), "train", ["data.mix"]),
        (Data(source="numbers"), "train", ["numbers", "digits", ".jsonl"]),
        (Data(source="rows.jsonl"), "heldout", ["data.heldout"]),
    ],
)
def test_wrong_data_settings_are_explained(data, split, words):
    with pytest.raises(InputError) as error:
        load(data, split, 0)
    assert all(word in str(error.value) for word in words)
