"""cleverhans."""

from __future__ import annotations

from cleverhans.torch.attacks.hop_skip_jump_attack import hop_skip_jump_attack
from torch import Tensor, nn


def hopskipjump(model: nn.Module, x: Tensor, y: Tensor, *, rounds: int) -> Tensor:
    return hop_skip_jump_attack(model, x, norm=2, num_iterations=rounds, verbose=False)
