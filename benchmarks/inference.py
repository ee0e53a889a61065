"""What classifiers give away: members by their confidences, classes by inversion, images by reconstruction.

``python -m benchmarks.inference > docs/inference.md`` tells on stderr how far it is and prints the page at the end.
Needs the shared data; about fifteen minutes on one core that is free. With ``--folder`` shadow models are kept, and
an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format

from benchmarks.networks import folder, mnist
from besiege.cli.infer import _through
from besiege.core.images import Images
from besiege.core.method import Attack, configured, method
from besiege.core.reference import Reference
from besiege.core.target import Target
from besiege.embedded.linear import optimum
from besiege.embedded.recipes import FITS, cnn, mlp, softmax
from besiege.engine.inference import infer_membership, invert, reconstruct
from besiege.results.interval import wilson

HEAD = """# What a classifier gives away

All in one process on one thread; `{command}` printed this page.
"""

MEMBERS = """
## Who was trained on

Fashion-MNIST: the victim, {recipe}, learned from {n} of the {total}
test images (accuracy {inside:.1%}) and the other {n} are the non-members ({outside:.1%}). {shadows} shadow networks by
the same recipe, each on a random half of all images; one question an image. A share's interval is Wilson's, that of the
area DeLong's, both at 95 %. "Unseen" is the same attack on a network that learned from half of the non-members alone,
judged on the members and the other half: its interval must hold 0.5. Seed {seed}. Who needs shadow networks first pays
for them, unless they were kept from an earlier run.

| attack | AUC | balanced accuracy | found at FPR 0.1 % | found at FPR 1 % | unseen AUC | CPU s |
|---|---:|---:|---:|---:|---:|---:|"""

HIDDEN = 128

MODES = (
    ("one threshold on the loss", {"mode": "loss"}),
    ("shadow, a network a class", {"mode": "shadow"}),
    ("lira-offline", {"mode": "lira-offline"}),
    ("rmia", {"mode": "rmia"}),
    ("lira, a variance each", {"mode": "lira", "variance": "each"}),
    ("lira, one variance (default)", {"mode": "lira"}),
)

STACKED = """
Training all shadow networks at once (`torch.func.vmap` over stacked weights) was measured before it was left out: where
it gains, a network trains in a second anyway. CPU milliseconds for one step of SGD on a batch of 64, a network,
{models} networks (dense ones with so many hidden units), and how far the weights of the two ways are apart after
{steps} steps.

| network | one after another | stacked | gain | largest difference of a weight |
|---|---:|---:|---:|---:|"""

CLASSES = """
## What a class looks like

MNIST: victims trained on {n} images; an evaluator, a narrower cnn, on {n} others (accuracy {evaluator:.1%}), says
which digit a picture shows. Victims of each kind: {seeds} (the lenses: the first). Distances are L2, a mean over the
pictures: to the mean of the class's training images and to the nearest. `nes` sees scores, `votes` labels alone.

| victim, accuracy | prior | gradients | recognized | confidence | to the mean | to the nearest | queries each | CPU s |
|---|---|---|---:|---:|---:|---:|---:|---:|"""

WAYS = (
    ({"prior": "none"}, None),
    ({"prior": "smooth"}, None),
    ({"prior": "none"}, "nes"),
    ({"prior": "smooth"}, "nes"),
    ({"prior": "smooth", "steps": 100}, "votes"),
)

ROWS = """
## The training image that an informed adversary lacks

MNIST: {rows} images, one after the other left out; linear models at their optimum with weight decay {decay}, which the
adversary does not know. The error is |found - true| / |true|.

| model | sets | labels right | median error | largest error | passes an image |
|---|---:|---:|---:|---:|---:|"""

DECODED = """
## The image behind an answer

MNIST: the victim is the cnn of the next table (the first). A decoder learned from its answers to {own} images that it
was not trained on; {judged} test images are rebuilt from the answers to them. Beside the error, its ratio to that of
the mean image of the right class, and of all images.

