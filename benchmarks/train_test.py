"""What training against one attack is worth against others: ``python -m benchmarks.train_test > docs/train-test.md``.

Networks of TRADES' SmallCNN learn from MNIST: undefended, and against FGSM, a fixed set of PGD images, PGD in L∞ and
PGD in L2. Each is then attacked by all; a row that benchmarks/records holds is not measured again. Needs the shared
data; about half an hour on one core.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch

from benchmarks import RECORDS
from benchmarks.networks import mnist
from besiege.core.images import Images
from besiege.core.method import Attack, configured, make, method
from besiege.core.target import Target
from besiege.core.threat import INF, Ball, ThreatModel
from besiege.embedded.recipes import recipe
from besiege.engine.summary import siege
from besiege.results.interval import wilson

PAGE = """# Trained against one attack, attacked by others

MNIST, TRADES' SmallCNN, {epochs} epochs on {training:,} training images in bfloat16, seed 0; {n} test images. Each
cell is the share that stays right, with Wilson's interval at 95 %: down, what a network was trained against by
`adversarial-training`; across, what attacks it. FGSM, PGD (40 steps, 2 restarts) and AutoAttack with the radius 0.3 in
L∞, PGD with 2 in L2, EAD (which seeks the nearest image) judged at 15 in L1. In one process on one thread:
`python -m benchmarks.train_test`.

| trained against | clean | {heads} |
|---|---|{rules}|"""

FIT = replace(recipe("small-cnn"), epochs=4, bfloat16=True)
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


def row(name: str, options: dict[str, Any] | None, training: Images, images: Images) -> list[str]:
    """The cells of a network that has learned so."""
    path = RECORDS / "train-test" / f"{name}.json"
    if not path.is_file():
        defended = FIT if options is None else configured(method("adversarial-training"), **options).bound()(FIT)
        found = cells(defended(training, 0, classes=10), images)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, ensure_ascii=False) + "\n")
        print(name, *found, file=sys.stderr, flush=True)
    kept: list[str] = json.loads(path.read_text())
    return kept


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    training, images = mnist(60_000, "train"), mnist(100)
    rows = [f"| {name} | {' | '.join(row(name, options, training, images))} |" for name, options in TRAINED]
    heads, rules = " | ".join(name for name, _, _ in SENT), "---|" * (len(SENT) - 1) + "---"
    page = PAGE.format(epochs=FIT.epochs, training=len(training), n=len(images), heads=heads, rules=rules)
    print("\n".join([page, *rows]))


if __name__ == "__main__":
    main()
