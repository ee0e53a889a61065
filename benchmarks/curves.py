"""How near the decision-based attacks come for so many queries: ours, and the peers' on the same images.

``python -m benchmarks.curves > docs/curves.md`` prints the page; stderr tells how far it is. Needs the shared data and
the peers (`make bench` installs them); about half an hour on one core.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.networks import bench
from besiege.bench.measure import Contender
from besiege.core.images import Images
from besiege.core.method import make
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.engine.evasion import evade

QUERIES = (500, 1000, 2500, 5000, 10000)
ROUNDS: Mapping[str, Mapping[str, int]] = {"hopskipjump": {"rounds": 64}, "boundary": {"steps": 25000}}
"""More than the largest budget pays for."""

PAGE = """# Distance against queries

The median L2 distance of the nearest adversarial image after so many queries, of {images} images that a digits CNN
classifies correctly; what has found none yet counts as infinitely far. Ours runs once for each budget and knows it.
The peers run once on each image, and each of their queries is looked at, so that the nearest adversarial image of
all counts, returned or not; they are stopped after the last budget. `{command}`.

| attack | {header} |
|---|{rule}"""


class Enough(Exception):
    """The last query of the budget has been spent."""


class Watched(nn.Module):
    """The network, which notes for one image how near the nearest adversarial query came, query by query."""

    def __init__(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.module, self.x, self.y, self.least = module, x, y, [INF]

    def forward(self, x: Tensor) -> Tensor:
        """The network's answer, as long as there are queries left."""
        if len(self.least) > QUERIES[-1]:
            raise Enough
        scores: Tensor = self.module(x)
        inside = ((x >= 0) & (x <= 1)).flatten(1).all(1)
        far = torch.where((scores.argmax(1) != self.y) & inside, (x - self.x).flatten(1).norm(dim=1), INF)
        for distance in far.tolist():
            self.least.append(min(self.least[-1], distance))
        return scores

    def after(self, queries: int) -> float:
        """How near it was by then."""
        return self.least[min(queries, len(self.least) - 1)]


def ours(name: str, target: Target, images: Images) -> list[Tensor]:
    """(n,) distances for each budget."""
    threats = (ThreatModel(Access.LABELS, Ball(2, INF), queries=queries) for queries in QUERIES)
    return [evade(make(name), target, images, threat).distance for threat in threats]


def theirs(run: Contender, target: Target, images: Images) -> list[Tensor]:
    """The same of a peer, one image after another, so that its queries are known to be that image's."""
    assert target.module is not None
    seen = []
    for i in range(len(images)):
        watched = Watched(target.module, images.x[i : i + 1], images.y[i : i + 1]).eval()
        try:
            run(watched, images[i : i + 1], 0)
        except Exception as error:
            if not isinstance(error, Enough):
                print(f"image {i}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr, flush=True)
        seen.append([watched.after(queries) for queries in QUERIES])
    return list(torch.tensor(seen).unbind(1))


def line(name: str, found: Sequence[Tensor]) -> str:
    """A row of the table."""
    return f"| {name} | " + " | ".join(f"{part.median():.3f}" for part in found) + " |"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=20)
    parser.add_argument("--network", choices=("A", "R"), default="A")
    given = parser.parse_args()
    torch.set_num_threads(1)
    target, images = bench(given.network, given.images)
    command = shlex.join(["python", "-m", "benchmarks.curves", *sys.argv[1:]])
    header = " | ".join(f"{queries:,}" for queries in QUERIES)
    print(PAGE.format(images=given.images, command=command, header=header, rule="---:|" * len(QUERIES)), flush=True)
    for name, options in ROUNDS.items():
        print(line(f"{name}, besiege", ours(name, target, images)), flush=True)
        for peer, run in peers.contenders(name, options).items():
            print(line(f"{name}, {peer}", theirs(run, target, images)), flush=True)


if __name__ == "__main__":
    main()
