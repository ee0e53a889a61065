"""HopSkipJump on robust networks, from noise and from where another network's gradients lead.

``python -m benchmarks.transfer_start > docs/transfer-start.md`` tells on stderr how far it is and prints the page at
the end. Needs the shared data; about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from benchmarks.networks import mnist, robust_net
from besiege.core.images import Images
from besiege.core.lens import Transfer
from besiege.core.method import make
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import Lensing, evade

QUERIES = (500, 1000, 2500, 5000)

PAGE = """# A start by transfer

HopSkipJump by labels alone on MNIST networks that were trained to be robust: the median L2 distance of {images} images
that the network knows, after so many queries. It starts from noise, or where DDN ends that follows another network's
gradients for 100 steps and asks the attacked one at each of them (`--lens transfer:TARGET`); those queries count.
Beside it DDN so led alone, and DDN with the network's own gradients. `{command}`.

| network | gradients of | attack | {header} |
|---|---|---|{rule}"""

PAIRS = (
    ("fast_mnist_pgd", "fast_mnist_fgsm"),
    ("fast_mnist_pgd", "sinkhorn_mnist_vanilla"),
    ("trades_mnist_smallcnn", "fast_mnist_pgd"),
    ("trades_mnist_smallcnn", "sinkhorn_mnist_vanilla"),
)


def led(by: Target) -> Lensing:
    """The lens that takes its gradients."""
    return lambda meter, x, rng: Transfer(meter, by, x)


def lines(name: str, other: str, digits: Images, n: int) -> Iterator[str]:
    """The rows of a pair."""
    target, by = (Target.of(robust_net(net), classes=10, shape=digits.shape, name=net) for net in (name, other))
    images = digits[target.labels(digits.x) == digits.y][:n]
    narrow = target.granting(Access.LABELS)
    for said, attack, lens in (
        ("hopskipjump", make("hopskipjump"), None),
        ("ddn, led", make("ddn", opening=0.0), led(by)),
        ("ddn, led, then hopskipjump", make("ddn|hopskipjump", opening=0.0), led(by)),
    ):
        medians = []
        for queries in QUERIES:
            threat = ThreatModel(Access.LABELS, Ball(2, INF), queries=queries)
            medians.append(float(evade(attack, narrow, images, threat, lens=lens).distance.median()))
        yield f"| {name} | {other if lens else ''} | {said} | " + " | ".join(f"{m:.3f}" for m in medians) + " |"
    white = evade(make("ddn"), target, images, ThreatModel(Access.GRADIENTS, Ball(2, INF)))
    yield f"| {name} | itself | ddn | {white.distance.median():.3f} | | | |"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer_start", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=25)
    n = parser.parse_args().images
    torch.set_num_threads(1)
    digits, rows = mnist(2 * n), []
    for name, other in PAIRS:
        for line in lines(name, other, digits, n):
            rows.append(line)
            print(line, file=sys.stderr, flush=True)
    header = " | ".join(f"{queries:,}" for queries in QUERIES)
    command = "python -m benchmarks.transfer_start"
    print(PAGE.format(images=n, command=command, header=header, rule="---:|" * len(QUERIES)))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
