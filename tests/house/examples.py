"""The examples of the documentation, run as a reader would run them.

A page is a session: its blocks run in their order, in one folder, Python ones in one namespace.

- ``console``: lines that begin with ``$`` are commands, what follows is their output, standard
  error included.  Output that is not shown is not compared; ``...`` stands for anything, and white
  space for any other.  A command ends with status 0, or as ``# exit status N`` behind it says.
- ``python`` is executed.  A ``text`` block right behind it is what it prints.
- ``toml`` and ``json`` are parsed; ``text`` is shown and nothing else.
- A command that ends with ``&``, or has ``--fork``, is a server: of the daemon, and of
  ``serve`` with ``-t``, the end is asked for behind the last block.
- A comment ``<!-- setup`` has commands that readers do not see; ``<!-- not run: WHY -->`` before a
  block says why it is not run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

from cli.support import called, command, environment

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
LANGUAGES = ("console", "python", "text", "toml", "json")
PEERS = ("jq", "nbdinfo", "nbdcopy", "qemu-img", "qemu-io")
_BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->"
    r"|^(?:<!-- not run: (?P<why>[^\n]+) -->\n\n?)?"
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
_STATUS = re.compile(r"\s+# exit status (\d+)$")
_HERE = re.compile(r"<<'(\w+)'$")
_LISTENS = re.compile(r"-k (\S+)|--chardev socket,\S*\bpath=([^\s,]+)")
_SHELL = re.compile(r"[|<>&;*`$(]")  # what only a shell understands


class Block(NamedTuple):
    """``why`` it is not run; ``printed``: what a Python block shows; ``hidden`` from readers."""

    language: str
    text: str
    why: str | None = None
    printed: str | None = None
    hidden: bool = False


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in their order."""
    out: list[Block] = []
    end = -1
    for found in _BLOCK.finditer(page):
        if found["setup"] is not None:
            out.append(Block("console", found["setup"], hidden=True))
            continue
        text = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        follows = not page[end : found.start()].strip() if end >= 0 else False
        end = found.end()
        if found["language"] == "text" and follows and out[-1].language == "python":
            out[-1] = out[-1]._replace(printed=text)
        else:
            out.append(Block(found["language"], text, found["why"]))
    return out


def commands(text: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output that is shown."""
    found: list[tuple[str, str]] = []
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            line = line[2:]
            while line.endswith("\\"):
                line = line[:-1] + next(lines).lstrip("> ")
            if here := _HERE.search(line):
                for more in lines:
                    line += f"\n{more}"
                    if more == here[1]:
                        break
            found.append((line, ""))
        else:
            assert found, f"output without a command: {line}"
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
    return found


def same(shown: str, printed: str) -> bool:
    """Whether what was printed is what is shown."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in shown.split("...")]
    return re.fullmatch(".*".join(parts), printed.strip(), re.DOTALL) is not None


class Session:
    """A page that is being carried out in ``folder``."""

    def __init__(self, folder: Path, peer: Callable[[str], str]) -> None:
        self.folder, self.peer = folder / "work", peer
        self.folder.mkdir()
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.servers: list[subprocess.Popen[bytes]] = []
        self.environment = environment()
        del self.environment["DISKWRIGHT_POLICY"]
        programs = folder / "bin"
        programs.mkdir()
        for name in ("diskwright", "python"):
            words = command(name) if name == "diskwright" else command()[:1]
            path = programs / name
            path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            path.chmod(0o755)
        self.environment["PATH"] = f"{programs}{os.pathsep}{self.environment['PATH']}"
        self.environment["PYTHONPATH"] = str(ROOT / "src")

    def run(self, block: Block) -> None:
        if block.language == "console":
            for line, shown in commands(block.text):
                self._command(line, shown)
        elif block.language == "python":
            for server in self.servers:  # whose last client may have left just now
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(2)
            printed = io.StringIO()
            with (
                contextlib.chdir(self.folder),
                contextlib.redirect_stdout(printed),
                mock.patch.dict(os.environ, self.environment, clear=True),
            ):
                exec(compile(block.text, "<example>", "exec"), self.namespace)
            if block.printed is not None:
                assert same(block.printed, printed.getvalue()), printed.getvalue()
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            json.loads(block.text)

    def _command(self, line: str, shown: str) -> None:
        told = _STATUS.search(line)
        line, expected = _STATUS.sub("", line), int(told[1]) if told else 0
        for name in PEERS:
            if re.search(rf"\b{name}\b", line):
                self.peer(name)
        if line.endswith(" &") or " --fork " in line:
            words = shlex.split(line.removesuffix(" &"))
            self._serve([word for word in words if word != "--fork"])
            return
        if line.startswith("diskwright ") and not _SHELL.search(line):
            done = called("diskwright", shlex.split(line)[1:], self.folder, self.environment)
            status, printed = done.status, (done.out + done.err).decode()
        else:
            ran = subprocess.run(
                ["bash", "-o", "pipefail", "-c", line],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=60,
            )
            status, printed = ran.returncode, ran.stdout.decode()
        assert status == expected, f"$ {line}\n{printed}(exit status {status})"
        if shown:
            assert same(shown, printed), f"$ {line}\n{printed}"

    def _serve(self, words: list[str]) -> None:
        """Start a server, and wait for its socket."""
        self.servers.append(
            subprocess.Popen(words, cwd=self.folder, env=self.environment, process_group=0)
        )
        found = _LISTENS.search(" ".join(words))
        assert found, "a server of which nobody knows where it listens"
        socket = self.folder / (found[1] or found[2])
        limit = time.monotonic() + 20
        while not socket.exists() and time.monotonic() < limit:
            time.sleep(0.02)

    def close(self) -> None:
        """Servers have ended with their last client, or end now."""
        try:
            for server in self.servers:
                if {"-t", "daemon"} & set(cast("list[str]", server.args)):
                    server.terminate()
                assert server.wait(20) == 0
        finally:
            for server in self.servers:
                server.kill()
