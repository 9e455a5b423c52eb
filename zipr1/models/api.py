"""`zipr1.load`: a trained run, an exported folder or any model, ready to be called as transformers' models are.

The processor has the calls of transformers' own ones, and makes the inputs that the model was trained on: PIL for
pictures, decord or PyAV for clips, the same on every machine, with no need for torchvision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zipr1.core.errors import InputError
from zipr1.core.load import validate
from zipr1.core.recipe import Sparse
from zipr1.core.types import Media
from zipr1.data.chat import OPTIONS, asked_of, medium, parse
from zipr1.data.media import load_timed
from zipr1.models.inputs import model_inputs
from zipr1.models.loading import WEIGHT_DTYPES, choose_device, save_processor, without_plans
from zipr1.models.open import BOUNDS, find_source, open_model, stored_dtype
from zipr1.models.processors import Processor
from zipr1.models.sparse.session import session_of
from zipr1.models.visual import Visual

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Options of a call that hold for all of its media; and those that say what is so anyway, with the values that do.
LIMITS = ("fps", "sample_fps", "max_frames")
TAKEN = (*OPTIONS["video"], "padding", "padding_side")
OF_CALLS = {
    "truncation": (False,),
    "add_special_tokens": (False,),
    "do_sample_frames": (True,),
    "return_mm_token_type_ids": (True,),
}
# Keys of a recipe's `model` section that `load` takes beside those of `sparse`.
MODEL_KEYS = ("revision", "trust_remote_code", *BOUNDS)


def load(
    path: str,
    budget: float | None,
    device: str | None,
    dtype: str | None,
    settings: Mapping[str, Any],
) -> tuple[Any, ChatProcessor]:
    """See `zipr1.load`."""
    where = "zipr1.load"
    chosen = {"path": path, **{k: v for k, v in settings.items() if k in MODEL_KEYS}}
    wanted = validate({"model": chosen}, where).model
    source = find_source(path)
    others = {k: v for k, v in settings.items() if k not in MODEL_KEYS}
    sparse = changed(source.sparse, budget, others, where)
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise InputError(f"{where}: dtype {dtype!r}; allowed: {', '.join(WEIGHT_DTYPES)}")
    place = choose_device(device)
    without_plans(place)
    if dtype is None:
        dtype = "float32" if place.type == "cpu" else stored_dtype(path, wanted.revision)
    opened = open_model(wanted.model_copy(update={"dtype": dtype}), place)
    model, processor = opened.model, opened.processor
    # As in training: these end an answer, and placeholders without a picture are never said.
    model.generation_config.eos_token_id = processor.end_ids
    model.generation_config.suppress_tokens = sorted(processor.placeholder.values())
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = processor.end_id
    session_of(model).enter(sparse)
    data = source.data
    return model, ChatProcessor(processor, model.config.model_type, data.max_frames, data.fps)


def changed(base: Sparse, budget: float | None, settings: Mapping[str, Any], where: str) -> Sparse:
    """`base` with another p and other fields of `Sparse`. Raises InputError that names a wrong one."""
    values = {**base.model_dump(), **settings, **({} if budget is None else {"p": budget})}
    if isinstance(values["p"], int) and not isinstance(values["p"], bool):
        values["p"] = float(values["p"])
    return validate({"sparse": values}, where).sparse


class ChatProcessor:
    """Chats, pictures and clips -> inputs of `model(...)` and `model.generate(...)`; tokens -> text.

    max_frames, fps: of clips, unless a call says otherwise.
    """

    def __init__(
        self,
        processor: Processor,
        family: str,
        max_frames: int | None = 16,
        fps: float | None = None,
    ) -> None:
        self.inner = processor
        self.family = family
        self.max_frames = max_frames
        self.fps = fps

    @property
    def tokenizer(self) -> Any:
        return self.inner.tokenizer

    @property
    def chat_template(self) -> Any:
        return self.inner.tokenizer.chat_template

    def apply_chat_template(
        self,
        conversation: Any,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        continue_final_message: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """One conversation, or a list of them, as text or, with `tokenize`, as model inputs.

        conversation: messages `{"role", "content"}`; content is text or a list of `{"type": "text", "text"}`,
        `{"type": "image", "image": X}` and `{"type": "video", "video": X}`, or in the other forms of data/chat.py. X is
        a path, a data URI of a picture, its bytes, a PIL picture, a uint8 array `(H, W, 3)` or `(F, H, W, 3)`, or a
        list of pictures for a clip. Beside it: `fps` (of a list or an array the rate of its frames, of a file the rate
        to read it at), `num_frames`, `max_frames`, `min_pixels`, `max_pixels`, `resized_height`, `resized_width`.

        options: the same for all media that say nothing themselves, and variables of the chat template.
        """
        several, conversations = _conversations(conversation)
        chats = [self._parted(chat) for chat in conversations]
        variables = {k: v for k, v in options.items() if k not in TAKEN and k not in OF_CALLS}
        self._check_variables(variables)
        texts = [
            self.inner.text(
                messages,
                add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
            for messages, _ in chats
        ]
        options = {k: v for k, v in options.items() if k not in variables}
        options |= processor_kwargs or {}
        if not tokenize:
            _check_options(options)
            return texts if several else texts[0]
        inputs = self._inputs(texts, [media for _, media in chats], return_tensors, options)
        return inputs if return_dict else inputs["input_ids"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        return_tensors: str = "pt",
        **options: Any,
    ) -> Any:
        """Rendered chats with one placeholder for each picture or clip; images and videos in their order."""
        if text is None:
            raise InputError("processor: text is missing; render a chat with apply_chat_template")
        texts = [text] if isinstance(text, str) else list(text)
        queues = {"image": iter(_flat(images)), "video": iter(_flat(videos, clips=True))}
        names = {
            k: self.tokenizer.convert_ids_to_tokens(i) for k, i in self.inner.placeholder.items()
        }
        media = []
        for one in texts:
            found = sorted((p, k) for k, name in names.items() for p in _places(one, name))
            try:
                media.append([medium(kind, next(queues[kind])) for _, kind in found])
            except StopIteration:
                raise InputError(
                    "processor: the text has more placeholders than there are images and videos; give one each"
                ) from None
        left = [kind for kind, queue in queues.items() if next(queue, None) is not None]
        if left:
            raise InputError(
                f"processor: an {left[0]} has no placeholder in the text; give one for each, in order"
            )
        return self._inputs(texts, media, return_tensors, options)

    def decode(self, *args: Any, **options: Any) -> Any:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> Any:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **options)

    def post_process_image_text_to_text(
        self, outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """Generated ids as text: what pipelines call."""
        options = {k: v for k, v in options.items() if k == "clean_up_tokenization_spaces"}
        return list(
            self.tokenizer.batch_decode(outputs, skip_special_tokens=skip_special_tokens, **options)
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Files that transformers' own processor is made from."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_processor(self.tokenizer, self.inner.settings, self.family, Path(folder))

    def _parted(self, chat: Any) -> tuple[list[dict[str, Any]], list[Media]]:
        """Messages as templates take them, and their media in order."""
        if not isinstance(chat, Sequence) or isinstance(chat, str) or not len(chat):
            raise InputError(f"chat {chat!r:.60}; allowed: a list of messages that is not empty")
        messages, media = [], []
        for message in chat:
            parsed, entries = parse(message)
            messages.append(parsed)
            for kind, source, asked in entries:
                if source is None:
                    raise InputError(
                        f"a {kind} of the chat has no source; write {{'type': '{kind}', '{kind}': PATH or pixels}}"
                    )
                media.append(medium(kind, source, asked))
        return messages, media

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        """Raise InputError for options that neither the processor nor the chat template knows."""
        template = str(variables.get("chat_template") or self.chat_template)
        for name in variables:
            if name != "chat_template" and not re.search(rf"\b{re.escape(name)}\b", template):
                raise InputError(
                    f"processor: {name} is not handled, and the chat template has no such variable; allowed: "
                    f"{', '.join(TAKEN)}"
                )

    def _inputs(
        self, texts: list[str], media: list[list[Media]], tensors: str, options: dict[str, Any]
    ) -> Any:
        if tensors != "pt":
            raise InputError(f"processor: return_tensors={tensors!r}; allowed: 'pt'")
        most, fps, asked = _check_options(options)
        rows: list[tuple[Any, list[Visual]]] = []
        for text, some in zip(texts, media, strict=True):
            visuals = []
            for m in some:
                m = _completed(m, asked)
                pixels, frame_fps, times = load_timed(
                    m,
                    self.max_frames if most is None else most,
                    self.fps if fps is None else fps,
                    self.inner.settings.frame_rule,
                )
                alone = len(some) == 1
                visuals.append(
                    self.inner.visual(m.kind, pixels, frame_fps, times, asked=m.asked, alone=alone)
                )
            rows.append((self.inner.ids(text, visuals), visuals))
        return model_inputs(rows, self.inner, self.family)


def _conversations(given: Any) -> tuple[bool, Any]:
    """Whether these are several conversations, and a list of them."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not len(given):
        raise InputError(
            f"conversation {given!r:.60}; allowed: a list of messages that is not empty, or a list of such lists"
        )
    several = not isinstance(given[0], Mapping)
    return several, given if several else [given]


