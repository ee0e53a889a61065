"""The peers: one file a library, one small function an attack, under the name that the attack has here.

Each is (model, x, y, *, eps, steps, queries, …) → adversarial images, and takes of these options what it needs.
The model answers with logits for images in [0, 1].
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from besiege.bench.measure import Contender
from besiege.core.images import Images


@dataclass(frozen=True)
class Library:
    """A peer: what it is called when imported, which is also its file here, and when installed."""

    module: str
    distribution: str

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None


LIBRARIES = {
    "foolbox": Library("foolbox", "foolbox"),
    "torchattacks": Library("torchattacks", "torchattacks"),
    "adv-lib": Library("adv_lib", "adv-lib"),
    "ART": Library("art", "adversarial-robustness-toolbox"),
    "auto-attack": Library("pyautoattack", "pyautoattack"),
    "cleverhans": Library("cleverhans", "cleverhans"),
}


def contenders(attack: str, options: Mapping[str, Any]) -> dict[str, Contender]:
    """Every installed peer that has ``attack``, ready to race."""
    found = {}
    for name, library in LIBRARIES.items():
        if not library.installed:
            continue
        function = getattr(
            importlib.import_module(f"benchmarks.peers.{library.module}"), attack.replace("-", "_"), None
        )
        if function is not None:
            found[name] = contender(function, options)
    return found


def contender(function: Callable[..., Tensor], options: Mapping[str, Any]) -> Contender:
    """A peer's function, seeded and silenced, with those of the ``options`` that it takes."""
    taken = {key: value for key, value in options.items() if key in inspect.signature(function).parameters}

    def run(module: nn.Module, images: Images, seed: int) -> Tensor:
        torch.manual_seed(seed)
        np.random.seed(seed)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logging.disable()
                try:
                    return function(module, images.x.clone(), images.y.clone(), **taken)
                finally:
                    logging.disable(logging.NOTSET)

    return run


def register_torchvision() -> None:
    """Let torchvision's build for CUDA be imported beside a torch without it: declare the operators that it expects."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[torch.library.Library] = []
