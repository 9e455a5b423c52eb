"""vLLM's scheduler, which takes back the blocks that a request does not need once its prompt was read."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler as Stock
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from zipr1.core.errors import RunError
from zipr1.serving.vllm import limits
from zipr1.serving.vllm.layout import gap
from zipr1.serving.vllm.worker import KEPT


class Scheduler(Stock):
    """Named by the plugin; made by vLLM."""

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        kept = getattr(model_runner_output, KEPT, {})
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        read = {new.req_id for new in scheduler_output.scheduled_new_reqs} | set(resumed)
        if not read <= kept.keys():
            raise RunError(
                "zipr1: vLLM read a prompt dense, past the plugin; report it, and serve with "
                + limits.DENSE
            )
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for name, (length, longest) in kept.items():
            request = self.requests.get(name)
            if request is not None and request.status == RequestStatus.RUNNING:
                self._give_back(name, *gap(length, longest, self.block_size))
        return outputs

    def _give_back(self, name: str, first: int, count: int) -> None:
        """As vLLM does with what leaves a sliding window: the null block stands in the places of those given back."""
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        blocks, pool = manager.req_to_blocks[name], manager.block_pool
        freed = blocks[first : first + count]
        blocks[first : first + count] = [pool.null_block] * count
        pool.free_blocks(reversed(freed))
