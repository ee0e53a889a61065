"""scikit-learn classifiers as targets: columns stand at their labels, and what has no scores gives labels alone."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from besiege.core.errors import BadInput
from besiege.core.threat import Access
from besiege.data import open_images
from besiege.targets import open_target
from besiege.targets.sklearn import Estimator

CODE = """
from besiege.data import open_images
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.svm import LinearSVC, SVC

images = open_images(limit=200)
x, y = images.x.flatten(1).numpy(), images.y.numpy()

def logistic():
    return LogisticRegression(max_iter=200).fit(x, y)

def machine():
    return SVC().fit(x, y)

def neighbours():
    return KNeighborsClassifier(1).fit(x, y)

class Plain:
    # no scores at all
    def __init__(self):
        self.inside = KNeighborsClassifier(1).fit(x, y)
        self.classes_ = self.inside.classes_
    def fit(self, x, y):
        return self
    def predict(self, x):
        return self.inside.predict(x)

def unfitted():
    return SVC()

def few():
    keep = (y == 2) | (y == 7)
    return LinearSVC().fit(x[keep], y[keep])

def narrow():
    return SVC().fit(x[:, :100], y)
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "estimators.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("estimators", None)


@pytest.fixture(scope="module")
def digits():
    return open_images(limit=40)


def test_probabilities_decision_values_and_labels(code, digits):
    estimators = {name: open_target(f"estimators:{name}", data=digits) for name in ("logistic", "machine", "Plain")}
    assert [target.access for target in estimators.values()] == [Access.SCORES, Access.SCORES, Access.LABELS]
    x = digits.x.flatten(1).numpy()
    module = sys.modules["estimators"]
    torch.testing.assert_close(
        estimators["logistic"].scores(digits.x),
        torch.from_numpy(module.logistic().predict_log_proba(x)).float(),
        atol=1e-3,
        rtol=1e-3,
    )
    torch.testing.assert_close(
        estimators["machine"].scores(digits.x), torch.from_numpy(module.machine().decision_function(x)).float()
    )
    assert estimators["Plain"].labels(digits.x).tolist() == module.neighbours().predict(x).tolist()


def test_two_classes_of_ten_keep_their_numbers(code, digits):
    target = open_target("estimators:few", data=digits[(digits.y == 2) | (digits.y == 7)])
    assert target.classes == 8
    said = target.labels(digits.x)
    assert set(said.tolist()) == {2, 7}
    assert (said == digits.y)[(digits.y == 2) | (digits.y == 7)].all()


def test_named_classes_are_numbered_in_their_order():
    class Named:
        classes_ = np.array(["cat", "dog"])

        def predict(self, x):
            return np.array(["dog", "cat", "dog"])

    assert Estimator(Named(), "it")(torch.zeros(3, 1, 2, 2)).tolist() == [1, 0, 1]


def test_what_cannot_be_used_is_said_in_one_sentence(code, digits):
    with pytest.raises(BadInput, match="knows no classes; fit it"):
        open_target("estimators:unfitted", data=digits)
    with pytest.raises(BadInput, match="takes 100 numbers an image, but these images have 784"):
        open_target("estimators:narrow", data=digits)
