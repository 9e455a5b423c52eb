"""What each request kept in each layer, from its prefill until it ends. No vllm.

The worker opens the ledger for each step with what the scheduler sends it; the model finds a request by the first block
of its row in the block table, for block tables are all that a model sees of requests. No two running requests share a
block, since prefix caching is off, and the entry of a request that ended is closed before its blocks are used again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zipr1.core.errors import RunError


@dataclass
class Entry:
    """prompt: its tokens. length: tokens read by its prefill, the prompt and after a preemption the answer so far; 0
    before it. kept: of them kept in each layer, as the layers run."""

    name: str
    prompt: int
    length: int = 0
    kept: list[int] = field(default_factory=list)

    @property
    def longest(self) -> int:
        return max(self.kept)


class Ledger:
    """The entries of one worker. open: a step of the engine is under way, and not one of vLLM's trial runs.

    shares: sum over prompts of kept / prompt tokens, by layer, and how many prompts these were.
    """

    def __init__(self, layers: int) -> None:
        self.open = False
        self.prompt: dict[str, int] = {}  # of every request that has not ended
        self.first: dict[str, int] = {}
        self.entries: dict[int, Entry] = {}
        self.read: list[Entry] = []
        self.shares = [0.0] * layers
        self.prompts = 0

    def begin(self, step: Any) -> None:
        """Open it for a step. step: vLLM's SchedulerOutput."""
        for name in step.finished_req_ids:
            self._close(name)
            self.prompt.pop(name, None)
        for new in step.scheduled_new_reqs:
            self.prompt[new.req_id] = new.prompt_len
            self._enter(new.req_id, new.block_ids)
        again = step.scheduled_cached_reqs
        for name, blocks in zip(again.req_ids, again.new_block_ids, strict=True):
            if name in again.resumed_req_ids:  # after a preemption, with other blocks
                self._enter(name, blocks)
        self.read = []
        self.open = True

    def end(self) -> None:
        """Close it after the model has run."""
        self.open = False
        for entry in self.read:
            self.prompts += 1
            for layer, kept in enumerate(entry.kept):
                answer = entry.length - entry.prompt
                self.shares[layer] += (kept - answer) / entry.prompt

    def of(self, first_block: int) -> Entry:
        """The request whose first block this is."""
        entry = self.entries.get(first_block)
        if entry is None:
            raise RunError(
                f"zipr1: block {first_block} belongs to no request; this vLLM hands out blocks in a way that was not "
                "tested: serve dense, and report it"
            )
        return entry

    def report(self) -> dict[str, tuple[int, int]]:
        """Of each request read in the last step: tokens read, and kept in the layer that keeps the most."""
        found = {entry.name: (entry.length, entry.longest) for entry in self.read}
        self.read = []
        return found

    def _enter(self, name: str, blocks: Any) -> None:
        if len(blocks) != 1:
            raise RunError(
                f"zipr1: layers lie in {len(blocks)} groups of blocks and one was tested; serve dense"
            )
        self._close(name)
        self.first[name] = blocks[0][0]
        self.entries[blocks[0][0]] = Entry(name, self.prompt[name])

    def _close(self, name: str) -> None:
        block = self.first.pop(name, -1)
        found = self.entries.get(block)
        # After a preemption the block may be another request's, or nobody's.
        if found is not None and found.name == name:
            del self.entries[block]
