"""Chats as people write them: one meaning at every door, or a refusal that names what is not handled."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import tinymodels
import torch
from PIL import Image

import zipr1
from zipr1.core.errors import InputError
from zipr1.core.recipe import Data, Recipe
from zipr1.data import rows, video
from zipr1.models.encoder import MediaEncoder

QUESTION = {"type": "text", "text": "which digit is red?"}


@pytest.fixture(scope="module")
def processor():
    return zipr1.load("tiny", device="cpu")[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """a.png of 64 x 64 pixels, b.png of 96 x 64, and a.mp4 of 4 seconds at 10 frames a second."""
    root = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for name, width in (("a.png", 64), ("b.png", 96), ("a b.png", 64)):
        pixels = rng.integers(0, 256, (64, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    grey = (np.arange(40, dtype=np.uint8) * 5)[:, None, None, None]
    clip = np.ascontiguousarray(np.broadcast_to(grey, (40, 64, 64, 3)))
    video.write(root / "a.mp4", clip, 10)
    return root


def made(processor, *parts, **options):
    chat = [{"role": "user", "content": [*parts, QUESTION]}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, **options)


def grids(inputs):
    return {k: v.tolist() for k, v in inputs.items() if k.endswith("thw")}


def in_a_row(folder, *parts):
    """What training makes of the same parts: the grids of a row with them."""
    row = {"messages": [{"role": "user", "content": [*parts, QUESTION]}], "answer": "x"}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    (prompt,) = rows.load(folder / "rows.jsonl", Data())
    policy = tinymodels.shared()
    recipe = Recipe.model_validate({"model": {"path": "tiny"}, "data": {"max_frames": 16}})
    encoder = MediaEncoder(policy, recipe)
    (encoded,) = encoder.encode([prompt])
    assert encoder.length(prompt)[0] == len(encoded)  # what is planned is what comes
    return [list(v.grid) for v in encoded.visuals]


def uri(folder, head="data:image/png;base64,"):
    return head + base64.b64encode((folder / "a.png").read_bytes()).decode()


PICTURES = {
    "a path": lambda f: {"type": "image", "image": str(f / "a.png")},
    "path": lambda f: {"type": "image", "path": str(f / "a.png")},
    "url": lambda f: {"type": "image", "url": str(f / "a.png")},
    "file://": lambda f: {"type": "image", "image": f"file://{f}/a.png"},
    "file://localhost": lambda f: {"type": "image", "image": f"file://localhost{f}/a.png"},
    "file:// with a space": lambda f: {"type": "image", "image": f"file://{f}/a b.png"},
    "file:// with %20": lambda f: {"type": "image", "image": f"file://{f}/a%20b.png"},
    "image_url": lambda f: {"type": "image_url", "image_url": {"url": str(f / "a.png")}},
    "image_url, file://": lambda f: {"type": "image_url", "image_url": {"url": f"file://{f}/a.png"}},
    "image_url, data": lambda f: {"type": "image_url", "image_url": {"url": uri(f)}},
    "image_url with detail": lambda f: {
        "type": "image_url", "image_url": {"url": str(f / "a.png"), "detail": "auto"}
    },
    "image_url as text": lambda f: {"type": "image_url", "image_url": str(f / "a.png")},
    "image_url of type image": lambda f: {"type": "image", "image_url": str(f / "a.png")},
    "no type": lambda f: {"image": str(f / "a.png")},
    "no type, image_url": lambda f: {"image_url": {"url": str(f / "a.png")}},
    "nulls of a table": lambda f: {"type": "image", "text": None, "image": str(f / "a.png"), "video": None},
    "an empty text of a table": lambda f: {"type": "image", "text": "", "image": str(f / "a.png")},
    "data:image/png": lambda f: {"type": "image", "image": uri(f)},
    "data:image": lambda f: {"type": "image", "image": uri(f, "data:image;base64,")},
    "data with a charset": lambda f: {
        "type": "image", "image": uri(f, "data:image/png;charset=utf-8;base64,")
    },
    "data with a name": lambda f: {"type": "image", "image": uri(f, "data:image/png;name=a.png;base64,")},
    "data, broken into lines": lambda f: {
        "type": "image", "image": "data:image/png;base64,\n" + base64.encodebytes((f / "a.png").read_bytes()).decode()
    },
    "base64": lambda f: {"type": "image", "base64": uri(f, "")},
    "base64 without a name": lambda f: {"type": "image", "image": uri(f, "")},
}  # fmt: skip


@pytest.mark.parametrize("way", PICTURES)
def test_a_picture_however_it_is_written(processor, folder, way):
    part = PICTURES[way](folder)
    got, wanted = (
        made(processor, p) for p in (part, {"type": "image", "image": str(folder / "a.png")})
    )
    assert grids(got) == {"image_grid_thw": [[1, 8, 8]]}
    if " b.png" not in str(part) and "%20" not in str(part):
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)
    assert in_a_row(folder, part) == [[1, 8, 8]]


LIVE = {
    "PIL": lambda f: Image.open(f / "a.png"),
    "bytes": lambda f: (f / "a.png").read_bytes(),
    "an open file": lambda f: io.BytesIO((f / "a.png").read_bytes()),
    "a tensor": lambda f: torch.from_numpy(np.array(Image.open(f / "a.png"))),
    "an array": lambda f: np.asarray(Image.open(f / "a.png")),
    "a cell of a data set": lambda f: {"bytes": (f / "a.png").read_bytes(), "path": "a.png"},
}


@pytest.mark.parametrize("way", LIVE)
def test_a_picture_in_memory(processor, folder, way):
    got = made(processor, {"type": "image", "image": LIVE[way](folder)})
    wanted = made(processor, {"type": "image", "image": str(folder / "a.png")})
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)


# Patches of 8 pixels, tokens of 16; pictures of 64 x 64, and a clip of 4 seconds of which 16 frames are read.
ASKED = {
    "max_pixels": ("image", {"max_pixels": 1024}, [1, 4, 4]),
    "less than the model's least": ("image", {"max_pixels": 200}, [1, 2, 2]),
    "min_pixels": ("image", {"min_pixels": 128 * 128}, [1, 16, 16]),
    "both bounds": ("image", {"min_pixels": 1024, "max_pixels": 2304}, [1, 6, 6]),
    "a size": ("image", {"resized_height": 32, "resized_width": 48}, [1, 4, 6]),
    "a size that is no whole tokens": ("image", {"resized_height": 40, "resized_width": 70}, [1, 4, 8]),
    "bounds as a table has them": ("image", {"max_pixels": 1024.0, "min_pixels": None}, [1, 4, 4]),
    "fps": ("video", {"fps": 1.0}, [2, 8, 8]),
    "fps under one": ("video", {"fps": 0.5}, [2, 8, 8]),
    "min_frames": ("video", {"fps": 0.5, "min_frames": 2}, [1, 8, 8]),
    "nframes": ("video", {"nframes": 6}, [3, 8, 8]),
    "num_frames": ("video", {"num_frames": 5}, [2, 8, 8]),
    "max_frames": ("video", {"max_frames": 4}, [2, 8, 8]),
    "more frames than the rule": ("video", {"nframes": 20}, [10, 8, 8]),
    "pixels of frames": ("video", {"fps": 1, "max_pixels": 1024}, [2, 4, 4]),
    "a size of frames": ("video", {"nframes": 2, "resized_height": 32, "resized_width": 64}, [1, 4, 8]),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_what_a_part_asks_for_is_done(processor, folder, name):
    """In a chat, and in a row: there as an entry of a message and as a listed medium, as verl writes it."""
    kind, options, grid = ASKED[name]
    source = str(folder / ("a.png" if kind == "image" else "a.mp4"))
    part = {"type": kind, kind: source, **options}
    assert grids(made(processor, part)) == {f"{kind}_grid_thw": [grid]}
    assert in_a_row(folder, part) == [grid]
    row = {"question": f"<{kind}>q", f"{kind}s": [{kind: source, **options}], "answer": "x"}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    (prompt,) = rows.load(folder / "rows.jsonl", Data())
    encoder = MediaEncoder(tinymodels.shared(), Recipe.model_validate({"model": {"path": "tiny"}}))
    assert [list(v.grid) for v in encoder.encode([prompt])[0].visuals] == [grid]


@pytest.mark.parametrize("name", [n for n in ASKED if n not in ("max_frames",)])
def test_what_a_call_asks_for_holds_for_all_that_say_nothing(processor, folder, name):
    kind, options, grid = ASKED[name]
    parts = [
        {"type": "image", "image": str(folder / "a.png")},
        {"type": "video", "video": str(folder / "a.mp4")},
        {
            "type": kind,
            kind: str(folder / ("a.png" if kind == "image" else "a.mp4")),
            "max_pixels": 256,
        },
    ]
    for way in (options, {"processor_kwargs": options}):
        got = grids(made(processor, *parts, **way))[f"{kind}_grid_thw"]
        assert got[0] == grid
        if "resized_height" not in options and "min_pixels" not in options:
            assert got[1][1:] == [2, 2]


def test_the_rest_of_a_chat_is_as_before(processor, folder):
    """What is asked of one picture is not asked of the next."""
    parts = [{"type": "image", "image": str(folder / n)} for n in ("a.png", "b.png")]
    parts[0]["max_pixels"] = 1024
    assert grids(made(processor, *parts)) == {"image_grid_thw": [[1, 4, 4], [1, 8, 12]]}


REFUSED = {
    "content None": ([{"role": "user", "content": None}], "content None; allowed: text or a list"),
    "an empty list": ([{"role": "user", "content": []}], r"content \[\]; allowed"),
    "no messages": ([], r"conversation \[\]; allowed"),
    "no messages in one of several": ([[]], r"chat \[\]; allowed"),
    "a text": ("hello", "conversation 'hello'; allowed"),
    "no role": ([{"content": "q"}], "a message has `role` and `content`"),
    "text in a list": ([{"role": "user", "content": ["q"]}], "content entry 'q'; allowed"),
    "a part of nothing": ([{"role": "user", "content": [{}]}], r"content entry \{\}; allowed"),
    "a sound": ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], "content entry .*audio"),
    "OpenAI's newer form": ([{"role": "user", "content": [{"type": "input_image"}]}], "content entry .*input_image"),
    "a text that is none": ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "content entry"),
    "a text with more": (
        [{"role": "user", "content": [{"type": "text", "text": "q", "cache_control": {}}]}],
        "`cache_control` is not handled",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_chats_that_are_none_are_refused(processor, name):
    chat, words = REFUSED[name]
    for tokenize in (False, True):
        with pytest.raises(InputError, match=words):
            processor.apply_chat_template(chat, tokenize=tokenize)


PARTS = {
    "a URL": ({"image": "https://x.org/a.png"}, "a URL; only local files are read; download the image"),
    "a bucket": ({"image": "s3://x/a.png"}, "a URL"),
    "a hub": ({"image": "hf://datasets/x/a.png"}, "a URL"),
    "a URL in image_url": ({"image_url": {"url": "https://x.org/a.png"}}, "a URL"),
    "a picture of a drawing program": ({"image": "data:image/svg+xml,<svg/>"}, "data URI without ;base64"),
    "a clip as data": ({"video": "data:video/mp4;base64,AAAA"}, "a video inside the row; give the path"),
    "a clip as a picture": ({"image": "data:video/mp4;base64,AAAA"}, "holds video data"),
    "no base64": ({"image": "data:image/png;base64,@@"}, "not base64"),
    "base64 of nothing": ({"image": "data:image/png;base64,AAAA"}, "not an image"),
    "a file that is not there": ({"image": "file:///gone.png"}, "/gone.png: no such image file"),
    "two sources": ({"type": "image", "image": "a.png", "url": "a.png"}, "both `image` and `url`"),
    "two kinds": ({"image": "a.png", "video": "a.mp4"}, "content entry"),
    "of another kind": ({"type": "image", "video": "a.mp4"}, "`video` is not handled"),
    "video_start": ({"video": "a.mp4", "video_start": 1.0}, "`video_start` is not handled; allowed: fps"),
    "total_pixels": ({"video": "a.mp4", "total_pixels": 9}, "`total_pixels` is not handled"),
    "fps of a picture": ({"image": "a.png", "fps": 1}, "`fps` is not handled; allowed: min_pixels"),
    "detail": ({"image_url": {"url": "a.png", "detail": "low"}}, "`detail` is not handled"),
    "half a size": ({"image": "a.png", "resized_height": 32}, "give both"),
    "fps and nframes": ({"video": "a.mp4", "fps": 1, "nframes": 4}, "both fps and num_frames"),
    "frames twice": ({"video": "a.mp4", "num_frames": 4, "nframes": 4}, "under another name"),
    "no pixels": ({"image": "a.png", "max_pixels": 0}, "max_pixels of one image is 0; allowed"),
    "pixels as text": ({"image": "a.png", "max_pixels": "1024"}, "max_pixels of one image is '1024'"),
    "half a frame": ({"video": "a.mp4", "nframes": 2.5}, "nframes of one video is 2.5; allowed: a whole"),
    "yes as a number": ({"image": "a.png", "max_pixels": True}, "max_pixels of one image is True"),
    "least above most": ({"image": "a.png", "min_pixels": 9, "max_pixels": 4}, "min_pixels 9 above"),
    "nothing": ({"type": "image", "image": {"bytes": None, "path": None}}, "image None; allowed"),
    "a number": ({"type": "image", "image": 7}, "image 7; allowed: the path of a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_are_not_handled_are_refused_in_chats_and_rows(processor, tmp_path, name):
    part, words = PARTS[name]
    with pytest.raises(InputError, match=words):
        made(processor, part)
    row = {"messages": [{"role": "user", "content": [part, QUESTION]}], "answer": "x"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=rf"row 1: .*{words}"):
        rows.load(tmp_path / "rows.jsonl", Data())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": {"longest_edge": 9}}, "size is not handled"),
        ({"do_sample_frames": False}, "do_sample_frames is not handled"),
        ({"videos_kwargs": {"fps": 1}}, "videos_kwargs is not handled"),
        ({"do_resize": False}, "do_resize is not handled"),
        ({"tools": [{"name": "f"}]}, "tools is not handled, and the chat template has no such variable"),
        ({"enable_thinking": False}, "enable_thinking is not handled"),
        ({"return_assistant_tokens_mask": True}, "return_assistant_tokens_mask is not handled"),
        ({"fps": 1, "num_frames": 3}, "both fps and num_frames"),
        ({"padding_side": "right"}, "padding_side"),
    ],
)  # fmt: skip
def test_options_of_a_call_are_never_dropped(processor, folder, options, words):
    for tokenize in (False, True):
        with pytest.raises(InputError, match=words):
            processor.apply_chat_template(
                [{"role": "user", "content": "q"}], tokenize=tokenize, **options
            )


def test_variables_of_the_template_reach_it(processor):
    """Those that it has; an option of that name is not taken for one of the processor's."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ mood }}"
    text = processor.apply_chat_template(
        [{"role": "user", "content": "q "}], chat_template=template, mood="gaily"
    )
    assert text == "q gaily"


