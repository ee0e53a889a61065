"""The oracle that counts: batching, the active set, budgets, early stop, best so far, the clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor

from besiege.core.errors import AccessDenied
from besiege.core.oracle import Finished, State
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Answer, Ball, Goal, Loss

Seeks = Literal["success", "minimum", "optimum"]


class Meter:
    """Answers for ``target`` about ``x`` (n, c, h, w), and keeps the books, one entry an image.

    ``best`` and ``distance`` hold the nearest success so far inside ``ball`` (any success if the method seeks
    the minimum), ``found`` says where there is one; ``forward``, ``backward`` count passes and ``needed`` the
    forward passes up to the first success. ``queries`` caps the forward passes of each image, ``deadline`` is
    a time of `time.monotonic`.
    """

    def __init__(
        self,
        target: Target,
        x: Tensor,
        goal: Goal,
        ball: Ball,
        *,
        seeks: Seeks = "success",
        access: Access | None = None,
        queries: int | None = None,
        deadline: float | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        x = x.contiguous()  # methods flatten images into views
        n, device = len(x), x.device
        self.target, self.x, self.ball, self.seeks = target, x, ball, seeks
        self.access = target.access if access is None else min(access, target.access)
        self.queries, self.deadline, self.progress = queries, deadline, progress
        self.outer = goal
        self.aim = goal
        self.rows = torch.arange(n, device=device)
        self.whole = True
        self.done = torch.zeros(n, dtype=torch.bool, device=device)
        self.found = torch.zeros(n, dtype=torch.bool, device=device)
        self.best = x.clone()
        self.distance = torch.full((n,), INF, dtype=x.dtype, device=device)
        self.forward = torch.zeros(n, dtype=torch.int64, device=device)
        self.backward = torch.zeros(n, dtype=torch.int64, device=device)
        self.needed = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.left = [n]
        self.sent: list[tuple[int, int]] = []

    @property
    def goal(self) -> Goal:
        """The goal of the rows that the method now holds."""
        return self.aim if self.whole else self.aim[self.rows]

    @property
    def classes(self) -> int:
        """How many classes the target knows."""
        return self.target.classes

    def is_adversarial(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `Oracle.is_adversarial`."""
        self._allow(Access.LABELS)
        return self._evaluate(x, rows, lambda answer, images: self.outer[images].reached(answer), True)

    def labels(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `Oracle.labels`."""
        self._allow(Access.LABELS)
        return self._evaluate(x, rows, lambda answer, images: answer.scores.argmax(1), 0)

    def loss(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> Tensor:
        """See `Oracle.loss`."""
        self._allow(Access.SCORES)
        return self._evaluate(x, rows, lambda answer, images: self.aim[images].loss(answer, loss), INF)

    def scores(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `Oracle.scores`."""
        self._allow(Access.SCORES)
        return self._evaluate(x, rows, lambda answer, images: answer.scores, 0)

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Oracle.gradient`."""
        self._allow(Access.GRADIENTS)
        pick, images = self._enter(x, rows)
        values, grads = [], []
        for part, ids in self._batches(x if pick is None else x[pick], images):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                answer = self.target.answer(leaf)
                value = self.aim[ids].loss(answer, loss)
                (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
            self._note(part, ids, answer, backward=1)
            values.append(value.detach())
            grads.append(torch.zeros_like(part) if grad is None else torch.nan_to_num(grad.to(part)).contiguous())
        if not values:
            return x.new_full((len(x),), INF), torch.zeros_like(x)
        return _spread(values, pick, len(x), INF), _spread(grads, pick, len(x), 0)

    def jacobian(self, x: Tensor, classes: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Oracle.jacobian`."""
        self._allow(Access.GRADIENTS)
        pick, images = self._enter(x, rows)
        wanted = classes if pick is None else classes[pick]
        values, grads = [], []
        for start, (part, ids) in enumerate(self._batches(x if pick is None else x[pick], images)):
            leaf = part.detach().requires_grad_()
            columns = wanted[start * self.target.batch : start * self.target.batch + len(part)]
            with torch.enable_grad():
                answer = self.target.answer(leaf)
                chosen = answer.scores.gather(1, columns).sum(0)
                rows_of = [
                    torch.autograd.grad(chosen[k], leaf, retain_graph=k + 1 < len(chosen))[0]
                    for k in range(len(chosen))
                ]
            self._note(part, ids, answer, backward=columns.shape[1])
            values.append(answer.scores.detach())
            grads.append(torch.nan_to_num(torch.stack(rows_of, 1).to(part)))
        if not values:
            return x.new_zeros((len(x), self.classes)), x.new_zeros((*classes.shape, *x.shape[1:]))
        return _spread(values, pick, len(x), 0), _spread(grads, pick, len(x), 0)

    def toward(self, classes: Tensor) -> Meter:
        """See `Oracle.toward`."""
        view = copy.copy(self)
        labels = self.outer.labels.clone()
        labels[self.rows] = classes
        view.aim = self.outer.toward(labels)
        return view

    def live(self, *state: *State) -> tuple[*State]:
        """See `Oracle.live`."""
        done = self.done if self.whole else self.done[self.rows]
        gone = int(done.sum())
        if gone == len(done):
            raise Finished
        if gone * 4 < len(done):
            return state
        keep = (~done).nonzero().squeeze(1)
        self.rows, self.whole = self.rows[keep], False
        rows: list[Any] = list(state)
        return cast(tuple[*State], tuple(part[keep] for part in rows))

    def retire(self, images: Tensor) -> None:
        """Ask no more about ``images``: their search has ended by itself."""
        self.done[images] = True

    def _allow(self, need: Access) -> None:
        if need > self.access:
            raise AccessDenied(
                f"this method asks for {need.name.lower()}, but {self.target.name} grants {self.access.name.lower()}"
            )

    def _enter(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Which rows of ``x`` to compute (None: all) and the images that they stand for."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.done[:] = True
        images = self.rows if rows is None else self.rows[rows]
        open_ = ~self.done[images]
        if self.queries is not None:
            if rows is None:
                open_ &= self.forward[images] < self.queries
            else:
                open_ &= self.forward[images] + _place(images) < self.queries
        if not bool(open_.any()):
            if self._all_spent():
                raise Finished
            return open_.nonzero().squeeze(1), images[:0]
        if bool(open_.all()):
            return None, images
        pick = open_.nonzero().squeeze(1)
        return pick, images[pick]

    def _all_spent(self) -> bool:
        spent = self.done if self.queries is None else self.done | (self.forward >= self.queries)
        return bool(spent[self.rows].all())

    def _batches(self, x: Tensor, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = self.target.batch
        if len(x) <= size:
            return [(x, images)] if len(x) else []
        return list(zip(torch.split(x, size), torch.split(images, size), strict=True))

    def _evaluate(
        self, x: Tensor, rows: Tensor | None, read: Callable[[Answer, Tensor], Tensor], fill: float
    ) -> Tensor:
        pick, images = self._enter(x, rows)
        values = []
        with torch.no_grad():
            for part, ids in self._batches(x if pick is None else x[pick], images):
                answer = self.target.answer(part)
                values.append(read(answer, ids))
                self._note(part, ids, answer, backward=0)
            if not values:
                values.append(read(Answer(x.new_zeros((0, self.target.classes))), images))
        return _spread(values, pick, len(x), fill)

    def _note(self, x: Tensor, images: Tensor, answer: Answer, backward: int) -> None:
        """Count a call, keep what it found, stop what is done."""
        self.sent.append((len(x), backward))
        one = torch.ones_like(images)
        self.forward.index_add_(0, images, one)
        if backward:
            self.backward.index_add_(0, images, one * backward)
        with torch.no_grad():
            hit = self.outer[images].reached(answer)
            if bool(hit.any()):
                self._keep(x, images, hit)
        if self.queries is not None and self.seeks != "optimum":
            self.done |= self.forward >= self.queries
        if self.progress is not None:
            self.progress(len(x))

    def _keep(self, x: Tensor, images: Tensor, hit: Tensor) -> None:
        at = hit.nonzero().squeeze(1)
        tried, of = x[at].detach().to(self.x.dtype), images[at]
        origin = self.x[of]
        distance = self.ball.distance(tried, origin)
        if self.seeks == "minimum":
            low, high = tried.flatten(1).aminmax(dim=1)
            fits = (low >= 0) & (high <= 1) & (distance < self.distance[of])
        else:
            fits = self.ball.holds(tried, origin) & (distance < self.distance[of])
        if not bool(fits.any()):
            return
        at = fits.nonzero().squeeze(1)
        tried, of, distance = tried[at], of[at], distance[at]
        nearest = torch.full_like(self.distance, INF).scatter_reduce(0, of, distance, "amin")
        first = (distance == nearest[of]).nonzero().squeeze(1)
        of = of[first].flip(0)
        self.best[of] = tried[first].flip(0)
        self.distance[of] = distance[first].flip(0)
        fresh = of[~self.found[of]]
        self.needed[fresh] = self.forward[fresh]
        self.found[of] = True
        if self.seeks == "success":
            self.done[of] = True


def _place(images: Tensor) -> Tensor:
    """(m,) how many earlier rows stand for the same image."""
    order = images.argsort(stable=True)
    ordered = images[order]
    at = torch.arange(len(images), device=images.device)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(new, at, 0).cummax(0).values
    return torch.empty_like(at).index_put_((order,), at - first)


def _spread(values: list[Tensor], pick: Tensor | None, n: int, fill: float) -> Tensor:
    """The computed rows among those that were left out."""
    value = values[0] if len(values) == 1 else torch.cat(values)
    if pick is None:
        return value
    return value.new_full((n, *value.shape[1:]), fill).index_copy(0, pick, value)
