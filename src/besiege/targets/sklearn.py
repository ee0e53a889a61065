"""A fitted scikit-learn classifier as a function of images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from besiege.core.errors import BadInput

NEVER = -1e6
"""The decision value of a class that the classifier was never shown."""


def is_estimator(made: Any) -> bool:
    """Whether it predicts as scikit-learn's classifiers do."""
    return hasattr(made, "predict") and hasattr(made, "fit") and not callable(made)


class Estimator:
    """Images (n, c, h, w), flattened in this order → probabilities, decision values, or labels alone.

    Columns and labels stand where ``classes_`` says: a class that is a whole number is its own label, whatever is
    missing below it; other classes are numbered in their order.

    Raises:
        BadInput: it is not fitted, or regresses.
    """

    def __init__(self, estimator: Any, name: str) -> None:
        self.estimator, self.name = estimator, name
        classes = getattr(estimator, "classes_", None)
        if classes is None:
            raise BadInput(f"{name} makes a {type(estimator).__name__} that knows no classes; fit it, on classes")
        classes = np.asarray(classes)
        if classes.ndim != 1:
            raise BadInput(f"{name} makes a {type(estimator).__name__} of several outputs; give one with one")
        whole = classes.dtype.kind in "iu" and int(classes.min()) >= 0
        self.known = classes
        self.labels = classes.astype(np.int64) if whole else np.arange(len(classes))
        self.classes = int(self.labels.max()) + 1

    def __call__(self, x: Tensor) -> NDArray[Any]:
        """Scores (n, classes), or labels (n,) from an estimator that has no scores."""
        rows = x.flatten(1).cpu().numpy()
        wanted = getattr(self.estimator, "n_features_in_", rows.shape[1])
        if rows.shape[1] != wanted:
            raise BadInput(f"{self.name} takes {wanted} numbers an image, but these images have {rows.shape[1]}")
        if hasattr(self.estimator, "predict_proba"):
            return self._placed(self.estimator.predict_proba(rows), 0.0)
        if hasattr(self.estimator, "decision_function"):
            values = np.asarray(self.estimator.decision_function(rows))
            values = np.stack([-values, values], 1) if values.ndim == 1 else values
            if values.shape[1] == len(self.known):
                return self._placed(values, NEVER)
        said = np.asarray(self.estimator.predict(rows))
        order = np.argsort(self.known)
        return np.asarray(self.labels[order[np.searchsorted(self.known, said, sorter=order)]])

    def _placed(self, scores: Any, missing: float) -> NDArray[Any]:
        """The columns at the labels that they belong to."""
        whole = np.full((len(scores), self.classes), missing)
        whole[:, self.labels] = scores
        return whole
