"""A substitute learned from labels alone, and how well what fools it fools the network that gave them.

``python -m benchmarks.substitute > docs/substitute.md`` tells on stderr how far it is and prints the page at the end.
Needs the shared data; about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from benchmarks.networks import mnist, robust_net
from besiege.core.images import Images
from besiege.core.method import make
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.core.trigger import Trigger
from besiege.engine.evasion import evade, fit_universal

PAGE = """# The substitute

A network learns the labels that an MNIST classifier gives to 150 test images and to what they grow into in six rounds
({queries:,} labels in all), and what fools it is tried on the classifier: {judged} other test images that the
classifier knows, L∞ {eps}. Agreement is the share of 1,000 further images on which both say the same. Beside it the
single step and ten steps with the classifier's own gradients, and random signs of the same size. Three seeds, in one
process on one thread: `python -m benchmarks.substitute`.

| network | agreement | fgsm on the substitute | momentum on the substitute | fgsm, white-box | pgd, white-box \
| random signs | labels | CPU s |
|---|---:|---:|---:|---:|---:|---:|---:|---:|"""

EPS = 0.3


def share(name: str, target: Target, images: Images, training: Images | None, seed: int, **options: object) -> float:
    """How many of ``images`` fall."""
    access = Access.GRADIENTS if training is None else Access.LABELS
    threat = ThreatModel(access, Ball(INF, EPS))
    found = evade(make(name, **options), target, images, threat, training=training, seed=seed)
    return float(found.success[found.attacked].double().mean())


def agreement(target: Target, training: Images, others: Images, seed: int) -> tuple[float, int, float]:
    """How often the substitute says what the target says, and what it cost: labels, and CPU seconds."""
    began = time.process_time()
    threat = ThreatModel(Access.LABELS, Ball(INF, EPS))
    trigger, setup = fit_universal(make("substitute"), target, training, threat, seed, None)
    spent = time.process_time() - began
    return float((said(trigger, others) == target.labels(others.x)).double().mean()), setup.forward, spent


def said(trigger: Trigger, images: Images) -> torch.Tensor:
    """The labels of the network inside ``trigger``."""
    network = vars(trigger)["network"]
    labels: torch.Tensor = network(images.x.double()).argmax(1)
    return labels


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.substitute", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=150, help="to judge on")
    n = parser.parse_args().images
    torch.set_num_threads(1)
    digits = mnist(1150 + n)
    rows, queries = [], 0
    for name in ("sinkhorn_mnist_vanilla", "sinkhorn_mnist_adv_training", "fast_mnist_fgsm", "fast_mnist_pgd"):
        target = Target.of(robust_net(name), classes=10, shape=digits.shape, name=name)
        for seed in (0, 1, 2):
            training, others, judged = digits[:150], digits[150:1150], digits[1150:]
            agrees, queries, spent = agreement(target, training, others, seed)
            queries -= len(training)
            draws = torch.Generator().manual_seed(seed)
            known = judged[target.labels(judged.x) == judged.y]
            noise = EPS * torch.randint(0, 2, known.x.shape, generator=draws).mul(2).sub(1)
            hit = target.labels((known.x + noise).clamp(0, 1)) != known.y
            figures = (
                share("substitute", target, judged, training, seed, search="fgsm"),
                share("substitute", target, judged, training, seed),
                share("fgsm", target, judged, None, seed),
                share("pgd", target, judged, None, seed),
                float(hit.double().mean()),
            )
            rows.append(
                f"| {name} | {agrees:.3f} | "
                + " | ".join(f"{figure:.3f}" for figure in figures)
                + f" | {queries:,} | {spent:.1f} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    print(PAGE.format(queries=queries, judged=n, eps=EPS))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
