"""What a rank that a signal ended leaves for the others: they find it gone, and that was no failure then.

In the middle of a start, or of a run that saves nothing, a signal ends a rank at once. Those that it has not reached
lose a connection, as they would when the rank had failed. The word lies in the store that the ranks met at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_fipo.interruption import Signals

ANSWERS_WITHIN = timedelta(seconds=5)
_KEY = "megatron_fipo/ended_by_signal"


@contextlib.contextmanager
def passed_on(signals: Signals) -> Iterator[None]:
    """A signal that ends what is inside is told to the other ranks; one that ended another rank counts as received."""
    try:
        yield
    except KeyboardInterrupt:
        signals.ending()
        _exchange(signals)
        raise
    except Exception:
        _exchange(signals)
        raise


def _exchange(signals: Signals) -> None:
    if not dist.is_initialized():
        return
    store = _get_default_store()
    store.set_timeout(ANSWERS_WITHIN)
    with contextlib.suppress(dist.DistError):  # gone with the rank that held it
        if signals.received:
            store.set(_KEY, str(signals.first))
        elif store.check([_KEY]):
            signals.hear_of(int(store.get(_KEY)))
