"""Which prompt tokens a layer keeps: probe positions, selection rules, the record of what was kept.

Pure tensors; nothing here knows a model. The settings are `zipr1.recipe.Sparse`.
"""

from zipr1.sparsity.probes import probe_positions, probe_slots
from zipr1.sparsity.record import LayerRecord, Record
from zipr1.sparsity.rules import RULES, Draw, select

__all__ = ["RULES", "Draw", "LayerRecord", "Record", "probe_positions", "probe_slots", "select"]
