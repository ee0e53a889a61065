"""What stolen models are worth: dense networks rebuilt exactly, and copies learned from labels, against queries.

``python -m benchmarks.extraction > docs/extraction.md`` tells on stderr how far it is and prints the page at the end.
Needs the shared data; about fifteen minutes on one core. The part ``photographs`` runs by its name alone, and reaches
the bar's size with ``--most 50000``: half an hour more.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.networks import folder, mnist
from benchmarks.prepare import mosaics
from besiege.core.errors import NotRebuilt
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import Attack, make, method
from besiege.core.target import Target
from besiege.core.threat import INF, Ball
from besiege.embedded.recipes import cnn
from besiege.engine.extraction import extract, steal
from besiege.engine.prada import Prada

HEAD = """# Extraction

What a thief gets for how many queries. On one thread: `python -m benchmarks.extraction`; a part alone by its name
(`exact`, `inside`, `outside`, `photographs`). Intervals are Wilson's at 95 %.
"""

EXACT = """
## functionally-equivalent

Dense networks with ReLU, trained on {trained:,} images of MNIST in float32 and asked in float64; each is rebuilt from
scores alone and compared with the original on the {n:,} test images, beyond the comparison on fresh points without
which nothing is returned. "At the bar" is a largest difference of at most 1e-4 standard deviations of the scores and
the same label on every image; what failed said so and returned no network. Jagielski et al. 2020 (arXiv:1909.01838)
need about 2^18.2 queries for 784-32-1 and Carlini et al. 2020 (arXiv:2003.04884) 2^19.2 (the latter's first table, from
memory); both see one score, this ten. It stops behind two hidden layers, and where the first of two has more neurons
than inputs.

| network | at the bar | label agreement | largest difference, worst seed | queries, median (most) | CPU s |
|---|---:|---:|---:|---:|---:|
{rows}
"""

COPIES = """
## copycat, {where}

The victim is the recipe `cnn` trained on {own:,} test images of Fashion-MNIST (the shared folder has no others); it
gets {accuracy:.1%} of {judged:,} other ones right. The thief sees labels alone and trains the same recipe from fresh
weights, {epochs} epochs, batch {batch}. It may ask about {pool}.

The bar: {bar}; by sampling as much with at most half of the
queries. `alarms` is how many of the tests of a query monitor after PRADA (delta 0.9) went off over the first 5,000
queries; on the images that judge {benign:.1%} do.
Transfer is how many of the victim's correct images (of 200) fall to PGD on the stolen model at L-infinity 0.1. Thieves
a line: {seeds}; figures are means, the lower end of the agreement's interval is the worst thief's.

