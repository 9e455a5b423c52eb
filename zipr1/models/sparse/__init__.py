"""models/sparse: which prompt tokens each decoder layer keeps, and attention among those alone.

To be read in this order; a file's first lines say what it is and what it is not.

    request.py      what one sparse forward pass is asked to do, and what it must know of its batch
    record.py       what each layer kept: what comes back
    selection.py    score -> select -> record, the same code for every kind of prefill
        probes.py       which prompt tokens ask (score the others)
        rules.py        scores and p -> kept tokens: top-p, top-k, threshold, random
        thresholds.py   random p for training, and exact gradients through the choice
        hashing.py      random numbers that are the same everywhere
    context.py      what a forward pass does in place of attention: prefill, prefill of packed rows, decoding
        gate.py         attention whose kept tokens carry their chance of being kept, for training
        packing.py      kept tokens as rows of a flattened batch
        cache.py        the KV cache whose prompt part was pruned
        retain.py       the same for `kv: retain`, where conversations lose nothing
    attention.py    the function that transformers' attention calls, and hands to the context
    patch.py        every forward that is swapped on a model, and `sparse_attention`, which undoes it
        arguments.py    what such a forward may be called with, and what is refused
        layer_skip.py   whole layers on the kept tokens alone
        last_layer.py   the last layer, finished only where its output is read
    session.py      sparsity of a model in memory: blocks, threads, statistics
        generate.py     what `generate` refuses, and later turns of a conversation
"""