def test_other_keys_of_a_message_reach_the_template(processor):
    template = "{% for m in messages %}{{ m.role }} {{ m.name }}: {{ m.content }}{% endfor %}"
    text = processor.apply_chat_template(
        [{"role": "user", "content": "q", "name": "Ada", "tool_calls": None}],
        chat_template=template,
    )
    assert text == "user Ada: q"


def test_a_last_message_is_continued(processor, folder):
    """The prompt ends within the answer that was begun, and beside a picture too."""
    begun = {"role": "assistant", "content": [{"type": "text", "text": "the red"}]}
    asked = {
        "role": "user",
        "content": [{"type": "image", "image": str(folder / "a.png")}, QUESTION],
    }
    text = processor.apply_chat_template([asked, begun], continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nthe red")
    inputs = processor.apply_chat_template(
        [asked, begun], continue_final_message=True, tokenize=True
    )
    tail = processor.tokenizer("assistant\nthe red", add_special_tokens=False)["input_ids"]
    assert inputs["input_ids"][0, -len(tail) :].tolist() == tail
    with pytest.raises(InputError, match="not compatible"):
        processor.apply_chat_template(
            [asked, begun], continue_final_message=True, add_generation_prompt=True
        )


def test_an_empty_system_message_of_a_chat_reaches_the_template(processor):
    """As in transformers, where templates tell it from none."""
    template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "q"}]
    assert processor.apply_chat_template(chat, chat_template=template) == "[system:][user:q]"


