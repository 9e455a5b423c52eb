"""What lmms-eval calls for the embedded tasks. It loads this file by its path, beside the YAML."""

import json

from zipr1.rewards.registry import find


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
