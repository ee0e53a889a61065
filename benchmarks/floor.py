"""The floor of a benchmark: what the same passes of the bare network cost, and how many passes there were."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

LAPS = 5


class Counted(nn.Module):
    """A network that counts the images that pass through it, and back."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.forwards, self.backwards = module, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """What the network answers."""
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self.back)
        answer: Tensor = self.module(x)
        return answer

    def back(self, grad: Tensor) -> None:
        """Count a backward pass."""
        self.backwards += len(grad)


def floor(module: nn.Module, x: Tensor, forward: float, backward: float) -> float:
    """CPU seconds of so many forward passes of an image, ``backward`` of them with the pass back, in batches of x."""
    once, both = [], []
    for _ in range(LAPS):
        began = time.process_time()
        with torch.no_grad():
            module(x)
        once.append(time.process_time() - began)
        leaf = x.clone().requires_grad_()
        began = time.process_time()
        torch.autograd.grad(module(leaf).sum(), leaf)
        both.append(time.process_time() - began)
    return ((forward - backward) * min(once) + backward * min(both)) / len(x)
