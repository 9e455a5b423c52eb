"""The formats of rows that other tools use, each converted to one common form: a question, its media, its answer.

A format is a name, the columns by which it is known, and a function `row -> row`; a row is of the first of FORMATS
whose columns it has. The common form is read by prompts.py:

    messages    chat turns {"role", "content"}, or question: one user turn, as text
    images, videos (or image, video)    in the order of their <image> and <video> placeholders
    answer      the right answer; a list holds several that are right
    id, task, kind, picture, reward     optional

Sources, as read in 2026: TRL's dataset formats (docs), ms-swift's Custom-dataset.md, LLaMA-Factory's data/README.md and
mllm_demo.json, verl's RLHFDataset and data preparation (docs), EasyR1's examples, Video-R1's grpo.py and README.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from zipr1.core.errors import InputError
from zipr1.rewards.final import final

Row = dict[str, Any]

QUESTIONS = ("question", "prompt", "problem", "query")
ANSWERS = ("answer", "answers", "solution", "response", "ground_truth", "label")
MEDIA = {"image": ("images", "image"), "video": ("videos", "video")}

# Video-R1 asks for thoughts and tags; what is trained here is the answer, so the question says its form alone.
VIDEO_R1 = {
    "multiple choice": ("choice", "Answer with the letter of the right option only."),
    "numerical": ("number", "Answer with a number only."),
    "regression": ("regression", "Answer with a number only."),
    "OCR": ("ocr", "Answer with the text only."),
    "free-form": ("rouge", "Answer in one sentence."),
}
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Format(NamedTuple):
    """columns: all of them, and one of each inner tuple, are in a row of this format.

    plain: converts such a row to the common form.
    """

    name: str
    columns: tuple[str | tuple[str, ...], ...]
    plain: Callable[[Row], Row]


def video_r1(row: Row) -> Row:
    """Video-R1: `problem`, `problem_type`, `data_type` (image or video), `path`, `options` and `solution`, which holds
    the answer in <answer> tags. Its five types choose the reward."""
    kind = str(row["problem_type"])
    if kind not in VIDEO_R1:
        raise InputError(f"problem_type {kind!r}; allowed: {', '.join(VIDEO_R1)}")
    reward, form = VIDEO_R1[kind]
    media = row.get("data_type", "video")
    if media not in MEDIA:
        raise InputError(f"data_type {media!r}; allowed: {', '.join(MEDIA)}")
    lines = [str(row["problem"]).strip()]
    if kind == "multiple choice":
        options = row.get("options") or []
        if not isinstance(options, list) or not options:
            raise InputError("`options` is empty; a multiple choice needs the texts of its options")
        lines += ["Options:", *(str(option).strip() for option in options)]
    return {
        **_kept(row, "task", "picture"),
        "id": row.get("problem_id", row.get("id")),
        "kind": kind,
        "question": "\n".join([*lines, form]),
        media: row["path"],
        "answer": final(str(row.get("solution", ""))),
        "reward": row.get("reward", reward),
    }


def verl(row: Row) -> Row:
    """verl: `prompt` (chat turns), `images` / `videos`, `reward_model` {"style", "ground_truth"}, `data_source`,
    `ability`, `extra_info`."""
    model = row["reward_model"]
    if not isinstance(model, dict) or "ground_truth" not in model:
        raise InputError(f"`reward_model` is {model!r:.60}; it holds the answer as ground_truth")
    plain = {**row, "answer": model["ground_truth"]}
    if "data_source" in row:
        plain.setdefault("task", str(row["data_source"]))
    if "ability" in row:
        plain.setdefault("kind", str(row["ability"]))
    return plain


def sharegpt(row: Row) -> Row:
    """LLaMA-Factory's ShareGPT: `conversations` of {"from": "human" | "gpt", "value"}, `system`, `images`, `videos`.
    ms-swift's `conversation` of {"human", "assistant"} pairs too. A closing answer is the right one."""
    name = "conversations" if "conversations" in row else "conversation"
    turns = row[name]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"`{name}` is {turns!r:.60}; allowed: a list of turns that is not empty")
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": str(row["system"])})
    for turn in turns:
        if isinstance(turn, dict) and {"from", "value"} <= set(turn):
            role = "system" if turn["from"] == "system" else SHAREGPT_ROLES.get(turn["from"])
            if role is None:
                raise InputError(f"`from` is {turn['from']!r}; allowed: human, gpt, system")
            messages.append({"role": role, "content": turn["value"]})
        elif isinstance(turn, dict) and "human" in turn:
            messages.append({"role": "user", "content": turn["human"]})
            if turn.get("assistant") is not None:
                messages.append({"role": "assistant", "content": turn["assistant"]})
        elif isinstance(turn, dict) and {"role", "content"} <= set(turn):
            messages.append({"role": turn["role"], "content": turn["content"]})
        else:
            raise InputError(f'turn {turn!r:.60}; a turn has "from" and "value"')
    return {**row, "messages": messages}


def plain(row: Row) -> Row:
    """TRL (`prompt`, `image` or `images`, `solution`), ms-swift (`messages`, `images`, `solution`; `query` and
    `response`), EasyR1 (`problem`, `images`, `answer`) and our own: these differ only in the names of columns."""
    # ms-swift writes boxes and names of its grounding rows into the text; left as they are, they would be the answer.
    if row.get("objects") and re.search("<bbox>|<ref-object>", repr(row)):
        raise InputError(
            "`objects` with <bbox> or <ref-object> in the text is not handled; write boxes and names out as text"
        )
    return row


FORMATS = (
    Format("Video-R1", ("problem", "problem_type", "path"), video_r1),
    Format("verl", ("prompt", "reward_model"), verl),
    Format("ShareGPT", (("conversations", "conversation"),), sharegpt),
    Format("messages", ("messages",), plain),
    Format("question and answer", (QUESTIONS,), plain),
)


def detect(row: Row) -> Format:
    """The format of a row by its columns. Raises InputError where none fits, naming the columns."""
    has = {name for name, value in row.items() if value is not None}
    if row.get("audios") or row.get("audio"):
        raise InputError("audio is not handled; allowed media: images and videos")
    for known in FORMATS:
        if all(c in has if isinstance(c, str) else has & set(c) for c in known.columns):
            return known
    raise InputError(
        f"no question; columns: {', '.join(row) or 'none'}; add `messages` or `question`, or name the column: "
        "data.columns={question: ITS NAME}"
    )


def renamed(row: Row, columns: dict[str, str]) -> Row:
    """The row with a dataset's column names changed to ours. Raises InputError for one that it does not have."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise InputError(
                f"data.columns: {ours} is to be read from `{theirs}`; columns: {', '.join(row) or 'none'}"
            )
    taken = set(columns.values())
    rest = {k: v for k, v in row.items() if k not in taken and k not in columns}
    return {**rest, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _kept(row: Row, *names: str) -> Row:
    return {name: row[name] for name in names if name in row}