| sampling | queries | accuracy / victim's | agreement | transfer | alarms | first alarm | CPU s |
|---|---:|---:|---:|---:|---:|---:|---:|
{rows}
"""


COPIED = ("inside", "outside", "photographs")
"""The sections about copycat, by what may be asked about."""


def fashion() -> Images:
    """The test images of Fashion-MNIST, in an order of our own."""
    place = folder() / "fashion_mnist"
    with gzip.open(place / "t10k-images-idx3-ubyte.gz") as file:
        x = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(place / "t10k-labels-idx1-ubyte.gz") as file:
        y = np.frombuffer(file.read(), np.uint8, offset=8)
    order = np.random.RandomState(0).permutation(len(x))
    x, y = x[order] / np.float32(255), y[order].astype(np.int64)
    return Images.of(torch.from_numpy(x), torch.from_numpy(y), name="fashion-mnist")


def photographs() -> Images:
    """What CIFAR-10, GTSRB and Tiny ImageNet show, in grey at 28x28; the labels say nothing."""
    sheets = [mosaics(name, part)[0] for name in ("cifar10", "gtsrb32") for part in ("train", "test")]
    for name in ("train100", "val"):
        with np.load(folder() / "tinyimagenet32" / f"{name}.npz") as file:
            content, offsets = file["jpeg"].tobytes(), file["offsets"].tolist()
        files = (content[begin:end] for begin, end in pairwise(offsets))
        sheets.append(np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]))
    small = [
        np.asarray(Image.fromarray(one).convert("L").resize((28, 28), Image.Resampling.BILINEAR))
        for sheet in sheets
        for one in sheet
    ]
    x = torch.from_numpy(np.stack(small)[:, None] / np.float32(255))
    return Images.of(x, torch.zeros(len(x), dtype=torch.int64), name="photographs")


def dense(shape: tuple[int, int, int], classes: int, *, hidden: tuple[int, ...]) -> nn.Module:
    """A network of dense layers with ReLU between."""
    parts: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise((math.prod(shape), *hidden, classes)):
        parts += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def exact(trained: Images, judged: Images, seeds: int) -> Iterator[str]:
    """One line an architecture."""
    for hidden in ((8,), (16,), (32,), (16, 16), (32, 16), (16, 16, 16)):
        nets = seeds if len(hidden) == 1 else max(1, seeds // 2) if len(hidden) == 2 else 1
        name = "-".join(map(str, (784, *hidden, 10)))
        fit = Fit(partial(dense, hidden=hidden), name, epochs=3, lr=0.05)
        queries, worst, agreed, good, failed, spent = [], 0.0, 0, 0, 0, 0.0
        for seed in range(nets):
            victim = replace(fit(trained, seed, classes=10), batch=1024)
            began = time.process_time()
            try:
                stolen = extract(method("functionally-equivalent")(), victim, trained[:200], fit, seed=seed)
            except NotRebuilt as error:
                failed += 1
                print(error, file=sys.stderr, flush=True)
                continue
            spent += time.process_time() - began
            assert victim.module is not None
            original = replace(victim, module=None, call=copy.deepcopy(victim.module).double(), dtype=torch.float64)
            theirs, ours = original.scores(judged.x.double()), stolen.model.scores(judged.x.double())
            apart, same = (
                float((theirs - ours).abs().max() / theirs.std()),
                int((theirs.argmax(1) == ours.argmax(1)).sum()),
            )
            queries.append(stolen.queries)
            worst, agreed = max(worst, apart), agreed + same
            good += apart <= 1e-4 and same == len(judged)
        if not queries:
            yield f"| {name} | 0 of {nets}, {failed} failed | – | – | – | – |"
            continue
        yield (
            f"| {name} | {good} of {nets}{f', {failed} failed' if failed else ''} "
            f"| {agreed:,} of {len(judged) * len(queries):,} | {worst:.1e} "
            f"| {statistics.median(queries):,.0f} = 2^{math.log2(statistics.median(queries)):.1f} ({max(queries):,}) "
            f"| {spent / len(queries):.1f} |"
        )


def copies(
    victim: Target, shown: Images, judged: Images, fit: Fit, plans: list[tuple[str, int]], seeds: int, **options: Any
) -> Iterator[str]:
    """One line a plan, a sampling and a number of queries, the means over the seeds."""
    probe: Attack = make("pgd")
    for sampling, queries in plans:
        attack = method("copycat")(sampling=sampling, queries=queries, **options)
        began = time.process_time()
        thefts = [
            steal(attack, victim, shown, judged, fit, seed=seed, probe=probe, ball=Ball(INF, 0.1))[1]
            for seed in range(seeds)
        ]
        spent = (time.process_time() - began) / seeds
        agreed = [theft.agreement for theft in thefts]
        low = min(theft.agreement_interval[0] for theft in thefts)
        ratio = statistics.fmean(theft.accuracy_ratio or 0 for theft in thefts)
        alarms = statistics.fmean(theft.alarm_rate or 0 for theft in thefts)
        first = [theft.first_alarm for theft in thefts if theft.first_alarm is not None]
        transfer = statistics.fmean(theft.transfer_success or 0 for theft in thefts)
        yield (
            f"| {sampling} | {queries:,} | {ratio:.1%} | {statistics.fmean(agreed):.1%} (from {low:.1%}) "
            f"| {transfer:.1%} | {alarms:.1%} | {f'{min(first):,}' if first else 'none'} | {spent:.0f} |"
        )


def stolen_fashion(part: str, seeds: int, most: int) -> str:
    """The section of copies from images of the problem domain, or from others."""
    clothes = fashion()
    own, inside, judged = clothes[:4000], clothes[4000:9000], clothes[9000:]
    if part == "photographs":
        own, judged = clothes[:8000], clothes[8000:]
    fit = Fit(cnn, "cnn", epochs=12, lr=0.05, shift=1)
    victim = replace(fit(own, 1234, classes=10), name="fashion-cnn")
    said, benign = victim.labels(judged.x), Prada()
    benign.see(judged.x, said)
    if part == "inside":
        where, bar = "from images of the problem domain", "92 % of the victim's accuracy from 5,000"
        pool = "5,000 other such images, unlabelled"
        plans = [("random", q) for q in (500, 1000, 2500, 5000)]
        plans += [(s, q) for s in ("uncertainty", "kcentre") for q in (500, 1000, 2500)]
        lines = copies(victim, inside, judged, fit, plans, seeds)
    else:
        where, bar = "from other images", "75 % of the victim's accuracy from 50,000"
        pool, shown = "images of MNIST and random textures, half and half", mnist(25_000, "train")
        if part == "photographs":
            where, shown = "from photographs", photographs()
            pool = (
                f"{len(shown):,} photographs\n(CIFAR-10, GTSRB, Tiny ImageNet; grey) and random textures, half and half"
            )
        fit, half = replace(fit, epochs=3, batch=128), most // 2
        plans = [("random", most), ("random", half), ("uncertainty", half), ("kcentre", half)]
        lines = copies(victim, shown, judged, fit, plans, seeds, pool="both", spare=2)
    return COPIES.format(
        where=where,
        own=len(own),
        accuracy=float((said == judged.y).float().mean()),
        judged=len(judged),
        epochs=fit.epochs,
        batch=fit.batch,
        pool=pool,
        bar=bar,
        benign=benign.rate or 0,
        seeds=seeds,
        rows="\n".join(told(lines)),
    )


def told(lines: Iterator[str]) -> Iterator[str]:
    """The lines, each said on stderr as it comes."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)
        yield line


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.extraction", description=__doc__)
    parser.add_argument("part", nargs="?", choices=("exact", *COPIED), help="one section alone")
    parser.add_argument("--nets", type=int, default=10, help="seeds of the dense networks")
    parser.add_argument("--seeds", type=int, default=1, help="thieves of the other victim")
    parser.add_argument("--most", type=int, default=10_000, help="queries outside of the problem domain")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.part is None:
        print(HEAD, end="")
    if chosen.part in (None, "exact"):
        trained, judged = mnist(5000, "train"), mnist(10_000)
        rows = "\n".join(told(exact(trained, judged, chosen.nets)))
        print(EXACT.format(trained=len(trained), n=len(judged), rows=rows), end="")
    for part in COPIED:
        if chosen.part == part or (chosen.part is None and part != "photographs"):
            print(stolen_fashion(part, chosen.seeds, chosen.most), end="")


if __name__ == "__main__":
    main()
