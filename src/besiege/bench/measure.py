"""Times attacks against the floor: the same passes of the bare model, at the batch sizes that were sent.

A model wrapper counts the passes and remembers the size of every call, so the same is measured of any library.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.method import Attack
from besiege.core.target import Target
from besiege.core.threat import INF, Ball, ThreatModel
from besiege.engine.evasion import evade

Contender = Callable[[nn.Module, Images, int], Tensor]
"""An attack as it is raced: (module, images, seed) → adversarial images, one an image, fallen or not."""

SIZES = (8, 16, 32, 64, 128, 256)
"""Batch sizes tried for the floor at the best one."""

LEAST = 0.2
"""Seconds that a timing takes at least; what is shorter runs several times."""


@dataclass
class Call:
    """One call of ``module`` on ``rows`` images, with ``columns`` backward passes of each."""

    module: nn.Module
    rows: int
    columns: int = 0

    def back(self, grad: Tensor) -> None:
        """Count a backward pass."""
        self.columns += 1


class Recorder(nn.Module):
    """The same module, which writes down every call; copies of it write in the same book."""

    def __init__(self, module: nn.Module, calls: list[Call] | None = None) -> None:
        super().__init__()
        self.module = module
        self.calls: list[Call] = [] if calls is None else calls

    def __deepcopy__(self, memo: dict[int, object]) -> Recorder:
        twin = Recorder(copy.deepcopy(self.module, memo), self.calls)
        return twin.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """The module's answer."""
        call = Call(self.module, len(x))
        self.calls.append(call)
        if torch.is_grad_enabled() and x.requires_grad:
            x = x.view_as(x)
            x.register_hook(call.back)
        scores: Tensor = self.module(x)
        return scores


@dataclass(frozen=True)
class Figures:
    """What one contender costs an image, in milliseconds of one thread and in passes, and what it reaches.

    ``overhead`` is the CPU time over ``floor_ms``, the bare model's at the same calls; ``best_floor_ms`` is the
    same number of passes at the batch size that suits the model best, ``given_ms`` the same calls of the model as it
    was given: ours lays it out anew for the search, and its floor is that of the new layout. Times and overhead are
    medians over the laps. ``robust_accuracy`` is the share that did not fall, by a pass of its own; the distances are
    over what fell. Both are over all seeds together.
    """

    images: int
    cpu_ms: float
    wall_ms: float
    forward: float
    backward: float
    floor_ms: float
    best_floor_ms: float
    best_batch: int
    overhead: float
    robust_accuracy: float
    median_distance: float | None
    mean_distance: float | None
    given_ms: float | None = None


@dataclass(frozen=True)
class Failure:
    """A contender that raised an error."""

    why: str


@dataclass(frozen=True)
class Lap:
    """One run of a contender: seconds for all images."""

    seed: int
    cpu: float
    wall: float
    floor: float
    given: float
    best_floor: float
    best_batch: int
    forward: int
    backward: int
    distance: Tensor


def contender(attack: Attack, target: Target, threat: ThreatModel) -> Contender:
    """One of ours, raced as a user runs it: the clean pass and the confirmation of what it found included."""

    def run(module: nn.Module, images: Images, seed: int) -> Tensor:
        return evade(attack, replace(target, module=module, call=module), images, threat, seed=seed).adv

    return run


def race(
    contenders: Mapping[str, Contender],
    module: nn.Module,
    images: Images,
    ball: Ball,
    *,
    repeat: int = 3,
    seeds: Sequence[int] = (0,),
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Figures | Failure]:
    """Run all ``contenders`` in turn, ``repeat`` times, each with its floor right after it.

    One that raises an error is left out of the remaining laps. ``tell`` hears what is being run.

    Raises:
        BadInput: ``repeat`` is below 1.
    """
    if repeat < 1:
        raise BadInput(f"a race has at least 1 lap, not {repeat}")
    laps: dict[str, list[Lap]] = {name: [] for name in contenders}
    failed: dict[str, Failure] = {}
    own = {name: copy.deepcopy(module) for name in contenders}
    for lap in range(-1, repeat):
        for name, run in contenders.items():
            if name in failed:
                continue
            try:
                if lap < 0:
                    run(own[name], images[:2], 0)
                else:
                    tell(f"lap {lap + 1} of {repeat}: {name}")
                    laps[name].append(_lap(run, own[name], images, ball, seeds[lap % len(seeds)]))
            except Exception as error:
                failed[name] = Failure(f"{type(error).__name__}: {error}")
    return {name: failed.get(name) or _figures(laps[name]) for name in contenders}


def fallen(module: nn.Module, images: Images, adv: Tensor, ball: Ball) -> Tensor:
    """(n,) float64: the distance of what is misclassified, finite and in ``ball``; inf for the rest.

    Looks afresh, in batches of 64, and shares no code with any search. Pixels are brought into [0, 1] first, which
    never makes a distance longer.
    """
    adv = adv.detach().clamp(0, 1)
    with torch.no_grad():
        labels = torch.cat([module(part).argmax(1) for part in torch.split(adv, 64)])
    moved = (adv.double() - images.x.double()).flatten(1)
    if isinstance(ball.norm, str):
        distance = ball.distance(adv, images.x).double()
    elif ball.norm == 0:
        distance = (moved.view(images.x.shape) != 0).any(1).flatten(1).sum(1).double()
    else:
        distance = torch.linalg.vector_norm(moved, ord=ball.norm, dim=1)
    inside = distance <= ball.reach
    return torch.where((labels != images.y) & inside & moved.isfinite().all(1), distance, INF)


