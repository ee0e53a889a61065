"""Functionally equivalent extraction: a dense ReLU network rebuilt exactly from kinks in its scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from besiege.attacks.extraction._pieces import ROUNDING, Ask, Layer, Line, Unclear, jacobian, jacobians, rank_one
from besiege.core.errors import NotRebuilt
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import extraction
from besiege.core.oracle import Oracle
from besiege.core.rng import Rng, Stream
from besiege.core.threat import Access

PROOFS = 12
"""At so many places of its hyperplane a neuron of the first layer must show."""

QUIET = 12
"""So many lines in turn that show no new neuron end the search for a layer's."""

NUDGE = 1e-4
"""How far either side of a hyperplane is looked, relative to where the point is."""

DIGITS = 10
"""Scores that have no more than so many are rounded."""


@extraction("Functionally equivalent extraction", paper="arXiv:1909.01838", access=Access.SCORES, exact=True)
def functionally_equivalent(
    oracle: Oracle,
    images: Images,
    fit: Fit,
    rng: Rng,
    *,
    queries: int = 1 << 20,
    lines: int = 8,
    tolerance: float = 1e-6,
) -> nn.Module:
    """Rebuild a dense network with at most two hidden layers of ReLU, from ``lines`` lines (Jagielski et al. 2020).

    Along a line every neuron of the first layer flips once, a kink in the scores that the tangents either side locate
    to the last digits. The Jacobians before and after a kink differ by what follows from the neuron times its row, up
    to a scale that does not matter. If there is one hidden layer, which way each neuron points follows from the
    Jacobian at the line's end, and the output layer from least squares. The network must then agree with the target
    to ``tolerance`` of the spread of the scores on fresh points, among them the images; else the next line is tried.
    ``fit`` is not used: nothing is trained.

    Departs from the paper, which has a single score and takes second differences at each critical point, relative
    signs by further ones and the global signs by preimages: with all scores at once one Jacobian between each two
    kinks, by finite differences, gives all of that for (d + 1) (h + 1) queries and needs no more hidden neurons than
    inputs times scores. It follows Carlini et al. 2020 (arXiv:2003.04884) in using exact differences of any width.

    Beyond the paper, two hidden layers (after Carlini et al.): the hyperplanes of the second bend where a neuron of
    the first flips, so the first layer is what does not. Its directions come from preimages, its inverse leads to the
    second layer, and lines among that one's positive inputs find the rest. This needs no more neurons in the first
    layer than inputs, and that each of the second flips where the first's outputs are all positive. Behind two layers
    the outputs of both can seldom be chosen freely at once: there it stops.

    Raises:
        NotRebuilt: the scores are rounded or not piecewise linear, they stay as they are beyond some pixel values, or
            no line gave a network that agrees.
    """
    shape = images.shape
    stream = rng.stream(0)

    def ask(points: Tensor) -> Tensor:
        rows = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        return oracle.scores(points.view(-1, *shape), rows)

    shown = images.x[:200].flatten(1).double()
    _refuse(ask, shown, stream)
    why = ""
    for _ in range(lines):
        try:
            return network(_rebuilt(ask, shown, stream, tolerance))
        except Unclear as reason:
            why = str(reason)
    raise NotRebuilt(
        f"no dense ReLU network of one or two hidden layers explains the scores: on the last of {lines} lines {why}"
    )


def network(layers: list[Layer]) -> nn.Sequential:
    """The layers as a module in float64 on images, with ReLU between them."""
    parts: list[nn.Module] = [nn.Flatten()]
    for layer in layers:
        dense = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], dtype=torch.float64, device=layer.weight.device)
        with torch.no_grad():
            dense.weight.copy_(layer.weight)
            dense.bias.copy_(layer.bias)
        parts += [dense, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).eval()


def forward(layers: list[Layer], x: Tensor) -> Tensor:
    """The scores (n, classes) of points (n, d)."""
    for layer in layers[:-1]:
        x = layer(x).relu()
    return layers[-1](x)


