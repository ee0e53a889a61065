"""One-pixel and few-pixel at the full length of their searches, beside what was published of another implementation.

``python -m benchmarks.pixels > docs/pixels.md`` tells on stderr how far it is and prints the page at the end. Needs the
shared data; about half an hour on one core.
"""

from __future__ import annotations

import argparse
import shlex
import sys

import torch
from torch import Tensor

from benchmarks.networks import bench
from besiege.core.method import make
from besiege.core.threat import Access, Ball, ThreatModel
from besiege.engine.summary import siege
from besiege.results.interval import wilson

PAGE = """# A few pixels

The share of {n} CIFAR-10 images, all of which a ResNet-20 classifies correctly, that falls when so many pixels change:
our defaults, with the queries of an image that fell (median) and of all (mean), and CPU seconds an image. `patience`
gives an image up that comes no nearer; 0 searches to the end, 40,000 queries, as the papers do. The union counts what
either of the two brings down (`one-pixel|few-pixel` on the command line). Beside them what Hyperparticle's
one-pixel-attack-keras reports for a ResNet of its own, untargeted, after as many queries as with a patience of 0.
In one process on one thread: `{command}`.

| pixels | attack | patience | success | 95 % | queries, fallen | queries, all | CPU s | published |
|---:|---|---:|---:|---|---:|---:|---:|---:|"""

PUBLISHED = {1: "34 %", 3: "79 %", 5: "79 %"}


def share(fell: Tensor) -> str:
    """The share of the images that fell, and Wilson's interval."""
    low, high = wilson(int(fell.sum()), len(fell))
    return f"{float(fell.float().mean()):.0%} | {low:.0%}–{high:.0%}"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pixels", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=50)
    n = parser.parse_args().images
    torch.set_num_threads(1)
    target, images = bench("B", n)
    rows: list[str] = []
    for pixels, published in PUBLISHED.items():
        threat = ThreatModel(Access.SCORES, Ball(0, pixels))
        for patience in (2000, 0) if pixels == 3 else (2000,):
            fallen: list[Tensor] = []
            for name in ("one-pixel", "few-pixel"):
                outcome, _, record = siege(make(name, patience=patience), target, images, threat)
                fallen.append(outcome.success)
                spent = outcome.forward.double()
                rows.append(
                    f"| {pixels} | {name} | {patience} | {share(outcome.success)} "
                    f"| {float(spent[outcome.success].median()):,.0f} | {float(spent.mean()):,.0f} "
                    f"| {record.cpu_seconds / len(images):.1f} | {published} |"
                )
                print(rows[-1], file=sys.stderr, flush=True)
            rows.append(f"| {pixels} | union | {patience} | {share(fallen[0] | fallen[1])} | | | | {published} |")
    command = shlex.join(["python", "-m", "benchmarks.pixels", *sys.argv[1:]])
    print("\n".join([PAGE.format(n=n, command=command), *rows]))


if __name__ == "__main__":
    main()
