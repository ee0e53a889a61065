"""Classifiers from anywhere: a spec string becomes a `besiege.core.target.Target`."""

from besiege.targets.callable import from_callable
from besiege.targets.module import from_module
from besiege.targets.open import expects, open_target
from besiege.targets.preprocessing import Preprocessing

__all__ = ["Preprocessing", "expects", "from_callable", "from_module", "open_target"]
