"""Runs searches of many images at once: their questions are joined into full batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from besiege.core.meter import Meter
from besiege.core.method import Asks
from besiege.core.oracle import Finished

WINDOW_PIXELS = 1 << 24
"""The questions that are pending at once hold about this many numbers, so that even single ones fill a batch."""


def pool(meter: Meter, search: Callable[[int], Any], asks: Asks, images: list[int]) -> None:
    """Run ``search(i)``, a generator, for each of ``images``; a window refills as images finish.

    Every round sends one batch: the pending candidates of the images in the window. An image leaves when its
    generator ends, the meter is done with it, or its budget is spent.
    """
    most = max(2 * meter.target.batch, WINDOW_PIXELS // meter.x[0].numel())
    waiting = images[::-1]
    running: dict[int, tuple[Any, Tensor]] = {}
    try:
        while waiting or running:
            rows = sum(len(ask) for _, ask in running.values())
            while waiting and rows < most:
                image = waiting.pop()
                generator = search(image)
                ask = next(generator, None)
                if ask is None:
                    meter.retire(torch.tensor([image], device=meter.done.device))
                    continue
                running[image] = (generator, ask)
                rows += len(ask)
            if running:
                _round(meter, running, asks)
    except Finished:
        pass
    finally:
        for generator, _ in running.values():
            generator.close()


def _round(meter: Meter, running: dict[int, tuple[Any, Tensor]], asks: Asks) -> None:
    """Answer every pending question and let the images that go on ask their next."""
    device = meter.done.device
    sizes = [len(ask) for _, ask in running.values()]
    ids = torch.tensor(list(running), device=device)
    rows = ids.repeat_interleave(torch.tensor(sizes, device=device))
    candidates = torch.cat([ask for _, ask in running.values()])
    if asks == "labels":
        answers = meter.is_adversarial(candidates, rows)
    else:
        answers = meter.loss(candidates, asks, rows)
    done = meter.done[ids].tolist()
    for (image, (generator, _)), answer, over in zip(
        list(running.items()), torch.split(answers, sizes), done, strict=True
    ):
        ask = None
        if not over:
            try:
                ask = generator.send(answer)
            except StopIteration:
                meter.retire(torch.tensor([image], device=device))
        if ask is None:
            generator.close()
            del running[image]
        else:
            running[image] = (generator, ask)
