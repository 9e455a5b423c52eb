"""vLLM's worker on a CPU, which tells our model of requests."""

from vllm.v1.worker.cpu_worker import CPUWorker

from zipr1.serving.vllm.worker import Telling


class Worker(Telling, CPUWorker):
    """Named by the plugin; made by vLLM."""
