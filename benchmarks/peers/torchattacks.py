"""torchattacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers import register_torchvision
from besiege.core.threat import Norm

register_torchvision()
import torchattacks as ta


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return ta.FGSM(model, eps)(x, y)


def bim(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int, stride: float) -> Tensor:
    return ta.BIM(model, eps, alpha=stride, steps=steps)(x, y)


def pgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int) -> Tensor:
    return ta.PGD(model, eps, alpha=2.5 * eps / steps, steps=steps)(x, y)


def apgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int) -> Tensor:
    return ta.APGD(model, eps=eps, steps=steps)(x, y)


def cw_l2(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    """It does not search for the constant; 1 is its default."""
    return ta.CW(model, steps=steps)(x, y)


def deepfool(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ta.DeepFool(model)(x, y)


def ead(model: nn.Module, x: Tensor, y: Tensor, *, norm: Norm, steps: int, searches: int, beta: float) -> Tensor:
    attack = {1: ta.EADL1, 2: ta.EADEN}[norm]
    return attack(model, max_iterations=steps, binary_search_steps=searches, beta=beta)(x, y)


def square(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, queries: int) -> Tensor:
    return ta.Square(model, eps=eps, n_queries=queries)(x, y)


def autoattack(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return ta.AutoAttack(model, eps=eps, seed=0)(x, y)


def jsma(model: nn.Module, x: Tensor, y: Tensor, *, gamma: float) -> Tensor:
    """Toward the highest other class; its own choice is the next label."""
    attack = ta.JSMA(model, theta=1.0, gamma=gamma)
    with torch.no_grad():
        goal = model(x).scatter(1, y[:, None], -float("inf")).argmax(1)
    attack.set_mode_targeted_by_label(quiet=True)
    return attack(x, goal)


def one_pixel(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, queries: int) -> Tensor:
    """With the paper's population; its own, 10 members and 10 generations, ends after 60 queries."""
    return ta.OnePixel(model, pixels=round(eps), steps=queries // 400 - 1, popsize=400)(x, y)


def few_pixel(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, queries: int) -> Tensor:
    return one_pixel(model, x, y, eps=eps, queries=queries)
