"""Small data sets in the schema of each of the thirteen benchmarks, with real pictures and real mp4 files.

Rows are made so that lmms-eval's own code reads them; `gold` maps what is asked to an answer that is right, and
CHANCE is the score of a model that always says the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zipr1.data import video
from zipr1.evaluate.suites import MVBENCH

LETTERS = "ABCDEFGHIJ"
CONSTANT = {"mme": "Yes", "chartqa": "cat", "textvqa": "cat", "ocrbench": "cat"}  # elsewhere A
# Shown scores of the constant answer, by hand: a quarter, a fifth or a tenth of the letters, half of MME's questions
# right and none of its pairs (50 of 200 points a category), one word in four.
CHANCE = {
    "mme": 700.0,
    "mmbench": 25.0,
    "mmstar": 25.0,
    "chartqa": 25.0,
    "textvqa": 25.0,
    "ocrbench": 250.0,
    "mmmu_pro": 10.0,
    "videomme": 25.0,
    "mvbench": 50.0,
    "longvideobench": 20.0,
    "mlvu": 100 * 1 / 7,
    "egoschema": 20.0,
    "nextqa": 20.0,
}
WORDS = ("cat", "dog", "owl", "fox")
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MLVU = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")


def picture(number: int) -> Image.Image:
    """A small picture that is not like the others."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8))


def clip(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    video.write(path, rng.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8), 4.0)


def write(root: Path, config: str | None, split: str, rows: list[dict[str, Any]]) -> None:
    """Rows as a hub repository holds them: <config>/<split>-00000-of-00001.parquet."""
    import datasets

    path = root / (config or "data") / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    datasets.Dataset.from_dict(columns).to_parquet(path)


def mme(root: Path) -> dict[str, str]:
    rows, gold = [], {}
    for n, category in enumerate([*PERCEPTION, *COGNITION]):
        for answer in ("Yes", "No"):
            question = f"Is this {category} {answer} right? Please answer yes or no."
            gold[f"Is this {category} {answer} right?"] = f"{answer}."
            rows.append({"question_id": f"{category}/{n}.png", "image": picture(n), "question": question,
                         "answer": answer, "category": category})  # fmt: skip
    write(root, None, "test", rows)
    return gold


def mmbench(root: Path) -> dict[str, str]:
    """Four questions, the first of them also with its options rotated."""
    rows, gold = [], {}
    options = dict(zip("ABCD", WORDS, strict=True))
    for n, letter in enumerate("ABCD"):
        rows.append(
            {
                "index": n,
                "question": f"bench question {n}?",
                "hint": "nan",
                **options,
                "answer": letter,
            }
        )
        gold[f"bench question {n}?"] = letter
    rows.append({"index": 1_000_001, "question": "rotated question?", "hint": "look", "A": "fox", "B": "cat",
                 "C": "dog", "D": "owl", "answer": "C"})  # fmt: skip
    gold["rotated question?"] = "C. dog"
    for n, row in enumerate(rows):
        row |= {
            "image": picture(n),
            "category": "c",
            "L2-category": "l",
            "source": "s",
            "split": "dev",
        }
    write(root, "en", "dev", rows)
    return gold


