"""How large a certificate of randomized smoothing the shadow attack spoofs, beside those of the images themselves.

``python -m benchmarks.shadow > docs/shadow.md`` trains two small networks under noise (two minutes), attacks them
toward every other class and prints the page; stderr tells how far it is. About forty minutes on one core.
"""

from __future__ import annotations

import argparse
import gzip
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.floor import floor
from benchmarks.networks import folder
from benchmarks.prepare import mosaics
from besiege.bench.measure import Recorder
from besiege.core.images import Images
from besiege.core.lens import Bpda
from besiege.core.meter import Meter
from besiege.core.method import Attack, make
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Ball, Goal
from besiege.defenses.input.randomized_smoothing import Smoothed, certify

SIGMA = 0.25
ART_STEPS = 300
BATCH = 128
"""Noisy copies that go through the network at once."""
Craft = Callable[[Tensor, Tensor, int], Tensor]
"""Images, the classes to reach, which turn it is → changed images."""

PAGE = """# The shadow attack against a certificate

A small network, trained on images under Gaussian noise of {sigma}, is smoothed by the same noise (Fashion-MNIST: 8,000
images of its test set, the others are attacked; CIFAR-10: 20,000 training images, test images are attacked). Images
that it certifies for their own class are attacked toward every other class, with {copies} noisy copies a step; of the
results, the one is kept whose certificate for a wrong class is largest (Ghiasi et al. 2020, arXiv:2003.08937).
Certificates are of {samples} fresh draws at alpha 0.001. Radii are L2; what is not certified counts as 0. Roughness is
the sum of squared differences of neighbours in the change; time without the certificates, beside that of the same
calls of the bare network, each of its size. In one process on one thread:
`{command}`.

| images | attack | steps a class | n | spoofed | mean radius, spoofed | natural | ratio | L2 of the change \
| roughness | forward | backward | CPU s an image | time / floor |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def fashion() -> tuple[Tensor, Tensor, int]:
    """The test set of Fashion-MNIST: images in [0, 1] and labels; the first 8,000 are to train on."""
    place = folder() / "fashion_mnist"
    with gzip.open(place / "t10k-images-idx3-ubyte.gz") as file:
        x = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(place / "t10k-labels-idx1-ubyte.gz") as file:
        y = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(x / np.float32(255)), torch.from_numpy(y.astype(np.int64)), 8000


def cifar() -> tuple[Tensor, Tensor, int]:
    """20,000 training images of CIFAR-10 in [0, 1] and their labels, then 1,000 test images."""
    (x, y), (x_test, y_test) = mosaics("cifar10", "train"), mosaics("cifar10", "test")
    both = np.concatenate([x, x_test[:1000]]).transpose(0, 3, 1, 2) / np.float32(255)
    labels = np.concatenate([y[: len(x)], y_test[:1000]]).astype(np.int64)
    return torch.from_numpy(both), torch.from_numpy(labels), len(x)


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """Eight epochs with one-cycle learning rate, each image under fresh noise."""
    torch.manual_seed(0)
    channels, height, width = x.shape[1:]
    network = nn.Sequential(
        nn.Conv2d(channels, 16 * channels, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16 * channels, 32 * channels, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * channels * (height // 4) * (width // 4), 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    rounds = 8 * -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=rounds)
    for _ in range(8):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            noisy = x[rows] + SIGMA * torch.randn_like(x[rows])
            nn.functional.cross_entropy(network(noisy), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def ours(attack: Attack, target: Target, copies: int) -> Craft:
    """Our attack through a smoothed classifier of so many noisy copies."""

    def craft(x: Tensor, toward: Tensor, turn: int) -> Tensor:
        index, ball = torch.arange(len(x)), Ball(INF, 1.0)
        shield = Smoothed(target, sigma=SIGMA, samples=copies)
        shield.key.fill_(turn)
        meter = Meter(target, x, Goal(toward, targeted=True), ball, seeks="optimum")
        oracle = Bpda(meter, shield.softened)
        with target.ready():
            found: Tensor = attack.bound()(oracle, x, ball, Rng.of(turn, index, attack.name))
        return found

    return craft


def art(network: nn.Module, copies: int) -> Craft:
    """ART's attack with as many noisy copies and its own 300 steps."""
    from benchmarks.peers.art import shadow

    fit = peers.contender(shadow, {"sigma": SIGMA, "copies": copies, "steps": ART_STEPS})
    return lambda x, toward, turn: fit(network, Images.of(x, toward), turn)


