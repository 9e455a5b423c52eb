"""Decoding: a token of every row at a time, until all rows have ended.

A step is the model's, the choice of the next token, and notes of it. It works on tensors that stay where they are, and
what changes from step to step lies in them too, not in Python. So where the cache has room for all tokens
(`PrunedCache.reserve`), a GPU is given the step once, as a CUDA graph, and then told to do it again: launching it anew
takes Python several times as long as the GPU needs for it. Elsewhere the same step runs as it is written, which is the
reference that the tests hold the graph to. No GPU has captured one yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from zipr1.core import watch
from zipr1.core.text import reason
from zipr1.models.batching import choose
from zipr1.models.transfer import send

log = logging.getLogger(__name__)

# After how many tokens the host looks whether all rows have ended, for which a GPU has to be waited for. What is
# computed in vain meanwhile is dropped.
LOOK = {"cpu": 1, "cuda": 8}
# Steps from which capturing pays: it costs about as much as three of them.
CAPTURED = 12


class Steps:
    """Rows under way. tokens `(B, T)` int64 and logprobs `(B, T)` float32: what was chosen; real `(B, T)` bool: where a
    row had not ended before.

    head: hidden states `(B, hidden)` -> float32 logits `(B, V)`. advance: chosen tokens `(B,)` and the number of the
    step `(1,)`, from 0 -> hidden states `(B, hidden)` that predict the next ones. uniforms, temperature, greedy: as
    `sample` (sampling.py) has them.
    """

    def __init__(
        self,
        rows: int,
        most: int,
        device: torch.device,
        *,
        head: Callable[[torch.Tensor], torch.Tensor],
        advance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        end_ids: Sequence[int],
        uniforms: torch.Tensor | None,
        temperature: float,
        greedy: torch.Tensor | None,
    ) -> None:
        self.head, self.advance, self.temperature = head, advance, temperature
        nothing = torch.empty(0)
        drawn, likeliest, self.ends = send(
            device,
            nothing if uniforms is None else uniforms[:, :most],
            nothing if greedy is None else greedy,
            torch.tensor(list(end_ids)),
        )
        self.uniforms = None if uniforms is None else drawn
        self.greedy = None if greedy is None else likeliest
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, most, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, most, device=device)
        self.real = torch.zeros(rows, most, dtype=torch.bool, device=device)
        self.choice = torch.zeros(rows, dtype=torch.int64, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)

    def choose(self, hidden: torch.Tensor) -> None:
        """The next token of each row."""
        logprobs = (self.head(hidden) / self.temperature).log_softmax(-1)
        drawn = None if self.uniforms is None else self.uniforms.index_select(1, self.step)[:, 0]
        choice = choose(logprobs, drawn, self.greedy)
        self.choice.copy_(choice)
        self.tokens.index_copy_(1, self.step, choice[:, None])
        self.logprobs.index_copy_(1, self.step, logprobs.gather(-1, choice[:, None]))
        self.real.index_copy_(1, self.step, self.alive[:, None])
        self.alive &= ~torch.isin(choice, self.ends)

    def again(self) -> None:
        """One step: the model's, then `choose`."""
        hidden = self.advance(self.choice, self.step)
        self.step += 1
        self.choose(hidden)

    def run(self, hidden: torch.Tensor, fixed: bool) -> int:
        """Choose from the prompt's hidden states `(B, hidden)` and go on. fixed: whether nothing in `advance` moves, so
        that a step may be captured. Returns how many tokens a row has; what `real` does not name means nothing."""
        device, most = self.tokens.device, self.tokens.shape[1]
        every, step = LOOK.get(device.type, 1), self.again
        self.choose(hidden)
        for made in range(1, most):
            watch.alive()
            if made % every == 0 and not bool(self.alive.any()):
                return made
            if fixed and made == 2 and device.type == "cuda" and most - made >= CAPTURED:
                # The step before this one has compiled and allocated what there is to.
                step = captured(step, device)
            step()
        return most


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same step as one CUDA graph; as it is, with a warning, where something in it cannot be captured."""
    try:
        # On a stream of its own: torch's is made once, on the GPU that was the current one then.
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                step()
    except RuntimeError as error:
        why = reason(error) or type(error).__name__
        log.warning("a decoding step is launched piece by piece: no CUDA graph (%s)", why)
        return step
    replay: Callable[[], None] = graph.replay
    return replay
