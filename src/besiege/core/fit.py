"""How a classifier is trained: one small seeded recipe, as a value whose parts an attack or a defense replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format

from besiege.core.images import Images
from besiege.core.rng import Rng
from besiege.core.target import Target

Shape = tuple[int, int, int]
Build = Callable[[Shape, int], nn.Module]
"""(channels, height, width) and a number of classes → a fresh network, images in [0, 1] → logits."""

Objective = Callable[[nn.Module, Tensor, Tensor, Rng], Tensor]
"""The network, images (n, c, h, w), labels (n,), their streams → what is minimized, a mean over the batch."""

Prepare = Callable[[Tensor, Tensor, Rng], tuple[Tensor, Tensor]]
"""Images and labels of a batch, and their streams → those that are learned from."""


def cross_entropy(module: nn.Module, x: Tensor, y: Tensor, rng: Rng) -> Tensor:
    """The mean cross-entropy."""
    return F.cross_entropy(module(x), y)


@dataclass(frozen=True)
class Fit:
    """A training recipe: SGD with momentum, weight decay and a one-cycle rate that peaks at ``lr``.

    ``build`` makes the network and ``loss`` is what it minimizes. ``shift`` moves images by up to so many pixels and
    ``flip`` mirrors half of them, each by itself; ``prepare`` sees a batch after that, so that what it stamps on an
    image stays where it is. Channels lie last in memory meanwhile, which is faster; the passes run in bfloat16 on a
    GPU, and on a CPU where ``bfloat16`` says so: one that knows the format (AVX512-BF16, AMX) takes half the time.
    """

    build: Build = field(repr=False)
    name: str = "fit"
    loss: Objective = field(default=cross_entropy, repr=False)
    prepare: Prepare | None = field(default=None, repr=False)
    epochs: int = 12
    batch: int = 64
    lr: float = 0.1
    decay: float = 5e-4
    shift: int = 0
    flip: bool = False
    bfloat16: bool = False

    def __call__(
        self,
        images: Images,
        seed: int = 0,
        *,
        classes: int,
        start: nn.Module | None = None,
        checkpoint: Path | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Target:
        """Train on ``images``, from fresh weights or (in place) from those of ``start``.

        The first weights, the order of the images and what is drawn for them depend on the seed and the numbers of
        the images alone: two sets that differ in some rows are trained alike. With ``checkpoint`` every epoch is
        saved there, and an interrupted training goes on after the last. ``progress`` is told how many images were
        learned from.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.build(images.shape, classes) if start is None else start
            module.to(images.x.device).train()
            convert_conv2d_weight_memory_format(module, torch.channels_last)
            optimizer = torch.optim.SGD(
                module.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.decay, nesterov=True
            )
            rounds = self.epochs * -(-len(images) // self.batch)
            rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, rounds)
            done = 0 if checkpoint is None else _resumed(checkpoint, module, optimizer, rate)
            if progress is not None and done:
                progress(done * len(images))
            for epoch in range(done, self.epochs):
                self._epoch(module, optimizer, rate, images, seed, epoch, progress)
                if checkpoint is not None:
                    _keep(checkpoint, epoch + 1, module, optimizer, rate)
        convert_conv2d_weight_memory_format(module, torch.contiguous_format)
        return Target.of(module.eval(), classes=classes, shape=images.shape, name=self.name, batch=256)

    def _epoch(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: torch.optim.lr_scheduler.LRScheduler,
        images: Images,
        seed: int,
        epoch: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        device = images.x.device
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed((seed << 16) + epoch))
        for rows in torch.split(order.to(device), self.batch):
            part = images[rows]
            rng = Rng.of(seed, part.index + (epoch << 40), "fit")
            x, y = self._augmented(part.x, rng), part.y
            if self.prepare is not None:
                x, y = self.prepare(x, y, rng)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16 or device.type == "cuda"):
                loss = self.loss(module, x, y, rng)
            loss.backward()
            optimizer.step()
            rate.step()
            if progress is not None:
                progress(len(part))

    def _augmented(self, x: Tensor, rng: Rng) -> Tensor:
        """Each image moved and mirrored by draws of its own; what moves in is black."""
        if self.flip:
            x = torch.where((rng.signs() > 0).reshape(-1, 1, 1, 1), x, x.flip(3))
        if not self.shift:
            return x
        (n, _, h, w), most = x.shape, self.shift
        down, right = rng.below(2 * most + 1, 2).unbind(1)
        padded = F.pad(x, (most, most, most, most))
        rows = down[:, None] + torch.arange(h, device=x.device)
        columns = right[:, None] + torch.arange(w, device=x.device)
        moved: Tensor = padded[
            torch.arange(n, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]
        ]
        return moved.permute(0, 3, 1, 2).contiguous()


def _keep(
    checkpoint: Path,
    epochs: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Save where a training stands; the file is whole at any moment."""
    state = {
        "epochs": epochs,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rate": rate.state_dict(),
        "random": torch.get_rng_state(),
    }
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    beside = checkpoint.with_name(checkpoint.name + ".new")
    torch.save(state, beside)
    beside.replace(checkpoint)


def _resumed(
    checkpoint: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Go back to where a training was saved; how many epochs are done."""
    if not checkpoint.is_file():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    rate.load_state_dict(state["rate"])
    torch.set_rng_state(state["random"])
    return int(state["epochs"])
