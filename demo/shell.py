"""Running commands as a person would type them, and proving what comes of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from content import MIB
from guest import Kept

SOURCES = Path(__file__).resolve().parent.parent / "src"
if SOURCES.is_dir():  # run from a checkout, without installing anything
    sys.path.insert(0, str(SOURCES))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
    )

failures: list[str] = []
proofs = 0
timings: list[tuple[str, float]] = []


class Shell:
    """Runs commands in the demo's folder, printing each as a person would type it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if k != "DISKWRIGHT_POLICY"}

    def __call__(self, line: str, *, expect: int = 0, show: int = 12) -> str:
        """Run ``line``; its error output (and a progress line) goes to the screen as it comes."""
        print(f"  $ {line}", flush=True)
        words = shlex.split(line)
        progress = "-p" in words
        live = progress and sys.stdout.isatty()
        start = time.monotonic()
        done = subprocess.run(
            self.command(words),
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=None if live else subprocess.PIPE,
            stderr=None if live else subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        timings.append((line, time.monotonic() - start))
        text = done.stdout or ""
        lines = text.splitlines()[-1:] if progress else text.splitlines()
        for out in lines[:show]:
            print(f"    {out}")
        if len(lines) > show > 0:
            print(f"    ... ({len(lines) - show} more lines)")
        prove(done.returncode == expect, f"`{line}` ended with {expect}", f"{done.returncode}")
        prove("Traceback (most" not in text, f"`{line}` said it in plain words")
        return text

    def command(self, words: list[str]) -> list[str]:
        if words[0] == "diskwright":
            return [sys.executable, "-m", "diskwright", *words[1:]]
        return words


def prove(ok: bool, what: str, found: str = "") -> None:
    global proofs
    proofs += 1
    if not ok:
        failures.append(what)
        print(f"  MISMATCH: {what}{f' (found {found})' if found else ''}", flush=True)


def first_difference(a: bytes | bytearray, b: bytes | bytearray) -> int:
    """The offset of the first byte that differs, or -1."""
    if a == b:
        return -1
    for at in range(0, max(len(a), len(b)), MIB):
        if a[at : at + MIB] != b[at : at + MIB]:
            pairs = zip(a[at : at + MIB], b[at : at + MIB], strict=False)
            return at + next((n for n, (x, y) in enumerate(pairs) if x != y), 0)
    return -1


Model = bytes | bytearray | Kept
PIECE = 8 * MIB


def prove_disk(
    source: Path | dict[str, Any],
    model: Model,
    what: str,
    size: int = 0,
    *,
    snapshot: str = "",
    secrets: dict[str, str] | None = None,
) -> None:
    """Read all of an image, or of a snapshot in it, through the Python API and compare it with the
    model.  A ``size`` beyond that of the model reads as zeroes there."""
    import diskwright

    size = size or len(model)
    with diskwright.open(source, policy="trusted", secrets=secrets) as disk:
        if snapshot:
            disk.snapshots.show(snapshot)
        prove(disk.size == size, f"{what}: size", str(disk.size))
        prove_bytes(disk.read_at, model, what, size)


def prove_file(path: Path, model: Model, what: str, longer: bool = False) -> None:
    """The same of a plain file, which may be ``longer``."""

    def read(at: int, length: int) -> bytes:
        file.seek(at)
        return file.read(length)

    size = path.stat().st_size
    prove(size == len(model) or (longer and size > len(model)), f"{what}: size", str(size))
    with path.open("rb") as file:
        prove_bytes(read, model, what, len(model))


def prove_bytes(read: Callable[[int, int], bytes], model: Model, what: str, size: int) -> None:
    wrong = -1
    digest = hashlib.sha256()
    for at in range(0, size, PIECE):
        length = min(PIECE, size - at)
        want = model[at : at + length].ljust(length, b"\0")
        digest.update(want)
        got = read(at, length)
        if got != want:
            wrong = at + first_difference(bytes(got), want)
            break
    prove(wrong < 0, f"{what}: every byte is the model's", f"difference at {wrong}")
    if wrong < 0:
        print(f"  proved: {what}: {size // MIB} MiB, sha256 {digest.hexdigest()[:16]}...")


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def has_qemu() -> bool:
    """Whether qemu-img is installed; says so if it is not."""
    if shutil.which("qemu-img"):
        return True
    print("  (qemu-img is not installed, so it was not asked)")
    return False


def oracle(shell: Shell, image: str, raw: str) -> None:
    """qemu-img's opinion of ``image``, which must hold the same bytes as the file ``raw``."""
    if not has_qemu():
        return
    format = image.rpartition(".")[2]
    shell(f"qemu-img check {image}", show=1)
    shell(f"qemu-img compare -f raw -F {format} {raw} {image}")


@contextlib.contextmanager
def served(shell: Shell, arguments: str, socket: Path) -> Iterator[str]:
    """`diskwright serve` in the background, and where a client finds it."""
    with background(shell, f"diskwright serve {arguments}", socket):
        yield f"nbd+unix:///?socket={socket}"


@contextlib.contextmanager
def background(shell: Shell, line: str, socket: Path) -> Iterator[None]:
    """A server that makes ``socket``, ended as a service manager would end it."""
    print(f"  $ {line} &", flush=True)
    process = subprocess.Popen(
        shell.command(shlex.split(line)), cwd=shell.folder, env=shell.env, stdin=subprocess.DEVNULL
    )
    try:
        limit = time.monotonic() + 20
        while not socket.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        prove(socket.exists(), "the socket is there")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        prove(status == 0, "the server stopped in good order", str(status))
