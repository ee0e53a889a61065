"""Weight files: safetensors, or a torch state dict read without running any code in it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from besiege.core.errors import BadInput
from besiege.targets.probe import first_line

NESTS = ("state_dict", "model_state_dict", "model", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
UNTRACKED = "num_batches_tracked"


def fill(module: nn.Module, path: Path) -> None:
    """Load the weights at ``path`` into ``module``, all of them or none.

    Raises:
        BadInput: the file is unreadable, or its keys, shapes or numbers do not fit.
    """
    own = module.state_dict()
    state = _unprefixed(read_state(path), own)
    missing = [key for key in own if key not in state and not key.endswith(UNTRACKED)]
    extra = [key for key in state if key not in own and not key.endswith(UNTRACKED)]
    if missing or extra:
        parts = [f"{what} {_some(keys)}" for what, keys in (("lacks", missing), ("has unknown", extra)) if keys]
        raise BadInput(f"{path}: does not fit {type(module).__name__}: it {' and '.join(parts)}")
    for key, value in state.items():
        if key in own and value.shape != own[key].shape:
            raise BadInput(
                f"{path}: {key} has shape {tuple(value.shape)}, but {type(module).__name__} takes "
                f"{tuple(own[key].shape)}"
            )
    refuse_nan(state, str(path))
    module.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)


def refuse_nan(state: Mapping[str, Tensor], name: str) -> None:
    """Raise `BadInput` if any weight is not a number. Infinite ones may be meant, as in a mask."""
    wrong = [key for key, value in state.items() if value.is_floating_point() and bool(value.isnan().any())]
    if wrong:
        raise BadInput(f"{name}: weights are not numbers (NaN) in {_some(wrong)}")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a file by name, freed of a checkpoint around them.

    Raises:
        BadInput: no such file, unreadable, truncated, or more than tensors.
    """
    if not path.is_file():
        raise BadInput(f"{path}: there is no such weight file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise BadInput(f"{path}: unreadable or truncated ({first_line(error)})") from None
    said = load_plain(path)
    nest = next((key for key in NESTS if isinstance(said, Mapping) and isinstance(said.get(key), Mapping)), None)
    state = said if nest is None else said[nest]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise BadInput(f"{path}: holds no state dict (names with tensors)")
    return dict(state)


def load_plain(path: Path) -> Any:
    """``torch.load`` of data alone.

    Raises:
        BadInput: unreadable, truncated, or a pickle that would run code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on old pickles, which load or fail all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if any(sign in str(error) for sign in ("GLOBAL", "Unsupported", "TorchScript")):
            raise CodeInside(
                f"{path}: is a pickle with code or whole objects in it, and was not opened; store the state dict, "
                "best as safetensors"
            ) from None
        raise BadInput(f"{path}: unreadable or truncated ({first_line(error)})") from None


class CodeInside(BadInput):
    """A file that is no data: opening it would run code."""


def _unprefixed(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DataParallel, torch.compile and trainers write before every name, where the module has no such."""
    for prefix in PREFIXES * 2:
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
