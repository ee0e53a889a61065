"""Threats that no norm describes, and any threat by its name."""

from besiege.regions.named import parse, within
from besiege.regions.wasserstein import Wasserstein

__all__ = ["Wasserstein", "parse", "within"]
