"""adv-lib."""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor, nn

from benchmarks.peers import register_torchvision

register_torchvision()
sys.modules.setdefault("visdom", types.ModuleType("visdom"))  # it plots; adv-lib imports it whether or not it does
from adv_lib import attacks


def pgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int) -> Tensor:
    return attacks.pgd_linf(model, x, y, eps, steps=steps, relative_step_size=2.5 / steps)


def apgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int) -> Tensor:
    return attacks.apgd(model, x, y, eps, norm=torch.inf, n_iter=steps, loss_function="ce")


def cw_l2(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, searches: int) -> Tensor:
    return attacks.carlini_wagner_l2(model, x, y, binary_search_steps=searches, max_iterations=steps)


def deepfool(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return attacks.df(model, x, y)


def fmn(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    return attacks.fmn(model, x, y, norm=2, steps=steps)


def ddn(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    return attacks.ddn(model, x, y, steps=steps)
