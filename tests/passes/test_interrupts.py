"""Ctrl-C is never lost, whatever a library makes of the exception."""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest

from passes._interrupts import interrupts_kept


def test_ctrl_c_that_is_dropped_is_raised_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_kept(), suppress(KeyboardInterrupt):  # as torch's tracing does
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_that_became_another_error_is_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:  # as an extension module does that was just being loaded
            raise ImportError("initialization failed") from error


def test_the_handler_from_before_is_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts_kept():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(ImportError), interrupts_kept():
        raise ImportError
