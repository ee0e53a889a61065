"""Our autoattack against the reference on networks trained to be robust, image by image.

``python -m benchmarks.robust_nets > docs/robust-networks.md`` tells on stderr how far it is and prints the page at the
end. Needs pyautoattack and the shared data; over an hour on one core at 500 images.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from benchmarks.networks import mnist, robust_net
from benchmarks.peers.pyautoattack import autoattack as reference
from besiege.core.method import make
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import evade
from besiege.engine.judge import judge

NETWORKS = ("fast_mnist_pgd", "trades_mnist_smallcnn")
EPS = 0.3
CHUNK = 50
PAGE = f"""# Networks that were trained to be robust

Left standing at L∞ {EPS} by our `autoattack` and by the reference's (pyautoattack), both with their standard budgets,
on the same first images of the MNIST test set, in one process on one thread: `python -m benchmarks.robust_nets`.

| network | images | robust, ours | robust, reference | stand for ours alone | for the reference alone \
| CPU ms an image | reference | ratio |
|---|---:|---:|---:|---:|---:|---:|---:|---:|"""


def compare(name: str, n: int) -> str:
    """One row of the table: the images left standing by ours and by the reference, and the CPU time of both."""
    images = mnist(n)
    target = Target.of(robust_net(name), classes=10, shape=images.shape, name=name)
    threat = ThreatModel(Access.GRADIENTS, Ball(INF, EPS))
    ours, theirs, only_ours, only_theirs = 0, 0, 0, 0
    spent, spent_theirs = 0.0, 0.0
    for start in range(0, n, CHUNK):
        part = images[start : start + CHUNK]
        began = time.process_time()
        outcome = evade(make("autoattack"), target, part, threat)
        stands = outcome.attacked & ~judge(outcome, target, part).success
        spent += time.process_time() - began
        right = target.labels(part.x) == part.y
        began = time.process_time()
        with target.ready():
            adv = reference(target.module, part.x[right], part.y[right], eps=EPS)
        spent_theirs += time.process_time() - began
        stands_theirs = right.clone()
        stands_theirs[right] = target.labels(adv) == part.y[right]
        ours, theirs = ours + int(stands.sum()), theirs + int(stands_theirs.sum())
        only_ours += int((stands & ~stands_theirs).sum())
        only_theirs += int((~stands & stands_theirs).sum())
        done = start + len(part)
        print(
            f"{name}: of {done} images {ours} stand, {theirs} for the reference; {spent:.0f} s, {spent_theirs:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return (
        f"| {name} | {n} | {ours / n:.3f} | {theirs / n:.3f} | {only_ours} | {only_theirs} "
        f"| {1000 * spent / n:.0f} | {1000 * spent_theirs / n:.0f} | {spent / spent_theirs:.2f} |"
    )


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robust_nets", description=__doc__)
    parser.add_argument("names", nargs="*", default=NETWORKS)
    parser.add_argument("-n", "--images", type=int, default=500)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [compare(name, given.images) for name in given.names]
    print("\n".join([PAGE, *rows]))


if __name__ == "__main__":
    main()
