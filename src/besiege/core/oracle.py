"""What a method may see of a target."""

from __future__ import annotations

from typing import Protocol, TypeVarTuple

from torch import Tensor

from besiege.core.threat import Goal, Loss

State = TypeVarTuple("State")


class Finished(Exception):
    """No image is left to ask about: ends a method from inside. The engine catches it."""


class Oracle(Protocol):
    """Answers about images (m, c, h, w); ``rows`` (m,) says which of the attacked images each stands for.

    Without ``rows`` there is one for each attacked image, in order. An image that is done is not computed
    again: its answer is ``True``, an infinite loss, a zero gradient, zero scores.
    """

    @property
    def goal(self) -> Goal:
        """What is to be reached, one label for each attacked image."""
        ...

    @property
    def classes(self) -> int:
        """How many classes the target knows."""
        ...

    def is_adversarial(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """(m,) bool: does the goal stand reached? Needs LABELS."""
        ...

    def labels(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """(m,) int64 predicted classes. Needs LABELS."""
        ...

    def loss(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> Tensor:
        """(m,) loss, falling as success nears. Needs SCORES."""
        ...

    def scores(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """(m, classes) logits or log-probabilities. Needs SCORES."""
        ...

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss (m,) and its gradient (m, c, h, w). Needs GRADIENTS."""
        ...

    def jacobian(self, x: Tensor, classes: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores (m, all classes) and the gradients (m, k, c, h, w) of those in ``classes`` (m, k).

        One class beyond the last stands for the sum of all scores. Needs GRADIENTS.
        """
        ...

    def toward(self, classes: Tensor) -> Oracle:
        """The same oracle with a sub-goal: losses aim at ``classes`` (n,); success is still the outer goal's."""
        ...

    def live(self, *state: *State) -> tuple[*State]:
        """Drop the rows of finished images from the method's state, once it is worth it.

        A long-running batch method calls it in its loop with every tensor (and `Rng`) that has a row an
        image: ``x, adv = oracle.live(x, adv)``. From then on the oracle's rows are the remaining ones.
        """
        ...
