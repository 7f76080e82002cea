"""What frozen features are worth: k nearest neighbours and a linear probe, with intervals.

Features are float [N, D], labels integers [N] from 0 on, both NumPy arrays or tensors on any one device. Nothing is ever chosen
by what the test set says. Neither autocast, nor the caller's gradient mode, nor torch's global generator has any influence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sami_cache.errors import SamiCacheError

K = 20
TEMPERATURE = 0.07
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""What the squared weights of the linear probe may be multiplied with, the strongest first."""
_SIMILARITIES_AT_ONCE = 1 << 25
_ITERATIONS = 100


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Multinomial logistic regression on standardised features."""

    weight: Tensor  # float32 [classes, D]
    bias: Tensor  # float32 [classes]
    mean: Tensor  # float32 [D], of the training set
    std: Tensor  # float32 [D]
    penalty: float
    """Of the squared weights, beside the mean cross-entropy; one of `PENALTIES`."""
    heldout_accuracy: float
    """With that penalty, on the tenth of the training set by which it was chosen."""

    def predict(self, features: Any) -> Tensor:
        """The likeliest class of float [N, D]: int64 [N]."""
        with torch.autocast(self.weight.device.type, enabled=False):
            x = (_features(features, self.weight.device) - self.mean) / self.std
            return F.linear(x, self.weight, self.bias).argmax(1)


def knn_accuracy(
    train: Any, train_labels: Any, test: Any, test_labels: Any, *, k: int = K, temperature: float = TEMPERATURE
) -> float:
    """Share of the test set, 0..1, that `knn_predictions` gets right."""
    found = knn_predictions(train, train_labels, test, ks=(k,), temperature=temperature)[k]
    return _accuracy(found, test_labels)


def linear_accuracy(train: Any, train_labels: Any, test: Any, test_labels: Any, *, seed: int = 0) -> float:
    """Share of the test set, 0..1, that `fit_linear`'s probe gets right. `seed`: of the tenth that the penalty is chosen on."""
    probe = fit_linear(train, train_labels, seed=seed)
    return _accuracy(probe.predict(torch.as_tensor(test, device=probe.weight.device)), test_labels)


def knn_predictions(
    train: Any, train_labels: Any, test: Any, *, ks: Sequence[int] = (K,), temperature: float = TEMPERATURE
) -> dict[int, Tensor]:
    """For every k the class that the k nearest training samples vote for: int64 [N test].

    As DINO measures it (arXiv 2104.14294): nearest by cosine; a vote weighs exp(cosine / temperature). Raises SamiCacheError
    where k is not between 1 and the number of training samples.
    """
    gallery, labels = _labelled(train, train_labels)
    queries = _features(test, gallery.device)
    if bad := [k for k in ks if not 1 <= k <= len(gallery)]:
        raise SamiCacheError(f"k is {bad[0]}: expected 1 to {len(gallery)}, the number of training samples")
    classes = int(labels.max()) + 1
    gallery, queries = F.normalize(gallery, dim=1), F.normalize(queries, dim=1)
    parts: dict[int, list[Tensor]] = {k: [] for k in ks}
    with torch.no_grad(), torch.autocast(gallery.device.type, enabled=False):
        for some in queries.split(max(1, _SIMILARITIES_AT_ONCE // len(gallery))):
            near = (some @ gallery.T).topk(max(ks), dim=1)
            # Less 1, the highest cosine there is, so that no temperature lets the exponential overflow.
            weights, voted = ((near.values - 1) / temperature).exp(), labels[near.indices]
            for k in ks:
                votes = torch.zeros(len(some), classes, device=some.device)
                parts[k].append(votes.scatter_add_(1, voted[:, :k], weights[:, :k]).argmax(1))
    return {k: torch.cat(found) if found else torch.zeros(0, dtype=torch.int64) for k, found in parts.items()}


def fit_linear(train: Any, train_labels: Any, *, seed: int = 0, penalties: Sequence[float] = PENALTIES) -> LinearProbe:
    """Logistic regression by L-BFGS on the whole training set.

    Its penalty is the one of `penalties` that does best on a tenth of the training set, drawn with `seed`, after fitting on
    the other nine; of equals the strongest. With one penalty, or fewer than ten samples, nothing is held out.
    """
    # What was made in inference mode cannot be saved for a gradient; what is computed from it here can.
    with torch.inference_mode(False), torch.enable_grad():
        x, labels = _labelled(train, train_labels)
        with torch.autocast(x.device.type, enabled=False):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
            held, kept = order[: len(x) // 10], order[len(x) // 10 :]
            classes = int(labels.max()) + 1
            chosen, best = penalties[0], float("nan")
            if len(penalties) > 1 and len(held):
                mean, std = _moments(x[kept])
                standard = (x - mean) / std
                solution, scores = None, []
                for penalty in penalties:
                    solution = _solve(standard[kept], labels[kept], classes, penalty, solution)
                    guessed = F.linear(standard[held], solution[:, :-1], solution[:, -1]).argmax(1)
                    scores.append(_accuracy(guessed, labels[held]))
                best = max(scores)
                chosen = penalties[scores.index(best)]
            mean, std = _moments(x)
            solution = _solve((x - mean) / std, labels, classes, chosen, None)
    weight, bias = solution[:, :-1].contiguous(), solution[:, -1].contiguous()
    return LinearProbe(weight=weight, bias=bias, mean=mean, std=std, penalty=chosen, heldout_accuracy=best)


def bootstrap_interval(right: int, count: int, *, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval, over test samples, of a share `right` / `count`.

    How many are right among `count` samples drawn with replacement is binomial, which is what is drawn here.
    """
    shares = np.random.default_rng(seed).binomial(count, right / count, draws) / count
    low, high = np.percentile(shares, (2.5, 97.5))
    return float(low), float(high)


def _solve(x: Tensor, labels: Tensor, classes: int, penalty: float, start: Tensor | None) -> Tensor:
    """Weights and bias, float32 [classes, D + 1], of standardised features."""
    weights = (torch.zeros(classes, x.shape[1] + 1, device=x.device) if start is None else start.clone()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], history_size=10, max_iter=_ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        scores = F.linear(x, weights[:, :-1], weights[:, -1])
        loss = F.cross_entropy(scores, labels) + penalty * weights[:, :-1].square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return weights.detach()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(x, 0, correction=0)
    return mean, std + 1e-6


def _labelled(features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    x = _features(features)
    y = torch.as_tensor(labels, device=x.device).long()
    if len(x) != len(y) or not len(x) or int(y.min()) < 0:
        raise SamiCacheError(f"{len(x)} training samples with {len(y)} labels: expected as many, at least one, all from 0 on")
    return x, y


def _features(features: Any, device: torch.device | None = None) -> Tensor:
    x = torch.as_tensor(features, device=device).float()
    if x.ndim != 2 or not torch.isfinite(x).all():
        raise SamiCacheError(f"features of shape {tuple(x.shape)}: expected [samples, dimensions], all finite")
    return x


def _accuracy(found: Tensor, labels: Any) -> float:
    true = torch.as_tensor(labels, device=found.device)
    if len(found) != len(true) or not len(true):
        raise SamiCacheError(f"{len(found)} test samples with {len(true)} labels: expected as many, and at least one")
    return float((found == true).double().mean())
