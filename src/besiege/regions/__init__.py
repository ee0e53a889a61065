"""Threats that no norm describes, and any threat by its name."""

from besiege.regions.color import Color
from besiege.regions.named import parse, within
from besiege.regions.spatial import Spatial
from besiege.regions.wasserstein import Wasserstein

__all__ = ["Color", "Spatial", "Wasserstein", "parse", "within"]
