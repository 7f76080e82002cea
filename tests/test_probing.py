"""k-NN and the linear probe against scikit-learn on the same features; the penalty is chosen without the test set."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from sami_cache.errors import SamiCacheError
from sami_cache.probing import bootstrap_interval, fit_linear, knn_accuracy, knn_predictions, linear_accuracy


@pytest.fixture(scope="module")
def digits():
    """1,797 handwritten digits of 8 x 8 pixels with noise on top, so that there is something to get wrong."""
    x, y = load_digits(return_X_y=True)
    x = (x + np.random.default_rng(0).normal(0, 6, x.shape)).astype(np.float32)
    return x[:1200], y[:1200], x[1200:], y[1200:]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.02)])
def test_nearest_neighbours_are_those_of_scikit_learn(digits, k, temperature):
    train, train_labels, test, test_labels = digits
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    expected = reference.fit(train, train_labels).predict(test)
    found = knn_predictions(train, train_labels, test, ks=(k, 3), temperature=temperature)[k]
    assert (found.numpy() == expected).mean() > 0.998  # what float32 may do to a tie
    accuracy = knn_accuracy(train, train_labels, test, test_labels, k=k, temperature=temperature)
    assert accuracy == pytest.approx((expected == test_labels).mean(), abs=0.002)
    assert 0.5 < accuracy < 0.95


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_the_probe_is_scikit_learns_logistic_regression(digits, penalty):
    train, train_labels, test, _ = digits
    scaler = StandardScaler().fit(train)
    reference = LogisticRegression(C=1 / (2 * penalty * len(train)), max_iter=2000, tol=1e-8)
    reference.fit(scaler.transform(train), train_labels)
    found = fit_linear(train, train_labels, penalties=(penalty,))
    assert (found.predict(test).numpy() == reference.predict(scaler.transform(test))).mean() > 0.996
    # Both are free up to a constant that is the same for all classes only in the bias: the penalty fixes the rest.
    assert np.abs(found.weight.numpy() - reference.coef_).max() < 0.02 * np.abs(reference.coef_).max()


def test_the_penalty_is_chosen_on_a_tenth_of_the_training_set(digits):
    train, train_labels, test, test_labels = digits
    few, few_labels = np.repeat(train[:100], 2, 1) + 1, train_labels[:100]
    free, strict = (fit_linear(few, few_labels, penalties=(penalty,)) for penalty in (1e-6, 1e-1))
    chosen = fit_linear(few, few_labels)
    alone = {float((probe.predict(np.repeat(test, 2, 1) + 1).numpy() == test_labels).mean()) for probe in (free, strict)}
    assert chosen.penalty > 1e-4  # 100 samples of 64 dimensions
    assert linear_accuracy(few, few_labels, np.repeat(test, 2, 1) + 1, test_labels) > min(alone)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    rest = fit_linear(few[order[10:]], few_labels[order[10:]], penalties=(chosen.penalty,))
    held = float((rest.predict(few[order[:10]]).numpy() == few_labels[order[:10]]).mean())
    assert chosen.heldout_accuracy == pytest.approx(held, abs=0.11)  # warm-started there, from nothing here


def test_what_surrounds_it_changes_nothing(digits):
    train, train_labels, test, test_labels = digits

    def both():
        knn = knn_accuracy(train, train_labels, test, test_labels)
        return knn, linear_accuracy(train[:300], train_labels[:300], test, test_labels)

    expected, state = both(), torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert both() == expected
    with torch.inference_mode():
        assert both() == expected
        assert knn_accuracy(torch.from_numpy(train), train_labels, torch.from_numpy(test), test_labels) == expected[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_an_interval_is_the_bootstraps():
    right = np.arange(200) < 150
    rng = np.random.default_rng(5)
    drawn = [right[rng.integers(0, 200, 200)].mean() for _ in range(5000)]
    assert bootstrap_interval(150, 200) == pytest.approx(tuple(np.percentile(drawn, (2.5, 97.5))), abs=0.006)
    assert bootstrap_interval(10, 10) == (1.0, 1.0)


def test_what_does_not_fit_is_refused(digits):
    train, train_labels, test, test_labels = digits
    with pytest.raises(SamiCacheError, match="k is 1201: expected 1 to 1200"):
        knn_accuracy(train, train_labels, test, test_labels, k=1201)
    with pytest.raises(SamiCacheError, match="1200 training samples with 5 labels"):
        linear_accuracy(train, train_labels[:5], test, test_labels)
    with pytest.raises(SamiCacheError, match=r"shape \(597,\)"):
        knn_accuracy(train, train_labels, test[:, 0], test_labels)
