"""profiling: what sparsity is worth on this machine in time and memory, counted and measured."""
