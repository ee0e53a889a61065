"""Theft and inference of one network as a torch module, an ONNX file and behind a real server on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from besiege.attacks.extraction.copycat import copycat
from besiege.attacks.extraction.functionally_equivalent import functionally_equivalent
from besiege.core.errors import BadInput, NotRebuilt
from besiege.core.fit import Fit
from besiege.core.images import Images
from besiege.core.method import configured, method
from besiege.core.reference import Reference
from besiege.core.target import Target
from besiege.core.threat import Access
from besiege.embedded.recipes import softmax
from besiege.engine.extraction import extract, steal
from besiege.engine.inference import infer_membership
from besiege.targets import open_target

SHAPE, CLASSES = (1, 4, 4), 3
SOFTMAX = Fit(softmax, "softmax", epochs=20, lr=0.1)
EXACT = functionally_equivalent()
WAYS = ("torch", "onnx", "http")

Answer = Callable[[Tensor], Tensor]
Open = Callable[..., Target]


class Server(ThreadingHTTPServer):
    """Answers with ``answer`` of the images in a request, in all digits, and counts them."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.lock, self.received = answer, threading.Lock(), 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        x = torch.tensor(sent["images"], dtype=torch.float64)
        with self.server.lock, torch.no_grad():
            self.server.received += len(x)
            try:
                said = json.dumps({"answers": self.server.answer(x).tolist()}).encode()
            except ValueError:
                said = b""
        self.send_response(200 if said else 422)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Server]]:
    """Starts servers, and stops them."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    servers: list[Server] = []

    def start(answer: Answer) -> Server:
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def dense(*widths: int, seed: int = 0) -> nn.Sequential:
    """A random network with ReLU in float64."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        parts += [nn.Linear(inputs, outputs, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def noise(n: int, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *SHAPE, generator=generator)
    return Images.of(x, torch.randint(0, CLASSES, (n,), generator=generator), name="noise")


def exported(net: nn.Sequential, path: Path, labels: bool = False, kind: int = TensorProto.DOUBLE) -> str:
    """A dense network as an ONNX file, of its scores or of its labels."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = [numpy_helper.from_array(w.numpy().astype(dtype), name) for name, w in net.state_dict().items()]
    nodes, at = [helper.make_node("Flatten", ["x"], ["0"])], "0"
    layers = [name for name, part in net.named_children() if isinstance(part, nn.Linear)]
    for name in layers:
        nodes.append(helper.make_node("Gemm", [at, f"{name}.weight", f"{name}.bias"], [f"g{name}"], transB=1))
        at = f"g{name}"
        if name != layers[-1]:
            nodes.append(helper.make_node("Relu", [at], [f"r{name}"]))
            at = f"r{name}"
    if labels:
        nodes.append(helper.make_node("ArgMax", [at], ["y"], axis=1, keepdims=0))
        end = helper.make_tensor_value_info("y", TensorProto.INT64, ["n"])
    else:
        nodes.append(helper.make_node("Identity", [at], ["y"]))
        end = helper.make_tensor_value_info("y", kind, ["n", CLASSES])
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, ["n", *SHAPE])], [end], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


@pytest.fixture
def doors(serve: Callable[[Answer], Server], tmp_path: Path) -> Open:
    """Opens one network by each way; ``labels`` alone, or all digits of its scores."""

    def start(way: str, net: nn.Sequential, labels: bool = False) -> Target:
        def said(x: Tensor) -> Tensor:
            scores: Tensor = net(x)
            return scores.argmax(1) if labels else scores

        if way == "onnx":
            return open_target(exported(net, tmp_path / "net.onnx", labels), data=noise(20), classes=CLASSES)
        if way == "http":
            return address(serve(said), tmp_path)
        target = Target.of(net, classes=CLASSES, shape=SHAPE)
        return target.granting(Access.LABELS) if labels else target

    return start


def address(server: Server, tmp_path: Path) -> Target:
    """What a server answers, asked about 64 images at once."""
    (tmp_path / "api.toml").write_text(f'url = "{server.url}"\nbatch = 64\nconcurrency = 4\nclasses = {CLASSES}\n')
    return open_target(str(tmp_path / "api.toml"), data=noise(20))


class Counted:
    """A target's function, and how many images it was asked about."""

    def __init__(self, target: Target) -> None:
        self.call, self.images = target.call, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.images += len(x)
        said = self.call(x)
        assert isinstance(said, Tensor)
        return said


def test_a_network_is_rebuilt_exactly_through_every_door_for_the_same_queries(doors: Open) -> None:
    net = dense(16, 4, CLASSES)
    x = 10 * torch.randn(500, *SHAPE, dtype=torch.float64)
    counts = []
    for way in WAYS:
        stolen = extract(EXACT, doors(way, net), noise(20), SOFTMAX)
        with torch.no_grad():
            theirs, ours = net(x), stolen.module(x)
        assert float((theirs - ours).abs().max() / theirs.std()) < 1e-8
        counts.append(stolen.queries)
    assert len(set(counts)) == 1


