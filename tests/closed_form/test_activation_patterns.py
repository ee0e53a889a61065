"""Activation patterns against planted neurons, a slow cut and a histogram by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from besiege.core.errors import BadInput
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import configured, method
from besiege.core.rng import Rng
from besiege.core.target import Target
from besiege.defenses.model.activation_patterns import (
    backdoor_neurons,
    clearest,
    entropy,
    outliers,
    patterns,
    prune,
    suspicion,
)

NEURONS, PLANTED = 20, 7


def planted() -> nn.Sequential:
    """Each neuron of the one convolution has a random filter; the planted one knows a white corner alone."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, NEURONS, 8), nn.ReLU(), nn.Flatten(), nn.Linear(NEURONS, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    with torch.no_grad():
        module[0].weight[PLANTED] = 0
        module[0].weight[PLANTED, 0, 6:, 6:] = 5
        module[0].bias[PLANTED] = -5
    return module.eval()


def target(module: nn.Module) -> Target:
    return Target.of(module, classes=3, shape=(1, 8, 8), name="planted", batch=32)


def poisoned(n: int = 600, rate: float = 0.1) -> tuple[Images, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, y = torch.rand(n, 1, 8, 8, generator=draw), torch.arange(n) % 3
    x[:, :, 6:, 6:] *= 0.2
    truth = (torch.rand(n, generator=draw) < rate) & (y == 2)
    x[truth, :, 6:, 6:] = 1.0
    return Images.of(x, y), truth


def test_the_entropy_is_that_of_the_histogram():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(200_000, 1, generator=draw, dtype=torch.float64)
    assert float(entropy(values)) == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.01)
    two = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(50)[:, None]
    assert float(entropy(two)) == pytest.approx(math.log(2) + math.log(0.1), abs=1e-9)
    assert entropy(torch.cat([values[:100], two], 1)).shape == (2,)


def test_the_clearest_cut_is_that_of_a_slow_search():
    values = torch.randn(40, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values[:9, 3] += 6
    best = (0.0, 0, 0.0)
    for j in range(5):
        v = values[:, j]
        for cut in ((v.sort().values[1:] + v.sort().values[:-1]) / 2).tolist():
            one, other = v[v <= cut], v[v > cut]
            between = len(one) * (one.mean() - v.mean()) ** 2 + len(other) * (other.mean() - v.mean()) ** 2
            share = float(between / (v - v.mean()).square().sum())
            best = max(best, (share, j, cut))
    assert best[1] == 3
    assert clearest(values) == pytest.approx(best, abs=1e-9)


def test_only_what_lies_far_below_its_layer_stands_out():
    low = torch.cat([torch.linspace(1.0, 1.2, 19), torch.tensor([-2.0])]).double()
    assert outliers(low, 3.0).nonzero().flatten().tolist() == [19]
    assert not outliers(torch.linspace(1.0, 1.2, 20).double(), 3.0).any()
    dead = torch.full((20,), math.log(0.1), dtype=torch.float64)
    assert not outliers(dead, 0.1).any()


def test_the_planted_neuron_and_no_other_of_its_layer_is_found():
    images, _ = poisoned()
    found = backdoor_neurons(target(planted()), images.x, 3.0)
    assert found["0"].nonzero().flatten().tolist() == [PLANTED]


def test_pruning_takes_exactly_the_planted_neuron():
    module, (images, _) = planted(), poisoned()
    before = copy.deepcopy(module.state_dict())
    made = configured(method("activation-patterns"), deviations=3.0).bound()(
        target(module), images, Rng.of(0, images.index, "activation-patterns")
    )
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    doomed = backdoor_neurons(target(module), images.x, 3.0)
    for name, layer in (("0", made.module[0]), ("3", made.module[3])):
        for k, gone in enumerate(doomed[name].tolist()):
            expected = torch.zeros_like(layer.weight[k]) if gone else before[f"{name}.weight"][k]
            assert torch.equal(layer.weight[k], expected)
            assert torch.equal(layer.bias[k], 0 * layer.bias[k] if gone else before[f"{name}.bias"][k])
    assert torch.equal(made.module[5].weight, before["5.weight"])
    assert made.fingerprint != target(module).fingerprint


def test_images_with_the_trigger_are_suspect_and_no_others():
    images, truth = poisoned()
    said = suspicion(target(planted()), images)
    assert torch.equal(said.suspect, truth)
    assert said.score[truth].min() > said.score[~truth].max()


def test_most_of_a_class_may_be_poison():
    images, _ = poisoned()
    truth = (images.y == 2) & (torch.arange(len(images)) % 30 != 2)
    assert float(truth[images.y == 2].float().mean()) > 0.5
    images.x[truth, :, 6:, 6:] = 1.0
    said = suspicion(target(planted()), images)
    assert said.suspect[truth].all()


def test_clean_images_are_not_suspect():
    images, _ = poisoned(rate=0)
    assert not suspicion(target(planted()), images).suspect.any()


def test_what_a_normalization_puts_out_counts_in_place_of_its_layer():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3)
    ).eval()
    module[1].running_mean += 0.3
    images, _ = poisoned(40)
    (layer,) = patterns(target(module), images.x)
    assert layer.name == "1"
    with torch.no_grad():
        expected = module[1](module[0](images.x)).amax((2, 3))
    assert torch.allclose(layer.inputs, expected)
    assert bool((layer.inputs < 0).any())
    doomed = torch.tensor([False, True, False, False])
    prune(module[1], doomed)
    with torch.no_grad():
        out = module[1](module[0](images.x))
    assert not out[:, 1].any()
    assert out[:, 0].any()


