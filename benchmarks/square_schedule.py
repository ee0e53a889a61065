"""Square's first squares, chosen on networks that it is not judged on, and what the choice is worth on others.

``python -m benchmarks.square_schedule > docs/square-schedule.md`` tells on stderr how far it is and prints the page at
the end. Needs the shared data; a few minutes on one core.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.networks import bench, mnist, resnet32, robust_net
from besiege.core.images import Images
from besiege.core.method import make
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import evade

AREAS = (0.05, 0.1, 0.2, 0.4, 0.8)
QUERIES = 1000

PAGE = """# Square's schedule

The share of the image that Square's first square covers decides how coarse it begins; the halvings after it are the
paper's, fitted to the queries. The networks above the line choose it, by the least mean of queries relative to each
network's best share: **{chosen}**. Those below had no part in that. The default is {default}, AutoAttack's, which is
tuned on none of them. A cell is the robust accuracy and the mean queries of {images} images that the network knows,
{queries:,} queries, L∞. `python -m benchmarks.square_schedule`.

| network | {header} |
|---|{rule}"""


def sides(n: int) -> tuple[list[tuple[Target, Images, float]], list[tuple[Target, Images, float]]]:
    """The networks to choose on, and those to judge on."""

    def known(name: str, eps: float) -> tuple[Target, Images, float]:
        digits = mnist(2 * n)
        target = Target.of(robust_net(name), classes=10, shape=digits.shape, name=name, batch=128)
        return target, digits[target.labels(digits.x) == digits.y][:n], eps

    judged, pictures = bench("B", 2 * n)
    held = Target.of(resnet32(), classes=10, shape=pictures.shape, name="ResNet-32", batch=128)
    pictures = pictures[held.labels(pictures.x) == pictures.y][:n]
    return (
        [(*bench("A", n), 0.1), known("fast_mnist_fgsm", 0.3), (held, pictures, 4 / 255)],
        [(*bench("R", n), 0.15), known("fast_mnist_pgd", 0.3), (judged, bench("B", n)[1], 4 / 255)],
    )


def measured(target: Target, images: Images, eps: float, area: float) -> tuple[float, float]:
    """Robust accuracy and mean queries."""
    threat = ThreatModel(Access.SCORES, Ball(INF, eps), queries=QUERIES)
    found = evade(make("square", iterations=QUERIES, area=area), target, images, threat)
    return 1 - float(found.success.double().mean()), float(found.forward.double().mean())


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.square_schedule", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=100)
    n = parser.parse_args().images
    torch.set_num_threads(1)
    rows, worth = [], dict.fromkeys(AREAS, 0.0)
    for part, networks in enumerate(sides(n)):
        if part:
            rows.append("| | " + " | ".join("" for _ in AREAS) + " |")
        for target, images, eps in networks:
            found = {area: measured(target, images, eps, area) for area in AREAS}
            least = min(queries for _, queries in found.values())
            cells = [f"{100 * robust:.0f} %, {queries:.0f}" for robust, queries in found.values()]
            rows.append(f"| {target.name}, {eps:.3g} | " + " | ".join(cells) + " |")
            print(rows[-1], file=sys.stderr, flush=True)
            if not part:
                worth = {area: worth[area] + found[area][1] / least for area in AREAS}
    default = make("square").arguments["area"]
    header = " | ".join(f"{area:g}" for area in AREAS)
    chosen = min(worth, key=lambda area: worth[area])
    rule = "---:|" * len(AREAS)
    print(PAGE.format(images=n, queries=QUERIES, chosen=chosen, default=default, header=header, rule=rule))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
