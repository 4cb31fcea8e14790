"""Errors in the model's threads: each is handed to the answers that it concerns, and ends neither thread nor others."""

import logging
from collections.abc import Callable
from typing import Any

from minivlm.batch import FAULTS

log = logging.getLogger("minivlm.serve")


class Failed(RuntimeError):
    """A mistake of ours ended this answer; its trace is in the log already."""


def tried(action: Callable, *arguments: object) -> Any:
    """What an action returns, or the exception that it raised, for the answers that it concerns."""
    try:
        return action(*arguments)
    except Exception as error:
        return error


def final(error: Exception) -> Exception:
    """What the reader of an answer gets: the row's own fault, or, of a mistake of ours, that the log has its trace."""
    if isinstance(error, FAULTS):
        return error
    log.error("the model's thread: %s", error, exc_info=error)
    return Failed(str(error))
