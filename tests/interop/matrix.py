"""One image of a random shape, what two programs do to it, and what it must hold then."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interop.shapes import Shape, base_options

Tool = Callable[[Path, list[str]], tuple[int, str]]
SECRETS = {"s0": "first one", "s1": "another", "s2": "the base's"}
OBJECTS = [w for i, v in SECRETS.items() for w in ("--object", f"secret,id={i},data={v}")]
OURS_IN_CHECK = ("passes", "bytes-read")
"""What only ours tells."""
# What QEMU's refuses and ours does (docs/differences.md).
OURS_ALONE = (
    "Failed to zero out new clusters",
    "Cannot use relative backing file names",
    "Error while writing to COW image: Input/output error",  # rebase -c over what is allocated
    "write failed: Operation not supported",  # -z -n in version 2, where nothing is stored
)


class Refused(Exception):
    """Both tools refused."""


class Matrix:
    """``now``: the folder of the image that the sequence is at."""

    def __init__(self, folder: Path, ours: Tool, theirs: Tool, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.tools = {"ours": ours, "theirs": theirs}
        self.now = folder / "now"
        self.sides = {name: folder / name for name in self.tools}
        shutil.rmtree(folder, ignore_errors=True)
        self.now.mkdir(parents=True)
        self.log: list[str] = []
        self.shape: Shape
        self.model = bytearray()
        self.base = b""
        self.held: dict[str, bytes | None] = {}
        """Snapshots; None for those of which the bytes are not known any more."""
        self.bitmaps: list[str] = []
        self.secret = "s0"
        self.spare = ""
        self.other = b""
        """What is in the file `other`, over which the image can be rebased."""
        self.vm_state = False
        self.number = 0

    def told(self) -> str:
        return "\n".join("  " + line for line in self.log)

    # -- both tools
    def described(self, backing: bool = True) -> str:
        shape = self.shape
        words = ["driver=qcow2", "file.filename=disk"]
        if shape.encrypted:
            words.append(f"encrypt.key-secret={self.secret}")
        if shape.base in ("luks", "aes") and backing:
            words += ["backing.driver=qcow2", "backing.encrypt.key-secret=s2"]
            words += ["backing.file.filename=base"]
        return ",".join(words)

    def image(self, backing: bool = True) -> list[str]:
        return [*OBJECTS, "--image-opts", self.described(backing)]

    def both(self, words: list[str], wanted: int = 0) -> str:
        """Carry it out on copies by both tools, which must agree, with the exit status ``wanted``
        or by refusing it; go on with what one of them left, which is told."""
        ends = {}
        for name, tool in self.tools.items():
            shutil.rmtree(self.sides[name], ignore_errors=True)
            subprocess.run(["cp", "-r", "--sparse=always", self.now, self.sides[name]], check=True)
            ends[name] = tool(self.sides[name], words)
        chosen = self.rng.choice(("ours", "theirs"))
        plain = [w for w in words if not w.startswith(("secret,", "--object"))]
        self.log.append(f"{chosen}: {' '.join(map(repr, plain))}")
        assert "Traceback" not in ends["ours"][1], ends["ours"][1]
        statuses = ends["ours"][0], ends["theirs"][0]
        alone = any(text in ends["theirs"][1] for text in OURS_ALONE)
        if statuses[0] == wanted != statuses[1] and (alone or statuses[1] < 0):
            chosen, statuses = "ours", (wanted, wanted)  # now and then a rebase of theirs aborts
            self.forget_theirs()
        assert statuses[0] == statuses[1], f"ended with {ends['ours']} for {ends['theirs']}"
        if statuses[0] != wanted:
            if (self.now / "disk").exists():  # what we refuse changes nothing
                # (QEMU's leaves leaks: snapshots without room in the counts, bitmaps in version 2.)
                self.look("ours", full=False)
            self.log[-1] += f"  (refused: {ends['ours'][1].strip()} | {ends['theirs'][1].strip()})"
            raise Refused
        self.go_on(chosen)
        return chosen

    def forget_theirs(self) -> None:
        """Both sides have what ours did."""
        shutil.rmtree(self.sides["theirs"])
        shutil.copytree(self.sides["ours"], self.sides["theirs"])

    def go_on(self, side: str) -> None:
        shutil.rmtree(self.now)
        shutil.copytree(self.sides[side], self.now)

    def alone(self, words: list[str], wanted: int = 0) -> None:
        """Our tool does it, and both sides go on with that."""
        self.log.append(f"ours alone: {' '.join(map(repr, words))}")
        status, text = self.tools["ours"](self.now, words)
        assert status == wanted, f"ended with {status}: {text}"
        for side in self.sides.values():
            shutil.rmtree(side, ignore_errors=True)
            shutil.copytree(self.now, side)

    # -- looking
    def content(self, tool: str, side: str, *more: str, verb: str = "convert") -> bytes:
        out = self.folder / "out"
        out.unlink(missing_ok=True)
        words = [verb, *more, *self.image(), "-O", "raw", str(out)]
        status, text = self.tools[tool](self.sides[side], words)
        # Salvaging tells by 3 that clusters are left that nothing names.
        good = status == 0 or (verb == "salvage" and status == 3)
        assert good, f"{tool} cannot read what {side} left: {text}"
        return out.read_bytes()

    def reads_the_model(self, tool: str, side: str) -> None:
        """By converting; now and then by comparing, or by salvaging."""
        way = self.rng.choice(("convert",) * 8 + ("compare", "salvage"))
        if way == "compare":
            (self.folder / "model").write_bytes(self.model)
            words = ["compare", "-q", *self.image(), "driver=raw,file.filename=../model"]
            if self.tools[tool](self.sides[side], words)[0] == 0:
                return
        if way == "salvage" and tool == "ours":
            found = self.content(tool, side, verb="salvage")
        else:
            found = self.content(tool, side)
        if found != self.model:
            pairs = zip(found, self.model, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), -1)
            raise AssertionError(
                f"{tool} reads of {side} by {way} {len(found)} bytes for {len(self.model)}, first "
                f"difference at {at:#x}: {found[at : at + 8].hex()} for "
                f"{bytes(self.model[at : at + 8]).hex()}"
            )

    def look(self, side: str, full: bool = True) -> None:
        """Both tools find ``side`` whole and see the model in it."""
        for tool in self.tools:
            if tool == side and self.rng.random() < 0.7:
                continue  # what the other one says counts more
            status, text = self.tools[tool](self.sides[side], ["check", *self.image()])
            assert status == 0, f"{tool} says of what {side} left: {text}"
            self.reads_the_model(tool, side)
        if not full:
            return
        for name, content in self.held.items():
            if content is not None and self.rng.random() < 0.3:
                tool = self.rng.choice(("ours", "theirs"))
                found = self.content(tool, side, "-l", name)
                most = min(len(found), len(content))
                assert found[:most] == content[:most], f"{tool}, {side}: snapshot {name}"

    def look_all(self, bitmaps: bool = True) -> None:
        for side in self.sides:
            self.look(side)
        if self.rng.random() < 0.3:
            self.tell(self.rng.choice(list(self.sides)))
        if bitmaps and self.bitmaps and self.shape.base not in ("luks", "aes"):
            told = {side: self.dirty(side) for side in self.sides}
            assert told["ours"] == told["theirs"], f"bitmaps {told['ours']} for {told['theirs']}"
            name = self.rng.choice(self.bitmaps)
            for side in self.sides:
                if name in told[side] and not told[side][name][2]:
                    theirs = self.served(side, name)
                    mine = [tuple(part) for part in told[side][name][3]]
                    assert mine == theirs, f"{side}, {name}: {mine} for {theirs}"

    def tell(self, side: str) -> None:
        """Both tools say the same of one image."""
        json_ = ["--output=json"]
        words = self.rng.choice((
            ["map", *json_], ["map"], ["info", *json_], ["check", *json_], ["snapshot", "-l"],
            ["measure", "-O", "qcow2", *json_], ["measure", "-O", "raw", *json_],
        ))  # fmt: skip
        said: dict[str, Any] = {}
        for name, tool in self.tools.items():
            status, text = tool(self.sides[side], [*words, *self.image(words[0] != "info")])
            if status and words == ["map"] and "or compressed clusters" in text:
                return
            assert status == 0, f"{name}, {words}, {side}: {text}"
            said[name] = json.loads(text) if words[-1] == "--output=json" else text.splitlines()
        if words == ["map", *json_]:
            said = {name: joined(parts) for name, parts in said.items()}
        if words[0] == "check":
            said["ours"] = {k: v for k, v in said["ours"].items() if k not in OURS_IN_CHECK}
        assert said["ours"] == said["theirs"], (
            f"{words} of {side}: {said['ours']} for {said['theirs']}"
        )

    def dirty(self, side: str) -> dict[str, list[object]]:
        described: dict[str, object] = {"driver": "qcow2", "file.filename": "disk"}
        if self.shape.encrypted:
            described["encrypt.key-secret"] = self.secret
        words = ["dirty", json.dumps(described), json.dumps(SECRETS)]
        status, text = self.tools["ours"](self.sides[side], words)
        assert status == 0, text
        found: dict[str, list[object]] = json.loads(text)
        return found

    def served(self, side: str, name: str) -> list[tuple[int, int]]:
        socket, pid = self.folder / "socket", self.folder / "pid"
        socket.unlink(missing_ok=True)
        words = ["serve", *OBJECTS, "--image-opts", "-r", "-t", "-B", name, "-k", str(socket)]
        words += ["--fork", "--pid-file", str(pid), self.described()]
        status, text = self.tools["theirs"](self.sides[side], words)
        assert status == 0, text
        uri = f"nbd+unix:///?socket={socket}"
        ask = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri]
        try:
            status, text = self.tools["theirs"](self.folder, ask)
        finally:
            subprocess.run(["kill", pid.read_text().strip()], check=False)
            for _ in range(200):
                if not pid.exists():
                    break
                time.sleep(0.005)
        assert status == 0, text
        return [(p["offset"], p["length"]) for p in json.loads(text) if p["type"] & 1]

    # -- making
    def create(self, shape: Shape) -> bool:
        """Whether both can make it."""
        self.shape = shape
        size = -(-shape.size // 512) * 512
        if shape.base:
            self.make_base()
        words = ["create", "-q", *OBJECTS, "-f", "qcow2", "-o", shape.words()]
        if shape.base in ("raw", "qcow2"):
            words += ["-b", "base", "-F", shape.base]
        elif shape.base:
            words += ["-u", "-b", "base", "-F", "qcow2"]
        self.model = bytearray(self.base[:size].ljust(size, b"\0"))
        try:
            self.both([*words, "disk", str(shape.size)])
        except Refused:
            return False
        self.look_all()
        return True

    def make_base(self) -> None:
        """The backing file, perhaps over another one, by a tool drawn at random."""
        shape = self.shape
        model = b""
        below: list[str] = []
        if shape.deep:
            size = self.rng.choice((shape.base_size, shape.base_size // 1024 * 512 + 512))
            model = self.written("deep", "raw", [], size, b"")
            below = ["-b", "deep", "-F", "raw"]
        self.base = self.written("base", shape.base, below, shape.base_size, model)
        if shape.base in ("raw", "qcow2"):
            size = self.rng.choice((shape.base_size, shape.base_size // 1024 * 512 + 512))
            self.other = self.written("other", "raw", [], size, b"")

    def written(self, name: str, kind: str, below: list[str], size: int, model: bytes) -> bytes:
        """A new image with something in it; what it holds."""
        rng = self.rng
        tool = self.tools[rng.choice(("ours", "theirs"))]
        fmt = "raw" if kind == "raw" else "qcow2"
        described = f"driver={fmt},file.filename={name}"
        words = ["create", "-q", *OBJECTS, "-f", fmt, *below]
        if kind in ("luks", "aes"):
            more = ",encrypt.iter-time=1" if kind == "luks" else ""
            words += ["-o", f"encrypt.format={kind},encrypt.key-secret=s2{more}"]
            described += ",encrypt.key-secret=s2"
        elif kind == "qcow2":
            words += ["-o", base_options(rng)]
        status, text = tool(self.now, [*words, name, str(size)])
        assert not status, text
        content = bytearray(model[:size].ljust(size, b"\0"))
        words = ["io", *OBJECTS, "--image-opts"]
        for _ in range(5):
            offset, length = self.range(size)
            pattern = rng.randrange(1, 256)
            command = f"write -q -P {pattern} {offset} {length}"
            if kind == "qcow2" and rng.random() < 0.2:
                command, pattern = f"write -q -z {offset} {length}", 0
            words += ["-c", command]
            content[offset : offset + length] = bytes([pattern]) * length
        status, text = tool(self.now, [*words, described])
        assert not status, text
        return bytes(content)

    def range(self, size: int, unit: int = 512) -> tuple[int, int]:
        """Offset and length within ``size``, aligned to sectors at least, often to ``unit``."""
        rng, cluster = self.rng, self.shape.cluster
        offset = rng.randrange(size)
        length = rng.choice((512, 1024, 4096, cluster, 3 * cluster, cluster // 32 or 512, 100_000))
        if rng.random() < 0.4 or unit > 512:
            offset -= offset % cluster
        offset -= offset % unit
        length = -(-min(length, size - offset) // unit) * unit
        return offset, max(min(length, size - offset), 512)


def joined(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `map` says, without the places of what is nowhere, which only theirs tells of unused
    subclusters."""
    out: list[dict[str, Any]] = []
    for part in parts:
        if not part["present"]:
            part.pop("offset", None)
        about = {k: v for k, v in part.items() if k not in ("start", "length", "offset")}
        if out and not part["present"] and about.items() <= out[-1].items():
            out[-1]["length"] += part["length"]
        else:
            out.append(part)
    return out
