"""The floor of a benchmark: what the same calls of the bare network cost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from besiege.bench.measure import Call, replay

LAPS = 5


def floor(calls: Sequence[Call], x: Tensor) -> float:
    """CPU seconds of the same calls, each of its own network and size, on images like ``x``."""
    sizes, spent = Counter((call.module, call.rows, call.columns) for call in calls), 0.0
    for (module, rows, columns), count in sizes.items():
        once = Call(module, rows, columns)
        part = x[torch.arange(rows) % len(x)]
        laps = []
        for _ in range(LAPS):
            began = time.process_time()
            replay([once], part)
            laps.append(time.process_time() - began)
        spent += count * min(laps)
    return spent