def test_fine_pruning_takes_the_idle_neurons_and_stops_in_time():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3))
    with torch.no_grad():
        module[0].weight.zero_()
        module[0].bias.zero_()
        for k in range(3):
            module[0].weight[k, 0, k] = 1.0
        module[0].bias[3:] = -torch.tensor([1.0, 2.0, 3.0])
        module[3].weight.zero_()
        module[3].weight[:, :3] = torch.eye(3)
        module[3].weight[:, 3:] = 9
        module[3].bias.zero_()
    images, _ = poisoned(300, rate=0)
    x = 0.1 * images.x
    for k in range(3):
        x[images.y == k, :, k] += 0.5 + 0.1 * k
    made = configured(method("activation-patterns"), mode="fine-pruning").bound()(
        target(module), Images.of(x, images.y), Rng.of(0, images.index, "activation-patterns")
    )
    gone = ~made.module[0].weight.flatten(1).any(1) & (made.module[0].bias == 0)
    assert gone.tolist() == [False] * 3 + [True] * 3
    assert torch.equal(made.labels(x), images.y)


def test_training_on_leaves_pruned_neurons_dead():
    images, _ = poisoned()
    made = configured(method("activation-patterns"), epochs=2).bound()(
        target(planted()), images, Rng.of(0, images.index, "activation-patterns")
    )
    first = patterns(made, images.x)[0]
    assert not first.inputs[:, PLANTED].any()
    assert not torch.equal(made.module[5].weight, planted()[5].weight)


def test_it_trains_on_with_what_it_does_not_name(monkeypatch):
    (images, truth), seen = poisoned(), []

    def learn(fit: Fit, given: Images, *rest: object, **options: object) -> None:
        seen.append(given)

    monkeypatch.setattr(Fit, "__call__", learn)
    for mode in ("entropy", "fine-pruning"):
        configured(method("activation-patterns"), mode=mode, epochs=1).bound()(
            target(planted()), images, Rng.of(0, images.index, "activation-patterns")
        )
    assert torch.equal(seen[0].index, images.index[~truth])
    assert torch.equal(seen[1].index, images.index[torch.arange(len(images)) % 5 != 0])


def test_what_it_cannot_work_with_is_refused():
    images, _ = poisoned(30)
    alone = target(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(BadInput, match="last layer"):
        suspicion(alone, images)
    opaque = Target.of(planted(), classes=3, shape=(1, 8, 8), name="opaque")
    hidden = Target(lambda x: opaque.call(x), opaque.access, 3, (1, 8, 8), "opaque")
    with pytest.raises(BadInput, match="plain torch module"):
        suspicion(hidden, images)
