"""The io language here and in qemu-io, on equal files, with answers made comparable."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from peers import find_peer

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    **{k: v for k, v in os.environ.items() if not k.startswith("DISKWRIGHT_")},
    "PYTHONPATH": str(ROOT / "src"),
    "DISKWRIGHT_POLICY": "trusted",
    "LC_ALL": "C",
}
# As `qemu-io`, so that messages start with the same name.
OURS = [
    sys.executable,
    "-c",
    "import sys; from diskwright.cli.main import main; sys.exit(main('qemu-io', sys.argv[1:]))",
]


class Answer(NamedTuple):
    out: str
    err: str
    status: int


def masked(text: str) -> str:
    """Without what differs from run to run (times and rates), and without the one-line
    descriptions of commands, which are our own words."""
    text = re.sub(r"(?m)^((?:qemu-io> )*[a-z_]+ .*) -- [a-z].*", r"\1 -- SUMMARY", text)
    text = re.sub(r" ops; .*", " ops; TIME", text)
    return re.sub(r"(?m)^((?:qemu-io> )*\d+,1,).*", r"\1TIME", text)


def call(
    program: Sequence[str], arguments: Sequence[str], cwd: Path, lines: Sequence[str] | None = None
) -> Answer:
    done = subprocess.run(
        [*program, *arguments],
        input="".join(f"{line}\n" for line in lines).encode() if lines is not None else b"",
        capture_output=True,
        cwd=cwd,
        env=ENV,
        timeout=60,
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert "Traceback" not in err, err
    return Answer(masked(out), err, done.returncode)


class Both:
    """A directory for each program, with equal files."""

    def __init__(self, path: Path, peer: str) -> None:
        self.peer = [peer]
        self.ours, self.theirs = path / "ours", path / "theirs"
        self.ours.mkdir()
        self.theirs.mkdir()

    def file(self, name: str, data: bytes = b"", size: int | None = None) -> None:
        for where in (self.ours, self.theirs):
            (where / name).write_bytes(data)
            if size is not None:
                os.truncate(where / name, size)

    def image(self, qemu_img: str, name: str, *arguments: str) -> None:
        subprocess.run(
            [qemu_img, "create", "-q", "-f", "qcow2", *arguments[:-1], name, arguments[-1]],
            cwd=self.theirs,
            check=True,
        )
        shutil.copy(self.theirs / name, self.ours / name)

    def run(
        self, *arguments: str, lines: Sequence[str] | None = None, answers: bool = True
    ) -> tuple[Answer, Answer]:
        """Ours and theirs."""
        return (
            call(OURS, arguments, self.ours, lines),
            call(self.peer, arguments, self.theirs, lines),
        )

    def same(self, *arguments: str, lines: Sequence[str] | None = None) -> Answer:
        """Run both; standard output, standard error and exit status must be the same."""
        ours, theirs = self.run(*arguments, lines=lines)
        for mine, wanted in ((ours.out, theirs.out), (ours.err, theirs.err)):
            lines_of = difflib.unified_diff(wanted.splitlines(), mine.splitlines(), "qemu-io",
                                            "diskwright", lineterm="", n=2)  # fmt: skip
            if difference := "\n".join(lines_of):
                pytest.fail(f"{arguments}:\n{difference[:3000]}", pytrace=False)
        assert ours.status == theirs.status, arguments
        return ours

    def commands(self, commands: Sequence[str], *arguments: str) -> Answer:
        """The same for a list of ``-c`` commands."""
        words = [word for command in commands for word in ("-c", command)]
        return self.same(*words, *arguments)


@pytest.fixture
def both(tmp_path: Path) -> Both:
    made = Both(tmp_path, find_peer("qemu-io"))
    made.file("disk.raw", size=1 << 20)
    made.file("letters", b"abcde")
    made.file("all", bytes(range(256)))
    made.file("empty")
    return made