class Clocked:
    """A craft, and the CPU seconds that it took."""

    def __init__(self, craft: Craft) -> None:
        self.craft, self.seconds = craft, 0.0

    def __call__(self, x: Tensor, toward: Tensor, turn: int) -> Tensor:
        """What the craft makes."""
        began = time.process_time()
        made = self.craft(x, toward, turn)
        self.seconds += time.process_time() - began
        return made


def spoofed(craft: Craft, target: Target, x: Tensor, y: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """(n,) the largest certified radius of a wrong class, and the image (n, c, h, w) that has it."""
    index = torch.arange(len(x))
    radius, found = torch.zeros(len(x), dtype=torch.float64), x.clone()
    for turn in range(1, target.classes):
        adv = craft(x, (y + turn) % target.classes, turn)
        held = certify(target, adv, Rng.of(100 + turn, index, "certify"), sigma=SIGMA, samples=samples)
        better = (held.label != y) & (held.radius > radius)
        radius, found[better] = torch.where(better, held.radius, radius), adv[better]
        print(f"class {turn} of 9: {radius.mean():.3f}", file=sys.stderr, flush=True)
    return radius, found


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shadow", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=50, help="of Fashion-MNIST")
    parser.add_argument("--few", type=int, default=5, help="of CIFAR-10, and of Fashion-MNIST as in the paper, too")
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--samples", type=int, default=10_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    paper = make("shadow", plain=True, steps=300, stride=0.1, loss="ce")
    rows = [
        line
        for name, read, races in (
            (
                "Fashion-MNIST",
                fashion,
                ((make("shadow"), given.images), (make("shadow"), given.few), (paper, given.few), (None, given.few)),
            ),
            ("CIFAR-10", cifar, ((make("shadow"), given.few),)),
        )
        for line in raced(name, *read(), races, given.copies, given.samples)
    ]
    command = shlex.join(["python", "-m", "benchmarks.shadow", *sys.argv[1:]])
    print(PAGE.format(sigma=SIGMA, copies=given.copies, samples=given.samples, command=command))
    print("\n".join(rows))


def raced(
    name: str, x: Tensor, y: Tensor, known: int, races: Sequence[tuple[Attack | None, int]], copies: int, samples: int
) -> Iterator[str]:
    """A row for each attack (None: ART's) and number of images."""
    network = trained(x[:known], y[:known])
    target = Target.of(network, classes=10, shape=x.shape[1:], name=name, batch=1024)
    x, y = x[known:], y[known:]
    many = 4 * max(n for _, n in races)
    held = certify(target, x[:many], Rng.of(0, torch.arange(many), "natural"), sigma=SIGMA, samples=samples)
    rows = (held.label == y[:many]).nonzero().squeeze(1)
    for attack, n in races:
        own, labels, natural = x[rows[:n]], y[rows[:n]], held.radius[rows[:n]]
        recorder = Recorder(network).eval()
        asked = Target.of(recorder, classes=10, shape=x.shape[1:], name=name, batch=BATCH)
        craft = Clocked(art(recorder, copies) if attack is None else ours(attack, asked, copies))
        radius, adv = spoofed(craft, target, own, labels, samples)
        calls = recorder.calls
        forward, backward = sum(call.rows for call in calls), sum(call.rows * call.columns for call in calls)
        change = (adv - own)[radius > 0]
        rough = change.diff(dim=2).square().flatten(1).sum(1) + change.diff(dim=3).square().flatten(1).sum(1)
        mean, before = float(radius.mean()), float(natural.mean())
        size = f"{float(change.flatten(1).norm(dim=1).mean()):.1f}" if len(change) else "–"
        roughness = f"{float(rough.mean()):.1f}" if len(change) else "–"
        who = "ART" if attack is None else "as in the paper" if attack.arguments["plain"] else "default"
        yield (
            f"| {name} | {who} | {ART_STEPS if attack is None else attack.arguments['steps']} "
            f"| {len(own)} | {float((radius > 0).double().mean()):.2f} | {mean:.3f} | {before:.3f} "
            f"| {mean / before:.2f} | {size} "
            f"| {roughness} | {forward / n:.0f} | {backward / n:.0f} | {craft.seconds / n:.1f} "
            f"| {craft.seconds / floor(calls, own):.2f} |"
        )


if __name__ == "__main__":
    main()
