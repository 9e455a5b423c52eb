"""Rows of files: the two formats, and an error with the row's number for everything that can be wrong."""

from __future__ import annotations

import json
import sys

import av
import numpy as np
import pytest
from PIL import Image

from zipr1.core.errors import InputError
from zipr1.core.extras import install
from zipr1.core.recipe import Data
from zipr1.data import rows, video
from zipr1.data.media import load_media
from zipr1.data.sources import files_in, load


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:-200])
    (tmp_path / "empty.png").write_bytes(b"")
    frames = np.repeat(pixels[None], 6, axis=0)
    video.write(tmp_path / "clip.mp4", np.ascontiguousarray(frames), 3.0)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:900])
    (tmp_path / "empty.mp4").write_bytes(b"")
    _write_header_only(tmp_path / "none.mp4")
    return tmp_path


def _write_header_only(path):
    """A valid mp4 with a video stream of no frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height = 32, 32
        container.start_encoding()


GOOD = {"question": "what is it?", "image": "a.png", "answer": "noise"}


def _write(folder, made, name="rows.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in made]
    path.write_text("\n".join(lines) + "\n")
    return path


def _load(folder, *made, **settings):
    return rows.load(_write(folder, made), Data(**settings))


def _types(prompt):
    return [[part["type"] for part in message["content"]] for message in prompt.messages]


def test_a_plain_question_gets_its_media_first(folder):
    (p,) = _load(folder, {**GOOD, "id": 7, "task": "t", "kind": "k", "reward": "exact"})
    assert (p.id, p.task, p.kind, p.reward, p.answer) == ("7", "t", "k", "exact", "noise")
    assert _types(p) == [["image", "text"]]
    assert p.messages[0]["content"][1]["text"] == "what is it?"
    assert [(m.kind, m.source) for m in p.media] == [("image", folder / "a.png")]


def test_an_unknown_reward_is_found_before_the_run(folder):
    with pytest.raises(
        InputError, match=r"row 2.*reward 'exakt': no such reward; did you mean 'exact'"
    ):
        _load(folder, GOOD, {**GOOD, "reward": "exakt"})
    with pytest.raises(InputError, match=r"row 1.*no such reward.*allowed: exact"):
        _load(folder, {**GOOD, "reward": ["exact"]})


def test_placeholders_keep_their_places_and_kinds(folder):
    row = {
        "prompt": "<video>compare\nwith <image>and <image>now",
        "images": ["a.png", "b.jpg"],
        "videos": ["clip.mp4"],
        "solution": 3,
    }
    (p,) = _load(folder, row)
    assert _types(p) == [["video", "text", "image", "text", "image", "text"]]
    assert [m.source.name for m in p.media] == ["clip.mp4", "a.png", "b.jpg"]
    assert p.answer == "3"


def test_messages_with_entries_and_several_turns(folder):
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "noise"},
        {
            "role": "user",
            "content": [{"type": "image", "image": "b.jpg"}, {"type": "text", "text": "?"}],
        },
    ]
    (p,) = _load(folder, {"messages": turns, "images": ["a.png"], "answer": "x"})
    assert _types(p) == [["text"], ["image", "text"], ["text"], ["image", "text"]]
    assert [m.source.name for m in p.media] == ["a.png", "b.jpg"]
    assert p.messages[3]["content"][0] == {"type": "image"}


def test_rows_about_the_same_picture_share_its_name(folder):
    same, again, other = _load(
        folder, GOOD, {**GOOD, "question": "why?"}, {**GOOD, "image": "b.jpg"}
    )
    assert same.picture == again.picture != other.picture
    assert len({same.id, again.id, other.id}) == 3


def test_media_root_is_used(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = _write(elsewhere, [GOOD])
    (p,) = rows.load(path, Data(media_root=str(folder)))
    assert p.media[0].source == folder / "a.png"
    with pytest.raises(InputError, match=r"row 1: .*no such image file.*media_root"):
        rows.load(path, Data())


def test_a_home_folder_is_found(folder, monkeypatch):
    _write(folder, [GOOD])
    monkeypatch.setenv("HOME", str(folder))
    (p,) = rows.load("~/rows.jsonl", Data(media_root="~"))
    assert p.media[0].source == folder / "a.png"
    for source in ("~no such user/rows.jsonl", "~no such user/rows"):
        with pytest.raises(InputError, match=r"~no such user/rows.*: no such (data )?file"):
            rows.load(source, Data())
    with pytest.raises(InputError, match=r"~no such user/a.png: no such image file"):
        rows.load("~/rows.jsonl", Data(media_root="~no such user"))


BAD = {
    "not json": ('{"question": ', "not JSON"),
    "no object": ([1], "list"),
    "no question": ({"image": "a.png", "answer": "x"}, "no question; columns: image, answer"),
    "empty question": ({**GOOD, "question": " "}, "`question` is empty"),
    "no answer": ({"question": "q", "image": "a.png"}, "no answer; columns: question, image"),
    "empty answer": ({**GOOD, "answer": "  "}, "answer is empty"),
    "table answer": ({**GOOD, "answer": {"x": 1}}, "answer is dict"),
    "list of empty": ({**GOOD, "answer": ["x", ""]}, "answer is empty"),
    "too few": ({**GOOD, "question": "<image><image>?"}, "2 image placeholders but 1 images"),
    "too many": (
        {
            "messages": [{"role": "user", "content": "<image>q"}],
            "images": ["a.png", "b.jpg"],
            "answer": "x",
        },
        "1 image placeholders but 2 images",
    ),
    "wrong kind": ({**GOOD, "question": "<video>?"}, "0 image placeholders but 1 images"),
    "missing": ({**GOOD, "image": "gone.png"}, r"gone\.png: no such image file"),
    "zero": ({**GOOD, "image": "empty.png"}, r"empty\.png: the image file is empty"),
    "cut": ({**GOOD, "image": "cut.jpg"}, r"cut\.jpg: the image is damaged"),
    "text": ({**GOOD, "image": "rows.jsonl"}, "not an image"),
    "url": ({**GOOD, "image": "https://x.org/a.png"}, "URL"),
    "no path": ({**GOOD, "image": 3}, "image 3"),
    "no base64": ({**GOOD, "image": "data:image/png;base64,@"}, "image data:.* not base64"),
    "cut base64": ({**GOOD, "image": "data:image/png;base64,iVBORw0KGgo="}, "image in the row"),
    "bare base64": ({**GOOD, "image": "iVBOR" * 1000}, r"image iVBOR.* 5,000 characters; .* path"),
    "empty cell": ('{"question": "q", "answer": NaN}', "answer is empty"),
    "audio": ({"question": "<audio>?", "audios": ["a.wav"], "answer": "x"}, "audio is not handled"),
    "boxes": (
        {
            "messages": [
                {"role": "user", "content": "<image>where is <ref-object>?"},
                {"role": "assistant", "content": "<bbox>"},
            ],
            "images": ["a.png"],
            "objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]},
        },
        "`objects` with <bbox>",
    ),
    "twice": ({**GOOD, "images": ["a.png"]}, "both `images` and `image`"),
    "video": ({"question": "q", "video": "gone.mp4", "answer": "x"}, "no such video file"),
    "empty video": ({"question": "q", "video": "empty.mp4", "answer": "x"}, r"empty \(0 bytes\)"),
    "cut video": (
        {"question": "q", "video": "cut.mp4", "answer": "x"},
        "cannot be read as a video",
    ),
    "no frames": ({"question": "q", "video": "none.mp4", "answer": "x"}, r"none\.mp4: .*video"),
    "role": ({"messages": [{"role": "bot", "content": "q"}], "answer": "x"}, "role 'bot'"),
    "last": (
        {"messages": [{"role": "assistant", "content": "q"}], "answer": "x"},
        "must be the user",
    ),
    "entry": (
        {"messages": [{"role": "user", "content": [{"type": "input_image"}]}], "answer": "x"},
        "content entry .*input_image",
    ),
    "no messages": ({"messages": [], "answer": "x"}, "not empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_with_its_number(folder, case):
    row, words = BAD[case]
    with pytest.raises(InputError, match=rf"rows\.jsonl: row 2: .*{words}"):
        _load(folder, GOOD, row, GOOD)


def test_bad_rows_are_skipped_and_counted(folder, caplog):
    made = [GOOD, BAD["not json"][0], GOOD, BAD["cut"][0], GOOD]
    prompts = _load(folder, *made, on_bad_row="skip")
    assert [p.id for p in prompts] == ["rows/1", "rows/3", "rows/5"]
    (record,) = [r for r in caplog.records if "skipped" in r.message]
    assert "2 of 5 rows skipped" in record.message
    assert "row 2" in record.message


@pytest.mark.parametrize(
    "made", [[], [BAD["zero"][0], BAD["no answer"][0]]], ids=["empty", "all bad"]
)
def test_nothing_usable_is_an_error(folder, made):
    with pytest.raises(
        InputError, match="all 2 rows are bad; the first: .*row 1" if made else "no rows"
    ):
        _load(folder, *made, on_bad_row="skip")


def test_json_holds_a_list(folder):
    path = folder / "rows.json"
    path.write_text(json.dumps([GOOD, GOOD]))
    assert [p.id for p in rows.load(path, Data())] == ["rows/1", "rows/2"]
    path.write_text(json.dumps({"rows": [GOOD]}))
    with pytest.raises(InputError, match=r"dict; allowed: a list of rows"):
        rows.load(path, Data())
    path.write_text("[{")
    with pytest.raises(InputError, match=r"rows\.json: not JSON"):
        rows.load(path, Data())


def test_parquet_without_pyarrow_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="parquet needs pyarrow") as told:
        rows.load(folder / "rows.parquet", Data())
    assert f"; {install('data')}, or convert it to .jsonl" in str(told.value)


def test_parquet_with_pictures_in_the_rows(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    stored = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    table = {"problem": ["<image>what?", "q"], "images": [[stored], None], "answer": ["x", "y"]}
    parquet.write_table(pyarrow.table(table), folder / "rows.parquet")
    one, two = rows.load(folder / "rows.parquet", Data())
    pixels, _ = load_media(one.media[0], 8)
    assert np.array_equal(pixels, np.asarray(Image.open(folder / "a.png")))
    assert one.media[0].size == (1, 24, 24, 0.0)
    assert two.media == ()
    assert one.picture != two.picture
    (folder / "rows.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match="not a parquet file"):
        rows.load(folder / "rows.parquet", Data())


def test_files_go_through_load(folder):
    path = _write(folder, [{**GOOD, "id": i} for i in range(30)])
    data = Data(source=str(path), heldout=str(path), heldout_prompts=5)
    train = [p.id for p in load(data, "train", 1)]
    assert sorted(train, key=int) == [str(i) for i in range(30)]
    assert train == [p.id for p in load(data, "train", 1)] != [p.id for p in load(data, "train", 2)]
    heldout = [p.id for p in load(data, "heldout", 1)]
    assert len(heldout) == 5
    assert heldout == [p.id for p in load(data, "heldout", 2)]
    with pytest.raises(InputError, match="no such data file"):
        load(Data(source=str(folder / "gone.jsonl")), "train", 0)


def test_files_that_a_recipe_names_outside_of_its_run(tmp_path, monkeypatch):
    """Rows inside of it, too, for they may name pictures anywhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "digits").mkdir()  # the embedded ones go first
    inside = tmp_path / "run"
    inside.mkdir()
    (inside / "rows.jsonl").touch()
    outside = {
        "rows.jsonl", "~/rows.jsonl", "/a/b", "./c", "run/../d.json", "owner/name:test", "e.parquet:[:-5]",
        "run/rows.jsonl", f"{inside}/x:[1:]",
    }  # fmt: skip
    within = {
        "digits",
        "validation",
        "of/hub:train",
        "of/hub:test:[5:]",
    }
    for source in outside | within:
        found = {"data.source": source} if source in outside else {}
        assert files_in(Data(source=source), inside) == found
        found = {key.replace("source", "heldout"): value for key, value in found.items()}
        assert files_in(Data(heldout=source), inside) == found
    for odd in ("a\0b", "\ud800", "~no such user/x", "x" * 5000):
        assert files_in(Data(source=odd), inside) == {"data.source": odd}
        assert files_in(Data(media_root=odd), inside) == {"data.media_root": odd}
    assert files_in(Data(media_root="run/media"), inside) == {}
    assert files_in(Data(media_root="of/hub"), inside) == {"data.media_root": "of/hub"}
    (inside / "link").symlink_to(tmp_path)
    assert files_in(Data(media_root="run/link/media"), inside) != {}
