"""The classifier under siege, as a frozen value."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from besiege.core.errors import BadInput
from besiege.core.threat import Access, Answer

if TYPE_CHECKING:
    from besiege.core.images import Images

CPU = torch.device("cpu")
Execution = Literal["auto", "plain", "channels_last", "bfloat16", "float16"]


@dataclass(frozen=True, eq=False)
class Target:
    """Images (n, c, h, w) in [0, 1] → scores (n, classes), logits or log-probabilities.

    Normalization lives inside. A target that grants LABELS alone answers with one-hot scores. ``shape`` is
    (c, h, w); ``batch`` is how many images it likes at once; ``module`` is what computes it, where it is torch.
    """

    call: Callable[[Tensor], Tensor | Answer] = field(repr=False)
    access: Access
    classes: int
    shape: tuple[int, int, int]
    name: str = "target"
    fingerprint: str = ""
    module: nn.Module | None = field(default=None, repr=False)
    batch: int = 64
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
        batch: int = 64,
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

    def takes(self, images: Images) -> None:
        """Check that images of this shape can be answered, and that their labels are known.

        Raises:
            BadInput: they cannot, or are not.
        """
        if images.shape != self.shape:
            raise BadInput(f"the images are {images.shape} (c, h, w), but {self.name} takes {self.shape}")
        if int(images.y.max()) >= self.classes:
            raise BadInput(
                f"label {int(images.y.max())} is out of range: {self.name} has classes 0 to {self.classes - 1}"
            )

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

    def tuned(self, execution: Execution) -> Target:
        """The same classifier laid out for speed: what a search runs on, never what verifies it.

        ``auto`` is channels-last where a float32 module convolves (up to twice as fast on a CPU), else plain.

        Raises:
            BadInput: another layout is asked for than a torch module can take.
        """
        module = self.module if self.module is self.call else None
        if execution == "auto":
            convolves = module is not None and any(w.dim() == 4 for w in module.parameters())
            execution = "channels_last" if convolves and self.dtype == torch.float32 else "plain"
        if execution == "plain":
            return self
        if module is None:
            raise BadInput(f"{self.name} is no plain torch module, so its search cannot run in {execution}")
        twin = copy.deepcopy(module)
        if execution == "channels_last":
            for weight in twin.parameters():
                if weight.dim() == 4:
                    # `contiguous` would leave a weight of one channel as it is, and the layer's output with it.
                    weight.data = torch.empty_like(weight.data, memory_format=torch.channels_last).copy_(weight.data)
            return replace(self, module=twin, call=twin)
        dtype = torch.bfloat16 if execution == "bfloat16" else torch.float16
        twin = twin.to(dtype)
        return replace(self, module=twin, call=twin, dtype=dtype)

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
