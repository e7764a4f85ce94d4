"""A machine of QEMU's saves itself into an image of ours, and goes on from what we leave there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from interop.tools import OURS, run


class Machine:
    """``system``: the program; it has no guest but its firmware."""

    def __init__(self, system: str, image: Path) -> None:
        self.command = [
            system, "-accel", "tcg", "-machine", "pc", "-m", "2", "-nodefaults", "-display", "none",
            "-monitor", "stdio", "-drive", f"file={image},format=qcow2,if=ide",
        ]  # fmt: skip

    def run(self, *commands: str, more: tuple[str, ...] = ()) -> list[str]:
        """What it prints for these commands of its monitor, the echo left out."""
        done = subprocess.run(
            [*self.command, *more],
            input="".join(f"{command}\n" for command in (*commands, "quit")),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert "rror" not in done.stdout, done.stdout
        return [line for line in done.stdout.splitlines() if not line.startswith("(qemu)")]


# Not encrypted: there QEMU's own savevm aborts.
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=16k,extended_l2=on"])
def test_a_machine_is_saved_and_goes_on(
    options: str, tmp_path: Path, peer: Callable[[str], str]
) -> None:
    system, qemu_img = peer("qemu-system-x86_64"), peer("qemu-img")
    path = tmp_path / "disk.qcow2"
    machine = Machine(system, path)

    def check() -> None:
        for tool in (OURS, [qemu_img]):
            run([*tool, "check", path])

    run([*OURS, "create", "-q", "-f", "qcow2", "-o", options, path, "4M"])
    run([*OURS, "io", "-c", "write -q -P 5 0 1M", path])
    was = machine.run("stop", "info registers", "savevm s1")
    told = run([*OURS, "snapshot", "-l", path])
    assert told == run([qemu_img, "snapshot", "-l", path])
    (line,) = [line for line in told.splitlines() if " s1 " in line]
    assert line.split()[3] == "KiB"  # the size of its state
    check()
    # The disk goes on, and comes back with the state of the machine.
    run([*OURS, "io", "-c", "write -q -P 6 512k 2M", path])
    run([*OURS, "snapshot", "-c", "s2", path])
    run([*OURS, "snapshot", "-a", "s1", path])
    asked = ["read -q -P 5 0 1M", "read -q -P 0 1M 3M", "read -b -v 0 4"]
    assert "QEVM" in run([*OURS, "io", *(word for c in asked for word in ("-c", c)), path])
    loaded = ("-S", "-loadvm", "s1")
    assert machine.run("info registers", more=loaded)[1:] == was[1:]
    machine.run("cont", "savevm s3", "delvm s1", more=loaded)
    run([*OURS, "snapshot", "-d", "s3", path])
    check()
    run([*OURS, "snapshot", "-a", "s2", path])
    run([*OURS, "io", "-c", "read -q -P 6 512k 2M", path])
