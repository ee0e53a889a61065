"""A classifier behind an HTTP address: asked by many requests at once, patiently, and every image sent is counted."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import random
import re
import threading
import time
import tomllib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from besiege.core.errors import BadInput, nearest
from besiege.core.target import Target
from besiege.targets.cache import Cached, collected
from besiege.targets.callable import from_callable
from besiege.targets.preprocessing import Preprocessing

WAVES = 8
"""The target takes this many rounds of concurrent requests at once, so that few of them wait for the last."""

LONGEST = 60.0
"""Seconds that a wait between two tries grows to, unless the endpoint asks for more."""

VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class Service(BaseModel):
    """How a classifier is asked over HTTP: the fields of its TOML file.

    ``images`` and ``answers`` are paths into the JSON that is sent and that comes back, keys and list positions with
    dots between; ``*`` stands where the list of images is (``instances.*.b64``). Without it a request holds one image.
    An image is nested lists of numbers or, with ``encoding`` png and in a multipart body, a PNG (in base64 in JSON).
    An answer is a label, a name out of ``names``, a list of scores, or the best few as a list of objects with a
    ``label`` and a ``score`` or an object of both. ``fields`` are sent along.

    ``batch`` images go into a request, ``concurrency`` requests at once, at most ``rate`` a second. What fails in
    passing is tried again ``retries`` times, after ``backoff`` seconds that double each time, or after as long as the
    endpoint asks for, up to ``patience``. ``queries`` caps the images sent in all, those sent again too. ``key`` names
    the environment variable whose content goes into the ``header`` after the ``prefix``. ``cache`` is a file of
    answers, beside the TOML.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    body: Literal["json", "multipart"] = "json"
    encoding: Literal["floats", "png"] = "floats"
    images: str = Field("images.*", min_length=1)
    answers: str = Field("answers.*", min_length=1)
    fields: dict[str, Any] = {}
    label: str = "label"
    score: str = "score"
    names: tuple[str, ...] = ()
    classes: int | None = Field(None, ge=2)
    shape: tuple[int, int, int] | None = None
    batch: int = Field(1, ge=1)
    concurrency: int = Field(16, ge=1, le=1024)
    rate: float | None = Field(None, gt=0)
    timeout: float = Field(30.0, gt=0)
    retries: int = Field(6, ge=0)
    backoff: float = Field(0.5, ge=0)
    patience: float = Field(300.0, ge=0)
    queries: int | None = Field(None, ge=1)
    key: str | None = None
    header: str = "Authorization"
    prefix: str = "Bearer "
    cache: str | None = None
    preprocessing: dict[str, Any] = {}

    @classmethod
    def read(cls, spec: str) -> Service:
        """What a URL says by itself, or the TOML file that is named.

        Raises:
            BadInput: unreadable, an unknown field or a wrong value. A key that stands in the file is not repeated.
        """
        said: dict[str, Any] = {"url": spec}
        if not is_url(spec):
            try:
                said = tomllib.loads(Path(spec).expanduser().read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise BadInput(f"{spec}: there is no such file") from None
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                raise BadInput(f"{spec}: unreadable ({error})") from None
        for name in said:
            if name not in cls.model_fields:
                raise BadInput(f"{spec}: {name!r} is unknown; {nearest(name, cls.model_fields)}")
        try:
            service = cls(**said)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(f"{spec}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None
        service._sound(spec)
        return service

    def how(self, spec: str) -> Preprocessing | None:
        """The declaration in the table ``preprocessing``, if there is one."""
        return Preprocessing.of(self.preprocessing, spec) if self.preprocessing else None

    @property
    def pictures(self) -> bool:
        """Whether images go as PNG, which holds 8 bits."""
        return self.body == "multipart" or self.encoding == "png"

    def _sound(self, spec: str) -> None:
        if "@" in self.url.split("://", 1)[-1].split("/", 1)[0]:
            raise BadInput("the address holds a password; put it into an environment variable and name that as key")
        if not is_url(self.url):
            raise BadInput(f"{spec}: url must begin with https:// or http://")
        if self.key is not None and not VARIABLE.fullmatch(self.key):
            raise BadInput(f"{spec}: key must be the name of an environment variable in capitals, never the key itself")
        for name, path in (("images", self.images), ("answers", self.answers)):
            if path.split(".").count("*") > 1:
                raise BadInput(f"{spec}: {name} may hold one *, where the images are listed")
            if "*" not in path.split(".") and self.batch > 1:
                raise BadInput(f"{spec}: {name} lists no images (there is no *), so batch must be 1")
        if self.body == "multipart" and self.images.removesuffix(".*").count("."):
            raise BadInput(f"{spec}: images must be the name of a form field in a multipart body")
        if self.images == "*" and self.fields:
            raise BadInput(f"{spec}: fields have no place beside images that are the whole body")
        if self.pictures and set(self.preprocessing) - {"size", "channels"}:
            raise BadInput(f"{spec}: a PNG holds plain pixels; preprocess by size and channels alone")


def is_url(spec: str) -> bool:
    """Whether a spec is an address of the web."""
    return spec.startswith(("http://", "https://"))


def open_service(
    spec: str,
    *,
    preprocessing: Preprocessing | None = None,
    classes: int | None = None,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    images: Tensor | None = None,
) -> Target:
    """The classifier behind a URL, or behind the `Service` that a TOML file describes, asked about a few images.

    Raises:
        BadInput: the description is wrong, no shape of images is known, or the endpoint fails for good.
    """
    service = Service.read(spec)
    if batch is not None:
        service = service.model_copy(update={"batch": batch})
    if classes is not None:
        service = service.model_copy(update={"classes": classes})
    service._sound(spec)
    shape = service.shape if images is None else (images.shape[1], images.shape[2], images.shape[3])
    if shape is None:
        raise BadInput(f"{spec}: what images it takes does not show; give images, or a shape in its TOML file")
    endpoint = Endpoint(service, spec)
    ask: Callable[[Tensor], Tensor] = partial(collected, endpoint.stream)
    notes = ["images are sent as PNG, rounded to 8 bits"] if service.pictures else []
    if service.cache is not None:
        path = (Path() if is_url(spec) else Path(spec).expanduser().parent) / service.cache
        ask = Cached(endpoint.stream, path, endpoint.identity)
        notes.append(f"answers are kept in {path}: an image that is in it costs no query, though it is counted as one")
    target = from_callable(
        ask,
        service.classes or len(service.names) or None,
        shape,
        name=spec,
        preprocessing=preprocessing or service.how(spec),
        batch=service.batch * service.concurrency * WAVES,
        device=device,
        images=images,
    )
    return replace(target, notes=(*notes, *target.notes))


class Endpoint:
    """Asks a `Service` about images. ``sent`` counts every image in every request that went out, repeated ones too.

    Raises:
        BadInput: the environment variable of the key is not set, or holds what no header can.
    """

    def __init__(self, service: Service, name: str) -> None:
        import httpx2

        self.service, self.name = service, name
        self.sent = 0
        self.kind: Literal["labels", "scores"] | None = None
        self.identity = hashlib.blake2b(
            service.model_dump_json(
                include={"url", "body", "encoding", "images", "answers", "fields", "names", "classes", "label", "score"}
            ).encode(),
            digest_size=8,
        ).hexdigest()
        self._free = 0.0
        self._lock = threading.Lock()
        self._random = random.Random()
        self._client = httpx2.Client(
            headers=_secret(service, name),
            timeout=service.timeout,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=service.concurrency),
        )
        weakref.finalize(self, self._client.close)

    def stream(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Labels (k,) or scores (k, classes) of images (n, ...), request by request as the answers come in.

        Where a request fails for good, those that had an answer are yielded before.

        Raises:
            BadInput: a request failed for good, or no query is left.
        """
        size = self.service.batch
        pixels = x.detach().cpu()
        stop = threading.Event()
        failed: BaseException | None = None
        with ThreadPoolExecutor(min(self.service.concurrency, -(-len(x) // size) or 1)) as pool:
            sent: dict[Future[Tensor], slice] = {}
            try:
                for start in range(0, len(x), size):
                    rows = slice(start, min(start + size, len(x)))
                    sent[pool.submit(self._ask, pixels[rows], stop)] = rows
                for done in as_completed(sent):
                    if done.cancelled():
                        continue
                    if done.exception() is None:
                        yield sent[done], done.result()
                    elif failed is None:
                        failed = done.exception()
                        stop.set()
                        for future in sent:
                            future.cancel()
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        if failed is not None:
            raise failed

    def _ask(self, x: Tensor, stop: threading.Event) -> Tensor:
        """One request, tried until it is answered."""
        import httpx2

        body, why, wait = self._encoded(x), "", 0.0
        for tried in range(self.service.retries + 1):
            if tried:
                wait = max(wait, min(LONGEST, self.service.backoff * 2 ** (tried - 1)) * self._random.uniform(0.5, 1))
            self._turn(wait, stop)
            self._spend(len(x))
            wait = 0.0
            try:
                with closing(self._client.post(self.service.url, **body)) as response:
                    status, content = response.status_code, response.content
                    asked_for = response.headers.get("retry-after")
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
                self._spend(-len(x))
                why = f"cannot be reached ({type(error).__name__})"
            except httpx2.TimeoutException:
                why = f"did not answer within {self.service.timeout:g} s"
            except httpx2.TransportError as error:
                why = f"broke off ({type(error).__name__})"
            except (httpx2.InvalidURL, httpx2.HTTPError) as error:
                raise BadInput(f"{self.name} cannot be asked ({type(error).__name__})") from None
            else:
                if status in (408, 425, 429) or status >= 500:
                    why, wait = f"answered with status {status}", _seconds(asked_for)
                    if wait > self.service.patience:
                        raise BadInput(f"{self.name} asks for {wait:.0f} s of patience; come back later or raise it")
                    self._hold(wait)
                elif status != 200:
                    raise BadInput(f"{self.name} refuses what it is sent with status {status}{self._hint(status)}")
                else:
                    try:
                        return self._read(content, len(x))
                    except _Malformed as error:
                        why = f"answered with {error}"
                        if error.lasting and self.kind is None:
                            break
            if stop.is_set():
                break
        raise BadInput(f"{self.name} {why}" + (f", {tried + 1} times in a row" if tried else ""))

    def _turn(self, wait: float, stop: threading.Event) -> None:
        """Sleep for ``wait`` seconds, and then until the rate and the endpoint's own wishes allow a request."""
        stop.wait(wait)
        with self._lock:
            at = max(time.monotonic(), self._free)
            self._free = at + 1 / self.service.rate if self.service.rate else self._free
        stop.wait(max(0.0, at - time.monotonic()))

    def _hold(self, seconds: float) -> None:
        """Let no request go out for so long: what one of them was told holds for all."""
        with self._lock:
            self._free = max(self._free, time.monotonic() + seconds)

    def _spend(self, images: int) -> None:
        with self._lock:
            limit = self.service.queries
            if limit is not None and self.sent + images > limit:
                raise BadInput(f"{self.name}: its {limit} queries are spent; raise queries, or keep a cache")
            self.sent += images

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            key = self.service.key
            return "; name the environment variable with its key" if key is None else f"; is the key in {key} right?"
        return "; give the address that it leads to" if 300 <= status < 400 else ""

    def _encoded(self, x: Tensor) -> dict[str, Any]:
        """The body of a request, as the arguments that httpx2 takes."""
        service, path = self.service, self.service.images
        if service.body == "multipart":
            field = path.removesuffix(".*")
            files = [(field, (f"{i}.png", _png(image), "image/png")) for i, image in enumerate(x)]
            return {"files": files, "data": service.fields}
        if service.encoding == "png":
            listed: list[Any] = [base64.b64encode(_png(image)).decode() for image in x]
        else:
            listed = x.tolist()
        built = _put(path.split("."), listed)
        content = json.dumps(built if path.startswith("*") else service.fields | built)
        return {"content": content, "headers": {"Content-Type": "application/json"}}

    def _read(self, content: bytes, n: int) -> Tensor:
        """The answers in a response about ``n`` images."""
        try:
            said = json.loads(content)
        except (ValueError, RecursionError):
            raise _Malformed("what is no JSON", lasting=False) from None
        found = _get(self.service.answers.split("."), said)
        if len(found) != n:
            raise _Malformed(f"{len(found)} answers to {n} images")
        rows = [self._answer(entry) for entry in found]
        kind: Literal["labels", "scores"] = "labels" if isinstance(rows[0], int) else "scores"
        if any(isinstance(row, int) != (kind == "labels") for row in rows) or self.kind not in (None, kind):
            raise _Malformed("labels at one time and scores at another")
        if kind == "scores" and len({len(row) for row in rows if isinstance(row, list)}) > 1:
            raise _Malformed("scores of one number of classes here and another there")
        self.kind = kind
        return torch.tensor(rows, dtype=torch.int64 if kind == "labels" else torch.float64)

    def _answer(self, entry: Any) -> int | list[float]:
        """One image's answer: its label, or its scores."""
        if isinstance(entry, Mapping):
            if self.service.label in entry:
                return self._number(entry[self.service.label])
            entry = [{self.service.label: name, self.service.score: score} for name, score in entry.items()]
        if not isinstance(entry, list):
            return self._number(entry)
        if entry and all(isinstance(one, Mapping) for one in entry):
            pairs = [(self._number(one.get(self.service.label)), _finite(one.get(self.service.score))) for one in entry]
            return self._whole(pairs)
        if not entry:
            raise _Malformed("an empty list of scores")
        return [_finite(value) for value in entry]

    def _number(self, label: Any) -> int:
        """The number of a class, which is given by its number or name."""
        if isinstance(label, str) and label in self.service.names:
            return self.service.names.index(label)
        if isinstance(label, int) and not isinstance(label, bool):
            classes = self._classes()
            if 0 <= label < classes:
                return label
            raise _Malformed(f"label {label}, but the classes are 0 to {classes - 1}")
        raise _Malformed(f"a label {str(label)[:40]!r} that is no number of a class and is not among the names")

    def _whole(self, pairs: Sequence[tuple[int, float]]) -> list[float]:
        """Scores of all classes from those of the best few.

        What probability they leave is spread over the others, none of which gets more than the least of the few; of
        other scores the rest stand one below the least.
        """
        classes, (labels, scores) = self._classes(), zip(*pairs, strict=True)
        least, total = min(scores), sum(scores)
        rest = least - 1
        if least >= 0 and total <= 1 + 1e-4:
            rest = min(least, max(0.0, 1 - total) / max(1, classes - len(scores)))
        whole = [rest] * classes
        for label, score in zip(labels, scores, strict=True):
            whole[label] = score
        return whole

    def _classes(self) -> int:
        classes = self.service.classes or len(self.service.names)
        if not classes:
            raise BadInput(f"{self.name} answers with labels; say how many classes there are, or their names")
        return classes


class _Malformed(Exception):
    """An answer that cannot be read: ``lasting`` if its form is wrong, and not only its content."""

    def __init__(self, what: str, *, lasting: bool = True) -> None:
        super().__init__(what)
        self.lasting = lasting


def _secret(service: Service, name: str) -> dict[str, str]:
    """The header with the key out of the environment, which is kept nowhere else."""
    if service.key is None:
        return {}
    value = os.environ.get(service.key, "").strip()
    if not value:
        raise BadInput(f"{name}: the environment variable {service.key} is not set")
    if not (value.isascii() and value.isprintable()):
        raise BadInput(f"{name}: the environment variable {service.key} holds what no header can")
    return {service.header: f"{service.prefix}{value}"}


def _seconds(asked_for: str | None) -> float:
    """What a Retry-After asks for: seconds, or a date."""
    if asked_for is None:
        return 0.0
    try:
        seconds = float(asked_for)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(asked_for).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _png(image: Tensor) -> bytes:
    """An image (1 or 3, h, w) in [0, 1] as a PNG."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _put(path: list[str], listed: list[Any]) -> Any:
    """``listed`` at the place in JSON that ``path`` names."""
    if not path:
        return listed[0]
    key, *rest = path
    if key == "*":
        return [_put(rest, [image]) for image in listed]
    return {key: _put(rest, listed)}


def _get(path: list[str], said: Any) -> list[Any]:
    """What stands in ``said`` where ``path`` leads."""
    for at, key in enumerate(path):
        if key == "*":
            if not isinstance(said, list):
                raise _Malformed(f"no list where {'.'.join(path)} has one")
            return [_get(path[at + 1 :], one)[0] for one in said]
        if isinstance(said, Mapping) and key in said:
            said = said[key]
        elif isinstance(said, list) and key.isdecimal() and int(key) < len(said):
            said = said[int(key)]
        else:
            raise _Malformed(f"nothing at {'.'.join(path)} in its JSON")
    return [said]


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _Malformed(f"a score {str(value)[:40]!r} that is no finite number")
    return float(value)
