"""Training recipes: seeded, resumable, the same for two sets where they agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from besiege.core.errors import BadInput
from besiege.core.features import all_features, features, last_layer
from besiege.core.fit import Fit, cross_entropy
from besiege.core.images import Images
from besiege.core.target import Target, fingerprint
from besiege.embedded.images import digits
from besiege.embedded.recipes import FITS, recipe
from besiege.targets.recipe import open_fit

TINY = Fit(lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "tiny", epochs=4, batch=8, lr=0.5)


def blobs(n: int = 48) -> Images:
    """Three classes, each bright in a third of the image."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = torch.rand(n, 1, 8, 8, generator=draw) * 0.5
    for label in range(3):
        x[y == label, :, 2 * label : 2 * label + 2] += 0.5
    return Images.of(x, y)


def test_it_learns_and_says_the_same_twice():
    images = blobs()
    first, second = TINY(images, 3, classes=3), TINY(images, 3, classes=3)
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != TINY(images, 4, classes=3).fingerprint
    assert (first.labels(images.x) == images.y).float().mean() > 0.9


def test_training_leaves_the_global_randomness_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    TINY(blobs(), classes=3)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("cut", [1, 3])
def test_an_interrupted_training_goes_on_where_it_was(tmp_path, cut):
    fit = replace(
        TINY, shift=1, flip=True, build=lambda s, c: nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3))
    )
    whole, seen = fit(blobs(), 1, classes=3), 0

    def stop(rows: int) -> None:
        nonlocal seen
        seen += rows
        if seen > cut * 48 + 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(blobs(), 1, classes=3, checkpoint=tmp_path / "c.pt", progress=stop)
    counted: list[int] = []
    resumed = fit(blobs(), 1, classes=3, checkpoint=tmp_path / "c.pt", progress=counted.append)
    assert resumed.fingerprint == whole.fingerprint
    assert sum(counted) == 4 * 48
    assert counted[0] == cut * 48


def test_rows_that_agree_are_drawn_alike():
    seen: list[torch.Tensor] = []

    def watch(module, x, y, rng):
        seen.append(x.clone())
        return cross_entropy(module, x, y, rng)

    fit, images = replace(TINY, epochs=1, shift=2, flip=True, loss=watch), blobs()
    fit(images, 2, classes=3)
    changed = images.x.clone()
    changed[5] = 0
    fit(replace(images, x=changed), 2, classes=3)
    half = len(seen) // 2
    first, second = torch.cat(seen[:half]), torch.cat(seen[half:])
    assert ((first != second).flatten(1).any(1)).sum() == 1


def test_in_bfloat16_the_passes_are_and_the_weights_are_not():
    seen = set()

    def watch(module, x, y, rng):
        seen.add(module(x).dtype)
        return cross_entropy(module, x, y, rng)

    images = blobs()
    learned = replace(TINY, bfloat16=True, loss=watch)(images, 3, classes=3)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in learned.module.parameters()} == {torch.float32}
    assert (learned.labels(images.x) == images.y).float().mean() > 0.9


def test_a_shift_moves_each_image_by_itself_and_fills_with_black():
    fit, found = replace(TINY, epochs=1, shift=1), set()

    def watch(module, x, y, rng):
        for image in x:
            (place,) = image[0].nonzero().tolist()
            found.add(tuple(place))
        return cross_entropy(module, x, y, rng)

    x = torch.zeros(48, 1, 8, 8)
    x[:, :, 4, 4] = 1
    replace(fit, loss=watch)(Images.of(x, torch.arange(48) % 3), classes=3)
    assert found == {(i, j) for i in (3, 4, 5) for j in (3, 4, 5)}


def test_what_prepares_a_batch_comes_after_the_augmentation():
    corners: list[torch.Tensor] = []

    def stamp(x, y, rng):
        x = x.clone()
        x[:, :, 0, 0] = 1
        return x, y

    def watch(module, x, y, rng):
        corners.append(x[:, 0, 0, 0])
        return cross_entropy(module, x, y, rng)

    replace(TINY, epochs=1, shift=2, prepare=stamp, loss=watch)(blobs(), classes=3)
    assert torch.cat(corners).eq(1).all()


@pytest.mark.parametrize("name", FITS)
def test_a_recipe_builds_for_grey_and_colour(name):
    for shape in ((1, 28, 28), (3, 32, 32)):
        assert recipe(name).build(shape, 7)(torch.rand(2, *shape)).shape == (2, 7)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(BadInput, match="resnet9"):
        recipe("resnet8")


def test_the_cnn_learns_the_digits():
    x, y = digits("train")
    target = replace(recipe("cnn"), epochs=10)(Images.of(x, y), classes=10)
    assert (target.labels(digits("test")[0]) == digits("test")[1]).float().mean() > 0.95


def test_features_are_what_enters_the_last_layer():
    module = recipe("cnn").build((1, 8, 8), 3).eval()
    target, x = Target.of(module, classes=3, shape=(1, 8, 8), batch=2), torch.rand(5, 1, 8, 8)
    expected = module[:-1](x)
    assert torch.allclose(all_features(target, x), expected, atol=1e-6)
    assert torch.allclose(last_layer(target)(features(target, x)), module(x), atol=1e-6)
    leaf = x.requires_grad_()
    assert torch.autograd.grad(features(target, leaf).sum(), leaf)[0].abs().sum() > 0
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_a_network_without_a_dense_end_has_no_features():
    module = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten())
    with pytest.raises(BadInput, match="dense layer"):
        features(Target.of(module, classes=3, shape=(1, 8, 8)), torch.rand(1, 1, 8, 8))


def test_a_fingerprint_follows_the_weights():
    images = blobs()
    target = TINY(images, classes=3)
    assert target.module is not None and target.fingerprint == fingerprint(target.module)


def test_a_recipe_from_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\nfrom besiege.core.fit import Fit\n"
        "def net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
        "def fit():\n    return Fit(lambda shape, classes: net(), 'mine', epochs=3)\n"
        "def other():\n    return 3\n"
    )
    assert open_fit(f"{file}:fit", trust_code=True).epochs == 3
    fit = open_fit(f"{file}:net", trust_code=True)
    assert replace(fit, epochs=1)(blobs(), classes=3).scores(blobs().x).shape == (48, 3)
    with pytest.raises(BadInput, match="not a Fit"):
        open_fit(f"{file}:other", trust_code=True)
    with pytest.raises(BadInput, match="trust"):
        open_fit(f"{file}:fit")