def _check_options(options: Mapping[str, Any]) -> tuple[int | None, float | None, dict[str, Any]]:
    """max_frames and fps of clips, and what is asked of all media, by the names in chat.OPTIONS. Raises InputError for
    options that are not handled."""
    asked: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        if name == "padding_side" and value != "left":
            raise InputError("processor: padding_side; allowed: 'left', for answers follow prompts")
        if name in OPTIONS["video"]:
            asked[name] = value
        elif name not in ("padding", "padding_side") and value not in OF_CALLS.get(name, ()):
            raise InputError(
                f"processor: {name} is not handled; allowed: {', '.join(TAKEN)}, return_tensors"
            )
    whole = asked_of("video", asked)
    return whole.max_frames, whole.fps, asked


def _completed(media: Media, asked: Mapping[str, Any]) -> Media:
    """The medium with what is asked of all, where it says nothing of the kind itself."""
    own = {k: v for k, v in asked.items() if k in OPTIONS[media.kind] and k not in LIMITS}
    if not own:
        return media
    given = {k: v for k, v in vars(media.asked).items() if v is not None}
    return replace(media, asked=replace(asked_of(media.kind, own), **given))


def _flat(given: Any, clips: bool = False) -> list[Any]:
    """One item, a list, or a list for each text -> items. A list of frames is one clip."""
    if given is None:
        return []
    if not isinstance(given, (list, tuple)):
        return [given]
    out: list[Any] = []
    for item in given:
        nested = isinstance(item, (list, tuple)) and not (clips and _is_clip(item))
        out.extend(_flat(item, clips) if nested else [item])
    return out


def _is_clip(item: Sequence[Any]) -> bool:
    """Whether these are frames of one clip, and not clips."""
    return bool(item) and all(
        hasattr(frame, "convert")
        or getattr(frame, "ndim", 0) == 3
        or str(frame).lower().endswith(PICTURES)
        for frame in item
    )


def _places(text: str, name: str) -> list[int]:
    parts, places = text.split(name), list[int]()
    for part in parts[:-1]:
        places.append((places[-1] + len(name) if places else 0) + len(part))
    return places
