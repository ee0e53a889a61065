"""Runs one extraction through a counting oracle, then measures what was stolen on images that it never saw."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from besiege.core.errors import BadInput, NotRebuilt
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.lens import Surrogate
from besiege.core.meter import Meter
from besiege.core.method import Attack
from besiege.core.oracle import Finished
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Answer, Ball, Goal, ThreatModel
from besiege.engine.prada import Prada
from besiege.engine.summary import siege
from besiege.results.extraction import Theft
from besiege.results.interval import wilson

WATCHED = 5000
"""The monitor watches so many queries; it compares each with those before it."""

BATCH = 256


@dataclass(frozen=True, eq=False)
class Stolen:
    """What an extraction brought: ``model`` is the stolen classifier, ``queries`` what it cost.

    ``watched`` (m, c, h, w) are the first queries and ``labels`` (m,) what they were answered.
    """

    model: Target
    module: nn.Module
    queries: int
    watched: Tensor
    labels: Tensor
    seconds: float
    notes: tuple[str, ...]


def extract(
    attack: Attack,
    target: Target,
    pool: Images,
    fit: Fit,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Stolen:
    """Steal ``target`` by asking about ``pool``, whose labels are not looked at.

    An exact method asks a module's copy in float64, or a function in float64 whatever it makes of it.

    Raises:
        BadInput: the method does not fit the target or the pool.
        NotRebuilt: it failed, or ran out of queries.
    """
    card = attack.card
    if target.access < card.access:
        raise BadInput(f"{card.name} needs {card.access.name.lower()}, but {target.name} grants labels alone")
    if pool.shape != target.shape:
        raise BadInput(f"the pool's images are {pool.shape} (c, h, w), but {target.name} takes {target.shape}")
    asked, notes = _exact(target) if card.exact else (target, ())
    book = _Book(asked)
    limit = int(attack.arguments["queries"])
    device = pool.x.device
    meter = Meter(
        replace(asked, call=book),
        torch.zeros(1, *target.shape, dtype=asked.dtype, device=device),
        Goal(torch.zeros(1, dtype=torch.int64, device=device), targeted=True, confidence=INF),
        Ball(INF, INF),
        seeks="optimum",
        access=card.access,
        queries=limit,
        progress=progress,
    )
    began = time.monotonic()
    unlabelled = replace(pool, y=torch.zeros_like(pool.y))
    try:
        with asked.ready():
            module = attack.bound()(meter, unlabelled, fit, Rng.of(seed, pool.index, attack.name))
    except (Finished, NotRebuilt) as error:
        spent = int(meter.forward[0])
        why = f": its {limit:,} queries were used up" if spent >= limit else f" after {spent:,} queries: {error}"
        raise NotRebuilt(f"{attack.name} failed{why}") from None
    model = Target.of(
        module.eval(), classes=target.classes, shape=target.shape, name=f"stolen from {target.name}", batch=BATCH
    )
    return Stolen(model, module, int(meter.forward[0]), *book.pages(), time.monotonic() - began, notes)


def steal(
    attack: Attack,
    target: Target,
    pool: Images,
    judged: Images,
    fit: Fit,
    *,
    seed: int = 0,
    probe: Attack | None = None,
    ball: Ball | None = None,
    probed: int = 200,
    progress: Callable[[int], None] | None = None,
) -> tuple[Stolen, Theft]:
    """Extract, and measure on the images ``judged``.

    ``probe`` is a white-box attack in ``ball`` that is run with the stolen model's gradients on the first ``probed``
    of them and judged on the target.

    Raises:
        BadInput, NotRebuilt: see `extract`.
    """
    target.takes(judged)
    stolen = extract(attack, target, pool, fit, seed=seed, progress=progress)
    both = 0 if attack.card.exact else judged.shared(pool)
    overlap = [f"{both} of the {len(judged)} images that judge are among those that it may ask about"] if both else []
    theirs, ours = target.scores(judged.x), stolen.model.scores(judged.x)
    said, copied = theirs.argmax(1), ours.argmax(1)
    n = len(judged)
    right, rightly, same = (int((a == b).sum()) for a, b in ((said, judged.y), (copied, judged.y), (said, copied)))
    apart = None
    if attack.card.exact:
        apart = _apart(_exact(target)[0], stolen.model, judged)
    elif target.access >= Access.SCORES:
        apart = _apart(target, stolen.model, judged)
    transfer = None
    if probe is not None and ball is not None:
        few = judged[:probed]
        transfer = siege(
            probe,
            target,
            few,
            ThreatModel(Access.LABELS, ball),
            seed=seed,
            lens=lambda meter, x, rng: Surrogate(meter, stolen.model, x),
            clean=said[:probed],
        )[2]
    monitor, benign = Prada(), Prada()
    monitor.see(stolen.watched, stolen.labels)
    benign.see(judged.x[:WATCHED].cpu(), said[:WATCHED].cpu())
    theft = Theft(
        attack=attack.name,
        options=attack.recorded(),
        title=attack.card.title,
        family=attack.card.family,
        paper=attack.card.paper,
        target=target.name,
        fingerprint=target.fingerprint,
        asked_of=pool.name,
        data=judged.name,
        n=n,
        seed=seed,
        fit="" if attack.card.exact else fit.name,
        layers=_widths(stolen.module) if attack.card.exact else None,
        queries=stolen.queries,
        accuracy=rightly / n,
        accuracy_interval=wilson(rightly, n),
        target_accuracy=right / n,
        accuracy_ratio=rightly / right if right else None,
        agreement=same / n,
        agreement_interval=wilson(same, n),
        max_difference=apart,
        transfer_success=None if transfer is None else transfer.success_rate,
        transfer_interval=None if transfer is None else transfer.success_interval,
        transfer_noise=None if transfer is None else transfer.noise_success_rate,
        transfer_eps=None if ball is None else float(ball.eps),
        watched=len(stolen.watched),
        alarm_rate=monitor.rate,
        first_alarm=monitor.first,
        alarm_rate_benign=benign.rate,
        seconds=stolen.seconds,
        notes=[*target.notes, *pool.notes, *stolen.notes, *overlap],
    )
    return stolen, theft


def _exact(target: Target) -> tuple[Target, tuple[str, ...]]:
    """The target in float64: itself, a copy of its module, or its function asked in float64.

    A module without weights, as an ONNX file with gradients is, is asked as a function is.
    """
    module = target.module
    if target.dtype == torch.float64:
        return target, ()
    if module is None or target.call is not module or next(module.parameters(), None) is None:
        return replace(target, dtype=torch.float64), ()
    twin = copy.deepcopy(module).double()
    note = f"{target.name} computes in {str(target.dtype).removeprefix('torch.')}; a copy of it in float64 was asked"
    return replace(target, module=twin, call=twin, dtype=torch.float64), (note,)


def _apart(target: Target, model: Target, judged: Images) -> float:
    """The largest difference of a score, in standard deviations of the target's."""
    x = judged.x.double()
    theirs = target.scores(x)
    return float((model.scores(x) - theirs).abs().max() / theirs.std().clamp_min(1e-30))