def _refuse(ask: Ask, shown: Tensor, stream: Stream) -> None:
    """One sentence for answers that no exact method can work from: rounded, curved, or cut off outside of a box.

    Raises:
        NotRebuilt: they are.
    """
    start = _points(shown, 64, stream)
    step = 1e-3 * stream.randn(*start.shape).to(start)
    said = ask(torch.cat([start, start + step, start + 2 * step]))
    if _rounded(said):
        raise NotRebuilt("the scores are rounded, to float32 or coarser; exact extraction needs all digits of float64")
    first, second, third = said.split(len(start))
    bend = (first + third - 2 * second).abs().amax(1)
    straight = bend <= 1e-9 * (third - first).abs().amax(1) + ROUNDING * said.abs().amax()
    if straight.float().mean() < 0.25:
        raise NotRebuilt(
            "the scores are not piecewise linear in the pixels, as logits of a dense ReLU network are; probabilities, "
            "rounded or smooth scores cannot be rebuilt from"
        )
    corners = torch.where(start[:8] > 0.5, 4.0, -4.0).to(start)
    near, far = ask(torch.cat([corners, -corners, 2 * corners, -2 * corners])).split(16)
    if torch.equal(near, far):
        raise NotRebuilt("pixels are cut off, so that beyond [0, 1] the scores stay as they are; it has to ask there")


def _rounded(said: Tensor) -> bool:
    """Whether all scores are numbers of float32, or of at most `DIGITS` decimal digits."""
    last = said * 10.0 ** (DIGITS - math.ceil(math.log10(max(float(said.abs().amax()), 1e-200))))
    return torch.equal(said, said.float().double()) or float((last - last.round()).abs().amax()) < 1e-3


def _points(shown: Tensor, count: int, stream: Stream) -> Tensor:
    """``count`` points: in turn images, uniform noise and normal noise, so that all neurons see both their sides."""
    near = shown[torch.arange(count, device=shown.device) % len(shown)]
    uniform = stream.rand(count, shown.shape[1]).to(shown)
    normal = 3 * stream.randn(count, shown.shape[1]).to(shown)
    kind = torch.arange(count, device=shown.device)[:, None] % 3
    return torch.where(kind == 0, near, torch.where(kind == 1, uniform, normal))


def _rebuilt(ask: Ask, shown: Tensor, stream: Stream, tolerance: float) -> list[Layer]:
    """The network that one random line shows; where it has a second hidden layer, further lines behind the first."""
    d = shown.shape[1]
    line = Line(ask, stream.rand(d).to(shown), stream.randn(d).to(shown))
    out = line.reach()
    kinks = line.kinks(-out, out)
    low, high = (float(kinks[0]) - 2, float(kinks[-1]) + 2) if len(kinks) else (-1.0, 1.0)
    slopes = jacobians(line, kinks, low, high)
    if not len(kinks):
        layers = [Layer(slopes[0], (ask(line.origin[None]) - line.origin @ slopes[0].T)[0])]
        _agree(ask, layers, shown, stream, tolerance)
        return layers
    planes, columns = _crossed(line, kinks, slopes)
    try:
        first = _turned(planes, columns, line.at(kinks[:1] - 1), slopes[0])
        layers = [first, _output(ask, first, _points(shown, 6 * (len(kinks) + 1), stream))]
        _agree(ask, layers, shown, stream, tolerance)
    except Unclear:
        layers = _two_hidden(ask, planes, shown, stream)
        _agree(ask, layers, shown, stream, tolerance)
    return layers


def _crossed(line: Line, kinks: Tensor, slopes: Tensor) -> tuple[Layer, Tensor]:
    """The hyperplanes (k, d) of the neurons that flip on a line, and what follows from each (k, classes)."""
    rows, columns = rank_one(slopes.diff(dim=0))
    turn = (rows @ line.way).sign()[:, None]
    rows = rows * turn
    return Layer(rows, -(rows * line.at(kinks)).sum(1)), columns * turn


