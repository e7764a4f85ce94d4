"""Smaller limits for a million executions.

What an image may ask for is bounded, and the bounds are generous: a table of 32 MiB, a minute of
hashing.  A fuzzer finds those at once, and then spends its time there.  The real ones are met by
test_fields, which meets each of them once.
"""

from __future__ import annotations

from diskwright.formats import luks1
from diskwright.formats.qcow2 import header
from diskwright.formats.qcow2.machine import alloc


def scale() -> None:
    """For the rest of this process."""
    header.MAX_L1_BYTES = alloc.MAX_L1_BYTES = 64 << 10
    header.MAX_REFTABLE_BYTES = alloc.MAX_REFTABLE_BYTES = 64 << 10
    luks1.MOST_ROUNDS = 1 << 15
