"""ONNX files as targets: layout, dtype and batch are read from the file, and its gradient is the network's."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from besiege.core.errors import BadInput
from besiege.core.meter import Meter
from besiege.core.threat import INF, Access, Ball, Goal
from besiege.data import open_images
from besiege.embedded.networks import load
from besiege.targets import expects, open_target

NET = load("digits-mlp")


@pytest.fixture(scope="module")
def digits():
    return open_images(limit=10)


def save(path, *, batch="n", layout="nchw", kind=TensorProto.FLOAT, answer="scores", op="Relu"):
    """The embedded dense network as an ONNX file."""
    state = {key: value.numpy() for key, value in NET.state_dict().items()}
    names = ["1.weight", "1.bias", "3.weight", "3.bias"]
    axes = [batch, 1, 28, 28] if layout == "nchw" else [batch, 28, 28, 1]
    nodes, at = [], "x"
    if kind == TensorProto.UINT8:
        nodes += [
            helper.make_node("Cast", [at], ["c"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["c", "255"], ["d"]),
        ]
        at = "d"
    dtype = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    nodes += [
        helper.make_node("Flatten", [at], ["f"]),
        helper.make_node("Gemm", ["f", "1.weight", "1.bias"], ["h"], transB=1),
        helper.make_node(op, ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "3.weight", "3.bias"], ["y"], transB=1),
    ]
    inside = kind if kind == TensorProto.FLOAT16 else TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info("y", inside, [batch, 10])]
    if answer == "labels":
        nodes.append(helper.make_node("ArgMax", ["y"], ["l"], axis=1, keepdims=0))
        outputs = [helper.make_tensor_value_info("l", TensorProto.INT64, [batch])]
    weights = [numpy_helper.from_array(state[name].astype(dtype), name) for name in names]
    weights.append(numpy_helper.from_array(np.array(255, np.float32), "255"))
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, axes)], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


@pytest.mark.parametrize("suffix", ["", "@gradients"])
@pytest.mark.parametrize("batch", ["n", 4])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_file_answers_as_the_network_it_was_made_of(digits, tmp_path, batch, layout, suffix):
    spec = save(tmp_path / "net.onnx", batch=batch, layout=layout) + suffix
    assert expects(spec) == ((28, 28), 1, "embedded:digits")
    for given in (digits, None):
        target = open_target(spec, data=given)
        assert (target.shape, target.classes, target.stochastic) == ((1, 28, 28), 10, False)
        assert target.access == (Access.GRADIENTS if suffix else Access.SCORES)
        torch.testing.assert_close(target.scores(digits.x), NET(digits.x).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", ["n", 4])
def test_its_gradient_is_the_networks(digits, tmp_path, batch):
    target = open_target(save(tmp_path / "net.onnx", batch=batch) + "@gradients", data=digits)
    meter = Meter(target, digits.x, Goal(digits.y), Ball(INF, 0.1))
    _, found = meter.gradient(digits.x, "ce")
    leaf = digits.x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(-torch.nn.functional.cross_entropy(NET(leaf), digits.y, reduction="sum"), leaf)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_without_a_gradient_onnxruntime_answers_and_not_the_twin(digits, tmp_path):
    target = open_target(save(tmp_path / "net.onnx") + "@gradients", data=digits)
    before = target.scores(digits.x)
    for buffer in target.module.buffers():
        buffer.zero_()
    torch.testing.assert_close(target.scores(digits.x), before)


def test_a_twin_that_answers_otherwise_is_refused(digits, tmp_path, monkeypatch):
    import onnx2fx

    honest = onnx2fx.convert
    spec = save(tmp_path / "net.onnx")
    monkeypatch.setattr(onnx2fx, "convert", lambda model: torch.nn.Sequential(honest(model), torch.nn.Softplus()))
    with pytest.raises(BadInput, match=r"differ, by up to .*; open it without @gradients"):
        open_target(spec + "@gradients", data=digits)
    assert open_target(spec, data=digits).access == Access.SCORES


def test_8_bit_and_half_inputs(digits, tmp_path):
    bytes_ = save(tmp_path / "bytes.onnx", kind=TensorProto.UINT8)
    rounded = (digits.x * 255).round() / 255
    found = open_target(bytes_, data=digits).scores(digits.x)
    torch.testing.assert_close(found, NET(rounded).detach(), atol=1e-4, rtol=1e-4)
    with pytest.raises(BadInput, match="8-bit images, which have no gradient"):
        open_target(bytes_ + "@gradients", data=digits)
    half = open_target(save(tmp_path / "half.onnx", kind=TensorProto.FLOAT16), data=digits)
    torch.testing.assert_close(half.scores(digits.x), NET(digits.x).detach(), atol=0.1, rtol=0.02)


def test_labels_alone(digits, tmp_path):
    spec = save(tmp_path / "net.onnx", answer="labels")
    with pytest.raises(BadInput, match="labels alone; say how many classes"):
        open_target(spec, data=digits)
    target = open_target(spec, data=digits, classes=10)
    assert target.access == Access.LABELS
    assert torch.equal(target.labels(digits.x), NET(digits.x).argmax(1))


def test_preprocessing_beside_the_file_stays_outside_it(digits, tmp_path):
    spec = save(tmp_path / "net.onnx", layout="nhwc")
    (tmp_path / "net.toml").write_text('mean = 0.5\nstd = 0.25\nlayout = "nhwc"\n')
    for suffix in ("", "@gradients"):
        found = open_target(spec + suffix, data=digits).scores(digits.x)
        torch.testing.assert_close(found, NET((digits.x - 0.5) / 0.25).detach(), atol=1e-3, rtol=1e-3)


def test_the_fingerprint_is_of_the_file(digits, tmp_path):
    spec = save(tmp_path / "net.onnx")
    first = open_target(spec, data=digits).fingerprint
    assert first and open_target(spec).fingerprint == first
    save(tmp_path / "net.onnx", op="Tanh")
    assert open_target(spec).fingerprint != first


def test_what_cannot_be_used_is_said_in_one_sentence(digits, tmp_path):
    path = tmp_path / "net.onnx"
    with pytest.raises(BadInput, match="no such file"):
        open_target(str(path))
    save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="unreadable or truncated") as caught:
        open_target(str(path), data=digits)
    assert "\n" not in str(caught.value)
    one = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    two = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [one], [two])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    with pytest.raises(BadInput, match="must take one batch of images"):
        open_target(str(path), data=digits)