def _turned(planes: Layer, columns: Tensor, base: Tensor, slopes: Tensor) -> Layer:
    """The hidden layer, if it is the only one: the neurons that are not silent at ``base`` (1, d) explain its slopes.

    Which they are is found by least squares over as many equations as there are slopes.
    """
    turn = torch.where(planes(base)[0] > 0, -1.0, 1.0).to(base)
    pairs = torch.einsum("kc,ki->kci", columns, planes.weight * turn[:, None]).flatten(1)
    speaks = torch.linalg.lstsq(pairs.T, -slopes.flatten()[:, None]).solution[:, 0]
    whole = speaks.round()
    if float((speaks - whole).abs().max()) > 1e-3 or not bool(((whole == 0) | (whole == 1)).all()):
        raise Unclear("the slopes somewhere are no sum of the neurons that were found")
    turn = turn * (1 - 2 * whole)
    return Layer(planes.weight * turn[:, None], planes.bias * turn)


def _two_hidden(ask: Ask, planes: Layer, shown: Tensor, stream: Stream) -> list[Layer]:
    """First the layer whose hyperplanes among ``planes``, all that one line crosses, do not bend; then the one behind.

    In the second all neurons must show where the first's are all positive.
    """
    points = _points(shown, 2000, stream)
    first = _oriented(ask, Layer(*_rows(planes, _lasting(ask, planes, points))), points)
    inner = _behind(ask, first)
    points = _positive(2000, len(first.bias), stream).to(shown)
    planes, columns = _search(inner, points, stream)
    base = points[:1]
    second = _turned(planes, columns, base, jacobian(inner, base, float(base.min()) / 2))
    return [first, second, _output(inner, second, points[: 8 * (len(second.bias) + 1)])]


def _behind(ask: Ask, layer: Layer) -> Ask:
    """What follows ``layer``, as a function of what it puts out (m, outputs), all positive."""
    inverse = torch.linalg.pinv(layer.weight)
    return lambda z: ask((z - layer.bias) @ inverse.T)


def _search(ask: Ask, points: Tensor, stream: Stream) -> tuple[Layer, Tensor]:
    """All hyperplanes among positive ``points``, and what follows from each.

    Lines between two of the points do not cross every neuron: they are drawn until none is new any more.

    Raises:
        Unclear: a hyperplane bends, so that there is one layer more.
    """
    found, columns = Layer(points[:0], points.new_zeros(0)), None
    quiet = 0
    for _ in range(40 * QUIET):
        pair = points[torch.randperm(len(points), generator=stream.generator)[:2].to(points.device)]
        line = Line(ask, pair[0], pair[1] - pair[0])
        try:
            kinks = line.kinks(0.0, 1.0)
            if not len(kinks):
                quiet += 1
                continue
            planes, follows = _crossed(line, kinks, jacobians(line, kinks, 0.0, 1.0))
        except Unclear:
            continue
        fresh = ~_among(planes, found)
        if not bool(_lasting(ask, Layer(*_rows(planes, fresh)), points).all()):
            raise Unclear("there are kinks of a third hidden layer")
        found = Layer(torch.cat([found.weight, planes.weight[fresh]]), torch.cat([found.bias, planes.bias[fresh]]))
        columns = follows[fresh] if columns is None else torch.cat([columns, follows[fresh]])
        quiet = 0 if bool(fresh.any()) else quiet + 1
        if quiet >= QUIET and columns is not None:
            return found, columns
    raise Unclear("the neurons of the second hidden layer come to no end")


