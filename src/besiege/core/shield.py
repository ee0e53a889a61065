"""A defense around a classifier, which is a classifier again."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from besiege.core.errors import BadInput
from besiege.core.target import Target, fingerprint
from besiege.core.threat import Answer


class Shield(nn.Module):
    """What stands between images and the classifier ``inner``; its own weights and thresholds are its state.

    ``forward`` is what is deployed: scores (n, classes), and in a detector the excess (n,) of suspicion over the
    threshold. ``softened`` answers as ``forward`` does, up to what stands in for steps without a useful gradient: who
    knows the defense attacks through it, by the lens `besiege.core.lens.Bpda`. The two are one where everything can be
    differentiated. With ``stochastic`` an answer is a draw, and who knows takes the mean gradient of so many ``draws``.
    """

    stochastic = False
    draws = 5

    def __init__(self, inner: Target) -> None:
        super().__init__()
        self.inner = inner
        self.module = inner.module

    def forward(self, x: Tensor) -> Answer:
        """The answer to images (n, c, h, w) in [0, 1]."""
        raise NotImplementedError

    def softened(self, x: Tensor) -> Answer:
        """The same with a gradient."""
        answer: Answer = self(x)
        return answer

    def own(self) -> dict[str, Tensor]:
        """The shield's state without that of the classifier inside."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("module.")}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what `own` gave.

        Raises:
            BadInput: it is the state of another shield, or of one with other options.
        """
        own = self.own()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state.items()}:
            raise BadInput(f"the saved state is not that of {type(self).__name__} with these options")
        self.load_state_dict(state, strict=False)

    def target(self, name: str) -> Target:
        """The defended target; it grants gradients where the one inside does."""
        inner, own = self.inner, nn.ParameterDict({k.replace(".", "/"): v.float() for k, v in self.own().items()})
        return replace(
            inner,
            call=self,
            module=self,
            stochastic=inner.stochastic or self.stochastic,
            name=f"{name} of {inner.name}",
            fingerprint=f"{fingerprint(own)}/{inner.fingerprint}",
        )


def threshold(suspicion: Tensor, rate: float) -> float:
    """The least value that at most ``rate`` of the clean ``suspicion`` (n,) exceeds."""
    ordered = suspicion.double().sort().values
    return float(ordered[max(0, len(ordered) - 1 - int(rate * len(ordered)))])
