"""The n-th change that a repair makes fails: it is told, nothing that could be read is lost, and
the next repair mends what is left."""

from __future__ import annotations

import errno

import pytest

from diskwright.formats import qcow2
from sansio.damages import DAMAGES, Damage
from sansio.test_qcow2_amend import Failing
from sansio.test_qcow2_cross import own_check
from sansio.test_qcow2_repair import content, lost, repaired


@pytest.mark.parametrize("damage", DAMAGES[::6], ids=lambda d: d.name)
def test_nth_failure(damage: Damage) -> None:
    file = damage.image()
    before = content(file, damage.backing)
    for n in (*range(1, 8), 10, 20, 40):
        machine = Failing(file)
        machine.open(qcow2.DRIVER, check=True)
        machine.left = n
        try:
            machine.run(machine.format.check("all"))
        except OSError as error:
            assert error.errno == errno.EIO
        if machine.left > 0:
            return
        left = bytes(machine.slots["file"])
        assert lost(before, content(left, damage.backing)) == [], n
        _, again, _ = repaired(left, "all")
        assert lost(before, content(again, damage.backing)) == [], n
        result = own_check(again)
        assert (result.corruptions, result.leaks) == (0, 0), n
