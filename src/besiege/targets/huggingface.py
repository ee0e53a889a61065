"""An image classifier of Hugging Face transformers, from a folder or the hub, fed as its own config says."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.targets.preprocessing import Preprocessing
from besiege.targets.probe import first_line


def load(where: str) -> nn.Module:
    """The classifier in a local folder, or of that name on the hub; code that lies beside it is not run.

    Raises:
        BadInput: there is none, or it classifies no images.
    """
    from transformers import AutoModelForImageClassification

    with _said(where):
        module: nn.Module = AutoModelForImageClassification.from_pretrained(_place(where), trust_remote_code=False)
    return module.eval()


def declared(where: str) -> Preprocessing:
    """What its ``preprocessor_config.json`` says: size, mean and std, in pixels of [0, 1].

    Images of another size are scaled to the one that the network sees; what a pipeline would cut off at the edges
    before, they are to lack already.

    Raises:
        BadInput: there is no such file, or it is no image processor's.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    with _said(where):
        said, _ = ImageProcessingMixin.get_image_processor_dict(_place(where))
    size = said.get("crop_size") if said.get("do_center_crop") else said.get("size") if said.get("do_resize") else None
    scale = 255 * float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 255.0
    shift = 1.0 if said.get("do_rescale", True) and said.get("rescale_offset") else 0.0
    normal = bool(said.get("do_normalize", True))
    mean = _numbers(said.get("image_mean")) if normal else ()
    std = _numbers(said.get("image_std")) if normal else ()
    mean, std = mean or (0.0,), std or (1.0,)
    return Preprocessing(
        mean=tuple((m + shift) / scale for m in mean),
        std=tuple(s / scale for s in std),
        size=_size(size),
        channels="bgr" if said.get("do_flip_channel_order") else "rgb",
    )


def agree(module: nn.Module, data: Images, name: str) -> None:
    """Refuse images whose classes carry the network's names under other numbers."""
    config: Any = module.config
    labels = {str(text): int(number) for number, text in (config.id2label or {}).items()}
    for label, text in enumerate(data.names or ()):
        if labels.get(text, label) != label:
            raise BadInput(
                f"{data.name} numbers the class {text!r} {label}, but {name} numbers it {labels[text]}; "
                "list its classes in its order in classes.txt beside the images"
            )


def depth(module: nn.Module) -> int:
    """How many channels its images have."""
    return int(getattr(module.config, "num_channels", 3))


def _place(where: str) -> str:
    folder = Path(where).expanduser()
    return str(folder) if folder.is_dir() else where


def _numbers(said: Any) -> tuple[float, ...]:
    return () if said is None else tuple(float(value) for value in (said if isinstance(said, list) else [said]))


def _size(said: Any) -> tuple[int, int] | None:
    """Height and width, or the shorter edge for both."""
    if isinstance(said, Mapping):
        edge = said.get("shortest_edge")
        height, width = said.get("height", edge), said.get("width", edge)
        return None if height is None or width is None else (int(height), int(width))
    if isinstance(said, list):
        return int(said[0]), int(said[-1])
    return None if said is None else (int(said), int(said))


@contextlib.contextmanager
def _said(where: str) -> Iterator[None]:
    """What transformers raises as one sentence; what it remarks on is kept quiet."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise BadInput(f"hf:{where} is no image classifier that can be opened: {first_line(error)}") from None
    finally:
        logging.set_verbosity(level)
