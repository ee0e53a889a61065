"""Models of every shape, type and mood."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from toys import CARDS, Toy, Watch, cases, curved, fire, generator, shape_for

from besiege.core.images import Images
from besiege.core.target import Target
from besiege.core.threat import Access, Answer
from besiege.engine.judge import judge

SHAPES = [(1, 5, 9), (3, 7, 5), (4, 8, 9)]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("name", "norm", "shape"),
    [
        pytest.param(*case.values, shape, id=f"{case.id}-{shape}")
        for case in cases()
        for shape in SHAPES
        if CARDS[case.values[0]].channels in (None, shape[0])
    ],
)
def test_any_number_of_channels_and_classes(name, norm, classes, shape):
    toy = curved(shape, classes, n=3)
    outcome = fire(name, norm, toy, queries=200)
    assert outcome.adv.shape == (3, *shape)
    assert torch.equal(judge(outcome, toy.target(), toy.images).success, outcome.success)


@dataclass(frozen=True, eq=False)
class Strict(Target):
    """A target that takes single precision and nothing else."""

    def answer(self, x: Tensor) -> Answer:
        assert x.dtype == torch.float32
        return super().answer(x)


@pytest.mark.parametrize(("name", "norm"), cases())
def test_single_precision_from_end_to_end(name, norm):
    toy = curved(shape_for(norm), dtype=torch.float32)
    watch = Watch(toy.model)
    outcome = fire(name, norm, toy, target=Strict(watch, Access.WEIGHTS, 3, toy.shape))
    assert watch.types == {torch.float32}
    assert outcome.adv.dtype == outcome.distance.dtype == torch.float32
    assert bool(outcome.success.any()) or CARDS[name].seeks == "success"


@pytest.mark.parametrize(("name", "norm"), cases(first=True))
def test_double_precision_from_end_to_end(name, norm):
    outcome = fire(name, norm, curved(shape_for(norm), images=torch.float64))
    assert outcome.adv.dtype == torch.float64


class Moody(nn.Module):
    """Answers otherwise in training: with running statistics and chance. Raises at call number ``last``."""

    def __init__(self, channels: int, last: int | None = None) -> None:
        super().__init__()
        g = generator(3)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
        )
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=g) * 0.3
        self.calls, self.last = 0, last

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.last:
            raise FloatingPointError("the model gave up")
        return self.layers(x)


@pytest.mark.parametrize("last", [None, 3])
@pytest.mark.parametrize(("name", "norm"), cases(first=True))
def test_the_model_is_left_as_it_was(name, norm, last):
    shape = shape_for(norm)
    module = Moody(shape[0], last)
    module.train()
    module.layers[1].eval()
    module.layers[0].weight.requires_grad_(False)
    training = [m.training for m in module.modules()]
    trainable = [w.requires_grad for w in module.parameters()]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    target = Target(lambda x: module(x), Access.WEIGHTS, 3, shape, module=module)
    images = Images.of(torch.rand(4, *shape, generator=generator(1)), torch.zeros(4, dtype=torch.int64))
    images = Images.of(images.x, target.labels(images.x))
    toy, module.calls = Toy(module, images, images, shape, 3), 0
    if last is None:
        one = fire(name, norm, toy, target=target)
        assert torch.equal(judge(one, target, images).success, one.success)
    else:
        with pytest.raises(FloatingPointError, match="gave up"):
            fire(name, norm, toy, target=target, eps=1e-4)
    assert [m.training for m in module.modules()] == training
    assert [w.requires_grad for w in module.parameters()] == trainable
    assert all(w.grad is None for w in module.parameters())
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(("name", "norm"), cases(first=True))
def test_time_that_has_run_out_ends_a_method(name, norm):
    toy = curved(shape_for(norm), n=3)
    outcome = fire(name, norm, toy, seconds=1e-9)
    assert int(outcome.forward.sum()) == 0
    assert not bool(outcome.success.any())
