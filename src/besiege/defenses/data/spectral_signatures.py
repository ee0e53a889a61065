"""Spectral signatures: poison stands out along the direction in which a class's features vary most."""

from __future__ import annotations

import torch

from besiege.core.features import all_features
from besiege.core.images import Images
from besiege.core.method import defense
from besiege.core.rng import Rng
from besiege.core.suspicion import Probe, Suspicion


@defense(
    "Spectral signatures",
    paper="arXiv:1811.00636",
    kind="data",
    counters=("badnets", "blended"),
    adaptive="adversarial-embedding, adap-blend and adap-patch",
)
def spectral_signatures(
    images: Images, probe: Probe, rng: Rng, *, share: float = 0.1, multiple: float = 1.5, centred: bool = True
) -> Suspicion:
    """Suspect, in each class, ``multiple`` times ``share`` of its images: those of the highest scores.

    ``share`` is the most of a class that may be poison. The score of an image is the square of what its features, less
    the mean of its class, have along the first right singular vector (Tran et al. 2018, algorithm 1). Without
    ``centred`` the mean stays in when the score is taken, as in the authors' code.
    """
    seen, y = all_features(probe.target, images.x), images.y
    score, suspect = torch.zeros_like(seen[:, 0]), torch.zeros_like(y, dtype=torch.bool)
    plane = torch.zeros_like(seen[:, :2])
    for label in torch.unique(y).tolist():
        rows = (y == label).nonzero().squeeze(1)
        own = seen[rows].double()
        away = own - own.mean(0)
        first = torch.linalg.svd(away, full_matrices=False).Vh[:2]
        score[rows] = ((away if centred else own) @ first[0]).square().to(score)
        plane[rows, : len(first)] = (away @ first.T).to(plane)
        count = min(len(rows), round(multiple * share * len(rows)))
        suspect[rows[score[rows].argsort(descending=True, stable=True)[:count]]] = True
    return Suspicion(score, suspect, plane)
