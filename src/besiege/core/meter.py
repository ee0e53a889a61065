"""The oracle that counts: batching, the active set, budgets, early stop, best so far, the clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from besiege.core.errors import AccessDenied
from besiege.core.oracle import Finished, State
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Answer, Ball, Goal, Loss

Seeks = Literal["success", "minimum", "optimum"]


@dataclass
class _Tally:
    """Shared by a meter and its views, which so know without looking that nothing new is done or spent.

    ``changes`` is how often images became done; no image has had more than ``most`` forward passes.
    """

    changes: int = 0
    most: int = 0


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
        self.cap = INF if queries is None else queries
        self.outer = goal
        self.aim = goal
        self.done = torch.zeros(n, dtype=torch.bool, device=device)
        self.found = torch.zeros(n, dtype=torch.bool, device=device)
        self.best = x.clone()
        self.distance = torch.full((n,), INF, dtype=x.dtype, device=device)
        self.forward = torch.zeros(n, dtype=torch.int64, device=device)
        self.backward = torch.zeros(n, dtype=torch.int64, device=device)
        self.needed = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.sent: list[tuple[int, int]] = []
        self.tally = _Tally()
        self.all_rows()

    def all_rows(self) -> None:
        """Stand for every image again, whatever a method has dropped or given up."""
        self.rows, self.whole = torch.arange(len(self.x), device=self.x.device), True
        self.done[:] = self.forward >= self.cap
        if self.seeks == "success":
            self.done |= self.found
        self.tally.changes += 1
        self.asked: tuple[int, Tensor | None, Tensor] | None = None

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
        return self._evaluate(x, rows, lambda answer, images: (hit := self._hit(answer, images), hit), True)

    def labels(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `Oracle.labels`."""
        self._allow(Access.LABELS)
        return self._evaluate(x, rows, lambda answer, images: (answer.scores.argmax(1), self._hit(answer, images)), 0)

    def loss(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> Tensor:
        """See `Oracle.loss`."""
        self._allow(Access.SCORES)
        return self._evaluate(x, rows, lambda answer, images: self._loss(answer, images, loss), INF)

    def scores(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """See `Oracle.scores`."""
        self._allow(Access.SCORES)
        return self._evaluate(x, rows, lambda answer, images: (answer.scores, self._hit(answer, images)), 0)

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Oracle.gradient`."""
        self._allow(Access.GRADIENTS)
        pick, images = self._enter(x, rows)
        values, grads = [], []
        for part, ids in self._batches(x if pick is None else x.index_select(0, pick), images):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                answer = self.target.answer(leaf)
                aim = self.aim[ids]
                known = aim.slope(answer, loss)
                if known is None:
                    value = aim.loss(answer, loss)
                    (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
                else:
                    value, pull, margin = known
                    (grad,) = torch.autograd.grad(answer.scores, leaf, pull, allow_unused=True)
            hit = margin < 0 if known is not None and self.aim is self.outer else self._hit(answer, ids)
            self._note(part, ids, hit, backward=1, once=rows is None)
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
                every = torch.cat([answer.scores, answer.scores.sum(1, keepdim=True)], 1)
                chosen = every.gather(1, columns).sum(0)
                rows_of = [
                    torch.autograd.grad(chosen[k], leaf, retain_graph=k + 1 < len(chosen))[0]
                    for k in range(len(chosen))
                ]
            hit = self._hit(answer, ids)
            self._note(part, ids, hit, backward=columns.shape[1], once=rows is None)
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
        self.rows, self.whole, self.asked = self.rows[keep], False, None
        rows: list[Any] = list(state)
        return cast(tuple[*State], tuple(part[keep] for part in rows))

    def retire(self, images: Tensor) -> None:
        """Ask no more about ``images``: their search has ended by itself."""
        self.done[images] = True
        self.tally.changes += 1

    def _allow(self, need: Access) -> None:
        if need > self.access:
            raise AccessDenied(
                f"this method asks for {need.name.lower()}, but {self.target.name} grants {self.access.name.lower()}"
            )

    def _enter(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Which rows of ``x`` to compute (None: all) and the images that they stand for."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.retire(self.rows)
        tight = self._tight(1 if rows is None else len(x))
        if rows is None and not tight and self.asked is not None and self.asked[0] == self.tally.changes:
            return self.asked[1:]
        images = self.rows if rows is None else self.rows[rows]
        open_ = ~self.done[images]
        if tight and rows is None:
            open_ &= self.forward[images] < self.cap
        elif tight:
            open_ &= self.forward[images] + _place(images) < self.cap
        at = open_.nonzero().squeeze(1)
        if not len(at) and self._all_spent():
            raise Finished
        chosen = (None, images) if len(at) == len(images) else (at, images[at])
        if rows is None and not tight:
            self.asked = (self.tally.changes, *chosen)
        return chosen

    def _tight(self, more: int) -> bool:
        """Whether some image may be short of ``more`` queries."""
        if self.tally.most + more <= self.cap:
            return False
        self.tally.most = int(self.forward.max())
        return self.tally.most + more > self.cap

    def _all_spent(self) -> bool:
        spent = self.done if self.queries is None else self.done | (self.forward >= self.queries)
        return bool(spent[self.rows].all())

    def _batches(self, x: Tensor, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = self.target.batch
        if len(x) <= size:
            return [(x, images)] if len(x) else []
        return list(zip(torch.split(x, size), torch.split(images, size), strict=True))

    def _evaluate(
        self, x: Tensor, rows: Tensor | None, read: Callable[[Answer, Tensor], tuple[Tensor, Tensor]], fill: float
    ) -> Tensor:
        """What is read of the answers, beside which it is told where the goal stands reached."""
        pick, images = self._enter(x, rows)
        values = []
        with torch.no_grad():
            for part, ids in self._batches(x if pick is None else x.index_select(0, pick), images):
                value, hit = read(self.target.answer(part), ids)
                values.append(value)
                self._note(part, ids, hit, backward=0, once=rows is None)
            if not values:
                values.append(read(Answer(x.new_zeros((0, self.target.classes))), images)[0])
        return _spread(values, pick, len(x), fill)

    def _hit(self, answer: Answer, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.outer[images].reached(answer)

    def _loss(self, answer: Answer, images: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """The loss, and where the goal stands reached: below a margin of zero."""
        value = self.aim[images].loss(answer, loss)
        same = loss == "margin" and self.aim is self.outer
        return value, value < 0 if same else self._hit(answer, images)

    def _note(self, x: Tensor, images: Tensor, hit: Tensor, backward: int, once: bool) -> None:
        """Count a call, keep what it found, stop what is done; ``once``: no image stands there twice."""
        self.sent.append((len(x), backward))
        one = torch.ones_like(images)
        self.forward.index_add_(0, images, one)
        if backward:
            self.backward.index_add_(0, images, one, alpha=backward)
        self.tally.most += 1 if once else len(x)
        at = hit.nonzero().squeeze(1)
        if len(at) == len(images):
            self._keep(x.detach().to(self.x.dtype), images, once)
        elif len(at):
            self._keep(x.detach().index_select(0, at).to(self.x.dtype), images[at], once)
        if self.seeks != "optimum" and self._tight(1):
            self.retire((self.forward >= self.cap).nonzero().squeeze(1))
        if self.progress is not None:
            self.progress(len(x))

    def _keep(self, tried: Tensor, of: Tensor, once: bool) -> None:
        """Keep the nearest of the successes ``tried``, which stand for the images ``of``."""
        distance = self.ball.distance(tried, self.x.index_select(0, of))
        fits = distance < self.distance[of]
        if self.seeks != "minimum":
            fits &= distance <= self.ball.reach
        at = fits.nonzero().squeeze(1)
        if not len(at):
            return
        if len(at) < len(of):
            tried, of, distance = tried.index_select(0, at), of[at], distance[at]
        low, high = tried.aminmax()
        if not (low >= 0 and high <= 1):
            at = ((tried >= 0) & (tried <= 1)).flatten(1).all(1).nonzero().squeeze(1)
            tried, of, distance = tried[at], of[at], distance[at]
            if not len(of):
                return
        if not once:
            nearest = torch.full_like(self.distance, INF).scatter_reduce(0, of, distance, "amin")
            first = (distance == nearest[of]).nonzero().squeeze(1).flip(0)
            tried, of, distance = tried[first], of[first], distance[first]
        self.best[of] = tried
        self.distance[of] = distance
        fresh = of[~self.found[of]]
        self.needed[fresh] = self.forward[fresh]
        self.found[of] = True
        if self.seeks == "success":
            self.retire(of)


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
