"""A few images of each cell, before and after, for the report to show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from besiege.core.images import Images
from besiege.engine.evasion import Outcome
from besiege.engine.judge import Verdict, eight_bits
from besiege.report.pictures import png
from besiege.results import files
from besiege.results.audit import Exhibit, Picture, slug
from besiege.results.record import Record

FOLDER = "pictures"


def take(
    folder: Path,
    record: Record,
    outcome: Outcome,
    verdict: Verdict,
    images: Images,
    confidence: Tensor,
    shown: set[int],
    count: int = 1,
) -> list[Picture]:
    """Write ``count`` triples of PNGs below ``folder``: clean, adversarial as 8-bit pixels, and the change.

    Images that are not ``shown`` yet come first, and those that survive rounding; ``confidence`` (n,) is the
    clean one.
    """
    fell = [row for row, hit in enumerate(record.images.success) if hit]
    fell.sort(key=lambda row: (record.images.index[row] in shown, not record.images.success_8bit[row]))
    taken = []
    for row in fell[:count]:
        index = record.images.index[row]
        shown.add(index)
        x, adv = images.x[row].cpu(), eight_bits(outcome.adv[row : row + 1], images.x[row : row + 1])[0].cpu()
        change = adv - x
        gain = 0.5 / max(float(change.abs().max()), 1 / 510)
        stem = slug(record.attack, str(record.threat), str(index))
        names = tuple(f"{FOLDER}/{stem}-{part}.png" for part in ("clean", "adversarial", "change"))
        for name, part in zip(names, (x, adv, 0.5 + gain * change), strict=True):
            files.write(folder / name, as_png(part))
        taken.append(
            Picture(
                attack=record.attack,
                threat=str(record.threat),
                index=index,
                label=label_name(images, record.images.label[row]),
                clean_label=label_name(images, record.images.clean_label[row]),
                clean_confidence=float(confidence[row]),
                adversarial_label=label_name(images, record.images.adversarial_label[row]),
                adversarial_confidence=float(verdict.confidence[row]),
                distance=float(verdict.distance[row]),
                survives_8bit=record.images.success_8bit[row],
                gain=gain,
                files=(names[0], names[1], names[2]),
            )
        )
    return taken


def hang(folder: Path, front: str, x: Tensor, captions: Sequence[str]) -> list[Exhibit]:
    """Write pictures (k, c, h, w) below ``folder``, and say of each what it shows."""
    hung = []
    for number, (image, caption) in enumerate(zip(x, captions, strict=True)):
        file = f"{FOLDER}/{slug(front, str(number))}.png"
        files.write(folder / file, as_png(image))
        hung.append(Exhibit(front=front, caption=caption, file=file))
    return hung


def as_png(x: Tensor) -> bytes:
    """An image (c, h, w) as a PNG file."""
    return png(_bytes(x.detach().float().cpu()).numpy())


def _bytes(x: Tensor) -> Tensor:
    """(h, w, c) uint8, c being 1, 3 or 4; other channels are averaged."""
    if x.shape[0] not in (1, 3, 4):
        x = x.mean(0, keepdim=True)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def label_name(images: Images, label: int) -> str:
    """The name of a class, or its number."""
    return images.names[label] if images.names is not None and label < len(images.names) else str(label)
