"""Signals: what is in hand is finished within the grace, or abandoned; nothing takes a signal for an error."""

import os
import signal
import time

import pytest

from sami_cache.errors import Interrupted
from sami_cache.processes import StopSignal


def stop(**given):
    return StopSignal(lambda: "told so", **given)


@pytest.fixture(autouse=True)
def handlers():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_with_nothing_in_hand_it_is_raised_at_once(number, code):
    with pytest.raises(Interrupted, match="told so") as caught, stop():
        signal.raise_signal(number)
        pytest.fail("went on")
    assert caught.value.exit_code == code


def test_what_is_in_hand_may_be_finished():
    with stop(grace=30) as signals:
        signals.holding = True
        assert signals.seconds_left() > 1e9
        signals.check()
        signal.raise_signal(signal.SIGTERM)
        assert signals.number == signal.SIGTERM
        assert 29 < signals.seconds_left() <= 30
        with pytest.raises(Interrupted, match="told so"):
            signals.check()


def test_when_the_grace_has_passed_it_is_abandoned():
    started = time.monotonic()
    with pytest.raises(Interrupted) as caught, stop(grace=0.2) as signals:
        signals.holding = True
        signal.raise_signal(signal.SIGTERM)
        time.sleep(5)
    assert 0.2 <= time.monotonic() - started < 3
    assert caught.value.exit_code == 143


@pytest.mark.parametrize("grace", [0, 30])
def test_at_a_second_signal_or_without_grace_too(grace):
    with pytest.raises(Interrupted) as caught, stop(grace=grace) as signals:
        signals.holding = True
        signal.raise_signal(signal.SIGTERM)
        assert grace
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")
    assert caught.value.exit_code == (130 if grace else 143)


def test_a_third_signal_ends_what_is_stuck():
    child = os.fork()
    if not child:
        with stop(grace=30) as signals:
            signals.holding = True
            signal.raise_signal(signal.SIGTERM)
            try:
                signal.raise_signal(signal.SIGTERM)
            except Interrupted:
                signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_no_handler_of_errors_takes_it():
    with pytest.raises(Interrupted), stop():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("taken for an error")
