"""From how many prompt tokens on scoring, selection and attention of the kept take less time than dense attention.

By the kind of device. cpu: measured at 25 % kept on two cores (kernels/bench/results.csv). cuda: an estimate for
one row on an H100, from counted operations and launches; no GPU has measured it. Shorter prompts may gain there too
where whole layers are skipped, or many rows run together.
"""

from __future__ import annotations

BREAK_EVEN = {"cpu": 384, "cuda": 4096}
