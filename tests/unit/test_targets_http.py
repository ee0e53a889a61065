"""A classifier behind a real server on loopback, which fails in every way that a server can, and counts."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from besiege.core.errors import BadInput
from besiege.core.method import make
from besiege.core.threat import INF, Access, Ball, ThreatModel
from besiege.data import open_images
from besiege.embedded.networks import load
from besiege.engine.evasion import evade
from besiege.targets import expects, open_target
from besiege.targets.cache import Cached
from besiege.targets.callable import from_callable
from besiege.targets.http import WAVES, Endpoint, Service

NET = load("digits-softmax")


class Server(ThreadingHTTPServer):
    """Answers with digits-softmax in any ``form``; each of ``faults`` spoils one request, in order."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, form="scores", faults=(), seconds=0.0, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.form, self.faults, self.seconds = form, list(faults), seconds
        self.lock = threading.Lock()
        self.received, self.answered, self.requests, self.spans, self.headers = 0, 0, 0, [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/predict"

    def handle_error(self, request, client_address):
        """A client that hung up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_POST(self):
        began, server = time.perf_counter(), self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        x = self.images(body)
        with server.lock:
            server.requests += 1
            server.received += len(x)
            server.headers.append(dict(self.headers))
            fault = server.faults.pop(0) if server.faults else None
        time.sleep(server.seconds)
        if fault == "slow":
            time.sleep(1.0)
        if fault == "hangs up":
            self.close_connection = True
            return
        if isinstance(fault, tuple):
            status, headers = fault
            return self.reply(status, b"no", headers)
        if fault == "malformed":
            return self.reply(200, b'{"answers": [[0.1, ')
        with torch.no_grad():
            p = NET(x).softmax(1)
        said = [self.form(row) for row in p]
        if fault == "short":
            said = said[1:]
        if fault == "nan":
            said = [[float("nan")] * 10 for _ in said]
        with server.lock:
            server.answered += len(x)
            server.spans.append((began, time.perf_counter()))
        self.reply(200, json.dumps({"answers": said, "out": {"predictions": [{"p": one} for one in said]}}).encode())

    def images(self, body):
        kind = self.headers["Content-Type"]
        if kind.startswith("multipart"):
            pictures = re.findall(rb"\r\n\r\n(\x89PNG.*?)\r\n--", body, re.DOTALL)
        else:
            said = json.loads(body)
            if "images" in said:
                return torch.tensor(said["images"], dtype=torch.float32)
            pictures = [base64.b64decode(one["b64"]) for one in said["inputs"]["instances"]]
        return torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(p)))) for p in pictures])[:, None] / 255

    def form(self, row):
        form, names = self.server.form, [f"digit {k}" for k in range(10)]
        if form == "label":
            return int(row.argmax())
        if form == "name":
            return names[int(row.argmax())]
        if form.startswith("top"):
            value, label = row.topk(int(form[3:]))
            return [{"label": names[k], "score": v} for v, k in zip(value.tolist(), label.tolist(), strict=True)]
        if form == "all":
            return dict(zip(names, row.tolist(), strict=True))
        return row.tolist()

    def reply(self, status, content, headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def serve(monkeypatch):
    """Starts servers, and stops them."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def start(*args, **kwargs):
        servers.append(Server(*args, **kwargs))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def digits():
    return open_images(limit=24)


def endpoint(server, **said):
    return Endpoint(Service(url=server.url, **({"backoff": 0.01} | said)), "it")


def answers(asked, x):
    rows = sorted(((rows.start, said) for rows, said in asked.stream(x)), key=lambda pair: pair[0])
    return torch.cat([said for _, said in rows])


def truth(x):
    with torch.no_grad():
        return NET(x).softmax(1).double()


NAMES = "names = [" + ", ".join(f'"digit {k}"' for k in range(10)) + "]\n"


def described(tmp_path, server, text="", name="api.toml"):
    (tmp_path / name).write_text(f'url = "{server.url}"\nbackoff = 0.01\n{text}')
    return str(tmp_path / name)


# forms


def test_a_bare_address_is_sent_lists_of_numbers(serve, digits):
    server = serve()
    target = open_target(server.url, data=digits)
    assert (target.access, target.classes, target.batch) == (Access.SCORES, 10, 16 * WAVES)
    before = server.received
    torch.testing.assert_close(target.scores(digits.x).exp().double(), truth(digits.x), atol=1e-5, rtol=1e-4)
    assert server.received - before == len(digits)


@pytest.mark.parametrize("body", ["json", "multipart"])
def test_pictures_and_paths(serve, digits, tmp_path, body):
    server = serve()
    images = "inputs.instances.*.b64" if body == "json" else "file.*"
    spec = described(
        tmp_path,
        server,
        f'body = "{body}"\nencoding = "png"\nimages = "{images}"\nanswers = "out.predictions.*.p"\nbatch = 5\n'
        'fields = {model = "m"}\n',
    )
    target = open_target(spec, data=digits)
    rounded = (digits.x * 255).round() / 255
    torch.testing.assert_close(target.scores(digits.x).exp().double(), truth(rounded), atol=1e-5, rtol=1e-4)
    assert any("rounded to 8 bits" in note for note in target.notes)


@pytest.mark.parametrize("form", ["label", "name"])
def test_labels_alone(serve, digits, tmp_path, form):
    target = open_target(described(tmp_path, serve(form), NAMES), data=digits)
    assert target.access == Access.LABELS
    assert torch.equal(target.labels(digits.x), truth(digits.x).argmax(1))


@pytest.mark.parametrize("form", ["top3", "top10", "all"])
def test_the_best_few(serve, digits, tmp_path, form):
    target = open_target(described(tmp_path, serve(form), NAMES), data=digits)
    assert target.access == Access.SCORES
    found, wanted = target.scores(digits.x).exp().double(), truth(digits.x)
    torch.testing.assert_close(found.sum(1), torch.ones(24).double(), atol=1e-4, rtol=0)
    best = wanted.topk(3 if form == "top3" else 10, 1)
    torch.testing.assert_close(found.gather(1, best.indices), best.values, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.argmax(1), wanted.argmax(1))
    if form == "top3":
        rest = (1 - best.values.sum(1)) / 7
        others = torch.ones(24, 10).bool().scatter(1, best.indices, False)
        torch.testing.assert_close(found[others].reshape(24, 7), rest[:, None].expand(24, 7), atol=1e-6, rtol=1e-3)


def test_what_shows_before_it_is_asked(tmp_path, serve):
    spec = described(tmp_path, serve(), "shape = [3, 32, 32]\n[preprocessing]\nmean = 0.5\n")
    assert expects(spec) == ((32, 32), 3, "embedded:digits-rgb")


# faults

FAULTS = [
    (429, [("Retry-After", "0")]),
    (500, []),
    (503, [("Retry-After", formatdate(time.time() - 5, usegmt=True))]),
    "slow",
    "malformed",
    "short",
    "nan",
    "hangs up",
]


def test_nothing_is_lost_and_every_query_is_counted(serve, digits):
    server = serve(faults=[None, *FAULTS * 2])
    asked = endpoint(server, timeout=0.5, retries=20, batch=2, concurrency=4)
    torch.testing.assert_close(answers(asked, digits.x), truth(digits.x), atol=1e-6, rtol=1e-5)
    time.sleep(0.6)
    assert server.requests == 12 + len(FAULTS) * 2
    assert asked.sent == server.received == 2 * server.requests


def test_an_attack_through_faults_is_the_attack_without_them(serve, digits):
    images = digits[:4]

    def attacked(server):
        asked = endpoint(server, retries=30)
        target = from_callable(lambda x: answers(asked, x), 10, images.shape, images=images.x, batch=64)
        before = server.answered
        threat = ThreatModel(Access.SCORES, Ball(INF, 0.2), queries=40)
        outcome = evade(make("square"), target, images, threat, seed=0)
        return outcome, server.answered - before, asked.sent - server.received

    calm, calmly, off = attacked(serve())
    rough, roughly, lost = attacked(
        serve(faults=[None] * 60 + [(500, []), None, "malformed", None, (429, []), None] * 6)
    )
    assert off == lost == 0
    assert int(calm.forward.max()) <= 40
    torch.testing.assert_close(rough.adv, calm.adv)
    assert rough.forward.tolist() == calm.forward.tolist()
    assert roughly == calmly >= int(calm.forward.sum())


def test_the_budget_holds_with_what_is_sent_again(serve, digits):
    server = serve(faults=[(500, [])] * 3)
    asked = endpoint(server, queries=10, concurrency=4)
    kept = []
    with pytest.raises(BadInput, match="its 10 queries are spent"):
        kept.extend(asked.stream(digits.x))
    assert server.received == asked.sent == 10
    assert len(kept) == server.answered == 7


def test_retry_after_holds_all_requests_back(serve, digits):
    server = serve(faults=[None, (429, [("Retry-After", "1")])])
    asked = endpoint(server, concurrency=1)
    answers(asked, digits.x[:1])
    began = time.monotonic()
    answers(asked, digits.x[:2])
    assert time.monotonic() - began >= 1.0
    with pytest.raises(BadInput, match="asks for 99 s of patience"):
        answers(endpoint(serve(faults=[(429, [("Retry-After", "99")])]), patience=5), digits.x[:1])


def test_a_server_that_starts_late_is_waited_for(serve, digits):
    with Server() as gone:
        port = gone.server_address[1]
    url = f"http://127.0.0.1:{port}/"
    with pytest.raises(BadInput, match=r"cannot be reached \(ConnectError\), 2 times in a row"):
        answers(Endpoint(Service(url=url, backoff=0.01, retries=1), "it"), digits.x[:1])
    started = []
    threading.Timer(0.3, lambda: started.append(serve(port=port))).start()
    asked = Endpoint(Service(url=url, backoff=0.1), "it")
    torch.testing.assert_close(answers(asked, digits.x[:3]), truth(digits.x[:3]), atol=1e-6, rtol=1e-5)
    assert asked.sent == started[0].received == 3


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ([(401, [])], "status 401; name the environment variable with its key"),
        ([(404, [])], "refuses what it is sent with status 404$"),
        ([(307, [("Location", "/elsewhere")])], "give the address that it leads to"),
        ([(500, [])] * 3, "answered with status 500, 3 times in a row"),
        (["malformed"] * 3, "what is no JSON, 3 times in a row"),
        (["short"] * 3, "0 answers to 1 images$"),
    ],
)
def test_failing_for_good_is_one_sentence(serve, digits, faults, said):
    server = serve(faults=faults)
    with pytest.raises(BadInput, match=said):
        answers(endpoint(server, retries=2), digits.x[:1])
    assert server.requests == (3 if "3 times" in said else 1)


