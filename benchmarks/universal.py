"""Universal perturbations as published and as mended, beside random noise of the same norm, on held-out images.

``python -m benchmarks.universal > docs/universal.md`` tells on stderr how far it is and prints the page at the end.
Needs the shared data and the peers' library ART; about half an hour on one core, most of it ART's.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator

import torch

from benchmarks import peers
from benchmarks.floor import floor
from benchmarks.networks import mnist, resnet20, robust_net
from benchmarks.prepare import mosaics
from besiege.bench.measure import Recorder
from besiege.core.images import Images
from besiege.core.method import Attack, make
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import evade

PAGE = """# Universal perturbations

One perturbation for all images, fitted on {fitted} and judged on {judged} others: the share that leaves the class
which the network gave the clean image (targeted: the share of the others that reaches the class). Beside it random
signs of the same size, and what the fitting cost: forward and backward passes, a fitting image, and CPU seconds for
all, the least of three runs where one takes less than {short} s. The seconds stand over the floor, too: the time of the
same calls of the bare network, each of its size. ART, which takes image by image, has its own defaults, 10 rounds as
ours, and {few} of the images to fit on: on 500 it takes hours. Beside it ours with as many. In one process on one
thread: `{command}`.

| network, radius | method | share | random signs | forward | backward | CPU s | time / floor |
|---|---|---:|---:|---:|---:|---:|---:|"""

SHORT = 2
"""What takes less than so many CPU seconds runs three times."""

METHODS = (
    ("as in the paper", make("uap", search="deepfool", batch=1), None),
    ("the paper's loop, batched", make("uap", search="deepfool"), None),
    ("default", make("uap"), None),
    ("as in the paper", make("targeted-uap", search="fgsm", batch=1), 3),
    ("the paper's loop, batched", make("targeted-uap", search="fgsm"), 3),
    ("default", make("targeted-uap"), 3),
)


def row(
    target: Target, training: Images, judged: Images, eps: float, name: str, attack: Attack, goal: int | None
) -> str:
    """One line of the table."""
    assert target.module is not None
    recorder = Recorder(target.module).eval()
    target = Target.of(recorder, classes=10, shape=judged.shape, name=target.name)
    judged = Images.of(judged.x, target.labels(judged.x))
    threat = ThreatModel(Access.GRADIENTS, Ball(INF, eps), targeted=goal is not None)
    spent = INF
    for _ in range(3):
        recorder.calls.clear()
        began = time.process_time()
        found = evade(attack, target, judged, threat, training=training, target_class=goal)
        spent = min(spent, time.process_time() - began)
        if spent > SHORT:
            break
    least = floor(recorder.calls, training.x)
    draws = torch.Generator().manual_seed(0)
    noise = eps * torch.randint(0, 2, (1, *judged.shape), generator=draws).mul(2).sub(1)
    labels = target.labels((judged.x + noise).clamp(0, 1))
    hit = (labels != judged.y if goal is None else labels == goal)[found.attacked]
    aim = "" if goal is None else f" to class {goal}"
    return (
        f"| {target.name}, {round(eps * 255)}/255 | {attack.name}{aim}, {name} "
        f"| {found.success[found.attacked].float().mean():.3f} | {hit.float().mean():.3f} "
        f"| {found.setup_forward / len(training):.1f} | {found.setup_backward / len(training):.1f} | {spent:.1f} "
        f"| {spent / least:.2f} |"
    )


def beside_art(target: Target, few: Images, judged: Images, eps: float) -> Iterator[str]:
    """Ours and ART's, fitted on the same few images."""
    for method, goal in (("uap", None), ("targeted-uap", 3)):
        yield row(target, few, judged, eps, f"default, {len(few)} images", make(method), goal)
        yield art_row(target, few, judged, eps, method, goal)


def art_row(target: Target, training: Images, judged: Images, eps: float, method: str, goal: int | None) -> str:
    """The line of ART, on the same images, with as many rounds over them as ours has by itself."""
    from benchmarks.peers import art

    judged = Images.of(judged.x, target.labels(judged.x))
    assert target.module is not None
    recorder = Recorder(target.module).eval()
    labels = target.labels(training.x) if goal is None else torch.full_like(training.y, goal)
    fit = peers.contender(getattr(art, method.replace("-", "_")), {"eps": eps, "epochs": 10})
    began = time.process_time()
    delta = fit(recorder, Images.of(training.x, labels), 0).clamp(-eps, eps)
    spent, calls = time.process_time() - began, recorder.calls
    forward, backward = sum(call.rows for call in calls), sum(call.rows * call.columns for call in calls)
    said = target.labels((judged.x + delta).clamp(0, 1))
    rows = torch.ones_like(said, dtype=torch.bool) if goal is None else judged.y != goal
    hit = (said != judged.y if goal is None else said == goal)[rows]
    aim = "" if goal is None else f" to class {goal}"
    return (
        f"| {target.name}, {round(eps * 255)}/255 | {method}{aim}, ART, {len(training)} images "
        f"| {hit.float().mean():.3f} | "
        f"| {forward / len(training):.1f} | {backward / len(training):.1f} | {spent:.1f} "
        f"| {spent / floor(calls, training.x):.2f} |"
    )


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.universal", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=500, help="to fit on; twice as many are judged")
    parser.add_argument("--few", type=int, default=25, help="to fit ART on, and ours beside it")
    given = parser.parse_args()
    n, few = given.images, given.few
    torch.set_num_threads(1)
    x, y = mosaics("cifar10", "test")
    cifar = Images.of(torch.from_numpy(x[: 3 * n]).permute(0, 3, 1, 2) / 255, torch.from_numpy(y[: 3 * n]))
    digits = mnist(3 * n)
    cases = [
        (Target.of(resnet20(), classes=10, shape=cifar.shape, name="CIFAR-10 ResNet-20"), cifar, 10 / 255),
        *(
            (Target.of(robust_net(name), classes=10, shape=digits.shape, name=name), digits, 0.3)
            for name in ("sinkhorn_mnist_vanilla", "fast_mnist_pgd")
        ),
    ]
    rows = []
    for target, images, eps in cases:
        for name, attack, goal in METHODS:
            rows.append(row(target, images[:n], images[n:], eps, name, attack, goal))
            print(rows[-1], file=sys.stderr, flush=True)
        for line in beside_art(target, images[:few], images[n:], eps):
            rows.append(line)
            print(line, file=sys.stderr, flush=True)
    command = shlex.join(["python", "-m", "benchmarks.universal", *sys.argv[1:]])
    print("\n".join([PAGE.format(fitted=n, judged=2 * n, few=few, short=SHORT, command=command), *rows]))


if __name__ == "__main__":
    main()
