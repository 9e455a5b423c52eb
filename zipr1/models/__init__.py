"""Models: the only place that knows transformers and peft."""

from zipr1.models.attention import Request, sparse_attention
from zipr1.models.policy import Answers, Features, Policy, load_policy
from zipr1.models.processors import Encoded
from zipr1.models.room import most_tokens
from zipr1.models.rows import replay_masks
from zipr1.models.shared import ANSWERS, shared_states

__all__ = [
    "ANSWERS",
    "Answers",
    "Encoded",
    "Features",
    "Policy",
    "Request",
    "load_policy",
    "most_tokens",
    "replay_masks",
    "shared_states",
    "sparse_attention",
]
