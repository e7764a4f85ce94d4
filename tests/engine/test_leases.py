"""The queue of leases, against a model that compares every entry with every earlier one."""

from __future__ import annotations

import random
from collections.abc import Coroutine

import pytest

from diskwright.engine.futures import Cancelled, Future
from diskwright.engine.leases import Lease, Leases, Span

GRANULE = 4096


class Model:
    """Who holds and who waits; an entry is granted when no earlier one conflicts."""

    def __init__(self) -> None:
        self.queue: list[tuple[int, list[Span], bool]] = []

    def granted(self) -> set[int]:
        return {
            name
            for i, (name, spans, exclusive) in enumerate(self.queue)
            if not any(
                (exclusive or other) and overlap(spans, theirs)
                for _, theirs, other in self.queue[:i]
            )
        }


def overlap(some: list[Span], others: list[Span]) -> bool:
    return any(
        s // GRANULE <= (f - 1) // GRANULE and g // GRANULE <= (e - 1) // GRANULE
        for s, e in some
        for g, f in others
    )


class Holders:
    """Coroutines that take leases, run by hand."""

    def __init__(self, leases: Leases) -> None:
        self.leases = leases
        self.held: dict[int, Lease] = {}
        self.waiting: dict[int, Coroutine[Future[None], None, Lease]] = {}

    def take(self, name: int, spans: list[Span], exclusive: bool) -> None:
        self._step(name, self.leases.take(spans, exclusive))

    def _step(self, name: int, coro: Coroutine[Future[None], None, Lease]) -> None:
        self.waiting.pop(name, None)
        try:
            future = coro.send(None)
        except StopIteration as stop:
            self.held[name] = stop.value
        else:
            self.waiting[name] = coro
            future.callbacks.append(lambda _: self._step(name, coro))

    def leave(self, name: int) -> None:
        if name in self.held:
            self.leases.drop(self.held.pop(name))
        else:
            with pytest.raises(Cancelled):
                self.waiting.pop(name).throw(Cancelled())


@pytest.mark.parametrize("seed", range(30))
def test_grants_are_those_of_the_model(seed: int) -> None:
    rng = random.Random(seed)
    leases, model = Leases(GRANULE), Model()
    holders = Holders(leases)
    for name in range(200):
        if rng.random() < 0.55:
            starts = [rng.randrange(20 * GRANULE) for _ in range(rng.choice((1, 1, 3)))]
            spans = [(start, start + rng.randint(1, 2 * GRANULE)) for start in starts]
            exclusive = rng.random() < 0.5
            model.queue.append((name, spans, exclusive))
            holders.take(name, spans, exclusive)
        elif model.queue:
            gone = rng.choice(model.queue)
            model.queue.remove(gone)
            holders.leave(gone[0])
        assert holders.held.keys() == model.granted(), name
        assert len(leases.queue) == len(model.queue)


def test_a_long_queue_costs_one_look_a_grant() -> None:
    """Each of many waits for the one before it: nobody is looked at again and again."""
    looks = 0

    class Counted(Leases):
        def _conflict(self, one: Lease, other: Lease) -> bool:
            nonlocal looks
            looks += 1
            return super()._conflict(one, other)

    holders = Holders(Counted(GRANULE))
    for name in range(1000):
        holders.take(name, [(0, GRANULE)], True)
    for name in range(1000):
        assert list(holders.held) == [name]
        holders.leave(name)
    assert looks == 999