def row_of(tmp_path, **row):
    for name in "ab":
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"answer": "x", **row}))
    return rows.load(tmp_path / "rows.jsonl", Data())[0]


def said(prompt):
    return [[p.get("text", p["type"]).strip() for p in m["content"]] for m in prompt.messages]


EMPTY = ["", None, []]


@pytest.mark.parametrize("content", EMPTY)
def test_an_empty_system_message_of_a_row_is_none(tmp_path, content):
    """Tables write it where there is none."""
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "q"}]
    assert said(row_of(tmp_path, messages=messages)) == [["q"]]


@pytest.mark.parametrize("content", EMPTY)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_other_empty_messages_of_a_row_are_refused(tmp_path, content, role):
    messages = [{"role": role, "content": content}, {"role": "user", "content": "q"}]
    with pytest.raises(InputError, match=r"row 1: content .*; allowed: text or a list"):
        row_of(tmp_path, messages=messages)


PLACES = {
    "in a text": "before <image> between <image> after?",
    "in a text of a list": [{"type": "text", "text": "before <image> between <image> after?"}],
    "in two texts": [{"type": "text", "text": "before <image> between"}, {"type": "text", "text": "<image> after?"}],
    "one in a text, one an entry": [
        {"type": "text", "text": "before <image> between"}, {"type": "image"}, {"type": "text", "text": "after?"},
    ],
    "entries": [
        {"type": "text", "text": "before"}, {"type": "image"}, {"type": "text", "text": "between"},
        {"type": "image_url"}, {"type": "text", "text": "after?"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("way", PLACES)
def test_pictures_stand_at_their_places(tmp_path, way):
    messages = [{"role": "user", "content": PLACES[way]}]
    prompt = row_of(tmp_path, messages=messages, images=["a.png", "b.png"])
    assert said(prompt) == [["before", "image", "between", "image", "after?"]]
    assert [m.source.name for m in prompt.media] == ["a.png", "b.png"]


def test_a_picture_of_its_own_and_a_listed_one_keep_their_order(tmp_path):
    content = [
        {"type": "text", "text": "one <image> two"},
        {"type": "image", "image": "b.png"},
    ]
    prompt = row_of(tmp_path, messages=[{"role": "user", "content": content}], images=["a.png"])
    assert [m.source.name for m in prompt.media] == ["a.png", "b.png"]


def test_a_word_in_brackets_is_a_word_where_no_media_are_listed(tmp_path, processor):
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "what is the tag <video>?"},
    ]
    prompt = row_of(tmp_path, messages=[{"role": "user", "content": content}])
    assert said(prompt) == [["image", "what is the tag <video>?"]]
    assert "<video>?" in processor.apply_chat_template(
        [{"role": "user", "content": "the tag <video>?"}]
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "text", "text": "<image> and <image>"}], "2 image placeholders but 1 images"),
        ([{"type": "image"}, {"type": "text", "text": "<image>"}], "2 image placeholders but 1"),
        ([{"type": "image", "image": "b.png"}, {"type": "text", "text": "q"}], "0 image placeholders but 1"),
    ],
)  # fmt: skip
def test_a_listed_picture_without_a_place_is_refused(tmp_path, content, words):
    with pytest.raises(InputError, match=words):
        row_of(tmp_path, messages=[{"role": "user", "content": content}], images=["a.png"])