@pytest.mark.parametrize("hidden", [4, 9])
def test_what_a_theft_over_http_is_said_to_cost_is_what_the_server_was_sent(
    hidden: int, serve: Callable[[Answer], Server], tmp_path: Path
) -> None:
    server = serve(dense(16, hidden, CLASSES, seed=hidden))
    target = address(server, tmp_path)
    before = server.received
    assert extract(EXACT, target, noise(20), SOFTMAX).queries == server.received - before
    before = server.received
    assert extract(copycat(queries=70), target, noise(100), SOFTMAX).queries == server.received - before == 70


def test_an_onnx_file_with_gradients_is_rebuilt_by_its_scores_too(tmp_path: Path) -> None:
    net = dense(16, 4, CLASSES)
    plain, slopes = (
        open_target(exported(net, tmp_path / "net.onnx") + end, data=noise(20)) for end in ("", "@gradients")
    )
    assert slopes.access == Access.GRADIENTS
    first, second = (extract(EXACT, one, noise(20), SOFTMAX) for one in (plain, slopes))
    assert first.queries == second.queries and not second.notes
    single = open_target(exported(net, tmp_path / "f.onnx", kind=TensorProto.FLOAT) + "@gradients", data=noise(20))
    with pytest.raises(NotRebuilt, match="rounded"):
        extract(EXACT, single, noise(20), SOFTMAX)


def boxed(x: Tensor) -> Tensor:
    """What takes pixels in [0, 1] and nothing else."""
    if x.min() < 0 or x.max() > 1:
        raise ValueError
    return x


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        (lambda net, x: net(x).float(), "the scores are rounded"),
        (lambda net, x: (net(x) * 1e3).round() / 1e3, "the scores are rounded"),
        (lambda net, x: (net(x) * 1e8).round() / 1e8, "the scores are rounded"),
        (lambda net, x: net(x.float().double()), "not piecewise linear"),
        (lambda net, x: net((x * 255).round() / 255), "not piecewise linear"),
        (lambda net, x: net(x).softmax(1), "not piecewise linear"),
        (lambda net, x: net(x.clamp(0, 1)), "pixels are cut off"),
        (lambda net, x: net(x.clamp(-1, 2)), "pixels are cut off"),
        (lambda net, x: net(boxed(x)), r"status 422; exact extraction asks about images beyond \[0, 1\]"),
        (lambda net, x: net(x).argmax(1), "labels alone"),
    ],
    ids=[
        "float32",
        "3 digits",
        "8 digits",
        "asked in float32",
        "8 bits",
        "softmax",
        "cut",
        "cut wider",
        "boxed",
        "labels",
    ],
)
def test_what_no_exact_method_can_work_from_is_refused_in_a_sentence_at_once(
    spoilt: Callable[[nn.Module, Tensor], Tensor], why: str, serve: Callable[[Answer], Server], tmp_path: Path
) -> None:
    net = dense(16, 4, CLASSES)
    server = serve(lambda x: spoilt(net, x))
    target = address(server, tmp_path)
    before = server.received
    with pytest.raises(BadInput, match=why) as refused:
        extract(EXACT, target, noise(20), SOFTMAX)
    assert "\n" not in str(refused.value)
    assert server.received - before <= 224


@pytest.mark.parametrize("sampling", ["random", "uncertainty", "kcentre"])
def test_copycat_learns_the_same_from_labels_through_every_door(sampling: str, doors: Open) -> None:
    net, attack = dense(16, 4, CLASSES, seed=2), copycat(queries=60, sampling=sampling, rounds=3)
    thefts = []
    for way in WAYS:
        target = doors(way, net, labels=True)
        assert target.access == Access.LABELS
        thefts.append(steal(attack, target, noise(90), noise(50, 1), SOFTMAX, seed=2))
    for stolen, theft in thefts:
        assert stolen.queries == theft.queries == 60
        assert torch.equal(stolen.module[1].weight, thefts[0][0].module[1].weight)
        assert theft.agreement == thefts[0][1].agreement and theft.max_difference is None


@pytest.mark.parametrize("mode", ["loss", "lira"])
def test_members_are_told_apart_alike_through_every_door_for_one_question_an_image(mode: str, doors: Open) -> None:
    net = dense(16, 8, CLASSES, seed=3)
    attack = configured(method("membership-inference"), mode=mode, shadows=4)
    knows = Reference(SHAPE, fit=SOFTMAX if mode == "lira" else None)
    found = []
    for way in WAYS:
        asked = doors(way, net)
        counted = Counted(asked)
        target = replace(asked, call=counted, module=None)
        scores, record = infer_membership(attack, target, noise(30), noise(40, 1), knows)
        assert record.queries == 70
        assert counted.images == 70 + 70
        found.append(scores)
    for scores in found[1:]:
        assert torch.allclose(scores, found[0], atol=1e-4)


def test_membership_from_labels_alone_is_refused(doors: Open) -> None:
    for way in WAYS:
        with pytest.raises(BadInput, match=r"needs scores, but .* grants labels"):
            infer_membership(
                configured(method("membership-inference"), mode="loss"),
                doors(way, dense(16, 4, CLASSES), labels=True),
                noise(20),
                noise(20, 1),
                Reference(SHAPE),
            )
