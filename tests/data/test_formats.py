"""Rows as other tools write them: TRL, ms-swift, LLaMA-Factory, verl, EasyR1, Video-R1; and the `datasets` library."""

from __future__ import annotations

import base64
import json
import os
import socket

import numpy as np
import pytest
from PIL import Image

from zipr1.core.errors import InputError, Missing
from zipr1.core.recipe import Data, Recipe, Rewards
from zipr1.core.types import Media
from zipr1.data import rows, video
from zipr1.data.formats import FORMATS, VIDEO_R1, detect
from zipr1.data.media import load_media
from zipr1.data.sources import identity, load
from zipr1.train.rollout import reward_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (24, 32), "b.png": (40, 20)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / name)
    (root / "clips").mkdir()
    video.write(root / "clips" / "c.mp4", rng.integers(0, 256, (6, 32, 64, 3), np.uint8), 3.0)
    return root


def read(folder, *made, **settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return rows.load(path, Data(**settings))


def shape(prompt):
    """Roles with their parts: media by kind, text as it is."""
    return [(m["role"], [p.get("text", p["type"]) for p in m["content"]]) for m in prompt.messages]


def names(prompt):
    return [m.source.name for m in prompt.media]


def video_r1(**changes):
    return {
        "problem_id": 7,
        "problem": "What is shown?",
        "data_type": "video",
        "problem_type": "free-form",
        "options": [],
        "process": "",
        "solution": "<answer>a cat</answer>",
        "path": "./clips/c.mp4",
        "data_source": "x",
        **changes,
    }


TURN = [{"role": "user", "content": "<image>Who?"}]
# Format: the row, and roles, answer and media of the prompt.
KNOWN = {
    "TRL, conversational": (
        {"prompt": [{"role": "user", "content": "Who?"}], "image": "a.png", "solution": "x"},
        [("user", ["image", "Who?"])],
        "x",
        ["a.png"],
    ),
    "TRL, a system turn and several images": (
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Who?"}],
            "images": ["a.png", "b.png"],
            "solution": "x",
        },
        [("system", ["s"]), ("user", ["image", "image", "Who?"])],
        "x",
        ["a.png", "b.png"],
    ),
    "ms-swift, with a response that the reward replaces": (
        {
            "messages": [*TURN, {"role": "assistant", "content": "told"}],
            "images": [{"path": "a.png", "bytes": None}],
            "solution": "x",
        },
        [("user", ["image", "Who?"])],
        "x",
        ["a.png"],
    ),
    "ms-swift, messages alone": (
        {"messages": [*TURN, {"role": "assistant", "content": "told"}], "images": ["a.png"]},
        [("user", ["image", "Who?"])],
        "told",
        ["a.png"],
    ),
    "ms-swift, query and response": (
        {"query": "<video>When?", "response": "now", "videos": ["clips/c.mp4"]},
        [("user", ["video", "When?"])],
        "now",
        ["c.mp4"],
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "<image>Who?"},
                {"from": "gpt", "value": "Kane"},
                {"from": "human", "value": "Where?"},
                {"from": "gpt", "value": "here"},
            ],
            "images": ["a.png"],
        },
        [
            ("system", ["s"]),
            ("user", ["image", "Who?"]),
            ("assistant", ["Kane"]),
            ("user", ["Where?"]),
        ],
        "here",
        ["a.png"],
    ),
    "ms-swift, ShareGPT": (
        {"conversation": [{"human": "<image>Who?", "assistant": "Kane"}], "images": ["a.png"]},
        [("user", ["image", "Who?"])],
        "Kane",
        ["a.png"],
    ),
    "verl": (
        {
            "data_source": "geo",
            "prompt": TURN,
            "images": ["a.png"],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"answer": "no"},
        },
        [("user", ["image", "Who?"])],
        "4",
        ["a.png"],
    ),
    "verl, media as Qwen's tools write them": (
        {
            "prompt": [{"role": "user", "content": "<image><video>Who?"}],
            "images": [{"image": "a.png"}],
            "videos": [{"type": "video", "video": "clips/c.mp4", "fps": 2.0}],
            "reward_model": {"ground_truth": "4"},
        },
        [("user", ["image", "video", "Who?"])],
        "4",
        ["a.png", "c.mp4"],
    ),
    "ms-swift, one picture without a list": (
        {"messages": TURN, "images": "a.png", "solution": "x"},
        [("user", ["image", "Who?"])],
        "x",
        ["a.png"],
    ),
    "EasyR1": (
        {"images": ["a.png"], "problem": "<image>Find x.", "answer": "4"},
        [("user", ["image", "Find x."])],
        "4",
        ["a.png"],
    ),
    "Video-R1": (
        video_r1(),
        [("user", ["video", "What is shown?\nAnswer in one sentence."])],
        "a cat",
        ["c.mp4"],
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_rows_of_other_tools(folder, case):
    row, messages, answer, media = KNOWN[case]
    (prompt,) = read(folder, row)
    assert shape(prompt) == messages
    assert (prompt.answer, names(prompt)) == (answer, media)
    assert prompt.row == "rows.jsonl: row 1"


def test_a_picture_inside_of_the_row(folder):
    inline = base64.b64encode((folder / "a.png").read_bytes()).decode()
    (prompt,) = read(
        folder, {"messages": TURN, "images": [f"data:image/png;base64,{inline}"], "solution": "x"}
    )
    pixels, _ = load_media(prompt.media[0], 1)
    assert (pixels == load_media(Media("image", folder / "a.png"), 1)[0]).all()


def test_every_format_is_tried():
    tried = {detect(row).name for row, *_ in KNOWN.values()}
    assert tried == {known.name for known in FORMATS}


def test_verl_names_task_and_kind(folder):
    (prompt,) = read(folder, KNOWN["verl"][0])
    assert (prompt.task, prompt.kind) == ("geo", "math")
    with pytest.raises(InputError, match="row 1: `reward_model` is 'x'; it holds the answer"):
        read(folder, {**KNOWN["verl"][0], "reward_model": "x"})


def test_the_types_of_video_r1_choose_the_reward(folder):
    made = [
        video_r1(problem_type=kind, problem_id=i, options=["A. cat", "B. dog"], path="a.png", data_type="image")
        for i, kind in enumerate(VIDEO_R1)
    ]  # fmt: skip
    prompts = read(folder, *made)
    assert [p.reward for p in prompts] == ["choice", "number", "regression", "ocr", "rouge"]
    assert [p.kind for p in prompts] == list(VIDEO_R1)
    text = shape(prompts[0])[0][1][1]
    assert text.startswith("What is shown?\nOptions:\nA. cat\nB. dog\nAnswer with the letter")
    assert "Options" not in shape(prompts[1])[0][1][1]
    assert [m.kind for m in prompts[0].media] == ["image"]
    for changes, words in (
        ({"problem_type": "essay"}, "problem_type 'essay'; allowed: multiple choice, numerical"),
        ({"data_type": "audio"}, "data_type 'audio'; allowed: image, video"),
        ({"problem_type": "multiple choice", "options": []}, "`options` is empty"),
        ({"solution": "<answer> </answer>"}, "answer is empty"),
    ):
        with pytest.raises(InputError, match=f"row 1: {words}"):
            read(folder, video_r1(**changes))


def test_sizes_are_those_of_the_files(folder):
    one, two = read(folder, KNOWN["EasyR1"][0], video_r1())
    assert one.media[0].size == (1, 24, 32, 0.0)
    assert two.media[0].size == (6, 32, 64, 3.0)
    (unseen,) = read(folder, video_r1(), check="exists")
    assert unseen.media[0].size is None


def test_columns_can_be_named_and_several_answers_are_right(folder, caplog):
    caplog.set_level("INFO", logger="zipr1")
    row = {"q": "How many?", "image": "a.png", "label": ["Two", "2"], "answer": "not this one"}
    columns = {"question": "q", "answer": "label"}
    (prompt,) = read(folder, row, columns=columns, instruction="Say a number.")
    assert shape(prompt) == [("user", ["image", "How many?", "\nSay a number."])]
    assert (prompt.answer, prompt.accepted) == ("Two", ("2",))
    assert "rows.jsonl: read as question and answer (columns: image, question, answer)" in (
        caplog.text
    )
    check = reward_of(prompt, Recipe(rewards=Rewards(check="exact")))
    assert [check(said, prompt.answer) for said in ("two", "2", "three")] == [1, 1, 0]
    with pytest.raises(InputError, match=r"question is to be read from `q`; columns: image"):
        read(folder, {"image": "a.png"}, columns=columns)
    with pytest.raises(
        InputError, match=r"no question; columns: q, image.*data.columns=\{question"
    ):
        read(folder, {"q": "x", "image": "a.png"})


def test_a_folder_holds_splits(folder, tmp_path):
    row = {**KNOWN["EasyR1"][0], "images": [str(folder / "a.png")]}
    (tmp_path / "train-00000-of-00002.jsonl").write_text(json.dumps({**row, "id": "one"}) + "\n")
    (tmp_path / "train-00001-of-00002.jsonl").write_text(json.dumps({**row, "id": "two"}) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps({**row, "id": "three"}) + "\n")
    data = Data(source=str(tmp_path), heldout=f"{tmp_path}:test")
    assert sorted(p.id for p in load(data, "train", 0)) == ["one", "two"]
    assert [p.id for p in load(data, "heldout", 0)] == ["three"]
    first = Data(source=str(tmp_path), streaming=True, prompts=1)
    assert [p.id for p in load(first, "train", 0)] == ["one"]


def test_a_source_can_be_cut_in_two(folder):
    read(folder, *({**KNOWN["EasyR1"][0], "id": i} for i in range(5)))
    source = str(folder / "rows.jsonl")
    data = Data(source=f"{source}:[:-2]", heldout=f"{source}:[-2:]")
    assert sorted(p.id for p in load(data, "train", 0)) == ["0", "1", "2"]
    heldout = load(data, "heldout", 0)
    assert sorted(p.id for p in heldout) == ["3", "4"]
    assert {p.row for p in heldout} == {"rows.jsonl: row 4", "rows.jsonl: row 5"}


def test_the_hash_follows_what_the_rows_say(folder, tmp_path):
    row = KNOWN["EasyR1"][0]
    same, again = (identity(read(folder, row)) for _ in range(2))
    assert same == again and len(same) == 64
    for change in ({"answer": "5"}, {"problem": "<image>Find y."}, {"images": ["b.png"]}):
        assert identity(read(folder, {**row, **change})) != same


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A dataset on disk with pictures inside, and the library's cache away from home."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = datasets.Dataset.from_dict(
        {
            "problem": ["<image>what?", "<image><image>which?", "<image>why?"],
            "images": [[str(folder / n) for n in names] for names in (["a.png"], ["a.png", "b.png"], ["b.png"])],
            "answer": ["x", "y", "z"],
        },
        features=datasets.Features(
            {
                "problem": datasets.Value("string"),
                "images": datasets.List(datasets.Image()),
                "answer": datasets.Value("string"),
            }
        ),
    )  # fmt: skip
    return datasets, made


