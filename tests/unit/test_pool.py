"""The pool: questions of many searches joined into full batches, each answered to the search that asked."""

from __future__ import annotations

import time

import pytest
import torch

from besiege.core.meter import Meter
from besiege.core.pool import BATCHES, pool
from besiege.core.target import Target
from besiege.core.threat import Access, Ball, Goal

BATCH = 8


class Counted:
    """Scores (0, mean - 1/2): the goal "leave class 0" is reached above one half. Keeps what it was asked."""

    def __init__(self):
        self.sizes, self.means = [], []

    def __call__(self, x):
        mean = x.mean((1, 2, 3))
        self.sizes.append(len(x))
        self.means += mean.tolist()
        return torch.stack([torch.zeros_like(mean), mean - 0.5], 1)


class Searches:
    """Hands out generators, and keeps the books of what they asked, were told and whether they were closed."""

    def __init__(self, body):
        self.body, self.begun, self.closed, self.told = body, [], [], {}
        self.unanswered = self.most_unanswered = 0

    def __call__(self, image):
        self.begun.append(image)
        return self._run(image)

    def _run(self, image):
        body, answer = self.body(image), None
        try:
            while True:
                question = body.send(answer)
                self.unanswered += len(question)
                self.most_unanswered = max(self.most_unanswered, self.unanswered)
                answer = yield question
                self.unanswered -= len(question)
                self.told.setdefault(image, []).append(answer)
        except StopIteration:
            pass
        finally:
            self.closed.append(image)


def at(*means):
    return torch.tensor(means).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def meter(n, model, **options):
    target = Target(model, Access.SCORES, 2, (1, 2, 2), batch=BATCH)
    return Meter(target, torch.zeros(n, 1, 2, 2), Goal(torch.zeros(n, dtype=torch.int64)), Ball(2, 9.0), **options)


def test_each_search_is_told_the_answers_to_its_own_questions():
    def body(image):
        for step in range(image % 4 + 1):
            yield at(*(0.001 * image + 0.01 * k for k in range(1 + (image + step) % 5)))

    model, searches = Counted(), Searches(body)
    books = meter(50, model)
    pool(books, searches, "margin", list(range(50)))
    for image in range(50):
        assert len(searches.told[image]) == image % 4 + 1
        for step, answer in enumerate(searches.told[image]):
            expected = [0.5 - 0.001 * image - 0.01 * k for k in range(1 + (image + step) % 5)]
            assert answer.tolist() == pytest.approx(expected, abs=1e-6)
    assert int(books.forward.sum()) == sum(model.sizes)
    assert sorted(searches.closed) == list(range(50))
    assert bool(books.done.all())


def test_single_questions_fill_the_batches():
    def body(image):
        for _ in range(6):
            yield at(0.1)

    model = Counted()
    pool(meter(300, model), Searches(body), "labels", list(range(300)))
    assert sum(model.sizes) == 300 * 6
    assert len(model.sizes) <= 300 * 6 / BATCH * 1.1


def test_what_searches_hold_at_once_is_bounded():
    def body(image):
        for _ in range(3):
            yield at(0.1)
            yield at(*[0.1] * 30)

    searches = Searches(body)
    pool(meter(200, Counted()), searches, "labels", list(range(200)))
    assert searches.most_unanswered < 2 * (BATCHES * BATCH + 30)
    assert len(searches.closed) == 200


def test_an_image_that_has_fallen_is_asked_no_more():
    def body(image):
        for step in range(10):
            yield at(0.9 if step == image else 0.1)

    model, searches = Counted(), Searches(body)
    books = meter(5, model)
    pool(books, searches, "labels", list(range(5)))
    assert books.found.all()
    assert books.forward.tolist() == [1, 2, 3, 4, 5]
    assert sum(model.sizes) == 15
    assert [len(searches.told.get(image, [])) for image in range(5)] == [0, 1, 2, 3, 4]
    assert sorted(searches.closed) == list(range(5))


def test_a_minimum_goes_on_after_a_success():
    def body(image):
        for mean in (0.9, 0.7, 0.6):
            yield at(mean)

    books = meter(2, Counted(), seeks="minimum")
    pool(books, Searches(body), "labels", [0, 1])
    assert books.forward.tolist() == [3, 3]
    assert books.distance.tolist() == pytest.approx([1.2, 1.2])


@pytest.mark.parametrize("queries", [1, 7, 37])
def test_a_budget_cuts_a_question_short(queries):
    def body(image):
        while True:
            yield at(*[0.1] * (image + 1))

    model, searches = Counted(), Searches(body)
    books = meter(9, model, queries=queries)
    pool(books, searches, "labels", list(range(9)))
    assert books.forward.tolist() == [queries] * 9
    assert sum(model.sizes) == 9 * queries
    assert sorted(searches.closed) == list(range(9))


def test_a_search_without_a_question_ends_alone():
    def body(image):
        if image != 1:
            yield at(0.1)

    books = meter(3, Counted())
    pool(books, Searches(body), "labels", [0, 1, 2])
    assert books.forward.tolist() == [1, 0, 1]
    assert books.done.all()


def test_only_the_images_that_are_named_are_searched():
    def body(image):
        yield at(0.9)

    books, searches = meter(4, Counted()), Searches(body)
    pool(books, searches, "labels", [3, 1])
    assert sorted(searches.begun) == [1, 3]
    assert books.found.tolist() == [False, True, False, True]
    pool(books, searches, "labels", [])
    assert len(searches.begun) == 2


def test_a_deadline_ends_every_search():
    def body(image):
        while True:
            yield at(0.1)

    model, searches = Counted(), Searches(body)
    pool(meter(5, model, deadline=time.monotonic() - 1), searches, "labels", list(range(5)))
    assert not model.sizes
    assert sorted(searches.closed) == list(range(5))


def test_an_error_in_one_search_closes_the_others():
    def body(image):
        yield at(0.1)
        if image == 2:
            raise RuntimeError("no")
        while True:
            yield at(0.1)

    searches = Searches(body)
    with pytest.raises(RuntimeError, match="no"):
        pool(meter(4, Counted()), searches, "labels", list(range(4)))
    assert sorted(searches.closed) == list(range(4))