def mmstar(root: Path) -> dict[str, str]:
    rows, gold = [], {}
    for n in range(8):
        question = f"star question {n}? Options: A: cat, B: dog, C: owl, D: fox"
        gold[f"star question {n}?"] = f"({LETTERS[n % 4]})"
        rows.append({"index": n, "image": picture(n), "question": question, "answer": LETTERS[n % 4],
                     "category": ("math", "logical reasoning")[n // 4],
                     "l2_category": ("geometry", "diagram reasoning")[n // 4]})  # fmt: skip
    write(root, None, "val", rows)
    return gold


def chartqa(root: Path) -> dict[str, str]:
    rows, gold = [], {}
    for n, word in enumerate(WORDS):
        rows.append({"image": picture(n), "question": f"chart question {n}?", "answer": word,
                     "type": ("human_test", "augmented_test")[n % 2]})  # fmt: skip
        gold[f"chart question {n}?"] = word
    write(root, None, "test", rows)
    return gold


def textvqa(root: Path) -> dict[str, str]:
    rows, gold = [], {}
    for n, word in enumerate(WORDS):
        rows.append({"image": picture(n), "question": f"text question {n}?", "answers": [word] * 10,
                     "question_id": n, "image_id": str(n), "ocr_tokens": [word]})  # fmt: skip
        gold[f"Text question {n}?"] = word
    write(root, None, "validation", rows)
    return gold


def ocrbench(root: Path) -> dict[str, str]:
    rows, gold = [], {}
    kinds = (
        "Regular Text Recognition",
        "Doc-oriented VQA",
        "Key Information Extraction",
        "Scene Text-centric VQA",
    )
    for n, (word, kind) in enumerate(zip(WORDS, kinds, strict=True)):
        rows.append({"image": picture(n), "question": f"ocr question {n}?", "answer": [word], "dataset": "X",
                     "question_type": kind})  # fmt: skip
        gold[f"ocr question {n}?"] = f"it says {word}"
    write(root, None, "test", rows)
    return gold


def mmmu_pro(root: Path) -> dict[str, str]:
    rows, gold, seen = [], {}, []
    for n in range(10):
        letter = LETTERS[n]
        options = str([f"thing {k}" for k in range(10)])
        rows.append({"id": f"s{n}", "question": f"<image 1> pro question {n}?", "options": options, "answer": letter,
                     "subject": ("Art", "Math")[n % 2], "image_1": picture(n),
                     **{f"image_{k}": None for k in range(2, 8)}})  # fmt: skip
        gold[f"pro question {n}?"] = letter
        seen.append({"id": f"v{n}", "image": picture(100 + n), "answer": letter, "subject": "Art"})
    write(root, "standard (10 options)", "test", rows)
    write(root, "vision", "test", seen)
    # The vision part has no words of its own: its pictures tell its questions apart.
    return gold | {picture(100 + n).tobytes(): f"({LETTERS[n]})." for n in range(10)}


def videomme(root: Path) -> dict[str, str]:
    rows, gold = [], {}
    for n in range(4):
        name = f"v{n // 2}"  # two questions a clip
        options = [f"{LETTERS[k]}. {word}" for k, word in enumerate(WORDS)]
        rows.append({"video_id": f"00{n}", "videoID": name, "question_id": f"{n}-1", "duration": "short",
                     "domain": "Knowledge", "sub_category": "Humanity & History", "task_type": "Counting Problem",
                     "question": f"video question {n}?", "options": options, "answer": LETTERS[n]})  # fmt: skip
        gold[f"video question {n}?"] = LETTERS[n]
        clip(root / "data" / f"{name}.mp4", n)
    write(root, "videomme", "test", rows)
    return gold


def mvbench(root: Path) -> dict[str, str]:
    gold = {}
    for kind, folder in MVBENCH.items():
        rows = []
        for n in range(2):
            question = f"{kind} question {n}?"
            rows.append({"video": f"{kind}{n}.mp4", "question": question, "candidates": ["cat", "dog"],
                         "answer": ("cat", "dog")[n]})  # fmt: skip
            gold[question] = f"({'AB'[n]}) it is"
            clip(root / "video" / folder / f"{kind}{n}.mp4", n)
        write(root, kind, "train", rows)
    return gold


def longvideobench(root: Path) -> dict[str, str]:
    rows, gold = [], {}
    for n in range(5):
        options = {f"option{k}": f"thing {k}" for k in range(5)}
        rows.append({"id": f"id{n}", "video_path": f"l{n}.mp4", "question": f"long question {n}?", **options,
                     "correct_choice": n, "duration_group": 15, "question_category": "S2E"})  # fmt: skip
        gold[f"long question {n}?"] = LETTERS[n]
        clip(root / "videos" / f"l{n}.mp4", n)
    write(root, None, "validation", rows)
    return gold


def mlvu(root: Path) -> dict[str, str]:
    """A question of each kind; the answers are A, B, C, D, B, C, D."""
    rows, gold = [], {}
    for n, kind in enumerate(MLVU):
        letter = "ABCDBCD"[n]
        question = f"mlvu question {n}?\n(A) cat\n(B) dog\n(C) owl\n(D) fox"
        rows.append(
            {
                "video_name": f"{n % 2}/m{n}.mp4",
                "question": question,
                "task_type": kind,
                "answer": letter,
            }
        )
        gold[f"mlvu question {n}?"] = f"{letter})"
        clip(root / "video" / f"{n % 2}" / f"m{n}.mp4", n)
    write(root, None, "test", rows)
    return gold


def egoschema(root: Path) -> dict[str, str]:
    rows, gold = [], {}
    for n in range(5):
        options = [f"{LETTERS[k]}. thing {k}" for k in range(5)]
        rows.append({"video_idx": f"e{n}", "question": f"ego question {n}?", "option": options, "answer": str(n),
                     "question_idx": n})  # fmt: skip
        gold[f"ego question {n}?"] = LETTERS[n]
        clip(root / "videos" / f"e{n}.mp4", n)
    write(root, "Subset", "test", rows)
    return gold


def nextqa(root: Path) -> dict[str, str]:
    rows, gold = [], {}
    for n in range(5):
        rows.append({"video": 1000 + n, "question": f"next question {n}", "answer": n, "qid": n,
                     **{f"a{k}": f"thing {k}" for k in range(5)}})  # fmt: skip
        gold[f"next question {n}"] = LETTERS[n]
        clip(root / "NExTVideo" / f"{1000 + n}.mp4", n)
    write(root, "MC", "test", rows)
    return gold


STANDINS: dict[str, Callable[[Path], dict[Any, str]]] = {
    "mme": mme,
    "mmbench": mmbench,
    "mmstar": mmstar,
    "chartqa": chartqa,
    "textvqa": textvqa,
    "ocrbench": ocrbench,
    "mmmu_pro": mmmu_pro,
    "videomme": videomme,
    "mvbench": mvbench,
    "longvideobench": longvideobench,
    "mlvu": mlvu,
    "egoschema": egoschema,
    "nextqa": nextqa,
}