def replay(calls: Sequence[Call], x: Tensor) -> None:
    """The floor: the same calls again on ``x``, with frozen weights, the input's gradient and nothing else."""
    x = _tiled(x, max((call.rows for call in calls), default=0))
    with _frozen(calls):
        for call in calls:
            _pass(call, x)


def best_floor(calls: Sequence[Call], x: Tensor) -> tuple[float, int]:
    """Seconds that as many passes take at the batch size that suits the model best, and that size.

    Forward passes and those with gradients find their sizes apart; the size told is that of the more expensive.
    """
    if not calls:
        return 0.0, 0
    rows: Counter[int] = Counter()
    for call in calls:
        rows[call.columns] += call.rows
    module = max(calls, key=lambda call: call.rows * (1 + call.columns)).module
    x, found = _tiled(x, max(SIZES)), []
    with _frozen(calls):
        for columns, total in rows.items():
            each, size = min(_cost(Call(module, size, columns), x) for size in SIZES)
            found.append((total * each, size))
    return sum(seconds for seconds, _ in found), max(found)[1]


def _cost(call: Call, x: Tensor) -> tuple[float, int]:
    """Seconds a row, and the rows."""
    return _clock(lambda: _pass(call, x), share=0.1)[0] / call.rows, call.rows


def _pass(call: Call, x: Tensor) -> None:
    part = x[: call.rows]
    if not call.columns:
        with torch.no_grad():
            call.module(part)
        return
    leaf = part.detach().requires_grad_()
    with torch.enable_grad():
        scores = call.module(leaf)
        for k in range(call.columns):
            column = scores[:, k % scores.shape[1]].sum()
            torch.autograd.grad(column, leaf, retain_graph=k + 1 < call.columns)


def _tiled(x: Tensor, rows: int) -> Tensor:
    return x.repeat(math.ceil(rows / len(x)), 1, 1, 1)


@contextmanager
def _frozen(calls: Sequence[Call]) -> Iterator[None]:
    modules = {id(call.module): call.module for call in calls}.values()
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _lap(run: Contender, module: nn.Module, images: Images, ball: Ball, seed: int) -> Lap:
    books: list[Recorder] = []
    results: list[Tensor] = []

    def once() -> None:
        books.append(Recorder(module).eval())
        results.append(run(books[-1], images, seed))

    cpu, wall = _clock(once)
    calls = books[0].calls
    floor, _ = _clock(lambda: _replay_recorded(calls, images.x))
    given, _ = _clock(lambda: _replay_recorded([replace(call, module=module) for call in calls], images.x))
    best, size = best_floor(calls, images.x)
    return Lap(
        seed=seed,
        cpu=cpu,
        wall=wall,
        floor=floor,
        given=given,
        best_floor=best,
        best_batch=size,
        forward=sum(call.rows for call in calls),
        backward=sum(call.rows * call.columns for call in calls),
        distance=fallen(module, images, results[0], ball),
    )


def _replay_recorded(calls: Sequence[Call], x: Tensor) -> None:
    """The floor bears the wrapper's cost too, so that it cancels in the overhead."""
    wrapped = {id(call.module): Recorder(call.module).eval() for call in calls}
    replay([Call(wrapped[id(call.module)], call.rows, call.columns) for call in calls], x)


def _clock(run: Callable[[], None], share: float = 1.0) -> tuple[float, float]:
    """CPU and wall seconds of one run, from as many as take a ``share`` of LEAST."""
    times, cpu, wall = 0, time.process_time(), time.perf_counter()
    while not times or time.process_time() - cpu < share * LEAST:
        run()
        times += 1
    return (time.process_time() - cpu) / times, (time.perf_counter() - wall) / times


def _figures(laps: Sequence[Lap]) -> Figures:
    n = len(laps[0].distance)
    seen = {lap.seed: lap for lap in laps}.values()
    distance = torch.cat([lap.distance for lap in seen])
    fell = distance[distance.isfinite()]

    def middle(read: Callable[[Lap], float]) -> float:
        return statistics.median(read(lap) for lap in laps)

    return Figures(
        images=n,
        cpu_ms=1000 * middle(lambda lap: lap.cpu) / n,
        wall_ms=1000 * middle(lambda lap: lap.wall) / n,
        forward=statistics.fmean(lap.forward for lap in seen) / n,
        backward=statistics.fmean(lap.backward for lap in seen) / n,
        floor_ms=1000 * middle(lambda lap: lap.floor) / n,
        best_floor_ms=1000 * middle(lambda lap: lap.best_floor) / n,
        best_batch=statistics.mode(lap.best_batch for lap in laps),
        overhead=middle(lambda lap: lap.cpu / lap.floor),
        robust_accuracy=1 - len(fell) / len(distance),
        median_distance=fell.median().item() if len(fell) else None,
        mean_distance=fell.mean().item() if len(fell) else None,
        given_ms=1000 * middle(lambda lap: lap.given) / n,
    )
