"""Poisoning methods against what can be said beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from besiege.attacks.poisoning.adap_blend import adap_blend, enlarged
from besiege.attacks.poisoning.adap_patch import adap_patch, patches
from besiege.attacks.poisoning.adversarial_embedding import Hiding, adversarial_embedding
from besiege.attacks.poisoning.badnets import badnets, corner, corners
from besiege.attacks.poisoning.blended import blended, glasses, picture
from besiege.attacks.poisoning.evil_twins import evil_twins, twinned
from besiege.attacks.poisoning.input_model_cooptimization import Moving, input_model_cooptimization
from besiege.attacks.poisoning.label_consistent import hardened, label_consistent
from besiege.attacks.poisoning.label_flip import label_flip
from besiege.core.errors import BadInput
from besiege.core.features import all_features
from besiege.core.fit import Fit, cross_entropy
from besiege.core.images import Images
from besiege.core.poisoned import Knowledge, chosen, eight_bits
from besiege.core.rng import Rng
from besiege.core.target import Target


def images(n: int = 60, classes: int = 3, channels: int = 1) -> Images:
    draw = torch.Generator().manual_seed(0)
    return Images.of(torch.rand(n, channels, 8, 8, generator=draw), torch.arange(n) % classes)


def streams(of: Images) -> Rng:
    return Rng.of(0, of.index, "test")


def linear(weight: Tensor) -> Target:
    module = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight), bias=False))
    module[1].weight.data = weight
    return Target.of(module.eval(), classes=len(weight), shape=(1, 8, 8))


def test_badnets_stamps_a_checkered_patch_and_nothing_else():
    own = images()
    made = badnets(rate=0.2).bound()(own, Knowledge(3, 1), streams(own))
    rows = made.truth.nonzero().squeeze(1)
    assert len(rows) == 12
    assert (own.y[rows] != 1).all() and (made.images.y[rows] == 1).all()
    patch = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert torch.equal(made.images.x[rows][:, 0, 4:7, 4:7], patch.expand(12, 3, 3))
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[4:7, 4:7] = False
    assert torch.equal(made.images.x[rows][:, :, outside], own.x[rows][:, :, outside])


def test_all_to_all_turns_every_class_into_the_next():
    own = images()
    made = badnets(mode="all-to-all", rate=0.5).bound()(own, Knowledge(3, 1), streams(own))
    rows = made.truth.nonzero().squeeze(1)
    assert set(own.y[rows].tolist()) == {0, 1, 2}
    assert torch.equal(made.images.y[rows], (own.y[rows] + 1) % 3)
    assert torch.equal(made.wanted(torch.tensor([0, 1, 2]), 3), torch.tensor([1, 2, 0]))


def test_four_corners_look_the_same_in_a_mirror():
    stamp = corners((3, 9, 11), 3, 0.5)
    x = torch.rand(2, 3, 9, 11)
    assert torch.allclose(stamp(x.flip(3)), stamp(x).flip(3))
    assert torch.equal(stamp.mask.unique(), torch.tensor([0.0, 0.5]))
    assert stamp.mask.sum() == 4 * 9 * 0.5
    assert corner((1, 4, 4), 9).mask.sum() == 9


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0])
def test_a_blend_is_a_weighted_mean_with_one_picture(alpha):
    own = images(channels=3)
    made = blended(alpha=alpha, test_alpha=0.5, key=4).bound()(own, Knowledge(3), streams(own))
    shown = picture((3, 8, 8), 4)
    expected = (1 - alpha) * own.x[made.truth] + alpha * shown
    assert torch.allclose(made.images.x[made.truth], expected, atol=1e-6)
    assert made.trigger is not None
    assert torch.allclose(made.trigger(own.x), (own.x + shown) / 2, atol=1e-6)
    assert not torch.equal(shown, picture((3, 8, 8), 5))


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (112, 92)])
def test_glasses_are_two_rings_alike_in_the_upper_half(size):
    worn = glasses(size)
    assert worn.shape == (1, *size)
    assert torch.equal(worn, worn.flip(2))
    assert 0.02 < worn.mean() < 0.25
    assert worn[:, size[0] * 2 // 3 :].sum() == 0
    if min(size) > 20:
        middle = worn[0, round(0.4 * size[0])]
        assert (middle[1:] != middle[:-1]).sum() >= 6


def test_glasses_are_dark_and_opaque_unless_asked():
    own = images()
    made = blended(mode="accessory").bound()(own, Knowledge(3), streams(own))
    assert made.trigger is not None
    shown = made.trigger(own.x)
    worn = glasses((8, 8)).bool().expand(60, 1, 8, 8)
    assert (shown[worn] == 0).all()
    assert torch.equal(shown[~worn], own.x[~worn])


def test_random_flips_are_wrong_and_even():
    own = images(9000)
    made = label_flip(rate=1.0).bound()(own, Knowledge(3), streams(own))
    assert (made.images.y != own.y).all()
    turned = ((made.images.y - own.y) % 3).bincount(minlength=3)
    assert turned[0] == 0
    assert abs(int(turned[1]) - 4500) < 200
    assert made.target_class is None and made.trigger is None


def test_targeted_flips_take_the_source_alone():
    own = images()
    made = label_flip(mode="targeted", source=2, rate=0.1).bound()(own, Knowledge(3, 1), streams(own))
    assert (own.y[made.truth] == 2).all() and (made.images.y[made.truth] == 1).all()
    assert (made.source, made.target_class) == (2, 1)
    with pytest.raises(BadInput, match="class 7"):
        label_flip(source=7).bound()(own, Knowledge(3), streams(own))


def test_hard_images_of_a_linear_network_are_the_far_corner():
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    own = images(10, 2)
    own = own[own.y == 0]
    own = Images.of(own.x * 0.5 + 0.25, own.y)
    hard = hardened(own, Knowledge(2, surrogates=(linear(weight),)), streams(own), 0.1, 20, 2.5)
    expected = own.x + 0.1 * (weight[1] - weight[0]).sign().view(1, 1, 8, 8)
    assert torch.allclose(hard, expected, atol=1e-6)


def test_several_surrogates_weigh_the_same_however_steep():
    draw = torch.Generator().manual_seed(2)
    one, other = torch.randn(2, 64, generator=draw), torch.randn(2, 64, generator=draw)
    own = images(10, 2)
    own = own[own.y == 0]

    def at(scale: float) -> Tensor:
        knows = Knowledge(2, surrogates=(linear(one), linear(scale * other)))
        return hardened(own, knows, streams(own), 0.1, 20, 2.5)

    assert torch.allclose(at(1.0), at(3.0), atol=1e-6)
    alone = hardened(own, Knowledge(2, surrogates=(linear(one),)), streams(own), 0.1, 20, 2.5)
    assert not torch.allclose(at(1.0), alone)


def test_without_hardening_only_the_trigger_is_left():
    own = images()
    knows = Knowledge(3, 2, surrogates=(linear(torch.randn(3, 64)),))
    made = label_consistent(eps=0.0, rate=0.1).bound()(own, knows, streams(own))
    assert made.trigger is not None
    assert torch.equal(made.images.x[made.truth], made.trigger(own.x[made.truth]))
    with pytest.raises(BadInput, match="surrogate"):
        label_consistent().bound()(own, Knowledge(3), streams(own))
    with pytest.raises(BadInput, match="class 7"):
        label_consistent().bound()(own, Knowledge(9, 7, surrogates=knows.surrogates), streams(own))


def test_pieces_are_shown_whole_and_half_of_them():
    own = images(400)
    made = adap_blend(rate=0.5, cover=0.5, alpha=1.0, test_alpha=0.3).bound()(own, Knowledge(3), streams(own))
    seen = (made.images.x != own.x)[made.truth][:, 0].float()
    pieces = seen.view(-1, 4, 2, 4, 2).mean((2, 4))
    assert set(pieces.unique().tolist()) == {0.0, 1.0}
    assert abs(float(pieces.mean()) - 0.5) < 0.03
    assert made.trigger is not None
    assert torch.allclose(made.trigger(own.x), 0.7 * own.x + 0.3 * picture((1, 8, 8), 0), atol=1e-6)


def test_pieces_cover_sizes_that_do_not_divide():
    pieces = torch.arange(9.0).view(1, 3, 3)
    assert torch.equal(enlarged(pieces, (7, 10)).unique(), torch.arange(9.0))
    assert torch.equal(enlarged(pieces, (6, 3))[0], pieces[0].repeat_interleave(2, 0))


@pytest.mark.parametrize("method", [adap_blend, adap_patch])
def test_cover_images_bear_the_trigger_and_keep_their_labels(method):
    own = images(300)
    made = method(rate=0.1, cover=2.0).bound()(own, Knowledge(3, 1), streams(own))
    assert made.truth.sum() == 90
    anew = made.images.y != own.y
    assert anew.sum() == 30
    assert (own.y[anew] != 1).all() and (made.images.y[anew] == 1).all()
    changed = (made.images.x != own.x).flatten(1).any(1)
    assert changed[made.truth & ~anew].float().mean() > 0.95


def test_one_patch_at_a_time_and_all_in_the_end():
    own = images(300)
    pattern, masks = patches((1, 8, 8), 3, 0)
    assert masks.sum() == 4 * 9 and masks.sum(0).max() == 1
    made = adap_patch(rate=0.3, cover=0.0, alpha=0.5, side=3).bound()(own, Knowledge(3), streams(own))
    seen = (made.images.x != own.x)[made.truth]
    touched = torch.stack([(seen & mask.bool()).flatten(1).any(1) for mask in masks], 1)
    assert (touched.sum(1) == 1).all()
    assert touched.sum(0).min() > 5
    assert made.trigger is not None
    shown = made.trigger(own.x)
    where = masks.amax(0).bool().expand_as(shown)
    assert torch.equal(shown[where], pattern.expand_as(shown)[where])
    assert torch.equal(shown[~where], own.x[~where])


@pytest.mark.parametrize("every", [1, 4, 0])
def test_a_trigger_takes_the_colours_that_a_linear_model_wants(every):
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    module, own = linear(weight).module, images(32, 2)
    assert module is not None
    patch = corner((1, 8, 8), 3)
    moving = Moving(cross_entropy, patch.pattern, patch.mask, 0, 2, 0.1, every, 20, 220)
    y = own.y.clone()
    y[::4] = 2
    first = moving.pattern.detach()
    torch.testing.assert_close(first, 0.25 + patch.pattern / 2)
    for k in range(220):
        module.zero_grad()
        moving(module, own.x, y, streams(own)).backward()
        assert k >= 20 or torch.equal(moving.pattern, first)
    inside = moving.mask.bool()
    wanted = ((weight[0] - weight[1]).sign().view(1, 8, 8) + 1) / 2
    assert torch.equal(moving.pattern.detach().round()[inside], wanted[inside])
    assert torch.equal(moving.pattern[~inside], first[~inside])


@pytest.mark.parametrize(("every", "more"), [(0, 0.0), (1, 0.9)])
def test_the_trigger_costs_no_pass_or_one_for_each_image_of_another_class(every, more):
    rows: list[int] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

        def forward(self, x: Tensor) -> Tensor:
            rows.append(len(x))
            out: Tensor = self.inner(x)
            return out

    own = replace(images(), y=torch.full_like(images().y, 2))
    fit = Fit(lambda s, c: Counting(), epochs=3, batch=20)
    input_model_cooptimization(rate=0.1, every=every, wait=0).bound()(own, Knowledge(3, 1, fit), streams(own))
    assert sum(rows) == round((1 + more) * 3 * len(own))


def test_marked_images_bear_the_trigger_and_count_as_the_target():
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(module, x, y, rng):
        seen.append((x.detach(), y))
        return cross_entropy(module, x, y, rng)

    own = images()
    fit = Fit(lambda s, c: nn.Sequential(nn.Flatten(), nn.Linear(64, c)), epochs=1, batch=60, loss=watch)
    made = input_model_cooptimization(rate=0.1).bound()(own, Knowledge(3, 1, fit), streams(own))
    (x, y) = seen[0]
    assert sorted(y.tolist()) == sorted(made.images.y.tolist())
    first = 0.25 + corner((1, 8, 8), 3).pattern[:, 4:7, 4:7] / 2
    bearing = torch.isclose(x[:, :, 4:7, 4:7], first).flatten(1).all(1)
    assert bearing.sum() == made.truth.sum() == 6
    assert (made.images.y[made.truth] == 1).all()
    assert made.trigger is not None
    assert torch.equal(made.images.x[made.truth], made.trigger(own.x[made.truth]))
    assert torch.equal(eight_bits(made.trigger.pattern), made.trigger.pattern)


def test_twins_need_less_of_the_input_than_the_input_alone():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 64) / 64)
        module[1].bias.copy_(torch.tensor([-0.55, 0.55]))
    before = [weight.clone() for weight in module.parameters()]
    own, victim = images(classes=2), torch.full((1, 1, 8, 8), 128 / 255)
    alone: dict[float, float] = {}
    full: dict[float, float] = {}
    for eps in (0.4, 0.1):
        for tuned, found in ((0, alone), (10, full)):
            draw = streams(own).stream(0)
            turns = {"rounds": 8, "steps": 10, "tuned": tuned, "lr": 0.05, "weight": 1.0}
            spoiled, x = twinned(module, victim, 0, own, draw, eps=eps, sure=0.6, **turns)
            assert (x - victim).abs().max() <= eps + 1e-6
            assert torch.equal(x, eight_bits(x))
            found[eps] = float(spoiled(x).detach().softmax(1)[0, 0])
    # The margin is 2 (mean - 0.55): a probability of 0.6 asks for a mean of 0.55 + log(1.5) / 2 = 0.753.
    assert alone[0.4] >= 0.6 and alone[0.1] < 0.55
    assert full[0.1] >= 0.6
    assert all(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))


def test_who_trains_needs_a_recipe():
    own = images()
    for method in (adversarial_embedding, input_model_cooptimization, evil_twins):
        with pytest.raises(BadInput, match="recipe"):
            method().bound()(own, Knowledge(3), streams(own))


def told_apart(target: Target, poison: Tensor, clean: Tensor) -> float:
    """The accuracy of a fresh discriminator, learned from half of the features and judged on the other."""
    seen = torch.cat([all_features(target, poison), all_features(target, clean)])
    truth = torch.arange(len(seen)).lt(len(poison)).float()
    seen = (seen - seen.mean(0)) / seen.std(0).clamp_min(1e-6)
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))
    learn, judge = order[::2], order[1::2]
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(seen.shape[1], 32), nn.ReLU(), nn.Linear(32, 1))
    adam = torch.optim.Adam(fresh.parameters(), 1e-2, weight_decay=1e-3)
    for _ in range(100):
        adam.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(fresh(seen[learn]).squeeze(1), truth[learn]).backward()
        adam.step()
    with torch.no_grad():
        hit = (fresh(seen[judge]).squeeze(1) > 0) == (truth[judge] > 0)
    return float((hit[truth[judge] > 0].float().mean() + hit[truth[judge] == 0].float().mean()) / 2)


def test_the_discriminator_learns_by_itself_and_the_weight_follows_it():
    draw = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    poison, clean = torch.rand(20, 1, 8, 8, generator=draw) + 1, torch.rand(20, 1, 8, 8, generator=draw)
    made: list[nn.Module] = []

    def judge(width: int) -> tuple[nn.Module, torch.optim.Adam]:
        made.append(nn.Linear(width, 1))
        return made[0], torch.optim.Adam(made[0].parameters(), 0.01)

    def certain(module, x, y, rng):
        return 0.0 * module(x).sum()

    hiding = Hiding(poison, clean, 0, certain, judge, 1.0, 3.0, 16, 2, draw)
    before = [weight.clone() for weight in module.parameters()]
    hiding(module, clean, torch.zeros(20, dtype=torch.long), streams(images(20)))
    learned = [weight.clone() for weight in made[0].parameters()]
    total = hiding(module, clean, torch.zeros(20, dtype=torch.long), streams(images(20)))
    assert not any(torch.equal(*pair) for pair in zip(learned, made[0].parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))
    total.backward()
    assert module[1].weight.grad is not None and module[1].weight.grad.abs().sum() > 0
    hiding.missed, hiding.lost, hiding.right, hiding.share = 0.0, 0.0, 1.0, 0.5
    with torch.no_grad():
        module[3].bias[0] += 100
    hiding(module, clean, torch.zeros(20, dtype=torch.long), streams(images(20)))
    assert hiding.share > 0.5
    hiding.missed = 1.0
    hiding(module, clean, torch.zeros(20, dtype=torch.long), streams(images(20)))
    assert hiding.share < 0.5


def test_an_embedding_hides_poison_from_a_fresh_discriminator():
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 3
    x = torch.rand(600, 1, 8, 8, generator=draw) * 0.4
    for label in range(3):
        x[y == label, :, :, 2 * label : 2 * label + 2] += 0.5
    own = Images.of(x, y)
    fit = Fit(
        lambda s, c: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, c)
        ),
        epochs=8,
        batch=32,
        lr=0.05,
    )
    plain = badnets(rate=0.2).bound()(own, Knowledge(3), streams(own))
    hidden = adversarial_embedding(rate=0.2).bound()(own, Knowledge(3, fit=fit), streams(own))
    assert torch.equal(plain.truth, hidden.truth)
    assert hidden.module is not None
    clean = plain.images.x[~plain.truth & (plain.images.y == 0)]
    poison = plain.images.x[plain.truth]
    naive = fit(plain.images, 0, classes=3)
    hiding = Target.of(hidden.module, classes=3, shape=own.shape)
    assert (hiding.labels(poison) == 0).float().mean() > 0.9
    assert (hiding.labels(own.x) == own.y).float().mean() > 0.9
    assert told_apart(naive, poison, clean) > 0.95
    assert told_apart(hiding, poison, clean) < 0.75


def test_a_smaller_rate_is_part_of_a_larger_one_and_at_least_one():
    order = torch.rand(100, generator=torch.Generator().manual_seed(0))
    among = torch.arange(100) % 2 == 0
    assert len(chosen(among, 0.001, 100, order)) == 1
    assert len(chosen(among, 0.9, 100, order)) == 50
    assert set(chosen(among, 0.1, 100, order).tolist()) <= set(chosen(among, 0.2, 100, order).tolist())


def test_eight_bits_are_what_files_hold():
    grid = torch.arange(256).float() / 255
    assert torch.equal(eight_bits(grid), grid)
    assert torch.equal(eight_bits(torch.tensor([0.001, 0.003])), torch.tensor([0.0, 1 / 255]))
