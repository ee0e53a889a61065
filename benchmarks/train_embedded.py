"""Trains the networks that the package brings along: ``python benchmarks/train_embedded.py [NAME ...]``.

Takes under two minutes on one core and overwrites the weights in ``src/besiege/embedded``. The test part is looked
at once, at the end.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from besiege.embedded.images import Part, digits, digits_rgb
from besiege.embedded.networks import NETWORKS, load, save

EPOCHS = {"digits-cnn": 25, "digits-mlp": 40, "digits-softmax": 40, "digits-rgb": 25}
COPIES = 6


def images(name: str, part: Part) -> tuple[Tensor, Tensor]:
    """The images that a network is for; colour ones are many, each digit on several patches."""
    return digits_rgb(part, COPIES if part == "train" else 1) if name == "digits-rgb" else digits(part)


def shifted(x: Tensor, draw: torch.Generator) -> Tensor:
    """Every batch moves as a whole by up to two pixels."""
    down, right = torch.randint(-2, 3, (2,), generator=draw).tolist()
    return x.roll((down, right), (2, 3))


def train(name: str) -> nn.Module:
    """Adam with a one-cycle rate and weight decay."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    module, (x, y), size = NETWORKS[name](), images(name, "train"), 64
    epochs, batches = EPOCHS[name], -(-len(x) // size)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draw).split(size):
            loss = F.cross_entropy(module(shifted(x[rows], draw)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return module


def main(names: list[str]) -> None:
    """Train, store, and state the accuracy of what was stored."""
    torch.set_num_threads(1)
    for name in names or list(NETWORKS):
        began = time.process_time()
        save(train(name), name)
        x, y = images(name, "test")
        right = int((load(name)(x).argmax(1) == y).sum())
        print(f"{name:15} {right / len(x):.1%} of {len(x)} test images in {time.process_time() - began:.0f} CPU s")


if __name__ == "__main__":
    main(sys.argv[1:])
