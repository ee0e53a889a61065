"""UPSET and ANGRI toward every class, beside the targeted universal perturbation and noise of the same size.

``python -m benchmarks.generators > docs/generators.md`` tells on stderr how far it is and prints the page at the end.
Needs the shared data; about half an hour on one core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from benchmarks.networks import mnist, resnet20, robust_net
from benchmarks.prepare import mosaics
from besiege.core.images import Images
from besiege.core.method import make
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import evade

METHODS = ("upset", "angri", "targeted-uap")
PAGE = """# Generators of perturbations

UPSET has one perturbation for each class to reach, ANGRI one for each image and class (Sarkar et al. 2017,
arXiv:1707.01159), the targeted universal perturbation is the rival of the first. Fitted on {fitted} images for each of
the ten classes and judged on {judged} others: the share of the images of other classes that reaches the class, its
mean, least and largest over the classes; random signs of the same size; the mean L2 norm of the change; CPU seconds to
fit and judge one class. In one process on one thread: `python -m benchmarks.generators`.

| network, radius | method | reached | least | largest | random signs | L2 | CPU s |
|---|---|---:|---:|---:|---:|---:|---:|"""


def row(target: Target, training: Images, judged: Images, eps: float, method: str) -> str:
    """One line of the table: all classes."""
    judged = Images.of(judged.x, target.labels(judged.x))
    threat, rates, chance, sizes = ThreatModel(Access.GRADIENTS, Ball(INF, eps), targeted=True), [], [], []
    draws = torch.Generator().manual_seed(0)
    noise = eps * torch.randint(0, 2, (1, *judged.shape), generator=draws).mul(2).sub(1)
    labels = target.labels((judged.x + noise).clamp(0, 1))
    began = time.process_time()
    for goal in range(target.classes):
        found = evade(make(method), target, judged, threat, training=training, target_class=goal)
        rates.append(float(found.success[found.attacked].float().mean()))
        chance.append(float((labels[found.attacked] == goal).float().mean()))
        sizes.append(float((found.adv - judged.x)[found.success].flatten(1).norm(dim=1).mean()))
        print(f"{target.name} {method} {goal}: {rates[-1]:.3f}", file=sys.stderr, flush=True)
    spent = (time.process_time() - began) / target.classes
    radius = f"{round(eps * 255)}/255" if abs(eps * 255 - round(eps * 255)) < 1e-6 else f"{eps:g}"
    return (
        f"| {target.name}, {radius} | {method} | {statistics.fmean(rates):.3f} | {min(rates):.3f} "
        f"| {max(rates):.3f} | {statistics.fmean(chance):.3f} | {statistics.fmean(sizes):.2f} | {spent:.1f} |"
    )


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generators", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=500, help="to fit on; twice as many are judged")
    n = parser.parse_args().images
    torch.set_num_threads(1)
    x, y = mosaics("cifar10", "test")
    cifar = Images.of(torch.from_numpy(x[: 3 * n]).permute(0, 3, 1, 2) / 255, torch.from_numpy(y[: 3 * n]))
    digits = mnist(3 * n)
    cases = (
        (Target.of(resnet20(), classes=10, shape=cifar.shape, name="CIFAR-10 ResNet-20"), cifar, 10 / 255),
        (
            Target.of(robust_net("sinkhorn_mnist_vanilla"), classes=10, shape=digits.shape, name="MNIST CNN"),
            digits,
            0.3,
        ),
    )
    lines = [row(target, images[:n], images[n:], eps, method) for target, images, eps in cases for method in METHODS]
    print("\n".join([PAGE.format(fitted=n, judged=2 * n), *lines]))


if __name__ == "__main__":
    main()