| answers | mean squared error | of the class mean's | of the mean image's | PSNR | CPU s |
|---|---:|---:|---:|---:|---:|"""


def fashion() -> Images:
    """The test images of Fashion-MNIST."""
    with gzip.open(folder() / "fashion_mnist" / "t10k-images-idx3-ubyte.gz") as file:
        x = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder() / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz") as file:
        y = np.frombuffer(file.read(), np.uint8, offset=8)
    return Images.of(torch.from_numpy(x / np.float32(255)), torch.from_numpy(y.astype(np.int64)), name="fashion")


def chosen(name: str, **options: object) -> Attack:
    """A method with those options."""
    return configured(method(name), **options)


def members(total: int, shadows: int, epochs: int, seed: int, kept: Path) -> Iterator[str]:
    """The table of membership inference, line by line."""
    every = fashion().sample(total, seed)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    inside, outside = every[order[: len(every) // 2]], every[order[len(every) // 2 :]]
    fit = replace(FITS["mlp"], build=partial(mlp, hidden=HIDDEN), epochs=epochs)
    knows = Reference(every.shape, fit=fit, folder=kept)
    victim = fit(inside, seed, classes=10, checkpoint=knows.kept(inside, seed))
    for k, (name, options) in enumerate(MODES):
        attack = chosen("membership-inference", shadows=shadows, **options)
        began = time.process_time()
        _, found = infer_membership(attack, victim, inside, outside, knows, seed=seed)
        spent = time.process_time() - began
        assert found.unseen is not None
        if not k:
            yield MEMBERS.format(
                recipe=f"a dense network of {HIDDEN} hidden units trained for {epochs} epochs",
                n=len(inside),
                total=len(every),
                shadows=shadows,
                inside=found.member_accuracy,
                outside=found.nonmember_accuracy,
                seed=seed,
            )
        (low, high), unseen = found.auc_interval, found.unseen
        shares = (
            f"{100 * found.tpr_at_fpr[rate]:.2f} % ({100 * lo:.2f}–{100 * hi:.2f})"
            for rate, (lo, hi) in found.tpr_at_fpr_interval.items()
        )
        yield (
            f"| {name} | {found.auc:.3f} ({low:.3f}–{high:.3f}) | {found.balanced_accuracy:.1%} | {' | '.join(shares)} "
            f"| {unseen.auc:.3f} ({unseen.auc_interval[0]:.3f}–{unseen.auc_interval[1]:.3f}) | {spent:.0f} |"
        )


def stacked(models: int, shape: tuple[int, int, int] = (1, 28, 28), steps: int = 40) -> Iterator[str]:
    """What training the networks at once would gain; the ways take turns, so that both meet the same machine."""
    yield STACKED.format(models=models, steps=steps)
    x, y = torch.rand(models, 64, *shape), torch.randint(0, 10, (models, 64))
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    builds = {"softmax": softmax, "mlp, 64": mlp, f"mlp, {HIDDEN}": partial(mlp, hidden=HIDDEN), "cnn": cnn}
    for name, build in builds.items():
        networks = [build(shape, 10) for _ in range(models)]
        state, buffers = stack_module_state(networks)
        weights = {key: value.detach().clone() for key, value in state.items()}
        base = copy.deepcopy(networks[0]).to("meta")
        for network in networks:
            convert_conv2d_weight_memory_format(network, torch.channels_last)
        optimizers, whole = [sgd(network.parameters()) for network in networks], sgd(weights.values())

        def loss(weights, buffers, x, y, base=base):
            return F.cross_entropy(functional_call(base, (weights, buffers), (x,)), y)

        def alone(networks=networks, optimizers=optimizers):
            for network, optimizer, images, labels in zip(networks, optimizers, x, y, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(network(images), labels).backward()
                optimizer.step()

        slopes = vmap(grad(loss))

        def together(slopes=slopes, weights=weights, buffers=buffers, whole=whole):
            for key, slope in slopes(weights, buffers, x, y).items():
                weights[key].grad = slope
            whole.step()

        spent = [0.0, 0.0]
        for step in range(steps):
            for k, way in enumerate((alone, together)):
                began = time.process_time()
                way()
                spent[k] += (time.process_time() - began) * (step >= 2)
        each = [1000 * seconds / (steps - 2) / models for seconds in spent]
        after, _ = stack_module_state(networks)
        apart = max(float((after[key].detach() - weights[key]).abs().max()) for key in weights)
        yield f"| {name} | {each[0]:.2f} | {each[1]:.2f} | {each[0] / each[1]:.2f} | {apart:.1e} |"


def victims(n: int, seeds: int) -> dict[str, list[Target]]:
    """Networks trained on the first ``n`` training images of MNIST."""
    training = mnist(n, "train")
    fits = {"softmax": FITS["softmax"], "mlp": FITS["mlp"], "cnn": replace(FITS["cnn"], epochs=6)}
    return {name: [fit(training, seed, classes=10) for seed in range(seeds)] for name, fit in fits.items()}


def classes(every: dict[str, list[Target]], n: int) -> Iterator[str]:
    """The table of model inversion, line by line."""
    images, judged = mnist(2 * n, "train"), mnist(1000)
    training, others = images[:n], images[n:]
    evaluator = replace(FITS["cnn"], build=partial(cnn, width=12, hidden=64), epochs=4)(others, 100, classes=10)
    right = float((evaluator.labels(judged.x) == judged.y).double().mean())
    yield CLASSES.format(n=n, evaluator=right, seeds=len(every["mlp"]))
    pictures: dict[str, Tensor] = {}
    for name, targets in every.items():
        for options, lens in WAYS:
            found, began = [], time.process_time()
            for seed, target in enumerate(targets if lens is None else targets[:1]):
                attack = chosen("model-inversion", **options)
                through = None if lens is None else _through(lens)
                made, facts = invert(
                    attack, target, torch.arange(10), evaluator, judged, training, seed=seed, lens=through
                )
                found.append(facts)
                if lens is None and not seed:
                    pictures[f"{name} {options['prior']}"] = made
            spent, hits = time.process_time() - began, sum(part.recognized for part in found)
            low, high = wilson(hits, 10 * len(found))
            accuracy = float((targets[0].labels(judged.x) == judged.y).double().mean())
            mean = [
                sum(float(getattr(part, key) or 0) for part in found) / len(found)
                for key in ("confidence", "distance_to_mean", "distance_to_nearest", "queries")
            ]
            yield (
                f"| {name}, {accuracy:.1%} | {options['prior']} | {lens or 'white-box'} "
                f"| {hits} of {10 * len(found)} ({low:.0%}–{high:.0%}) | {mean[0]:.1%} | {mean[1]:.2f} | {mean[2]:.2f} "
                f"| {mean[3] / 10:,.0f} | {spent:.0f} |"
            )
    yield again(pictures, others, judged)


def again(pictures: dict[str, Tensor], others: Images, judged: Images) -> str:
    """The same pictures as another evaluator sees them."""
    evaluator = replace(FITS["small-cnn"], epochs=3)(others, 0, classes=10)
    right = float((evaluator.labels(judged.x) == judged.y).double().mean())
    hits = (f"{name} {int((evaluator.labels(made) == torch.arange(10)).sum())}" for name, made in pictures.items())
    return (
        f"\nAnother evaluator, the recipe small-cnn for 3 epochs on the same others (accuracy {right:.1%}), recognizes "
        f"of the first victims' white-box pictures, of 10: {', '.join(hits)}. Who judges matters."
    )


def rows(count: int, sets: int, decay: float = 0.01) -> Iterator[str]:
    """The table of the informed adversary, line by line."""
    yield ROWS.format(rows=count, decay=decay)
    images = mnist(count * sets, "train")
    for link, name in (("softmax", "logistic regression"), ("identity", "ridge regression")):
        found = []
        for k in range(sets):
            part = images[k * count : (k + 1) * count]
            target = optimum(part, classes=10, link=link, decay=decay)
            attack = chosen("reconstruction", mode="informed", link=link)
            found.append(reconstruct(attack, target, part, Reference(part.shape), seed=k)[1])
        yield (
            f"| {name} | {sets} | {round(sum(f.label_accuracy * f.n for f in found))} of {count * sets} "
            f"| {max(f.relative_error_median for f in found):.2e} | {max(f.relative_error_max for f in found):.2e} "
            f"| {found[0].queries / found[0].n:.0f} forward, {found[0].backward / found[0].n:.0f} backward |"
        )


def decoded(target: Target, n: int, own_images: int, judged: int, epochs: int) -> Iterator[str]:
    """The table of the decoder, line by line; the victim has learned from the first ``n`` training images."""
    own, images = mnist(n + own_images, "train")[n:], mnist(judged)
    yield DECODED.format(own=len(own), judged=judged)
    for top, name in ((0, "all ten probabilities"), (3, "the three largest"), (1, "the largest")):
        attack, began = chosen("reconstruction", epochs=epochs, top=top), time.process_time()
        _, found = reconstruct(attack, target, images, Reference(own.shape, own))
        yield (
            f"| {name} | {found.mse:.4f} | {found.ratio:.2f} | {found.mse / found.mse_mean_image:.2f} "
            f"| {found.psnr:.1f} dB | {time.process_time() - began:.0f} |"
        )


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__)
    parser.add_argument("-n", "--images", type=int, default=10_000, help="of Fashion-MNIST, half of them members")
    parser.add_argument("--shadows", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=40, help="of the victim and the shadow networks")
    parser.add_argument("--seeds", type=int, default=1, help="victims of the inversion")
    parser.add_argument("--training", type=int, default=10_000, help="images of MNIST that a victim learns from")
    parser.add_argument("--auxiliary", type=int, default=40_000, help="images that the decoder learns from")
    parser.add_argument("--decoder", type=int, default=6, help="epochs of the decoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where shadow models are kept")
    said = parser.parse_args()
    torch.set_num_threads(1)
    lines = [HEAD.format(command=" ".join(["python -m benchmarks.inference", *sys.argv[1:]]))]

    def tell(part: Iterator[str]) -> None:
        for line in part:
            lines.append(line)
            print(line, file=sys.stderr, flush=True)

    tell(rows(50, 3))
    every = victims(said.training, said.seeds)
    tell(decoded(every["cnn"][0], said.training, said.auxiliary, 1000, said.decoder))
    tell(classes(every, said.training))
    tell(stacked(said.shadows))
    with TemporaryDirectory() as temporary:
        tell(members(said.images, said.shadows, said.epochs, said.seed, said.folder or Path(temporary)))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
