"""AutoAttack: four attacks in a row, each on the images that the others left standing."""

from __future__ import annotations

from besiege.attacks.blackbox.square import square
from besiege.attacks.whitebox.apgd import apgd
from besiege.attacks.whitebox.apgd_t import apgd_t
from besiege.attacks.whitebox.fab_t import fab_t
from besiege.core.method import Attack, ensemble
from besiege.core.threat import INF, Access


@ensemble("AutoAttack", paper="arXiv:2003.01690", norms=(2, INF), access=Access.GRADIENTS)
def autoattack(*, steps: int = 100, targets: int = 9, queries: int = 5000) -> tuple[Attack, ...]:
    """APGD on cross-entropy, APGD-T, FAB-T and Square: the standard version (Croce & Hein 2020)."""
    return (
        apgd(steps=steps, loss="ce"),
        apgd_t(steps=steps, targets=targets),
        fab_t(steps=steps, targets=targets),
        square(iterations=queries, rescale=False),
    )
