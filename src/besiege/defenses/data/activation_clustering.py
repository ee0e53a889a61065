"""Activation clustering: a class whose features fall apart into two groups holds more than one thing."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from besiege.core.features import all_features
from besiege.core.images import Images
from besiege.core.method import defense
from besiege.core.rng import Rng
from besiege.core.suspicion import Probe, Suspicion

Array = NDArray[np.float64]
FEWEST = 20
"""A class with fewer images is not searched."""

APART = 0.15
"""Exclusion asks about smaller clusters from this silhouette on; it is where the paper sees two things in a class."""


@defense(
    "Activation clustering",
    paper="arXiv:1811.03728",
    kind="data",
    counters=("badnets", "blended", "label-flip"),
    adaptive="adversarial-embedding, adap-blend and adap-patch",
)
def activation_clustering(
    images: Images,
    probe: Probe,
    rng: Rng,
    *,
    method: Literal["kmeans", "dbscan"] = "kmeans",
    decide: Literal["silhouette", "exclusion", "size"] = "silhouette",
    components: int = 10,
    reduce: Literal["ica", "pca"] = "ica",
    silhouette: float = 0.25,
    size: float = 0.35,
) -> Suspicion:
    """Cluster each class's features, reduced to ``components``, and suspect the small clusters of classes fallen apart.

    ``kmeans`` makes two clusters (Chen et al. 2018). The smaller, of less than ``size`` of the class, is suspect by
    ``decide``: where the silhouette of both passes ``silhouette``; by ``exclusion``, where a network that has learned
    from none of them mostly takes it for other classes (the paper's exclusionary reclassification, which also accuses
    rare ways to write a digit); or at once. ``dbscan`` is no method of the paper: clusters are what is dense at the
    knee of the distances to the neighbours, and those below ``size`` of the class are suspect, also clusters of what
    lies in none.

    Departs from the paper in that, for exclusion, one network is trained without all clusters in question, not one for
    each, and in that a cluster that is hardly apart, its silhouette below 0.15, is not in question.
    """
    seen, y = all_features(probe.target, images.x), images.y
    score, suspect, plane = torch.zeros(len(y)), torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(y), 2)
    for label in torch.unique(y).tolist():
        rows = (y == label).nonzero().squeeze(1).cpu()
        if len(rows) < FEWEST:
            continue
        points = _reduced(seen[rows].double().cpu().numpy(), components, reduce if method == "kmeans" else "pca")
        plane[rows, : points.shape[1]] = torch.from_numpy(points[:, :2]).float()
        if method == "dbscan":
            lone = torch.from_numpy(_sparse(points, size))
            score[rows], suspect[rows] = lone.float(), lone
            continue
        small, apart = _halves(points)
        score[rows] = torch.from_numpy(small).float() * apart
        least = {"exclusion": APART, "silhouette": silhouette, "size": -1.0}[decide]
        suspect[rows] = torch.from_numpy(small & (small.mean() < size and apart > least))
    if method == "kmeans" and decide == "exclusion" and bool(suspect.any()):
        suspect &= _misplaced(images, probe, suspect)
    return Suspicion(*(part.to(images.x.device) for part in (score, suspect, plane)))


def _reduced(points: Array, components: int, how: str) -> Array:
    from sklearn.decomposition import PCA, FastICA

    components = min(components, *points.shape, int(np.linalg.matrix_rank(points - points.mean(0))) or 1)
    if how == "pca":
        found: Array = PCA(components, svd_solver="full").fit_transform(points)
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an ICA that has not settled is as good a projection
        found = FastICA(components, whiten="unit-variance", max_iter=500, random_state=0).fit_transform(points)
    return found


def _halves(points: Array) -> tuple[NDArray[np.bool_], float]:
    """The smaller of two clusters, and the silhouette of both."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    said = KMeans(2, n_init=10, random_state=0).fit_predict(points)
    small = said == (said.mean() < 0.5)
    apart = float(silhouette_score(points, said)) if 0 < small.sum() < len(points) else 0.0
    return small, max(apart, 0.0)


def _sparse(points: Array, size: float) -> NDArray[np.bool_]:
    """What lies in a cluster that holds less than ``size`` of the points, or in one of what is left over by itself.

    Poison is often less dense than its class: what belongs to no cluster is searched again, at its own knee.
    """
    fewest = max(10, math.ceil(0.01 * len(points)))
    said = _dense(points, fewest)
    counts = np.bincount(said[said >= 0], minlength=1)
    small: NDArray[np.bool_] = (said >= 0) & (counts[np.clip(said, 0, None)] < size * len(points))
    lone = np.flatnonzero(said < 0)
    if len(lone) > 2 * fewest and len(lone) < size * len(points):
        small[lone[_dense(points[lone], fewest) >= 0]] = True
    return small


def _dense(points: Array, fewest: int) -> NDArray[np.int_]:
    """The cluster of each point, -1 for none: what has ``fewest`` neighbours at the knee of their distances."""
    from sklearn.cluster import DBSCAN
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=min(fewest, len(points) - 1)).fit(points).kneighbors()[0]
    found: NDArray[np.int_] = DBSCAN(eps=max(knee(np.sort(near[:, -1])), 1e-9), min_samples=fewest).fit_predict(points)
    return found


def knee(ascending: Array) -> float:
    """The value of a rising curve that lies farthest below the straight line between its ends."""
    line = np.linspace(ascending[0], ascending[-1], len(ascending))
    return float(ascending[int(np.argmax(line - ascending))])


def _misplaced(images: Images, probe: Probe, questioned: Tensor) -> Tensor:
    """(n,) the images of classes whose ``questioned`` ones a network that has not seen them takes for other classes."""
    kept = replace(probe.fit, name=f"{probe.fit.name}, without what is in question")
    where = questioned.to(images.x.device)
    other = kept(images[~where], probe.seed, classes=probe.target.classes, progress=probe.progress)
    wrong = torch.zeros(len(images), dtype=torch.bool)
    wrong[questioned] = (other.labels(images.x[where]) != images.y[where]).cpu()
    y, guilty = images.y.cpu(), torch.zeros_like(wrong)
    for label in torch.unique(y[questioned]).tolist():
        own = y == label
        guilty |= own & bool(wrong[own & questioned].float().mean() > 0.5)
    return guilty
