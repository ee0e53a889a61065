"""How far a share measured on a few images may be from the truth."""

from __future__ import annotations

import math

Z95 = 1.959963984540054


def wilson(k: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval (95 %) of a share of which ``k`` of ``n`` were seen (Wilson 1927).

    Without observations everything is possible: (0, 1).
    """
    if not n:
        return 0.0, 1.0
    share, spread = k / n, z * z / n
    middle = share + spread / 2
    reach = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = (middle - reach) / (1 + spread), (middle + reach) / (1 + spread)
    return (0.0 if k == 0 else low), (1.0 if k == n else high)
