"""`zipr1.load`: a trained run, an exported folder or any model, ready to be called as transformers' models are.

The processor has the calls of transformers' own ones, and makes the inputs that the model was trained on: PIL for
pictures, decord or PyAV for clips, the same on every machine, with no need for torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.load import validate
from zipr1.core.recipe import Sparse
from zipr1.core.types import Media
from zipr1.data.media import load_timed
from zipr1.models.inputs import model_inputs
from zipr1.models.loading import WEIGHT_DTYPES, choose_device, save_processor
from zipr1.models.open import BOUNDS, find_source, open_model, stored_dtype
from zipr1.models.processors import Processor
from zipr1.models.sparse.session import session_of
from zipr1.models.visual import Visual

KINDS = ("image", "video")
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
        `{"type": "image", "image": X}` and `{"type": "video", "video": X}`. X is a path, a PIL picture, a uint8
        array `(H, W, 3)` or `(F, H, W, 3)`, or a list of pictures for a clip (`"fps"` beside it: frames a second).
        """
        several = not (len(conversation) and isinstance(conversation[0], Mapping))
        chats = [self._parted(chat) for chat in (conversation if several else [conversation])]
        texts = [
            self.inner.text(
                messages, add_generation_prompt, continue_final_message=continue_final_message
            )
            for messages, _ in chats
        ]
        if not tokenize:
            return texts if several else texts[0]
        inputs = self._inputs(
            texts,
            [media for _, media in chats],
            return_tensors,
            {**options, **(processor_kwargs or {})},
        )
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
                media.append([_media(kind, next(queues[kind])) for _, kind in found])
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
        messages, media = [], []
        for message in chat:
            content = message["content"]
            if isinstance(content, str):
                messages.append({"role": message["role"], "content": content})
                continue
            parts: list[dict[str, Any]] = []
            for part in content:
                kind = part.get("type")
                if kind not in KINDS:
                    parts.append(dict(part))
                    continue
                source = next(
                    (part[k] for k in (kind, "path", "url") if part.get(k) is not None), None
                )
                if source is None:
                    raise InputError(
                        f"a {kind} of the chat has no source; write {{'type': '{kind}', '{kind}': PATH or pixels}}"
                    )
                media.append(_media(kind, source, part.get("fps")))
                parts.append({"type": kind})
            messages.append({"role": message["role"], "content": parts})
        return messages, media

    def _inputs(
        self, texts: list[str], media: list[list[Media]], tensors: str, options: dict[str, Any]
    ) -> Any:
        if tensors != "pt":
            raise InputError(f"processor: return_tensors={tensors!r}; allowed: 'pt'")
        options = {k: v for k, v in options.items() if v is not None}
        most, fps, rule = self.max_frames, self.fps, self.inner.settings.frame_rule
        if "num_frames" in options:
            if "fps" in options:
                raise InputError("processor: num_frames and fps exclude each other; give one")
            most, fps, rule = None, None, replace(rule, number=options.pop("num_frames"))
        most, fps = options.pop("max_frames", most), options.pop("fps", fps)
        if options.pop("padding_side", "left") != "left":
            raise InputError("processor: padding_side; allowed: 'left', for answers follow prompts")
        options.pop("padding", None)  # a batch is always padded
        unknown = [k for k, v in options.items() if v is not False]
        if unknown:
            raise InputError(
                f"processor: {unknown[0]} is not handled; allowed: fps, num_frames, max_frames, padding, return_tensors"
            )
        rows: list[tuple[Any, list[Visual]]] = []
        for text, some in zip(texts, media, strict=True):
            visuals = []
            for m in some:
                pixels, frame_fps, times = load_timed(m, most, fps, rule)
                visuals.append(self.inner.visual(m.kind, pixels, frame_fps, times=times))
            rows.append((self.inner.ids(text, visuals), visuals))
        return model_inputs(rows, self.inner, self.family)


def _media(kind: Any, source: Any, fps: float | None = None) -> Media:
    if isinstance(source, Media):
        return source
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise InputError(f"{source}: not fetched from here; download the {kind} and give its path")
    if isinstance(source, (str, Path)):
        return Media(kind, source)
    if isinstance(source, (list, tuple)):
        source = np.stack([_pixels(frame) for frame in source])
    return Media(kind, _pixels(source), fps if kind == "video" else None)


def _pixels(source: Any) -> np.ndarray:
    """A PIL picture as uint8 `(H, W, 3)`; arrays as they are."""
    return np.asarray(source.convert("RGB") if hasattr(source, "convert") else source)


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
    return bool(item) and all(hasattr(f, "convert") or getattr(f, "ndim", 0) == 3 for f in item)


def _places(text: str, name: str) -> list[int]:
    parts, places = text.split(name), list[int]()
    for part in parts[:-1]:
        places.append((places[-1] + len(name) if places else 0) + len(part))
    return places
