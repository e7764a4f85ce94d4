"""A virtual machine under QEMU, with its console as lines."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

SECONDS = 900.0
"""For all that a guest does.  With TCG two boots need up to a minute of a processor, of which a
loaded machine may have little to give."""
_PROBE_SECONDS = 2.0


class Console:
    """What the guest says, and a way to answer."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def until(self, word: str) -> list[str]:
        """The lines up to the next one that is ``word``, which is left out."""
        assert self.process.stdout
        begin = len(self.lines)
        while True:
            line = (await self.process.stdout.readline()).decode(errors="replace")
            assert line, f"the guest has ended before it said {word}:\n{self}"
            self.lines.append(line.strip())
            if self.lines[-1] == word:
                return self.lines[begin:-1]

    async def say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")
        await self.process.stdin.drain()

    def __str__(self) -> str:
        return "\n".join(f"  console: {line}" for line in self.lines)


@asynccontextmanager
async def machine(scratch: Path, *words: str) -> AsyncIterator[Console]:
    """A machine with these devices; the console is shown when the body fails."""
    process = await asyncio.create_subprocess_exec(
        *("qemu-system-x86_64", "-accel", accelerator(scratch), "-m", "256", "-nodefaults"),
        *("-display", "none", "-serial", "stdio", *words),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    console = Console(process)
    try:
        async with asyncio.timeout(SECONDS):
            yield console
            assert await process.wait() == 0
    except BaseException as error:
        error.add_note(str(console))
        raise
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def accelerator(scratch: Path) -> str:
    """``kvm`` where that is as fast as it should be; otherwise ``tcg``.

    A host that is itself a guest may have a KVM that needs seconds to reach a boot sector, and
    minutes for a kernel.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    sector = scratch / "probe"
    sector.write_bytes(b"\xb0\x10\xe6\xf4\xf4".ljust(510, b"\0") + b"\x55\xaa")  # out 0xf4, 0x10
    exit = "isa-debug-exit,iobase=0xf4,iosize=1"
    words = ["-drive", f"file={sector},format=raw", "-device", exit]
    try:
        done = subprocess.run(
            ["qemu-system-x86_64", "-accel", "kvm", "-nodefaults", "-display", "none", *words],
            capture_output=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "tcg"
    return "kvm" if done.returncode == 0x21 else "tcg"
