"""vLLM's worker on a GPU, which tells our model of requests. Not yet run on a GPU."""

from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from zipr1.serving.vllm.worker import Telling


class Worker(Telling, GPUWorker):
    """Named by the plugin; made by vLLM."""