def test_a_saved_dataset_keeps_its_pictures_until_they_are_needed(hub, folder, tmp_path):
    datasets, made = hub
    datasets.DatasetDict({"train": made, "test": made.select([2])}).save_to_disk(tmp_path / "set")
    prompts = rows.load(str(tmp_path / "set"), Data())
    assert [p.answer for p in prompts] == ["x", "y", "z"]
    assert not isinstance(prompts[1].media[1].source, bytes)
    pixels, _ = load_media(prompts[1].media[1], 8)
    assert np.array_equal(pixels, np.asarray(Image.open(folder / "b.png")))
    assert prompts[1].media[1].size == (1, 40, 20, 0.0)
    assert len({m.key for p in prompts for m in p.media}) == 4
    assert [p.answer for p in rows.load(f"{tmp_path / 'set'}:test", Data())] == ["z"]
    with pytest.raises(InputError, match=r"set \(gone\): does not load"):
        rows.load(f"{tmp_path / 'set'}:gone", Data())


def test_parquet_in_a_folder_streams(hub, folder, tmp_path):
    _, made = hub
    (tmp_path / "p").mkdir()
    made.to_parquet(tmp_path / "p" / "part.parquet")
    whole = rows.load(str(tmp_path / "p"), Data())
    part = rows.load(str(tmp_path / "p"), Data(streaming=True, prompts=2))
    assert [p.answer for p in whole] == ["x", "y", "z"]
    assert [p.answer for p in part] == ["x", "y"]
    for prompts in (whole, part):
        pixels, _ = load_media(prompts[0].media[0], 8)
        assert np.array_equal(pixels, np.asarray(Image.open(folder / "a.png")))


