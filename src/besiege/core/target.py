"""The classifier under siege, as a frozen value."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from besiege.core.errors import BadInput
from besiege.core.threat import Access, Answer

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Target:
    """Images (n, c, h, w) in [0, 1] → scores (n, classes), logits or log-probabilities.

    Normalization lives inside. A target that grants LABELS alone answers with one-hot scores. ``shape`` is
    (c, h, w); ``batch`` is how many images it likes at once; ``module`` is what computes it, where it is torch.
    """

    call: Callable[[Tensor], Tensor | Answer]
    access: Access
    classes: int
    shape: tuple[int, int, int]
    name: str = "target"
    fingerprint: str = ""
    module: nn.Module | None = None
    batch: int = 128
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    stochastic: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        classes: int,
        shape: tuple[int, int, int],
        name: str = "module",
        access: Access = Access.WEIGHTS,
        batch: int = 128,
    ) -> Target:
        """A torch module that maps images in [0, 1] to logits."""
        first = next(module.parameters(), None)
        return cls(
            call=module,
            access=access,
            classes=classes,
            shape=shape,
            name=name,
            fingerprint=fingerprint(module),
            module=module,
            batch=batch,
            device=torch.device("cpu") if first is None else first.device,
            dtype=torch.float32 if first is None else first.dtype,
        )

    def answer(self, x: Tensor) -> Answer:
        """One call of the model, whatever the batch."""
        said = self.call(x.to(self.dtype))
        answer = said if isinstance(said, Answer) else Answer(said)
        if answer.scores.dtype != x.dtype:
            answer = replace(answer, scores=answer.scores.to(x.dtype))
        if answer.scores.shape != (len(x), self.classes):
            raise BadInput(
                f"{self.name} answered {len(x)} images with shape {tuple(answer.scores.shape)}; "
                f"expected ({len(x)}, {self.classes})"
            )
        return answer

    def scores(self, x: Tensor) -> Tensor:
        """Scores (n, classes) of any number of images, in batches, without gradients."""
        with torch.no_grad(), self.ready():
            return torch.cat([self.answer(part).scores for part in torch.split(x, self.batch)])

    def labels(self, x: Tensor) -> Tensor:
        """Predicted classes (n,)."""
        return self.scores(x).argmax(1)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Evaluation mode and frozen weights while inside; both are as before afterwards."""
        modules = [] if self.module is None else list(self.module.modules())
        weights = [] if self.module is None else list(self.module.parameters())
        training, trainable = [m.training for m in modules], [w.requires_grad for w in weights]
        try:
            for module in modules:
                module.training = False
            for weight in weights:
                weight.requires_grad_(False)
            yield
        finally:
            for module, was in zip(modules, training, strict=True):
                module.training = was
            for weight, was in zip(weights, trainable, strict=True):
                weight.requires_grad_(was)

    def granting(self, access: Access) -> Target:
        """The same target behind a narrower door."""
        if access > self.access:
            raise BadInput(f"{self.name} grants {self.access.name.lower()}, not {access.name.lower()}")
        return replace(self, access=access)


def fingerprint(module: nn.Module) -> str:
    """A digest of the module's structure and weights."""
    digest = hashlib.blake2b(repr(module).encode(), digest_size=8)
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