def test_a_picture_in_the_closing_answer_is_refused(tmp_path):
    messages = [
        {"role": "user", "content": "draw it"},
        {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
    ]
    with pytest.raises(InputError, match="the closing answer holds an image"):
        row_of(tmp_path, messages=messages)


@pytest.mark.parametrize("family", tinymodels.OTHERS)
def test_sizes_of_one_picture_in_every_family(family, tmp_path, folder):
    """Done where pictures keep their size, refused by name where all become one tile."""
    processor = zipr1.load(str(tinymodels.folder(family, tmp_path)), device="cpu")[1]
    part = {"type": "image", "image": str(folder / "b.png"), "max_pixels": 1024}
    if not processor.inner.settings.tile:
        assert grids(made(processor, part)) == {"image_grid_thw": [[1, 2, 4]]}
        return
    with pytest.raises(InputError, match=r"a size is asked of one image \(max_pixels"):
        made(processor, part)
    assert len(made(processor, {"type": "image", "image": Image.open(folder / "a.png")}))


def test_a_call_takes_frames_by_their_paths(processor, folder):
    """A list in the list is one clip; clips stay clips."""
    mark = "<|vision_start|><|video_pad|><|vision_end|>q"
    paths = [str(folder / "a.png")] * 4
    inputs = processor(text=mark, videos=[paths])
    assert grids(inputs) == {"video_grid_thw": [[2, 8, 8]]}
    both = processor(text=[mark, mark], videos=[[str(folder / "a.mp4")], [str(folder / "a.mp4")]])
    assert grids(both) == {"video_grid_thw": [[8, 8, 8]] * 2}
    with pytest.raises(InputError, match="a picture and no clip"):
        processor(text=mark, videos=paths[:1])


@torch.no_grad()
def test_a_placeholder_is_never_said(folder):
    """Even where it would be the likeliest word by far."""
    model, processor = zipr1.load("tiny", device="cpu")
    inputs = made(processor, {"type": "image", "image": str(folder / "a.png")})
    last = model.model(**inputs).last_hidden_state[0, -1]
    head = model.lm_head.weight.detach().clone()
    places = list(processor.inner.placeholder.values())
    head[places] = 10 * last / last.norm()
    model.lm_head.weight = torch.nn.Parameter(head)
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 4}
    said = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert not torch.isin(said, torch.tensor(places)).any()
