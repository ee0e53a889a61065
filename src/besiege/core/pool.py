"""Runs searches of many images at once: their questions are joined into full batches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from besiege.core.meter import Meter
from besiege.core.method import Asks
from besiege.core.oracle import Finished

BATCHES = 8
"""A round asks about this many batches, or everything that is pending if that is less."""

Asking = Generator[Tensor, Tensor, Any] | Iterator[Tensor]


def pool(meter: Meter, search: Callable[[int], Any], asks: Asks, images: list[int]) -> None:
    """Run ``search(i)``, a generator, for each of ``images``; new ones begin as others finish.

    The searches that were answered last go on first, and only until the next round is full: those that hold many
    candidates are soon rid of them, and memory is that of a few rounds. An image leaves when its generator ends or
    the meter is done with it.
    """
    enough = BATCHES * meter.target.batch
    waiting, running = images[::-1], {}
    answered: list[tuple[int, Tensor | None]] = []
    try:
        while answered or waiting:
            pending: list[tuple[int, Tensor]] = []
            ended, rows = [], 0
            while rows < enough and (answered or waiting):
                image, answer = answered.pop() if answered else (waiting.pop(), None)
                if answer is None:
                    running[image] = search(image)
                question = _next(running[image], answer)
                if question is None:
                    ended.append(image)
                    del running[image]
                else:
                    pending.append((image, question))
                    rows += len(question)
            if ended:
                meter.retire(torch.tensor(ended, device=meter.done.device))
            for image, answer, over in _round(meter, pending, asks):
                if over:
                    running.pop(image).close()
                else:
                    answered.append((image, answer))
    except Finished:
        pass
    finally:
        for generator in running.values():
            generator.close()


def _next(generator: Any, answer: Tensor | None) -> Tensor | None:
    """What a search asks next, first of all where there is no answer yet; None when it has ended."""
    try:
        question: Tensor = generator.send(answer)
    except StopIteration:
        return None
    return question


def _round(meter: Meter, pending: list[tuple[int, Tensor]], asks: Asks) -> Iterator[tuple[int, Tensor, bool]]:
    """The answers to every pending question, and whether the image is done with."""
    if not pending:
        return
    device = meter.done.device
    sizes = [len(question) for _, question in pending]
    ids = torch.tensor([image for image, _ in pending], device=device)
    rows = ids if max(sizes) == 1 else ids.repeat_interleave(torch.tensor(sizes, device=device))
    candidates = torch.cat([question for _, question in pending])
    answers = meter.is_adversarial(candidates, rows) if asks == "labels" else meter.loss(candidates, asks, rows)
    done = meter.done[ids].tolist()
    yield from (
        (image, answer, over)
        for (image, _), answer, over in zip(pending, torch.split(answers, sizes), done, strict=True)
    )