def test_what_is_not_here_says_how_to_get_it():
    pytest.importorskip("datasets")
    with pytest.raises(
        Missing,
        match=r"nobody/nothing \(train\): is not on this machine, and HF_HUB_OFFLINE is set; unset .*hf download",
    ):
        rows.load("nobody/nothing", Data())
    with pytest.raises(Missing, match=r"no such data file"):
        rows.load("data/gone.jsonl", Data())
    with pytest.raises(Missing, match=r"no such file or folder"):
        rows.load("./gone", Data())
    with pytest.raises(
        InputError, match=r"data source 'digit': unknown; allowed: digits, pages, a .jsonl"
    ):
        rows.load("digit", Data())


def test_a_host_name_that_is_not_found_leaves_the_process_online(hub, monkeypatch):
    """One source is tried without a network: fast, from what was downloaded. The next one is asked for online."""
    datasets, made = hub
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    tried = []

    def load_dataset(path, *_, **__):
        tried.append((path, constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("offline")
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def no_such_host(*_):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_host)
    with pytest.raises(
        Missing,
        match=r"one/first .*huggingface.co cannot be found from here; on a machine with a network",
    ):
        rows.load("one/first", Data())
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert len(rows.load("one/second", Data())) == 3
    assert tried == [("one/first", True, True), ("one/second", False, False)]


def _nested(datasets, folder):
    """Rows whose pictures lie within messages, as TRL writes them; in frames of clips; and beside a null."""
    picture = datasets.Image()
    text = datasets.Value("string")
    part = {"type": text, "text": text, "image": picture}
    message = {"role": text, "content": datasets.List(part)}
    features = {
        "messages": datasets.List(message),
        "videos": datasets.List(datasets.List(picture)),
        "answer": text,
    }
    a, b = str(folder / "a.png"), str(folder / "b.png")
    ask = {"type": "text", "text": "<video>what?", "image": None}
    said = [{"role": "user", "content": [{"type": "image", "text": None, "image": a}, ask]}]
    return datasets.Dataset.from_dict(
        {"messages": [said, said], "videos": [[[a, a]], [[b]]], "answer": ["x", "y"]},
        features=datasets.Features(features),
    )


@pytest.mark.parametrize("how", ["saved", "parquet", "folder of parquet", "streamed"])
def test_pictures_within_messages_and_clips(hub, folder, tmp_path, how):
    made = _nested(hub[0], folder)
    (tmp_path / "set").mkdir()
    source = tmp_path / "set"
    if how == "saved":
        made.save_to_disk(source)
    else:
        made.to_parquet(source / ("train.parquet" if how == "parquet" else "part.parquet"))
        source = source / "train.parquet" if how == "parquet" else source
    one, two = rows.load(str(source), Data(streaming=how == "streamed", prompts=2))
    assert [m.kind for m in one.media] == ["image", "video"]
    wanted = {name: np.asarray(Image.open(folder / f"{name}.png").convert("RGB")) for name in "ab"}
    assert np.array_equal(load_media(one.media[0], 8)[0], wanted["a"])
    assert np.array_equal(load_media(one.media[1], 8)[0], np.stack([wanted["a"]] * 2))
    assert np.array_equal(load_media(two.media[1], 8)[0], wanted["b"][None])
    assert [m.size[:3] for m in one.media] == [
        (1, *wanted["a"].shape[:2]), (2, *wanted["a"].shape[:2]),
    ]  # fmt: skip
    assert len({one.media[1].key, two.media[1].key}) == 2
    if how == "saved":  # they stay there until they are needed
        assert not isinstance(one.media[0].source, bytes)


def test_a_clip_within_a_saved_row_is_refused_as_such(hub, tmp_path):
    datasets, _ = hub
    video.write(tmp_path / "a.mp4", np.zeros((4, 64, 64, 3), np.uint8), 10)
    made = {"problem": ["<video>q"], "video": [str(tmp_path / "a.mp4")], "answer": ["1"]}
    table = datasets.Dataset.from_dict(made).cast_column("video", datasets.Video())
    table.save_to_disk(tmp_path / "set")
    with pytest.raises(InputError, match="row 1: a video inside the row; give the path of a file"):
        rows.load(str(tmp_path / "set"), Data())


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t.xlsx", "t"])
def test_a_file_of_another_kind_is_not_called_missing(tmp_path, name):
    (tmp_path / name).write_text("question,answer\nq,a\n")
    for source in (str(tmp_path / name), f"{tmp_path / name}:[:-1]"):
        with pytest.raises(
            InputError, match=rf"{name}: a data file that ends in .*; allowed: \.jsonl"
        ):
            rows.load(source, Data())
    with pytest.raises(Missing, match="no such file"):
        rows.load(str(tmp_path / "gone.csv"), Data())


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (3.0, "3"), (-2.0, "-2"), (2.5, "2.5"), (1e6, "1000000"), (1e22, "1e+22"),
        ("3.0", "3.0"), (7, "7"), (True, "True"),
    ],
)  # fmt: skip
def test_whole_numbers_of_a_table_are_whole(folder, value, wanted):
    """A column of pandas with an empty cell holds 3.0 where 3 was meant: whatever reads the answer, it is 3."""
    (prompt,) = read(folder, {"question": "q", "answer": value, "id": 5.0})
    assert prompt.answer == wanted and prompt.id == "5"
