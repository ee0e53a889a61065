"""A changed input and a changed model together: what each may save the other.

``python -m benchmarks.evil_twins > docs/evil-twins.md`` tells on stderr how far it is and prints the page at the end.
Needs the shared data; about five minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.poisoning import read
from besiege.attacks.poisoning.evil_twins import twinned
from besiege.core.images import Images
from besiege.core.method import method
from besiege.core.poisoned import eight_bits
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.embedded.recipes import recipe

SURE, GOAL, SHARES = 0.75, 0, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)

PAGE = """# Evil twins

{n} MNIST test images of other classes, each by itself: how far must one move (L∞) until a network gives class {goal} a
probability of {sure}, and how little of that is enough when the network moves too (Pang et al. 2019, arXiv:1911.01559)?
The network is a cnn that was trained on {trained:,} images. The input alone, by the same projected steps and as many,
needs {alone:.3f} in the mean, the least radius that bisection finds ({least:.3f} to {most:.3f}). Then the input gets a
share of its own radius, and the network as many turns as it takes, up to eight. *Reached* counts the images of 8 bits
that the spoiled network is so sure of; *accuracy lost* is on {judged:,} other test images, in points, the mean and the
largest over the images. On one thread: `python -m benchmarks.evil_twins`.

| share of the radius | reached | accuracy lost | at most |
|---:|---:|---:|---:|"""


def alone(module: nn.Module, victim: Tensor, images: Images) -> float:
    """The least radius at which the input alone gets there, to a hundredth."""
    low, high = 0.0, 1.0
    while high - low > 0.01:
        eps = (low + high) / 2
        draw = Rng.of(0, images.index[:1], "evil-twins").stream(0)
        kept, x = twinned(module, victim, GOAL, images, draw, **options(eps=eps, steps=80, tuned=0, rounds=1))
        low, high = (low, eps) if sure(kept, x) else (eps, high)
    return high


def options(**given: Any) -> dict[str, Any]:
    """All options of the method: those given, and its defaults."""
    return {key: option.default for key, option in method("evil-twins").card.options.items()} | given


def sure(module: nn.Module, x: Tensor) -> bool:
    """Whether the class is reached by the image that a file holds."""
    with torch.no_grad():
        return float(module(eight_bits(x)).softmax(1)[0, GOAL]) >= SURE


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evil_twins", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=20)
    n = parser.parse_args().images
    torch.set_num_threads(1)
    training, test = read("mnist", 20_000, 2000)
    fit = replace(recipe("cnn"), epochs=6, bfloat16=True)
    target = fit(training, 0, classes=10)
    said = target.labels(test.x)
    victims = test[(said == test.y) & (test.y != GOAL)][:n]
    before = float((said == test.y).float().mean())
    assert target.module is not None
    radii = [alone(target.module, victims.x[k : k + 1], training) for k in range(n)]
    page = PAGE.format(
        n=n,
        goal=GOAL,
        sure=SURE,
        trained=len(training),
        judged=len(test),
        alone=statistics.fmean(radii),
        least=min(radii),
        most=max(radii),
    )
    rows = [row(share, target.module, victims, radii, training, test, before) for share in SHARES]
    print("\n".join([page, *rows]))


def row(
    share: float, module: nn.Module, victims: Images, radii: list[float], training: Images, test: Images, before: float
) -> str:
    """All images at a share of their radii."""
    reached, lost = 0, []
    for k, radius in enumerate(radii):
        victim = victims[k : k + 1]
        draw = Rng.of(0, victim.index, "evil-twins").stream(0)
        spoiled, x = twinned(module, victim.x, GOAL, training, draw, **options(eps=share * radius))
        reached += sure(spoiled, x)
        judge = Target.of(spoiled, classes=10, shape=test.shape)
        lost.append(100 * (before - float((judge.labels(test.x) == test.y).float().mean())))
    line = f"| {share:g} | {reached} of {len(radii)} | {statistics.fmean(lost):.2f} | {max(lost):.2f} |"
    print(line, file=sys.stderr, flush=True)
    return line


if __name__ == "__main__":
    main()
