"""What training against one attack is worth against others: ``python -m benchmarks.train_test > docs/train-test.md``.

Networks of TRADES' SmallCNN learn from MNIST: undefended, and against FGSM, a fixed set of PGD images, PGD in L∞ and
PGD in L2. Each is then attacked by all. Needs the shared data; about twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from typing import Any

import torch

from benchmarks.networks import mnist
from besiege.core.images import Images
from besiege.core.method import Attack, configured, make, method
from besiege.core.target import Target
from besiege.core.threat import INF, Ball, ThreatModel
from besiege.embedded.recipes import recipe
from besiege.engine.summary import siege
from besiege.results.interval import wilson

PAGE = """# Trained against one attack, attacked by others

MNIST, TRADES' SmallCNN, {epochs} epochs on {training:,} training images, seed 0; {n} test images. Each cell is the
share that stays right, with Wilson's interval at 95 %: down, what a network was trained against by
`adversarial-training`; across, what attacks it. FGSM, PGD (40 steps, 2 restarts) and AutoAttack with the radius 0.3 in
L∞, PGD with 2 in L2 and with 15 in L1 (EAD, without a radius otherwise, is judged there). In one process on one thread:
`{command}`.

| trained against | clean | {heads} |
|---|---|{rules}|"""

TRAINED: tuple[tuple[str, dict[str, Any] | None], ...] = (
    ("nothing", None),
    ("FGSM, L∞ 0.3", {"mode": "fgsm", "eps": 0.3}),
    ("a fixed set (static), L∞ 0.3", {"mode": "static", "eps": 0.3, "steps": 7}),
    ("fast, L∞ 0.3", {"mode": "fast", "eps": 0.3}),
    ("PGD, L∞ 0.3", {"mode": "pgd", "eps": 0.3, "steps": 3}),
    ("PGD, L2 2", {"mode": "pgd", "eps": 2.0, "norm": "2", "steps": 3}),
)

SENT: tuple[tuple[str, Attack, Ball], ...] = (
    ("FGSM L∞", make("fgsm"), Ball(INF, 0.3)),
    ("PGD L∞", make("pgd", steps=40, restarts=2), Ball(INF, 0.3)),
    ("AutoAttack L∞", make("autoattack", queries=1000), Ball(INF, 0.3)),
    ("PGD L2", make("pgd", steps=40, restarts=2), Ball(2, 2.0)),
    ("EAD L1", make("ead"), Ball(1, 15.0)),
)


def cells(target: Target, images: Images) -> list[str]:
    """The share that stays right, by itself and under each attack."""
    right = int((target.labels(images.x) == images.y).sum())
    found = [_cell(right, len(images))]
    for _, attack, ball in SENT:
        record = siege(attack, target, images, ThreatModel(attack.card.access, ball))[2]
        found.append(_cell(round(record.robust_accuracy * len(images)), len(images)))
    return found


def _cell(k: int, n: int) -> str:
    low, high = wilson(k, n)
    return f"{k / n:.1%} ({low:.0%}–{high:.0%})"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_test", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=300)
    parser.add_argument("--training", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    training, images = mnist(given.training, "train"), mnist(given.images)
    fit = replace(recipe("small-cnn"), epochs=given.epochs)
    rows = []
    for name, options in TRAINED:
        defended = fit if options is None else configured(method("adversarial-training"), **options).bound()(fit)
        target = defended(training, 0, classes=10)
        rows.append(f"| {name} | {' | '.join(cells(target, images))} |")
        print(rows[-1], file=sys.stderr, flush=True)
    command = shlex.join(["python", "-m", "benchmarks.train_test", *sys.argv[1:]])
    heads, rules = " | ".join(name for name, _, _ in SENT), "---|" * (len(SENT) - 1) + "---"
    page = PAGE.format(
        epochs=given.epochs, training=len(training), n=len(images), command=command, heads=heads, rules=rules
    )
    print("\n".join([page, *rows]))


if __name__ == "__main__":
    main()
