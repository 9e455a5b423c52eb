"""serving/vllm: vLLM's plugin. The only place that knows vllm.

plugin.py is what vLLM calls, hook.py what it then changes, settings.py what a folder asks for, limits.py what is
refused. model.py runs the layers, projections.py keeps their queries apart, ledger.py remembers what each request kept,
layout.py says where that lies in its blocks, choose.py chooses it. worker.py and scheduler.py stand around vLLM's own,
so that the model learns of requests and blocks are given back.
"""
