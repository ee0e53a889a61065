"""Opening targets: what is found out, what is handled, and what is refused in one sentence."""

from __future__ import annotations

import pickle
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from besiege.core.errors import BadInput
from besiege.core.images import Images
from besiege.core.meter import Meter
from besiege.core.target import Target
from besiege.core.threat import INF, Access, Ball, Goal
from besiege.data import open_images
from besiege.embedded.networks import load
from besiege.targets import Preprocessing, expects, from_callable, from_module, open_target
from besiege.targets.check import alternatives, feeding_warning, throughput
from besiege.targets.preprocessing import Front

NETWORK = """
import numpy as np
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 10))

def colour():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

def nan():
    module = small()
    module[0].weight.data[0, 0, 0, 0] = float("nan")
    return module

def scores():
    return lambda x: np.stack([x.numpy().mean((1, 2, 3)), x.numpy().max((1, 2, 3))], 1)

def labels():
    return lambda x: (x.mean((1, 2, 3)) > 0.2).long()

def raises():
    raise RuntimeError("no weights\\nhere")

def leaves():
    raise SystemExit(3)

def text():
    return "a network"

def chatty():
    print("loading")
    return small()

ready = small()
number = 3
"""


@pytest.fixture
def digits():
    return open_images(limit=20)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A folder with ``nets.py``, the current one; its modules are forgotten afterwards."""
    (tmp_path / "nets.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("nets", "broken") or name.startswith("besiege_target_"):
            del sys.modules[name]


def refused(*args, **kwargs):
    with pytest.raises(BadInput) as caught:
        open_target(*args, **kwargs)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 10))


# specs


def test_the_default_is_the_embedded_network(digits):
    target = open_target(data=digits)
    assert (target.name, target.shape, target.classes) == ("embedded:digits-cnn", (1, 28, 28), 10)
    assert target.access == Access.WEIGHTS
    assert open_target("embedded:digits-rgb").shape == (3, 32, 32)


def test_unknown_names_suggest_the_nearest(code):
    assert "'digits-mlp'" in refused("embedded:digit-mlp")
    assert "'embedded:digits-cnn'" in refused("digits-cnn")
    assert "'colour'" in refused("nets:color")
    assert "no Python module 'netz'" in refused("netz:small")
    assert "no such file" in refused("gone.py:small", trust_code=True)
    assert "no such file" in refused("gone.pt2", trust_code=True)
    assert "nets.py:factory" in refused("nets.py")
    assert "device" in refused(device="gpu")
    assert "device" in refused(device="cuda:77")
    assert "batch" in refused(batch=0)


def test_a_factory_in_the_current_folder(code, digits):
    target = open_target("nets:small", data=digits, batch=7)
    assert torch.allclose(target.scores(digits.x), small()(digits.x), atol=1e-6)
    assert (target.classes, target.batch, target.name, target.notes) == (10, 7, "nets:small", ())
    assert str(code) not in sys.path
    assert torch.equal(open_target("nets:ready", data=digits).scores(digits.x), target.scores(digits.x))


def test_a_file_needs_trust(code, digits):
    sentence = refused("nets.py:small", data=digits)
    assert "--trust-code" in sentence
    assert "besiege_target_nets" not in sys.modules
    assert open_target("nets.py:small", data=digits, trust_code=True).classes == 10


def test_factories_that_fail_say_so_in_a_sentence(code, digits, capsys):
    assert "raised RuntimeError: no weights here" in refused("nets:raises", data=digits)
    assert "raised SystemExit: 3" in refused("nets:leaves", data=digits)
    assert "makes a str" in refused("nets:text", data=digits)
    assert "is a int" in refused("nets:number", data=digits)
    (code / "broken.py").write_text("import not_there_at_all\n")
    assert "not_there_at_all" in refused("broken:f", data=digits)
    (code / "broken.py").write_text("def f(:\n")
    assert "SyntaxError" in refused("broken:f", data=digits)
    open_target("nets:chatty", data=digits)
    printed = capsys.readouterr()
    assert printed.out == "" and "loading" in printed.err


def test_a_factory_may_make_a_target(code, digits):
    (code / "broken.py").write_text(
        "from besiege.targets import open_target\ndef f():\n    return open_target('embedded:digits-mlp')\n"
    )
    target = open_target("broken:f", data=digits, batch=3)
    assert (target.name, target.batch) == ("embedded:digits-mlp", 3)
    assert "takes no preprocessing" in refused("broken:f", preprocessing=Preprocessing(mean=(0.5,)))
    assert "takes no weights" in refused("embedded:digits-mlp", weights="a.pt")


def test_images_and_classes_must_fit(code, digits):
    assert "3x28x28" in refused("embedded:digits-cnn", data=open_images(limit=3, channels=3))
    assert "fails on images of 1x28x28" in refused("nets:colour", data=digits)
    many = Images.of(digits.x, digits.y + 5)
    assert "labels" in refused("nets:small", data=many)
    assert "10 classes, not 7" in refused("nets:small", data=digits, classes=7)
    assert "10 classes, not 7" in refused("embedded:digits-mlp", classes=7)
    assert "does not show" in refused("nets:small")


# weights


@pytest.fixture
def state():
    torch.manual_seed(5)
    return {key: torch.randn_like(value) * 0.1 for key, value in small().state_dict().items()}


def loaded(state, x):
    module = small()
    module.load_state_dict(state)
    return module(x)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: s,
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "optimizer": {"lr": 0.1}},
        lambda s: {k: v.double() for k, v in s.items()},
    ],
)
def test_state_dicts_are_found_under_prefixes_and_nests(code, digits, state, wrapped):
    torch.save(wrapped(state), code / "w.pt")
    target = open_target("nets:small@w.pt", data=digits)
    assert torch.allclose(target.scores(digits.x), loaded(state, digits.x), atol=1e-5)


def test_safetensors_after_the_spec_or_apart(code, digits, state):
    save_file(state, code / "w.safetensors")
    for target in (
        open_target("nets:small@w.safetensors", data=digits),
        open_target("nets:small", weights=str(code / "w.safetensors"), data=digits),
    ):
        assert torch.allclose(target.scores(digits.x), loaded(state, digits.x), atol=1e-5)
    assert "twice" in refused("nets:small@w.safetensors", weights="w.safetensors", data=digits)
    assert "takes no weights" in refused("nets:scores@w.safetensors", data=digits)
    assert "pkg.module:factory@w.safetensors" in refused("w.safetensors", data=digits)


def test_weights_that_do_not_fit_are_refused(code, digits, state):
    def refused_weights(state):
        save_file(state, code / "w.safetensors")
        return refused("nets:small@w.safetensors", data=digits)

    assert "lacks 0.bias" in refused_weights({k: v for k, v in state.items() if k != "0.bias"})
    assert "unknown 9.weight" in refused_weights(state | {"9.weight": torch.zeros(1)})
    assert "(4, 1, 5, 5)" in refused_weights(state | {"0.weight": torch.zeros(4, 1, 5, 5)})
    state["3.bias"][2] = float("nan")
    assert "NaN" in refused_weights(state) and "3.bias" in refused_weights(state)
    assert "NaN" in refused("nets:nan", data=digits)
    assert "no such weight file" in refused("nets:small@gone.pt", data=digits)


def test_damaged_weight_files_are_refused(code, digits, state):
    torch.save(state, code / "w.pt")
    torch.save(state, code / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, code / "w.safetensors")
    for name in ("w.pt", "old.pt", "w.safetensors"):
        whole = (code / name).read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:100], whole[:5], b"", b"hello world" * 20):
            (code / name).write_bytes(damaged)
            assert "truncated" in refused(f"nets:small@{name}", data=digits)
    torch.save([1, 2], code / "w.pt")
    assert "no state dict" in refused("nets:small@w.pt", data=digits)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_with_code_is_refused_and_not_run(code, digits):
    (code / "bare.pt").write_bytes(pickle.dumps(Bomb("ran"), protocol=2))
    torch.save({"0.weight": Bomb("ran")}, code / "zip.pt")
    for name in ("bare.pt", "zip.pt"):
        sentence = refused(f"nets:small@{name}", data=digits)
        assert "code" in sentence
        assert "--trust-code" in refused(name, data=digits)
    assert not (code / "ran").exists()


# whole networks in a file


def test_a_pickled_module_needs_trust(code, digits, state):
    torch.save(small(), code / "whole.pt")
    assert "--trust-code" in refused("whole.pt", data=digits)
    target = open_target("whole.pt", data=digits, trust_code=True)
    assert torch.allclose(target.scores(digits.x), small()(digits.x), atol=1e-6)
    torch.save(state, code / "w.pt")
    assert "weights alone" in refused("w.pt", data=digits, trust_code=True)


@pytest.mark.filterwarnings("default")  # torch.export's own
@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_program_takes_any_number_of_images(code, digits, dynamic):
    shapes = ({0: torch.export.Dim("n", min=1)},) if dynamic else None
    program = torch.export.export(small().eval(), (torch.rand(4, 1, 28, 28),), dynamic_shapes=shapes)
    torch.export.save(program, code / "net.pt2")
    assert "--trust-code" in refused("net.pt2", data=digits)
    target = open_target("net.pt2", trust_code=True)
    assert (target.shape, target.classes, target.access) == ((1, 28, 28), 10, Access.WEIGHTS)
    for n in (1, 4, 7):
        assert torch.allclose(target.scores(digits.x[:n]), small()(digits.x[:n]), atol=1e-5)
    (code / "net.pt2").write_bytes((code / "net.pt2").read_bytes()[:500])
    assert "truncated" in refused("net.pt2", trust_code=True)


# functions


def test_a_function_grants_scores(code, digits):
    target = open_target("nets:scores", data=Images.of(digits.x, digits.y % 2))
    assert (target.access, target.classes, target.module) == (Access.SCORES, 2, None)
    expected = torch.stack([digits.x.mean((1, 2, 3)), digits.x.amax((1, 2, 3))], 1)
    assert torch.allclose(target.scores(digits.x), expected, atol=1e-6)
    assert target.fingerprint == open_target("nets:scores", data=Images.of(digits.x, digits.y % 2)).fingerprint != ""


def test_a_function_that_answers_with_labels_grants_labels_alone(code, digits):
    data = Images.of(digits.x, digits.y % 2)
    target = open_target("nets:labels", data=data, classes=2)
    assert target.access == Access.LABELS
    truth = (digits.x.mean((1, 2, 3)) > 0.2).long()
    assert torch.equal(target.labels(digits.x), truth)
    assert torch.equal(target.scores(digits.x), F.one_hot(truth, 2).float())
    assert target.notes == ()
    assert "how many classes" in refused("nets:labels", data=data)
    with pytest.raises(BadInput, match="label 7"):
        from_callable(lambda x: np.full(len(x), 7), 5, (1, 4, 4))


def test_functions_with_wrong_answers_are_refused():
    def sentence(function, classes=None):
        with pytest.raises(BadInput) as caught:
            from_callable(function, classes, (1, 4, 4))
        return str(caught.value)

    assert "NoneType" in sentence(lambda x: None)
    assert "(8, 2, 2)" in sentence(lambda x: torch.zeros(len(x), 2, 2))
    assert "one score" in sentence(lambda x: torch.zeros(len(x), 1))
    assert "not finite" in sentence(lambda x: torch.full((len(x), 3), float("nan")))
    assert "floats" in sentence(lambda x: torch.zeros(len(x), 3, dtype=torch.int64))
    assert "3 classes, not 4" in sentence(lambda x: torch.zeros(len(x), 3), 4)
    assert "KeyError: 'x'" in sentence(lambda x: {}["x"])


def test_a_function_sees_no_graph():
    seen = []

    def function(x):
        seen.append(x.requires_grad)
        return x.flatten(1)[:, :2]

    target = from_callable(function, 2, (1, 4, 4))
    target.answer(torch.rand(2, 1, 4, 4, requires_grad=True))
    assert not any(seen)


# what is found out about a module


def test_probabilities_are_found_said_and_taken_as_logarithms(digits):
    logits, target = small(), from_module(nn.Sequential(small(), nn.Softmax(1)), (1, 28, 28), images=digits.x)
    assert "probabilities" in target.notes[0]
    assert torch.allclose(target.scores(digits.x), logits(digits.x).log_softmax(1), atol=1e-5)
    assert target.access == Access.WEIGHTS
    plain = from_module(logits, (1, 28, 28), images=digits.x)
    grads = [Meter(t, digits.x, Goal(digits.y), Ball(INF, 0.1)).gradient(digits.x, "ce")[1] for t in (target, plain)]
    assert torch.allclose(grads[0], grads[1], atol=1e-5)
    assert from_module(nn.Sequential(small(), nn.LogSoftmax(1)), (1, 28, 28), images=digits.x).notes == ()


def test_certain_probabilities_stay_finite(digits):
    target = from_module(nn.Sequential(small(), Scale(1e4), nn.Softmax(1)), (1, 28, 28), images=digits.x)
    assert bool(target.scores(digits.x).isfinite().all())
    assert torch.equal(target.labels(digits.x), small()(digits.x).argmax(1))


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Detached(nn.Module):
    def forward(self, x):
        return (x * 255).round().detach()


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = small(), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


class Output:
    def __init__(self, logits):
        self.logits = logits


def test_random_and_batch_dependent_and_gradientless_modules_are_noted(digits):
    def target(*parts):
        return from_module(nn.Sequential(*parts), (1, 28, 28), images=digits.x)

    random = target(small(), Noisy())
    assert random.stochastic and "random" in random.notes[0]
    assert "batch" in target(small(), Centred()).notes[0]
    blind = target(Detached(), small())
    assert blind.access == Access.SCORES and "no gradient" in blind.notes[0]
    dropout = target(nn.Dropout(0.5), nn.BatchNorm2d(1), small())
    assert not dropout.stochastic and dropout.notes == ()
    assert dropout.module is not None and dropout.module.training  # as it was handed over


@pytest.mark.parametrize("wrap", [lambda z: (z, z.sum()), lambda z: {"logits": z}, Output, lambda z: [z]])
def test_scores_are_found_in_what_is_returned(digits, wrap):
    target = from_module(Wrapped(wrap), (1, 28, 28), images=digits.x)
    assert torch.allclose(target.scores(digits.x), small()(digits.x), atol=1e-6)
    assert target.access == Access.WEIGHTS


def test_a_module_that_loses_the_batch_of_one_is_refused(digits):
    with pytest.raises(BadInput, match=re.escape("1 images with shape (10,)")):
        from_module(Wrapped(torch.squeeze), (1, 28, 28), images=digits.x)


def test_half_precision_stays_half(digits):
    module = small().to(torch.bfloat16)
    target = from_module(module, (1, 28, 28), images=digits.x, preprocessing=Preprocessing(mean=(0.1,), std=(0.3,)))
    assert target.dtype == torch.bfloat16
    assert target.scores(digits.x).dtype == torch.float32


def test_labels_from_a_module(digits):
    target = from_module(Wrapped(lambda z: z.argmax(1)), (1, 28, 28), 10, images=digits.x)
    assert target.access == Access.LABELS
    assert torch.equal(target.labels(digits.x), small()(digits.x).argmax(1))


# preprocessing


def test_preprocessing_does_what_it_says():
    x = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([10.0, 20, 30]).reshape(3, 1, 1), torch.tensor([2.0, 3, 4]).reshape(3, 1, 1)
    how = Preprocessing((10.0, 20.0, 30.0), (2.0, 3.0, 4.0), (4, 6), "bgr", 255, "nhwc")
    expected = F.interpolate(x, (4, 6), mode="bilinear", antialias=True)[:, [2, 1, 0]] * 255
    expected = ((expected - mean) / std).permute(0, 2, 3, 1)
    assert torch.allclose(Front(how, 3)(x), expected, atol=1e-4)
    assert torch.equal(Front(Preprocessing(), 3)(x), x)


def test_preprocessing_lives_inside_and_gradients_reach_the_pixels(digits):
    how = Preprocessing(mean=(0.2,), std=(0.5,), size=(28, 28))
    large = open_images(limit=20, size=(40, 40))
    target = from_module(small(), large.shape, images=large.x, preprocessing=how)
    resized = F.interpolate(large.x, (28, 28), mode="bilinear", antialias=True)
    assert torch.allclose(target.scores(large.x), small()((resized - 0.2) / 0.5), atol=1e-4)
    _, grad = Meter(target, large.x, Goal(large.y), Ball(INF, 0.1)).gradient(large.x, "ce")
    assert grad.shape == large.x.shape and bool((grad != 0).flatten(1).any(1).all())
    other = from_module(small(), large.shape, images=large.x, preprocessing=Preprocessing((0.3,), (0.5,), (28, 28)))
    assert target.fingerprint != other.fingerprint


def test_preprocessing_beside_the_weights_or_the_code(code, digits, state):
    save_file(state, code / "w.safetensors")
    (code / "model.toml").write_text('mean = [0.3]\nstd = "1/2"\n')
    target = open_target("nets:small@w.safetensors", data=digits)
    assert torch.allclose(target.scores(digits.x), loaded(state, (digits.x - 0.3) / 0.5), atol=1e-5)
    assert "model.toml" in target.notes[0]
    (code / "w.toml").write_text("mean = 0.1\nsize = 28")
    target = open_target("nets:small@w.safetensors")
    assert torch.allclose(target.scores(digits.x), loaded(state, digits.x - 0.1), atol=1e-5)
    given = open_target("nets:small@w.safetensors", data=digits, preprocessing=Preprocessing(mean=(0.7,)))
    assert torch.allclose(given.scores(digits.x), loaded(state, digits.x - 0.7), atol=1e-5)
    (code / "nets.toml").write_text("std = 4")
    assert torch.allclose(open_target("nets:small", data=digits).scores(digits.x), small()(digits.x / 4), atol=1e-5)


def test_preprocessing_of_a_function(digits):
    target = from_callable(lambda x: x.flatten(1)[:, :3], 3, (1, 4, 4), preprocessing=Preprocessing(mean=(0.5,)))
    x = torch.rand(2, 1, 4, 4)
    assert torch.allclose(target.scores(x), x.flatten(1)[:, :3] - 0.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("maen = 0.5", "'mean'"),
        ("mean = [0.1, 0.2", "unreadable"),
        ("std = 0", "above 0"),
        ('mean = "abc"', "no number"),
        ("range = 2", "1 or 255"),
        ('channels = "rbg"', "rgb or bgr"),
        ("size = [1, 2, 3]", "height, width"),
        ("mean = [0.1, 0.2]\nstd = [1, 2, 3]", "one a channel"),
        ("mean = [0.1, 0.2, 0.3]", "3 channels"),
        ('channels = "bgr"', "bgr"),
    ],
)
def test_wrong_declarations_are_refused(code, digits, text, says):
    (code / "nets.toml").write_text(text)
    assert says in refused("nets:small", data=digits)


def test_what_a_target_expects_shows_before_it_is_opened(code):
    assert expects(None) == ((28, 28), 1, "embedded:digits")
    assert expects("embedded:digits-rgb") == ((32, 32), 3, "embedded:digits-rgb")
    assert expects("nets:raises") == (None, None, "embedded:digits")
    (code / "nets.toml").write_text("mean = [0.1, 0.2, 0.3]\nsize = [20, 30]")
    assert expects("nets:raises") == expects("nets.py:raises") == ((20, 30), 3, "embedded:digits-rgb")
    assert expects("nets:raises", preprocessing=Preprocessing(size=(5, 5))).size == (5, 5)


# the look before hours are spent


def fed(change, **how):
    """The embedded network behind what its user forgot to say."""
    module = nn.Sequential(Wrapper(change), load("digits-cnn"))
    return from_module(module, (1, 28, 28), name="net", preprocessing=Preprocessing(**how))


class Wrapper(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


def relabelled(order):
    return from_module(nn.Sequential(load("digits-cnn"), Wrapper(lambda z: z[:, order])), (1, 28, 28), name="net")


def test_chance_level_is_warned_of_with_its_cause():
    images = open_images(limit=200)
    assert feeding_warning(open_target(), images) is None
    assert "the range 0 to 255 it is right on 9" in feeding_warning(fed(lambda x: x / 255 * 0.998), images)
    assert "inverted" in feeding_warning(fed(lambda x: 1 - x), images)
    assert "no normalization" in feeding_warning(fed(lambda x: x, mean=(100.0,), std=(0.1,)), images)
    assert "one too low" in feeding_warning(relabelled([*range(1, 10), 0]), images)
    assert "one too high" in feeding_warning(relabelled([9, *range(9)]), images)
    assert "another order" in feeding_warning(relabelled([3, 5, 7, 9, 1, 8, 0, 2, 4, 6]), images)
    assert "inverted" in feeding_warning(fed(lambda x: 1 - x), images[:20])
    sentence = feeding_warning(from_module(small(), (1, 28, 28), name="net"), images)
    assert sentence.startswith("net is right on") and "check weights" in sentence


@pytest.mark.parametrize(("std", "right"), [(10.0, 32), (8.0, 70), (5.0, 142)])
def test_a_better_way_of_feeding_is_named_above_chance_too(std, right):
    victim, images = fed(lambda x: x, mean=(0.0,), std=(std,)), open_images(limit=200)
    sentence = "net is right on {} of 200 images, but with no normalization it is right on 98%"
    assert feeding_warning(victim, images) == sentence.format(right)


def test_alternatives_skip_what_the_network_cannot_take():
    images = open_images("embedded:digits-rgb", limit=50)
    found = alternatives(open_target("embedded:digits-rgb"), images)
    assert found["no normalization"] > 0.9
    assert "channels last (layout nhwc)" not in found


def test_throughput_times_what_the_target_grants(digits):
    forward, both, batch = throughput(open_target(), digits, seconds=0.2)
    assert 0 < forward < both and batch in (1, 4, 16, 64, 256)
    only = throughput(open_target().granting(Access.SCORES), digits, seconds=0.1)
    assert only.forward > 0 and np.isnan(only.both)


def test_opening_leaves_the_module_as_it_was(digits):
    module = small().train()
    target = from_module(module, (1, 28, 28), images=digits.x)
    assert isinstance(target, Target) and target.module is module and target.call is module
    assert module.training and all(p.requires_grad and p.grad is None for p in module.parameters())
