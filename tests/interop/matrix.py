"""One image of a random shape, the operations on it, and what it must hold after each."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Tool = Callable[[Path, list[str]], tuple[int, str]]
KIB, MIB = 1 << 10, 1 << 20
WIDTHS = ("1", "2", "4", "8", "16", "32", "64")
SECRETS = {"s0": "first one", "s1": "another", "s2": "the base's"}
OBJECTS = [w for i, v in SECRETS.items() for w in ("--object", f"secret,id={i},data={v}")]


class Shape(NamedTuple):
    """What an image is made of."""

    size: int
    cluster: int
    options: dict[str, str]
    base: str
    """"" for none, otherwise the format of a backing file."""
    base_size: int = 0

    @property
    def encrypted(self) -> str:
        return self.options.get("encrypt.format", "")

    @property
    def external(self) -> bool:
        return "data_file" in self.options

    @classmethod
    def drawn(cls, rng: random.Random, target: bool = False) -> Shape:
        """Options that need not fit together: then both must refuse them."""
        cluster = 1 << rng.choice((9, 10, 12, 14, 15, 16, 16, 16, 17, 21))
        options = {"cluster_size": str(cluster)}
        limit = min(cluster << 10, 3 * MIB)
        size = rng.randrange(limit // 4, limit) // 512 * 512
        if rng.random() < 0.5:
            size = max(size // cluster * cluster, cluster)
        old = rng.random() < 0.15
        if old:
            options["compat"] = "0.10"
        draws: list[tuple[float, str, str]] = [
            (
                0.4 if not old else 0.03,
                "refcount_bits",
                rng.choice(["1", "2", "4", "8", "16", "32", "64"]),
            ),
            (0.2 if not old else 0.03, "lazy_refcounts", "on"),
            (0.4 if cluster >= 16384 and not old else 0.03, "extended_l2", "on"),
            (0.25 if not old else 0.03, "compression_type", "zstd"),
            (0.2 if not old else 0.03, "data_file", "data.raw"),
            (0.3, "preallocation", rng.choice(["metadata", "falloc", "full"])),
        ]
        for chance, name, value in draws:
            if rng.random() < chance:
                options[name] = value
        if "data_file" in options and rng.random() < 0.8:
            options.pop("extended_l2", None)  # not together here
        if "data_file" in options and rng.random() < 0.5:
            options["data_file_raw"] = "on"
        if rng.random() < 0.3:
            options["encrypt.format"] = kind = rng.choice(("luks", "luks", "aes"))
            options["encrypt.key-secret"] = "s0"
            if kind == "luks":
                options["encrypt.iter-time"] = "1"
            options.pop("preallocation", None)  # QEMU's reads as noise
        base = "" if target or rng.random() < 0.5 else rng.choice(("raw", "qcow2", "luks", "aes"))
        base_size = 0
        if base:
            base_size = max(512, size + rng.choice((0, 0, 512, -512, 65536, -65536, -size // 2)))
            base_size = base_size // 512 * 512
        return cls(size, cluster, options, base, base_size)

    def words(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.options.items())


# What QEMU's refuses and ours does (docs/differences.md).
OURS_ALONE = ("Failed to zero out new clusters", "Cannot use relative backing file names")


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

    def both(self, words: list[str], judge: Callable[[Path], None] | None = None) -> str:
        """Carry it out on copies by both tools, which must agree; go on with one of them, ``judge``
        looks at each first."""
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
        if statuses == (0, 1) and any(text in ends["theirs"][1] for text in OURS_ALONE):
            chosen, statuses = "ours", (0, 0)
            shutil.rmtree(self.sides["theirs"])
            shutil.copytree(self.sides["ours"], self.sides["theirs"])
        assert statuses[0] == statuses[1], f"ended with {ends['ours']} for {ends['theirs']}"
        if statuses[0]:
            if (self.now / "disk").exists():  # what we refuse changes nothing
                # (QEMU's leaves leaks: snapshots without room in the counts, bitmaps in version 2.)
                self.look("ours", full=False)
            self.log[-1] += f"  (refused: {ends['ours'][1].strip()} | {ends['theirs'][1].strip()})"
            raise Refused
        if judge is not None:
            for side in self.sides.values():
                judge(side)
        shutil.rmtree(self.now)
        shutil.copytree(self.sides[chosen], self.now)
        return chosen

    # -- looking
    def content(self, tool: str, side: str, *more: str) -> bytes:
        out = self.folder / "out"
        out.unlink(missing_ok=True)
        words = ["convert", *more, *self.image(), "-O", "raw", str(out)]
        status, text = self.tools[tool](self.sides[side], words)
        assert status == 0, f"{tool} cannot read what {side} left: {text}"
        return out.read_bytes()

    def look(self, side: str, full: bool = True) -> None:
        """Both tools find ``side`` whole and see the model in it."""
        for tool in self.tools:
            if tool == side and self.rng.random() < 0.7:
                continue  # what the other one says counts more
            status, text = self.tools[tool](self.sides[side], ["check", *self.image()])
            assert status == 0, f"{tool} says of what {side} left: {text}"
            found = self.content(tool, side)
            if found != self.model:
                pairs = zip(found, self.model, strict=False)
                at = next((i for i, (a, b) in enumerate(pairs) if a != b), -1)
                raise AssertionError(
                    f"{tool} reads of {side} {len(found)} bytes for {len(self.model)}, first "
                    f"difference at {at:#x}: {found[at : at + 8].hex()} for "
                    f"{bytes(self.model[at : at + 8]).hex()}"
                )
        if not full:
            return
        for name, content in self.held.items():
            if content is not None and self.rng.random() < 0.3:
                tool = self.rng.choice(("ours", "theirs"))
                found = self.content(tool, side, "-l", name)
                most = min(len(found), len(content))
                assert found[:most] == content[:most], f"{tool}, {side}: snapshot {name}"

    def look_all(self) -> None:
        for side in self.sides:
            self.look(side)
        if self.bitmaps and not self.shape.base:
            told = {side: self.dirty(side) for side in self.sides}
            assert told["ours"] == told["theirs"], f"bitmaps {told['ours']} for {told['theirs']}"
            name = self.rng.choice(self.bitmaps)
            for side in self.sides:
                if name in told[side] and not told[side][name][2]:
                    theirs = self.served(side, name)
                    mine = [tuple(part) for part in told[side][name][3]]
                    assert mine == theirs, f"{side}, {name}: {mine} for {theirs}"

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

    # -- operations
    def create(self, shape: Shape) -> bool:
        """Whether both can make it."""
        self.shape = shape
        if shape.base:
            self._make_base()
        words = ["create", "-q", *OBJECTS, "-f", "qcow2", "-o", shape.words()]
        if shape.base == "raw" or shape.base == "qcow2":
            words += ["-b", "base", "-F", shape.base]
        elif shape.base:
            words += ["-u", "-b", "base", "-F", "qcow2"]
        self.model = bytearray(self.base[: shape.size].ljust(shape.size, b"\0"))
        try:
            self.both([*words, "disk", str(shape.size)])
        except Refused:
            return False
        self.look_all()
        return True

    def _make_base(self) -> None:
        shape, rng = self.shape, self.rng
        words = ["create", "-q", *OBJECTS, "-f", "raw" if shape.base == "raw" else "qcow2"]
        described = f"driver={'raw' if shape.base == 'raw' else 'qcow2'},file.filename=base"
        if shape.base in ("luks", "aes"):
            more = ",encrypt.iter-time=1" if shape.base == "luks" else ""
            words += ["-o", f"encrypt.format={shape.base},encrypt.key-secret=s2{more}"]
            described += ",encrypt.key-secret=s2"
        tool = self.tools["theirs"]
        status, text = tool(self.now, [*words, "base", str(shape.base_size)])
        assert not status, text
        model = bytearray(shape.base_size)
        words = ["io", *OBJECTS, "--image-opts"]
        for _ in range(5):
            offset, length = self._range(len(model))
            pattern = rng.randrange(1, 256)
            words += ["-c", f"write -q -P {pattern} {offset} {length}"]
            model[offset : offset + length] = bytes([pattern]) * length
        status, text = tool(self.now, [*words, described])
        assert not status, text
        self.base = bytes(model)

    def _range(self, size: int, unit: int = 512) -> tuple[int, int]:
        """Aligned to sectors at least, often to ``unit``."""
        rng, cluster = self.rng, self.shape.cluster
        offset = rng.randrange(size)
        length = rng.choice((512, 1024, 4096, cluster, 3 * cluster, cluster // 32 or 512, 100_000))
        if rng.random() < 0.4 or unit > 512:
            offset -= offset % cluster
        offset -= offset % unit
        length = -(-min(length, size - offset) // unit) * unit
        return offset, max(min(length, size - offset), 512)

    def step(self) -> None:
        """One random operation."""
        kinds = [
            *["write"] * 6, *["zero"] * 2, *["discard"] * 2, "packed", *["snapshot"] * 4,
            *["bitmap"] * 5, *["resize"] * 2, *["amend"] * 3, "rebase", "commit", "convert", "mend",
        ]  # fmt: skip
        kind = self.rng.choice(kinds)
        try:
            getattr(self, f"_{kind}")()
        except Refused:
            return
        self.look_all()

    def _write(self) -> None:
        words = ["io", *OBJECTS, "--image-opts"]
        for _ in range(self.rng.randrange(1, 5)):
            offset, length = self._range(len(self.model))
            pattern = self.rng.randrange(1, 256)
            words += ["-c", f"write -q -P {pattern} {offset} {length}"]
            self.model[offset : offset + length] = bytes([pattern]) * length
        self.both([*words, self.described()])

    def _zero(self) -> None:
        offset, length = self._range(len(self.model))
        unmap = self.rng.choice(("", "-u "))
        self.model[offset : offset + length] = bytes(length)
        command = f"write -q -z {unmap}{offset} {length}"
        self.both(["io", *OBJECTS, "--image-opts", "-c", command, self.described()])

    def _discard(self) -> None:
        offset, length = self._range(len(self.model))
        command = f"discard -q {offset} {length}"
        more = self.rng.choice(("", "", ",discard-no-unref=on"))
        described = self.described() + more
        old = bytes(self.model)
        words = ["io", *OBJECTS, "--image-opts", "-d", "unmap", "-c", command, described]
        chosen = self.both(words)
        for side in ("ours", "theirs"):
            found = self.content("theirs", side)
            end = offset + length
            assert found[:offset] == old[:offset] and found[end:] == old[end:], "discarded more"
            below = self.base.ljust(len(old), b"\0")
            for at in range(offset, end, 512):
                piece = found[at : at + 512]
                may = [old[at : at + 512], bytes(len(piece)), below[at : at + 512]]
                assert piece in may, f"{side}: {at:#x} after a discard"
        for side in ("ours", "theirs"):
            self.model[:] = self.content("theirs", side)
            self.look(side, full=False)
        self.model[:] = self.content("theirs", chosen)
        other = "theirs" if chosen == "ours" else "ours"
        shutil.rmtree(self.sides[other])
        shutil.copytree(self.sides[chosen], self.sides[other])

    def _packed(self) -> None:
        if self.shape.encrypted:
            return
        offset, length = self._range(len(self.model), self.shape.cluster)
        pattern = self.rng.randrange(1, 256)
        command = f"write -q -c -P {pattern} {offset} {length}"
        if length > self.shape.cluster:
            length = self.shape.cluster
            command = f"write -q -c -P {pattern} {offset} {length}"
        model = bytearray(self.model)
        model[offset : offset + length] = bytes([pattern]) * length
        self.both(["io", *OBJECTS, "--image-opts", "-c", command, self.described()])
        self.model = model

    def _snapshot(self) -> None:
        what = self.rng.choice("ccad") if self.held else "c"
        image = self.image()
        if what == "c":
            self.number += 1
            name = f"snapshot{self.number}"
            self.both(["snapshot", "-c", name, *image])
            self.held[name] = bytes(self.model)
            return
        name = self.rng.choice(list(self.held))
        self.both(["snapshot", f"-{what}", name, *image])
        if what == "d":
            del self.held[name]
            return
        content = self.held[name]
        if content is None:
            content = self.content("theirs", "theirs")
        self.model = bytearray(content)
        if self.shape.options.get("compat") == "0.10":
            self.model = bytearray(self.content("theirs", "theirs"))

    def _bitmap(self) -> None:
        rng, image = self.rng, self.image(backing=False)
        what = rng.choice(["add", "add", "add", "remove", "clear", "enable", "disable", "merge"])
        if what == "add" or not self.bitmaps:
            self.number += 1
            name = f"b{self.number}"
            more = rng.choice(([], ["-g", "512"], ["-g", "4k"], ["-g", "1M"], ["--disable"]))
            self.both(["bitmap", "--add", *more, *image, name])
            self.bitmaps.append(name)
            return
        name = rng.choice(self.bitmaps)
        words = [f"--{what}"] if what != "merge" else ["--merge", rng.choice(self.bitmaps)]
        self.both(["bitmap", *words, *image, name])
        if what == "remove":
            self.bitmaps.remove(name)

    def _resize(self) -> None:
        rng = self.rng
        limit = min(self.shape.cluster << 10, 3 * MIB)
        size = rng.randrange(512, limit) // 512 * 512
        more: list[str] = rng.choice(
            (
                [],
                [],
                [],
                ["--preallocation=metadata"],
                ["--preallocation=falloc"],
                ["--preallocation=full"],
            )
        )
        if self.shape.encrypted:
            more = []  # what QEMU's preallocates reads as noise
        self.both(["resize", "-q", "--shrink", *more, *self.image(), str(size)])
        self.model = bytearray(self.model[:size].ljust(size, b"\0"))

    def _amend(self) -> None:
        rng = self.rng
        draws = [
            "compat=1.1",
            "compat=0.10",
            "refcount_bits=",
            "lazy_refcounts=on",
            "lazy_refcounts=off",
            "data_file_raw=on",
            "data_file_raw=off",
        ]
        if self.shape.encrypted == "luks":
            draws += ["key"] * 5
        what = rng.choice(draws)
        if what == "compat=0.10" and self.bitmaps:
            return  # theirs leaks them
        spare, secret = self.spare, self.secret
        if what == "refcount_bits=":
            what += rng.choice(["1", "2", "4", "8", "16", "32", "64"])
        if what == "key":
            if spare:
                gone = rng.choice((spare, secret))
                what = f"encrypt.state=inactive,encrypt.old-secret={gone}"
                secret = spare if gone == secret else secret
                spare = ""
                image = [*OBJECTS, "--image-opts", self.described()]
            else:
                spare = "s1" if secret == "s0" else "s0"
                what = f"encrypt.state=active,encrypt.new-secret={spare},encrypt.iter-time=1"
        image = self.image()
        self.both(["amend", *image[:-2], "-o", what, *image[-2:]])
        self.spare, self.secret = spare, secret
        if what.startswith("compat="):
            self.shape.options["compat"] = what[7:]
            if what == "compat=0.10":
                self.bitmaps = []

    def _rebase(self) -> None:
        if self.shape.base not in ("raw", "qcow2", ""):
            return
        rng = self.rng
        target = rng.choice(("", "base")) if self.shape.base else ""
        words = ["-b", target] + (["-F", self.shape.base] if target else [])
        if "encrypt.format" not in self.shape.options:  # QEMU's stores plain data there
            words += rng.choice(([], [], ["-c"]))
        unsafe = rng.random() < 0.2
        if unsafe:
            words.append("-u")
        self.both(["rebase", "-q", *words, *self.image()])
        if not target and self.shape.base:
            self.shape = self.shape._replace(base="")
            self.held = dict.fromkeys(self.held)
            self.base = b""
            if unsafe:
                self.model = bytearray(self.content("theirs", "theirs"))

    def _commit(self) -> None:
        keep = self.rng.choice(([], ["-d"]))
        self.both(["commit", "-q", *keep, *self.image()])
        if len(self.model) > len(self.base):
            self.base = bytes(self.model)
        else:
            self.base = bytes(self.model) + self.base[len(self.model) :]
        self.held = dict.fromkeys(self.held)

    def _convert(self) -> None:
        rng = self.rng
        shape = Shape.drawn(rng, target=True)
        shape = shape._replace(size=len(self.model))
        if "data_file" in shape.options:
            shape.options["data_file"] = "new.raw"
        words = ["convert", "-q", *OBJECTS, "-O", "qcow2", "-o", shape.words()]
        words += rng.choice(([], ["-W"], ["-m", "16", "-W"], ["-m", "1"]))
        words += rng.choice(([], ["-S", "0"], ["-S", "64k"], ["-T", "none"], ["-r", "100M"]))
        if rng.random() < 0.25:
            words.append("-c")
        if self.bitmaps and rng.random() < 0.5 and not self.shape.base:
            words += ["--bitmaps"]
        name = ""
        if self.held and rng.random() < 0.3 and "--bitmaps" not in words:
            name = rng.choice(list(self.held))
            words += ["-l", name]
        words += ["--image-opts", self.described(), "new"]
        self.both(words)
        model = self.model
        if name:
            # In the size of now (theirs) or then (ours).
            return
        for side in [*self.sides.values(), self.now]:
            for old in ("data.raw",):
                (side / old).unlink(missing_ok=True)
            (side / "new").replace(side / "disk")
        self.shape, self.model = shape, model
        self.secret, self.spare, self.held = "s0", "", {}
        self.base = b""
        if "--bitmaps" not in words:
            self.bitmaps = []

    def _mend(self) -> None:
        if self.held and self.bitmaps:
            raise Refused  # QEMU's loses the snapshots
        self.both(["check", "-q", "-r", self.rng.choice(("leaks", "all")), *self.image()])
