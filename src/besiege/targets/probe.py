"""What a network answers: asked with a few images when a target is opened, before hours are spent on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.core.errors import BadInput
from besiege.core.target import Target
from besiege.core.threat import Access

FEW = 8
"""So many images are asked about."""

STEADY = 1e-4
"""Two passes may differ by this much, relative to the largest score."""


class Unpack(nn.Module):
    """Finds the scores in what a network returns: an array, the first of several, or an entry ``logits``."""

    def forward(self, said: Any) -> Any:
        """The scores as a tensor; what holds none is passed on."""
        if isinstance(said, Mapping):
            said = said.get("logits", said)
        elif not isinstance(said, (Tensor, np.ndarray)):
            said = getattr(said, "logits", said)
        if isinstance(said, (tuple, list)) and said and isinstance(said[0], (Tensor, np.ndarray)):
            said = said[0]
        return torch.from_numpy(np.ascontiguousarray(said)) if isinstance(said, np.ndarray) else said


class LogProbability(nn.Module):
    """The logarithm of probabilities, which every loss takes as it takes logits."""

    def forward(self, p: Tensor) -> Tensor:
        """Log-probabilities (n, classes)."""
        return p.clamp_min(1e-30).log()


class OneHot(nn.Module):
    """Labels (n,) as scores (n, classes): 1 for the class, 0 elsewhere."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, labels: Tensor) -> Tensor:
        """One-hot float32 scores."""
        return F.one_hot(labels.long(), self.classes).float()


@dataclass(frozen=True)
class Found:
    """What was found out: ``tail`` is what must follow the network so that it answers with scores."""

    tail: tuple[nn.Module, ...]
    classes: int
    access: Access
    stochastic: bool
    notes: tuple[str, ...]


def probe(net: nn.Module, x: Tensor, *, name: str, classes: int | None = None, access: Access) -> Found:
    """Ask ``net`` about images (n, c, h, w) and judge its answers; ``classes`` is what is expected, if known.

    Raises:
        BadInput: it fails, or its answers are no scores of two classes or more, or not finite.
    """
    draft = Target(call=net, access=access, classes=0, shape=(0, 0, 0), module=net)
    with draft.ready(), torch.no_grad():
        tail = _tail(_ask(net, x, name), classes, name)
        access = Access.LABELS if tail and isinstance(tail[-1], OneHot) else access
        whole = nn.Sequential(net, *tail)
        scores = _scores(whole, x, classes, name)
        scale = max(1.0, float(scores.abs().amax()))
        drift = float((_scores(whole, x, classes, name) - scores).abs().amax())
        change = float((torch.cat([_scores(whole, one[None], classes, name) for one in x]) - scores).abs().amax())
        stochastic = drift > STEADY * scale
        notes = []
        if stochastic:
            notes.append(f"it is random: two passes over the same images differ by up to {drift:.2g}")
        elif change > 10 * STEADY * scale:
            notes.append(f"an image's scores depend on the others in its batch, by up to {change:.2g}")
        if access > Access.LABELS and probabilities(scores):
            tail.append(LogProbability())
            notes.append("it answers with probabilities, not logits; their logarithm is attacked")
        reason = _no_gradient(nn.Sequential(net, *tail), x[:2]) if access >= Access.GRADIENTS else ""
        if reason:
            access = Access.SCORES
            notes.append(f"it gives no gradient ({reason}), so only attacks by scores or labels apply")
    return Found(tuple(tail), scores.shape[1], access, stochastic, tuple(notes))


def probabilities(scores: Tensor) -> bool:
    """Whether every row (n, classes) is a distribution."""
    return bool((scores >= 0).all()) and float((scores.double().sum(1) - 1).abs().max()) <= 1e-4


def settled(target: Target, found: Found) -> Target:
    """A target with what was found out about it."""
    notes = (*target.notes, *found.notes)
    return replace(target, classes=found.classes, access=found.access, stochastic=found.stochastic, notes=notes)


def first_line(error: BaseException) -> str:
    """An error as a phrase of one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _ask(net: nn.Module, x: Tensor, name: str) -> Any:
    try:
        return net(x)
    except BadInput:
        raise
    except Exception as error:
        shape = "x".join(map(str, x.shape[1:]))
        raise BadInput(f"{name} fails on images of {shape} (channels, height, width): {first_line(error)}") from None


def _tail(said: Any, classes: int | None, name: str) -> list[nn.Module]:
    """What turns an answer into scores, as far as its form shows."""
    tail: list[nn.Module] = []
    if not isinstance(said, Tensor):
        tail.append(Unpack())
        inside = tail[0](said)
        if not isinstance(inside, Tensor):
            raise BadInput(f"{name} answers with a {type(said).__name__}; scores must be a tensor or array")
        said = inside
    if said.dim() == 1 and not said.is_floating_point() and not said.is_complex():
        if classes is None:
            raise BadInput(f"{name} answers with labels alone; say how many classes there are")
        low, high = int(said.min()), int(said.max())
        if low < 0 or high >= classes:
            raise BadInput(
                f"{name} answers with label {low if low < 0 else high}, but the classes are 0 to {classes - 1}"
            )
        tail.append(OneHot(classes))
    return tail


def _scores(net: nn.Module, x: Tensor, expected: int | None, name: str) -> Tensor:
    """The scores (n, classes), or an error that says what else came."""
    scores: Tensor = _ask(net, x, name)
    if scores.dim() != 2 or len(scores) != len(x):
        raise BadInput(f"{name} answers {len(x)} images with shape {tuple(scores.shape)}; expected ({len(x)}, classes)")
    if not scores.is_floating_point():
        raise BadInput(f"{name} answers with {scores.dtype}; scores must be floats")
    if scores.shape[1] < 2:
        raise BadInput(f"{name} answers with one score an image; give one for each of two classes or more")
    if expected is not None and scores.shape[1] != expected:
        raise BadInput(f"{name} answers with {scores.shape[1]} classes, not {expected}")
    if not bool(scores.isfinite().all()):
        raise BadInput(f"{name} answers with scores that are not finite (NaN or infinite) on ordinary images")
    return scores


def _no_gradient(net: nn.Module, x: Tensor) -> str:
    """Why there is no gradient; nothing if there is one."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_(True)
        try:
            scores = net(leaf)
            if not scores.requires_grad:
                return "its scores do not depend on the pixels in torch's eyes"
            torch.autograd.grad(scores.sum(), leaf)
        except Exception as error:
            return first_line(error)
    return ""
