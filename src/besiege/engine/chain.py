"""What two attacks share whose regions differ: the first moves the images, the second goes on from there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from besiege.core.lens import Lens
from besiege.core.oracle import State
from besiege.core.threat import INF


@dataclass
class Lowest(Lens):
    """Answers what is asked about success by scores, and keeps for each image of ``x`` its try of lowest margin."""

    x: Tensor
    value: Tensor = field(init=False)
    rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x, self.value = self.x.clone(), self.x.new_full((len(self.x),), INF)
        self.rows = torch.arange(len(self.x), device=self.x.device)

    def is_adversarial(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `Oracle.is_adversarial`; one pass, as there."""
        margin, of = self.oracle.loss(x, "margin", rows), self.rows if rows is None else self.rows[rows]
        least = self.value.scatter_reduce(0, of, margin, "amin")
        at = ((margin < self.value[of]) & (margin == least[of])).nonzero().squeeze(1)
        self.x[of[at]], self.value = x[at], least
        return margin < 0

    def live(self, *state: *State) -> tuple[*State]:
        """See `Oracle.live`; the memory's rows follow."""
        (*left, self.rows) = self.oracle.live(*state, self.rows)
        return cast(tuple[*State], tuple(left))
