"""What lmms-eval calls for the embedded tasks. It loads this file by its path, beside the YAML."""

import json

import datasets
import numpy as np
from lmms_eval.api.task import ConfigurableMessagesTask
from PIL import Image

from zipr1.data.embedded import HELDOUT_SEED, draw
from zipr1.rewards.registry import find


class Embedded(ConfigurableMessagesTask):
    """A task whose data set is drawn: the held-out questions of training runs, the first `questions` of them."""

    def __init__(self, config):
        values = {key: value for key, value in config.items() if key != "class"}
        super().__init__(config=values, model_name="zipr1")

    def download(self, dataset_kwargs=None):
        columns = ("id", "picture", "kind", "answer", "messages", "media")
        rows: dict[str, list] = {name: [] for name in columns}
        for prompt in draw("test", self.config.task, dataset_kwargs["questions"], HELDOUT_SEED):
            source = prompt.media[0].source
            for name in columns[:4]:
                rows[name].append(getattr(prompt, name))
            rows["messages"].append(json.dumps(prompt.messages))
            is_picture = isinstance(source, np.ndarray)
            rows["media"].append(Image.fromarray(source) if is_picture else str(source))  # type: ignore[arg-type]
        self.dataset = datasets.DatasetDict(test=datasets.Dataset.from_dict(rows))
        self.dataset_no_image = self.dataset.remove_columns("media")


def doc_to_visual(doc):
    """A picture, or the path of a clip."""
    media = doc["media"]
    return [media if isinstance(media, str) else media.convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return json.loads(doc["messages"])[-1]["content"][-1]["text"]


def doc_to_messages(doc, lmms_eval_specific_kwargs=None):
    """The whole conversation: some questions follow an answered one."""
    media = doc_to_visual(doc)[0]
    messages = json.loads(doc["messages"])
    for message in messages:
        for part in message["content"]:
            if part["type"] in ("image", "video"):
                part["url"] = media
    return messages


def process_results(doc, results):
    return {"exact_match": find("exact")(results[0], doc["answer"])}