def _widths(module: nn.Module) -> list[int]:
    """The widths of a dense network, from its inputs to its scores."""
    dense = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return [dense[0].in_features, *(layer.out_features for layer in dense)]


class _Book:
    """The target, which remembers its first questions."""

    def __init__(self, target: Target) -> None:
        self.target, self.kept = target, 0
        self.asked: list[Tensor] = []
        self.answered: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor | Answer:
        try:
            said = self.target.call(x)
        except BadInput as error:
            if float(x.min()) >= 0 and float(x.max()) <= 1:
                raise
            raise BadInput(
                f"{error}; exact extraction asks about images beyond [0, 1], which it may not take"
            ) from None
        except Exception:
            if self.kept or x.dtype != torch.float64:
                raise
            raise BadInput(
                f"{self.target.name} takes no images in float64, which exact extraction needs; give a torch module, an "
                "ONNX file in float64 or an address that is sent numbers as JSON"
            ) from None
        if self.kept < WATCHED:
            scores = said.scores if isinstance(said, Answer) else said
            self.asked.append(x[: WATCHED - self.kept].detach().cpu())
            self.answered.append(scores[: WATCHED - self.kept].argmax(1).cpu())
            self.kept += len(self.asked[-1])
        return said

    def pages(self) -> tuple[Tensor, Tensor]:
        """The first questions (m, c, h, w) and the labels (m,) that they were answered."""
        if not self.asked:
            return torch.zeros(0, *self.target.shape), torch.zeros(0, dtype=torch.int64)
        return torch.cat(self.asked), torch.cat(self.answered)
