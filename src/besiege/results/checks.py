"""One line of self-diagnosis."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What was measured (``evidence``), whether it is as it should be, and what to do where it is not."""

    name: str
    passed: bool
    evidence: str
    advice: str = ""
