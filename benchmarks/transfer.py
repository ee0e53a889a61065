"""What a perturbation made on one network does to others that are built differently: UPSET, ANGRI and Houdini.

``python -m benchmarks.transfer > docs/transfer.md`` trains two of the three networks on MNIST (a minute), tells on
stderr how far it is and prints the page at the end. Needs the shared data; about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.networks import DigitsCNN, mnist, robust_net
from besiege.core.images import Images
from besiege.core.lens import Lens, Surrogate
from besiege.core.meter import Meter
from besiege.core.method import make
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal, Loss, ThreatModel
from besiege.engine.evasion import fit_universal

PAGE = """# What carries over to other networks

Three networks of MNIST that are built differently: two strided convolutions ({strided:.1%} of the images judged on
right), two convolutions with pooling ({pooled:.1%}), dense layers ({dense:.1%}). Perturbations within L∞ {eps} are made
with the gradients of those in the row and tried on the network of the column; in bold where its gradients had no part.
UPSET and ANGRI: fitted on {fitted} images, the share of {judged} others that comes to the target class, without those
that are of it or that the network does not know; the mean over the ten classes. Houdini: the share that leaves its own
class. Random signs of the same size beside. In one process on one thread: `python -m benchmarks.transfer`.

| attack | made with | strided | pooled | dense | L2 |
|---|---|---:|---:|---:|---:|"""

EPS = 0.3


@dataclass
class Mean(Lens):
    """Gradients are the mean of those that several oracles give."""

    others: Sequence[Oracle]

    def gradient(self, x: Tensor, loss: Loss = "margin", rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean loss and gradient."""
        found = [other.gradient(x, loss, rows) for other in self.others]
        return torch.stack([value for value, _ in found]).mean(0), torch.stack([slope for _, slope in found]).mean(0)


def networks() -> dict[str, Target]:
    """The three, two of them trained here."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
    dense.append(nn.Linear(128, 10))
    modules = {"strided": robust_net("sinkhorn_mnist_vanilla"), "pooled": DigitsCNN(), "dense": dense}
    training = mnist(10_000, "train")
    for module in (modules["pooled"], modules["dense"]):
        optimizer = torch.optim.Adam(module.parameters(), 1e-3)
        for rows in (rows for _ in range(5) for rows in torch.randperm(len(training)).split(64)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(training.x[rows]), training.y[rows]).backward()
            optimizer.step()
    shape = training.shape
    return {name: Target.of(module.eval(), classes=10, shape=shape, name=name) for name, module in modules.items()}


def rates(moved: dict[int, Tensor], nets: dict[str, Target], judged: Images, using: Sequence[str]) -> tuple[str, float]:
    """The cells of a line, and the mean L2 norm; ``moved`` holds the images by target class, -1 for none."""
    cells = []
    for name, target in nets.items():
        known, shares = target.labels(judged.x) == judged.y, []
        for goal, x in moved.items():
            chosen = known & (judged.y != goal)
            said = target.labels(x[chosen])
            shares.append(float(((said != judged.y[chosen]) if goal < 0 else (said == goal)).double().mean()))
        share = sum(shares) / len(shares)
        cells.append(f"{share:.3f}" if name in using or not using else f"**{share:.3f}**")
    sizes = [float((x - judged.x).flatten(1).norm(dim=1).mean()) for x in moved.values()]
    return " | ".join(cells), sum(sizes) / len(sizes)


def lens(chosen: Sequence[Target], meter: Meter, x: Tensor) -> Oracle:
    """The mean of what those networks say."""
    return Mean(meter, [Surrogate(meter, target, x) for target in chosen])


def lines(nets: dict[str, Target], training: Images, judged: Images) -> Iterator[str]:
    """The table."""
    sources = [[name] for name in nets] + [[other for other in nets if other != name] for name in nets]
    ball = Ball(INF, EPS)
    threat = ThreatModel(Access.LABELS, ball, targeted=True)
    for attack in ("upset", "angri"):
        for using in sources:
            chosen, moved = [nets[name] for name in using], {}
            for goal in range(10):
                trigger, _ = fit_universal(
                    make(attack),
                    chosen[0],
                    training,
                    threat,
                    0,
                    goal,
                    lambda meter, x, rng, chosen=chosen: lens(chosen, meter, x),
                )
                moved[goal] = ball.project(trigger(judged.x), judged.x)
            cells, size = rates(moved, nets, judged, using)
            yield f"| {attack} | {', '.join(using)} | {cells} | {size:.2f} |"
    for using in sources:
        chosen = [nets[name] for name in using]
        meter = Meter(chosen[0], judged.x, Goal(judged.y), ball, seeks="optimum", access=Access.LABELS)
        run = make("houdini").bound()
        made = run(lens(chosen, meter, judged.x), judged.x, ball, Rng.of(0, judged.index, "houdini"))
        cells, size = rates({-1: made}, nets, judged, using)
        yield f"| houdini | {', '.join(using)} | {cells} | {size:.2f} |"
    signs = torch.randint(0, 2, judged.x.shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
    noise = ball.project(judged.x + EPS * signs, judged.x)
    for said, goals in (("to a class", range(10)), ("away", [-1])):
        cells, size = rates(dict.fromkeys(goals, noise), nets, judged, ())
        yield f"| random signs, {said} | | {cells} | {size:.2f} |"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=500, help="to fit on, and as many to judge on")
    n = parser.parse_args().images
    torch.set_num_threads(1)
    nets, digits = networks(), mnist(2 * n)
    training, judged = digits[:n], digits[n:]
    right = {name: float((target.labels(judged.x) == judged.y).double().mean()) for name, target in nets.items()}
    rows = []
    for line in lines(nets, training, judged):
        rows.append(line)
        print(line, file=sys.stderr, flush=True)
    print(PAGE.format(**right, eps=EPS, fitted=n, judged=n))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
