"""auto-attack, the authors' reference (packaged as pyautoattack)."""

from __future__ import annotations

import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.square import SquareAttack
from torch import Tensor, nn


def apgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int) -> Tensor:
    return APGDAttack(model, n_iter=steps, norm="Linf", eps=eps, seed=_seed(), device="cpu").perturb(x, y)


def square(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, queries: int) -> Tensor:
    attack = SquareAttack(model, norm="Linf", eps=eps, n_queries=queries, p_init=0.8, seed=_seed(), device="cpu")
    return attack.perturb(x, y)


def autoattack(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    attack = AutoAttack(model, norm="Linf", eps=eps, seed=_seed())
    adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
    return adv


def _seed() -> int:
    return torch.initial_seed() % 2**31