def _rows(planes: Layer, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of some of them."""
    return planes.weight[kept], planes.bias[kept]


def _among(planes: Layer, found: Layer) -> Tensor:
    """(k,) which of ``planes`` are already ``found``, either way round."""
    ours, theirs = (torch.cat([p.weight, p.bias[:, None]], 1) for p in (planes, found))
    ours, theirs = (p / p.norm(dim=1, keepdim=True) for p in (ours, theirs))
    same: Tensor = ((ours @ theirs.T).abs() > 1 - 1e-9).any(1)
    return same


def _on(planes: Layer, points: Tensor) -> Tensor:
    """(k, PROOFS, d) places on each hyperplane, between two of the ``points`` on either side of it."""
    side = (points @ planes.weight.T + planes.bias).T
    over, under = (s.float().argsort(dim=1, descending=True, stable=True)[:, :PROOFS] for s in (side > 0, side < 0))
    share = side.gather(1, over) / (side.gather(1, over) - side.gather(1, under))
    return points[over] + share[:, :, None] * (points[under] - points[over])


def _cut(planes: Layer, points: Tensor) -> Tensor:
    """(k,) which hyperplanes have enough of the ``points`` on either side."""
    side = points @ planes.weight.T + planes.bias
    return torch.minimum((side > 0).sum(0), (side < 0).sum(0)) >= PROOFS


def _lasting(ask: Ask, planes: Layer, points: Tensor) -> Tensor:
    """(k,) which of ``planes`` are kinks all over: the first layer's. A deeper neuron's bends at every other."""
    kept = _cut(planes, points)
    if not bool(kept.any()):
        return kept
    planes = Layer(*_rows(planes, kept))
    places = _on(planes, points)
    step = NUDGE * (places.abs().mean(2, keepdim=True)) * planes.weight[:, None]
    said = ask(torch.stack([places - step, places, places + step]).flatten(0, 2)).view(3, *places.shape[:2], -1)
    bend = (said[0] + said[2] - 2 * said[1]).abs().amax(2)
    there = bend > 0.01 * ROUNDING * said.abs().amax((0, 3))
    return kept.index_put((kept.nonzero().squeeze(1),), there.float().mean(1) > 0.7)


def _oriented(ask: Ask, planes: Layer, points: Tensor) -> Layer:
    """The neurons turned so that they are silent below zero: there the scores do not change with them.

    A neuron alone is moved along its row of the inverse.
    """
    inverse = torch.linalg.pinv(planes.weight)
    if float((planes.weight @ inverse - torch.eye(len(planes.bias)).to(inverse)).abs().max()) > 1e-6:
        raise Unclear("a layer has more neurons than inputs")
    places = _on(planes, points)
    step = NUDGE * places.abs().mean(2, keepdim=True) * inverse.T[:, None]
    said = ask(torch.stack([places - step, places, places + step]).flatten(0, 2)).view(3, *places.shape[:2], -1)
    below, above = ((said[k] - said[1]).abs().amax(2).sum(1) for k in (0, 2))
    if bool((torch.minimum(below, above) > 0.05 * torch.maximum(below, above)).any()):
        raise Unclear("a neuron changes the scores on both its sides")
    turn = torch.where(below < above, 1.0, -1.0).to(planes.bias)
    return Layer(planes.weight * turn[:, None], planes.bias * turn)


def _positive(count: int, d: int, stream: Stream) -> Tensor:
    """(count, d) positive points of sizes that differ widely, among the coordinates too."""
    return torch.exp(stream.randn(count, 1) + 1.5 * stream.randn(count, d)).double()


def _output(ask: Ask, hidden: Layer, points: Tensor) -> Layer:
    """The last layer, by least squares on ``points``."""
    active = torch.cat([hidden(points).relu(), points.new_ones(len(points), 1)], 1)
    scale = active.norm(dim=0).clamp_min(1e-30)
    solved = torch.linalg.lstsq(active / scale, ask(points)).solution / scale[:, None]
    return Layer(solved[:-1].T.contiguous(), solved[-1])


def _agree(ask: Ask, layers: list[Layer], shown: Tensor, stream: Stream, tolerance: float) -> None:
    """Compare with the target on fresh points.

    Raises:
        Unclear: somewhere they differ.
    """
    points = _points(shown, 300, stream)
    said, ours = ask(points), forward(layers, points)
    apart = float(((said - ours).abs().amax(1) / said.std(0).amax().clamp_min(1e-30)).max())
    if not apart <= tolerance:
        raise Unclear(f"what was rebuilt differs on fresh points by up to {apart:.2g} standard deviations")
