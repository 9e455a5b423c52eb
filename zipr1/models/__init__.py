"""Models: the only place that knows transformers and peft."""

from zipr1_kernels import use

from zipr1.models.attention import Request, sparse_attention
from zipr1.models.cache import PrunedCache
from zipr1.models.loading import choose_device, random_model
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
    "PrunedCache",
    "Request",
    "choose_device",
    "load_policy",
    "most_tokens",
    "random_model",
    "replay_masks",
    "shared_states",
    "sparse_attention",
    "use",
]
