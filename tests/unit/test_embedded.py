"""The embedded images and networks."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from besiege.data import open_images
from besiege.embedded.images import digits, digits_rgb
from besiege.embedded.networks import NETWORKS, load, weights
from besiege.targets import open_target

ACCURACY = {"digits-cnn": 0.986, "digits-mlp": 0.956, "digits-softmax": 0.946, "digits-rgb": 0.970}


@pytest.mark.parametrize("name", NETWORKS)
def test_accuracy_is_as_stated(name):
    images = open_images("embedded:digits-rgb" if name == "digits-rgb" else "embedded:digits")
    target = open_target(f"embedded:{name}", data=images)
    accuracy = float((target.labels(images.x) == images.y).double().mean())
    assert len(images) == 500
    assert accuracy == pytest.approx(ACCURACY[name], abs=0.004)
    assert target.notes == ()
    assert target.name == f"embedded:{name}"


def test_weights_are_small():
    assert all(weights(name).stat().st_size < 300_000 for name in NETWORKS)


def test_a_loaded_network_runs_in_single_precision_and_is_new_each_time():
    first, second = load("digits-mlp"), load("digits-mlp")
    assert all(p.dtype == torch.float32 for p in first.parameters())
    assert first is not second
    assert not first.training


def test_parts_share_no_digit_and_together_are_all():
    (train, _), (test, _) = digits("train"), digits("test")
    assert (len(train), len(test)) == (1297, 500)
    source = torch.from_numpy(load_digits().images).float().div(16)[:, None]
    whole = torch.nn.functional.interpolate(source, (28, 28), mode="bilinear").flatten(1)
    found = [tuple(row) for row in torch.cat([train, test]).flatten(1).tolist()]
    assert sorted(found) == sorted(tuple(row) for row in whole.tolist())
    assert len(set(found)) == 1797


def test_colour_digits_are_the_difference_to_a_photograph():
    x, y = digits_rgb("test")
    grey, labels = digits("test")
    assert x.shape == (500, 3, 32, 32)
    assert torch.equal(y, labels)
    assert 0 <= float(x.min()) and float(x.max()) <= 1
    corner = x[:, :, 0, 31][grey[:, 0, 0, 27] == 0]  # where the digit does not reach it, the photograph shows
    assert len(corner) > 400
    assert float(corner.std()) > 0.1
    assert float((corner[:, 0] - corner[:, 2]).abs().mean()) > 0.02
    again, _ = digits_rgb("test")
    assert torch.equal(x, again)
    train, _ = digits_rgb("train")
    assert not (train[:1] == x).flatten(1).all(1).any()
