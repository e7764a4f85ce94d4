"""Smaller limits for a million executions.

What an image may ask for is bounded, and the bounds are generous: a table of 32 MiB, a minute of
hashing.  A fuzzer finds those at once, and then spends its time there.  The real ones are met by
test_fields, which meets each of them once.  The keys of what did not change are computed once, and
the checksum of VHDX is one that the interpreter computes in no time.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any
from zlib import crc32

from diskwright.codecs.crc32c import crc32c
from diskwright.formats import luks1
from diskwright.formats.qcow2 import header
from diskwright.formats.qcow2.check import counts
from fuzz.samples import reseal


def scale() -> None:
    """For the rest of this process; the samples that it uses have been made."""
    for name, value in {"MAX_L1_BYTES": 64 << 10, "MAX_REFTABLE_BYTES": 64 << 10,
                        "MAX_SNAPSHOTS": 200}.items():  # fmt: skip
        _everywhere(name, getattr(header, name), value)
    _everywhere("CHUNK_BITS", counts.CHUNK_BITS, 12)
    _everywhere("CHUNK", counts.CHUNK, 1 << 12)
    luks1.MOST_ROUNDS = 1 << 12
    _everywhere("derive", luks1.derive, lru_cache(256)(luks1.derive))
    _everywhere("crc32c", crc32c, crc32)
    reseal()


def _everywhere(name: str, old: Any, new: Any) -> None:
    """``new`` in all modules of formats, and of these tests, that have ``old`` by this name."""
    for key, module in list(sys.modules.items()):
        ours = key.startswith(("diskwright.formats.", "fuzz.samples"))
        if ours and getattr(module, name, None) is old:
            setattr(module, name, new)