def test_the_rate_is_kept(serve, digits):
    server = serve()
    began = time.monotonic()
    answers(endpoint(server, rate=50), digits.x[:11])
    assert time.monotonic() - began >= 10 / 50


def test_sixteen_requests_at_once_are_kept_busy(serve):
    """None waits for another. Client and server share this process and the machine, so the best of three counts."""
    busy = []
    for _ in range(3):
        server = serve(seconds=0.25)
        asked = endpoint(server)
        x = open_images(limit=128).x
        assert len(answers(asked, x)) == 128
        began, ended = min(s[0] for s in server.spans), max(s[1] for s in server.spans)
        busy.append(sum(b - a for a, b in server.spans) / 16 / (ended - began))
        if busy[-1] >= 0.85:
            break
    assert max(busy) >= 0.85


# the key


def test_the_key_is_sent_and_never_shown(serve, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("DIGITS_KEY", "s3cr3t-value\n")
    server = serve()
    spec = described(tmp_path, server, 'key = "DIGITS_KEY"\ncache = "answers.sqlite"\n')
    target = open_target(spec, data=digits)
    target.scores(digits.x)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cr3t-value"}
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"s3cr3t" not in stored and "s3cr3t" not in repr(target) + str(vars(target))
    server.faults = [(403, [])]
    with pytest.raises(BadInput, match="is the key in DIGITS_KEY right") as caught:
        open_target(described(tmp_path, server, 'key = "DIGITS_KEY"\n'), data=digits)
    assert "s3cr3t" not in str(caught.value)


def test_a_key_where_a_name_belongs_is_not_repeated(digits, tmp_path, monkeypatch):
    path = tmp_path / "api.toml"
    for text, said in (
        ('key = "sk-s3cr3t"', "must be the name of an environment variable in capitals"),
        ('url = "https://me:s3cr3t@host/"', "put it into an environment variable"),
        ('key = "BESIEGE_NOT_SET"', "BESIEGE_NOT_SET is not set"),
        ("batch = 0", "batch: input should be greater than"),
        ('imagse = "a"', "'imagse' is unknown; did you mean 'images'"),
        ('images = "image"\nbatch = 2', r"lists no images \(there is no \*\), so batch must be 1"),
        ('encoding = "png"\npreprocessing = {mean = 0.5}', "a PNG holds plain pixels"),
        ("batch = ", "unreadable"),
    ):
        path.write_text(text if "url" in text else f'url = "https://host/"\n{text}\n')
        with pytest.raises(BadInput, match=said) as caught:
            open_target(str(path), data=digits)
        assert "s3cr3t" not in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setenv("BESIEGE_NOT_SET", "s3cr3t\nInjected: 1")
    path.write_text('url = "https://host/"\nkey = "BESIEGE_NOT_SET"\n')
    with pytest.raises(BadInput, match="holds what no header can") as caught:
        open_target(str(path), data=digits)
    assert "s3cr3t" not in str(caught.value)


# the cache


@pytest.mark.parametrize("form", ["scores", "label"])
def test_no_image_is_paid_for_twice(serve, digits, tmp_path, form):
    server = serve(form)
    spec = described(tmp_path, server, 'classes = 10\ncache = "answers.sqlite"\n')
    first = open_target(spec, data=digits)
    said = first.scores(torch.cat([digits.x, digits.x]))
    assert server.received == len(digits)
    again = open_target(spec, data=digits)
    assert torch.equal(again.scores(digits.x.repeat(2, 1, 1, 1)), said)
    assert (again.fingerprint, again.access) == (first.fingerprint, first.access)
    assert server.received == len(digits)
    assert any("costs no query" in note for note in again.notes)


def test_what_was_answered_before_a_failure_is_kept(serve, digits, tmp_path):
    server = serve(faults=[None] * 10 + [(400, [])])
    spec = described(tmp_path, server, 'concurrency = 1\ncache = "answers.sqlite"\n')
    target = open_target(spec, data=digits)
    with pytest.raises(BadInput, match="status 400"):
        target.scores(digits.x)
    assert 10 <= server.answered < len(digits)
    target.scores(digits.x)
    assert server.answered == len(digits)


def test_a_cache_may_be_let_go_of_by_any_thread(tmp_path):
    held = [Cached(lambda x: iter(()), tmp_path / "answers.sqlite", "someone")]
    unraisable = []
    hook, sys.unraisablehook = sys.unraisablehook, unraisable.append
    try:
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
    finally:
        sys.unraisablehook = hook
    assert unraisable == [] and held == []


def test_a_cache_of_another_classifier_is_refused(serve, digits, tmp_path):
    open_target(described(tmp_path, serve(), 'cache = "answers.sqlite"\n'), data=digits)
    with pytest.raises(BadInput, match="holds the answers of another classifier"):
        open_target(described(tmp_path, serve(), 'cache = "answers.sqlite"\n'), data=digits)
    (tmp_path / "answers.sqlite").write_bytes(b"no database at all " * 100)
    with pytest.raises(BadInput, match="cannot keep answers"):
        open_target(described(tmp_path, serve(), 'cache = "answers.sqlite"\n'), data=digits)
