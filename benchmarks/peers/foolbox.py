"""Foolbox."""

from __future__ import annotations

import foolbox as fb
from torch import Tensor, nn

from besiege.core.threat import INF, Norm


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
    return _run(fb.attacks.LinfFastGradientAttack(), model, x, y, eps)


def bim(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int, stride: float) -> Tensor:
    attack = fb.attacks.LinfBasicIterativeAttack(abs_stepsize=stride, steps=steps, random_start=False)
    return _run(attack, model, x, y, eps)


def pgd(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int) -> Tensor:
    return _run(fb.attacks.LinfPGD(rel_stepsize=2.5 / steps, steps=steps), model, x, y, eps)


def cw_l2(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, searches: int) -> Tensor:
    return _run(fb.attacks.L2CarliniWagnerAttack(binary_search_steps=searches, steps=steps), model, x, y, None)


def deepfool(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return _run(fb.attacks.L2DeepFoolAttack(), model, x, y, None)


def fmn(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    return _run(fb.attacks.L2FMNAttack(steps=steps), model, x, y, None)


def ddn(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    return _run(fb.attacks.DDNAttack(steps=steps), model, x, y, None)


def newtonfool(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    return _run(fb.attacks.NewtonFoolAttack(steps=steps), model, x, y, None)


def ead(model: nn.Module, x: Tensor, y: Tensor, *, norm: Norm, steps: int, searches: int, beta: float) -> Tensor:
    rule = {1: "L1", 2: "EN"}[norm]
    attack = fb.attacks.EADAttack(binary_search_steps=searches, steps=steps, regularization=beta, decision_rule=rule)
    return _run(attack, model, x, y, None)


def brendel_bethge(model: nn.Module, x: Tensor, y: Tensor, *, norm: Norm, steps: int) -> Tensor:
    name = {0: "L0", 1: "L1", 2: "L2", INF: "Linfinity"}[norm]
    return _run(getattr(fb.attacks, f"{name}BrendelBethgeAttack")(steps=steps), model, x, y, None)


def boundary(model: nn.Module, x: Tensor, y: Tensor, *, steps: int) -> Tensor:
    return _run(fb.attacks.BoundaryAttack(steps=steps), model, x, y, None)


def hopskipjump(model: nn.Module, x: Tensor, y: Tensor, *, rounds: int) -> Tensor:
    return _run(fb.attacks.HopSkipJumpAttack(steps=rounds), model, x, y, None)


def spatial(model: nn.Module, x: Tensor, y: Tensor, *, shift: float, turn: float, shifts: int, turns: int) -> Tensor:
    attack = fb.attacks.SpatialAttack(
        max_translation=shift * x.shape[-1], max_rotation=turn, num_translations=shifts, num_rotations=turns
    )
    return _run(attack, model, x, y, None)


def _run(attack: fb.Attack, model: nn.Module, x: Tensor, y: Tensor, eps: float | None) -> Tensor:
    _, clipped, _ = attack(fb.PyTorchModel(model, bounds=(0, 1), device=x.device), x, y, epsilons=eps)
    return clipped
