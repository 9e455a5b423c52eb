"""Around each step of a worker: the model's ledger learns which requests are in it, the scheduler what they kept."""

from __future__ import annotations

from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput

from zipr1.serving.vllm.ledger import Ledger

KEPT = (
    "zipr1_kept"  # attribute of a step's output: request -> (tokens read, most kept in any layer)
)


class Telling:
    """Goes in front of a worker class of vLLM's."""

    @property
    def ledger(self) -> Ledger:
        ledger: Ledger = self.get_model().ledger  # type: ignore[attr-defined]
        return ledger

    def execute_model(self, scheduler_output: Any) -> Any:
        self.ledger.begin(scheduler_output)
        try:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        finally:
            self.ledger.end()

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        kept = self.ledger.report()
        if kept:
            # vLLM's second model runner, the one of a GPU, copies its output on a stream of its own; waiting here
            # costs nothing, since asynchronous scheduling is off and the engine would wait next.
            if isinstance(output, AsyncModelRunnerOutput):
                output = output.get_output()
            setattr(output, KEPT, kept)
        return output

    def kept_shares(self) -> tuple[int, list[float]]:
        """Prompts read so far, and the mean share of their tokens kept in each layer: for `collective_rpc`."""
        ledger = self.ledger
        return ledger.prompts, [total / max(1, ledger.prompts) for total in ledger.shares]
