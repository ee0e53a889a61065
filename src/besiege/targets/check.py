"""The look before hours are spent: is the classifier fed as it was trained, and how fast is it?"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from besiege.core.images import Images
from besiege.core.target import Target
from besiege.core.threat import Access
from besiege.results.interval import wilson
from besiege.targets.preprocessing import Front

CHANCE = 1.5
"""At chance level is whose accuracy, at the upper end of its interval, is at most this many times 1 / classes.

A few images cannot show that much; of them it is enough that chance lies in the interval and half does not.
"""

WELL = 0.9
"""A classifier that is right so often is fed as it was trained."""

CLOSE = 0.03
"""Of causes that explain nearly as many images, the first is named: the simplest."""

BATCHES = (1, 4, 16, 64, 256)
MEANS = {
    "the mean and std of ImageNet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "the mean and std of CIFAR-10": ([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]),
    "the mean and std of MNIST": ([0.1307], [0.3081]),
}
CAFFE = [103.939, 116.779, 123.68]


class Throughput(NamedTuple):
    """Milliseconds an image at the fastest ``batch``; backward is not a number where there is no gradient."""

    forward: float
    both: float
    batch: int


def feeding_warning(target: Target, images: Images) -> str | None:
    """A sentence on a classifier that is right no more often than chance, or clearly less often than fed otherwise.

    It names the likely cause. Whoever is right on `WELL` of the images is not asked about other ways.
    """
    n, level = len(images), CHANCE / target.classes
    said = target.labels(images.x)
    right = int((said == images.y).sum())
    low, high = wilson(right, n)
    chance = high <= level or (low <= 1 / target.classes and high < 0.5)
    if not chance and right >= WELL * n:
        return None
    causes = {f"with {name} it is right on {{:.0%}}": share for name, share in alternatives(target, images).items()}
    causes = _relabelled(said, images.y, target.classes) | causes
    best = max(causes.values())
    cause, share = next((cause, share) for cause, share in causes.items() if share >= best - CLOSE)
    least = wilson(round(share * n), n)[0]
    told = f"{target.name} is right on {right} of {n} images"
    if chance:
        known = cause.format(share) if least > level else "check weights, labels, mean, std, range and channel order"
        return f"{told}, chance among {target.classes} classes: {known}"
    return f"{told}, but {cause.format(share)}" if least > high else None


def alternatives(target: Target, images: Images) -> dict[str, float]:
    """The accuracy with the network fed in other ways than declared, as far as it takes them."""
    found = {}
    for name, fed in _fed(images.x).items():
        try:
            with torch.no_grad(), target.ready():
                parts = torch.split(_through(target, fed), target.batch)
                said = torch.cat([target.answer(part).scores.argmax(1) for part in parts])
        except Exception:  # a way that the classifier cannot take is none
            continue
        found[name] = float((said == images.y).double().mean())
    return found


def throughput(target: Target, images: Images, seconds: float = 2.0) -> Throughput:
    """Time forward passes, and backward ones where there are gradients, in batches up to 256, for about ``seconds``."""
    share = seconds / len(BATCHES) / 2
    backward = target.access >= Access.GRADIENTS
    best = Throughput(float("inf"), float("nan"), 1)
    with target.ready():
        for size in BATCHES:
            if best.forward * size / 1e3 > 2 * share and size > 1:
                break
            x = images.x.repeat(-(-size // len(images)), 1, 1, 1)[:size]
            forward = _time(partial(_forward, target, x), target.device, share) * 1e3 / size
            if forward < best.forward:
                both = _time(partial(_both, target, x), target.device, share) * 1e3 / size if backward else best.both
                best = Throughput(forward, both, size)
            elif forward > 1.5 * best.forward:
                break
    return best


def _fed(x: Tensor) -> dict[str, Tensor]:
    """What a network may have been trained to see in place of images (n, c, h, w) in [0, 1]."""
    depth = x.shape[1]
    usual = {name: pair for name, pair in MEANS.items() if depth == len(pair[0])}
    ways = {"no normalization": x, "the range 0 to 255": x * 255, "inverted pixels": 1 - x}
    for name, (mean, std) in usual.items():
        ways[name] = (x - _row(mean, x)) / _row(std, x)
    ways["mean 0.5 and std 0.5"] = (x - 0.5) / 0.5
    if depth == 3:
        ways |= {f"{name}, channels in the order bgr": fed.flip(1) for name, fed in ways.items()}
        ways["the range 0 to 255 less the mean of ImageNet, order bgr"] = x.flip(1) * 255 - _row(CAFFE, x)
    ways["channels last (layout nhwc)"] = x.permute(0, 2, 3, 1)
    return ways


def _through(target: Target, fed: Tensor) -> Tensor:
    """What to give the target so that the network behind its declared preprocessing sees ``fed``."""
    parts = target.call.modules() if isinstance(target.call, nn.Module) else ()
    front = next((part for part in parts if isinstance(part, Front)), None)
    if front is None or fed.shape[1] not in (1, 3):
        return fed
    fed = (fed * front.std + front.mean) / front.how.range
    return fed.flip(1) if front.how.channels == "bgr" else fed


def _row(values: list[float], x: Tensor) -> Tensor:
    return x.new_tensor(values).reshape(1, -1, 1, 1)


def _relabelled(said: Tensor, y: Tensor, classes: int) -> dict[str, float]:
    """The accuracy with the classes under other numbers: shifted by one, or in the order that fits best.

    That order is learned on every other image and measured on the rest.
    """
    said, y = said.cpu(), y.cpu()
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    counts.index_put_((said[::2], y[::2]), torch.tensor(1), accumulate=True)
    order = torch.from_numpy(linear_sum_assignment(counts.numpy(), maximize=True)[1])
    ways = {
        "its classes are numbered one too low; shifted it is right on {:.0%}": (said + 1) % classes == y,
        "its classes are numbered one too high; shifted it is right on {:.0%}": (said - 1) % classes == y,
        "its classes stand in another order; in the best one it is right on {:.0%}": (order[said] == y)[1::2],
    }
    return {how: float(hits.double().mean()) for how, hits in ways.items() if len(hits)}


def _time(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds a call takes, the least of several."""
    times: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while not times or (time.perf_counter() < end and len(times) < 50):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _forward(target: Target, x: Tensor) -> None:
    with torch.no_grad():
        target.answer(x)


def _both(target: Target, x: Tensor) -> None:
    x = x.detach().requires_grad_(True)
    torch.autograd.grad(target.answer(x).scores.sum(), x)
