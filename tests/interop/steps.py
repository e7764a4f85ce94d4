"""The operations of the random matrix."""

from __future__ import annotations

import shutil
from pathlib import Path

from interop.matrix import OBJECTS, Matrix, Refused
from interop.shapes import KIB, WIDTHS, Shape, runtime_options

KINDS = [
    *["write"] * 5, *["zero"] * 2, *["discard"] * 2, *["packed"] * 2, *["snapshot"] * 4,
    *["bitmap"] * 5, *["resize"] * 2, *["amend"] * 3, "rebase", "commit", "convert", "mend",
    *["kill"] * 2, "vm_state",
]  # fmt: skip
CACHES = ("writeback", "writethrough", "none", "directsync", "unsafe")


class Steps(Matrix):
    def step(self) -> None:
        """One random operation."""
        kind = self.rng.choice(KINDS)
        try:
            getattr(self, f"_{kind}")()
        except Refused:
            return
        self.look_all()

    def _opened(self) -> str:
        """The image with options of an open one."""
        more = runtime_options(self.rng, self.shape.cluster) if self.rng.random() < 0.5 else []
        return ",".join([self.described(), *more])

    def _io(self, *more: str) -> list[str]:
        cache = self.rng.choice(CACHES)
        return ["io", *OBJECTS, "-t", cache, *more, "--image-opts"]

    def _writes(self) -> tuple[list[str], bytearray]:
        """Commands, and the model after them."""
        rng, model = self.rng, bytearray(self.model)
        words = []
        for _ in range(rng.randrange(1, 5)):
            offset, length = self.range(len(model))
            pattern = rng.choice((0, *range(1, 256)))
            verb = rng.choice(("write", "write", "write -f", "writev", "aio_write"))
            words += ["-c", f"{verb} -q -P {pattern} {offset} {length}"]
            if verb == "aio_write":
                words += ["-c", "aio_flush"]
            model[offset : offset + length] = bytes([pattern]) * length
        return words, model

    def _write(self) -> None:
        words, model = self._writes()
        self.both([*self._io(), *words, self._opened()])
        self.model = model

    def _zero(self) -> None:
        flags = self.rng.choice(("", "-u ", "-f ", "-n ", "-n -u "))
        # Of what fails without -n's other way a part may be done.
        unit = self.shape.cluster if "-n" in flags else 512
        offset, length = self.range(len(self.model), unit)
        command = f"write -q -z {flags}{offset} {length}"
        more = self.rng.choice(([], ["-d", "unmap"]))
        self.both([*self._io(*more), "-c", command, self._opened()])
        self.model[offset : offset + length] = bytes(length)

    def _discard(self) -> None:
        offset, length = self.range(len(self.model))
        command = f"discard -q {offset} {length}"
        described = self._opened() + self.rng.choice(("", "", ",discard-no-unref=on"))
        old = bytes(self.model)
        chosen = self.both([*self._io("-d", "unmap"), "-c", command, described])
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
        offset, length = self.range(len(self.model), self.shape.cluster)
        pattern = self.rng.randrange(1, 256)
        length = min(length, self.shape.cluster)
        command = f"write -q -c -P {pattern} {offset} {length}"
        model = bytearray(self.model)
        model[offset : offset + length] = bytes([pattern]) * length
        self.both([*self._io(), "-c", command, self._opened()])
        self.model = model

    def _vm_state(self) -> None:
        """Behind the end of the disk."""
        if self.shape.external:
            return  # theirs goes into the data file
        offset, length = self.range(1 << 18)
        words = ["-c", f"write -q -b -P 9 {offset} {length}"]
        words += ["-c", f"read -q -b -P 9 {offset} {length}"]
        self.both([*self._io(), *words, self._opened()])
        self.vm_state = True

    def _kill(self) -> None:
        """What was flushed is there after the program was killed, and repaired with it."""
        words, model = self._writes()
        self.both([*self._io(), *words, "-c", "flush", "-c", "sigraise 9", self._opened()], -9)
        self.model = model
        if self.rng.random() < 0.5:
            self._repair_and_undo()
        if self.held and self.bitmaps:  # QEMU's loses the snapshots
            self.alone(["check", "-q", "-r", "all", *self.image()])
        else:
            self.both(["check", "-q", "-r", "all", *self.image()])
        self.look_all(bitmaps=False)  # theirs had all in use, ours those that follow writes

    def _repair_and_undo(self) -> None:
        """A repair that is shown changes nothing, and one that is taken back neither."""
        tool, work = self.tools["ours"], self.folder / "undo"
        (self.folder / "kept").unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.now, work)
        before = files(work)
        words = ["check", "-q", *self.image()]
        for more in (["--dry-run"], ["--undo-file", "../kept"]):
            status, text = tool(work, [*words, "-r", "all", *more])
            assert status in (0, 2, 3), text
            if more[-1] == "--dry-run":
                assert files(work) == before, "a repair that is only shown"
        if not (self.folder / "kept").exists():
            return  # nothing was wrong
        status, text = tool(work, ["check", "-q", "--undo", "../kept", *self.image()])
        assert status == 0 and files(work) == before, f"a repair that is taken back: {text}"

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
        if content is None or self.shape.options.get("compat") == "0.10":
            content = self.content("theirs", "theirs")
        self.model = bytearray(content)

    def _bitmap(self) -> None:
        rng, image = self.rng, self.image(backing=False)
        what = rng.choice(["add", "add", "add", "remove", "clear", "enable", "disable", "merge"])
        if what == "add" or not self.bitmaps:
            self.number += 1
            name = f"b{self.number}"
            more = rng.choice((
                [], ["-g", "512"], ["-g", "4k"], ["-g", "1M"], ["--disable"],
                ["--disable", "--merge", rng.choice(self.bitmaps)] if self.bitmaps else [],
            ))  # fmt: skip
            self.both(["bitmap", "--add", *more, *image, name])
            self.bitmaps.append(name)
            return
        name = rng.choice(self.bitmaps)
        words = [f"--{what}"] if what != "merge" else ["--merge", rng.choice(self.bitmaps)]
        if what == "disable" and rng.random() < 0.5:
            words.append("--clear")
        self.both(["bitmap", *words, *image, name])
        if what == "remove":
            self.bitmaps.remove(name)

    def _resize(self) -> None:
        rng = self.rng
        old = len(self.model)
        size = rng.randrange(512, self.shape.most) // 512 * 512
        if self.vm_state:
            return  # of QEMU's it shows up as data, or is leaked
        if rng.random() < 0.2:
            self.both(["io", *OBJECTS, "--image-opts", "-c", f"truncate {size}", self._opened()])
        else:
            modes = ("off", "off", "off", "metadata", "falloc", "full")
            # What QEMU's preallocates in encrypted images reads as noise.
            mode = "off" if self.shape.encrypted else rng.choice(modes)
            words = ["resize", "-q", "--shrink", f"--preallocation={mode}", *self.image()]
            self.both([*words, *([f"+{size - old}"] if size >= old else ["--", f"-{old - size}"])])
            if mode != "off" and any(self.content("theirs", "theirs")[old:]):
                self.forget_theirs()  # which shows there what its clusters held before
                self.go_on("ours")
        self.model = bytearray(self.model[:size].ljust(size, b"\0"))

    def _amend(self) -> None:
        rng = self.rng
        old = len(self.model)
        draws = [
            "compat=1.1", "compat=0.10", "refcount_bits=" + rng.choice(WIDTHS),
            "refcount_bits=" + rng.choice(WIDTHS), "lazy_refcounts=on", "lazy_refcounts=off",
            "data_file_raw=on", "data_file_raw=off", f"size={old + rng.choice((512, 65536, -512))}",
            "extended_l2=on", "cluster_size=64k", "preallocation=full",
            *["key"] * (5 * (self.shape.encrypted == "luks")),
        ]  # fmt: skip
        what = rng.choice(draws)
        if what == "compat=0.10" and self.bitmaps:
            return  # theirs leaks them
        if what.startswith("size=") and self.vm_state:
            return
        spare, secret = self.spare, self.secret
        image = self.image()
        if what == "key":
            if spare:
                gone = rng.choice((spare, secret))
                what = f"encrypt.state=inactive,encrypt.old-secret={gone}"
                secret, spare = spare if gone == secret else secret, ""
            else:
                spare = "s1" if secret == "s0" else "s0"
                what = f"encrypt.state=active,encrypt.new-secret={spare},encrypt.iter-time=1"
        words = ["amend", *image[:-2], "-o", what, *image[-2:]]
        if what.startswith("refcount_bits=") and self.shape.cluster > 64 * KIB:
            # Theirs runs for ever.
            if self.held or self.shape.options.get("compat") == "0.10":
                return  # may be refused
            self.alone(words)
        else:
            self.both(words)
        self.spare, self.secret = spare, secret
        if what.startswith("compat="):
            self.shape.options["compat"] = what[7:]
            if what == "compat=0.10":
                self.bitmaps = []
        if what.startswith("size="):
            size = int(what[5:])
            self.model = bytearray(self.model[:size].ljust(size, b"\0"))

    def _rebase(self) -> None:
        if self.shape.base not in ("raw", "qcow2", ""):
            return
        rng = self.rng
        bases = {"": "", "base": self.shape.base, "other": "raw"} if self.shape.base else {"": ""}
        target = rng.choice(list(bases))
        words = ["-b", target] + (["-F", bases[target]] if target else [])
        if not self.shape.encrypted:  # QEMU's stores plain data there
            words += rng.choice(([], [], ["-c"]))
        unsafe = rng.random() < 0.2
        if unsafe:
            words.append("-u")
        words = ["rebase", "-q", *words, *self.image()]
        if unsafe and target == "other" and rng.random() < 0.5:
            image = self.image()
            more = ["-o", "backing_file=other,backing_fmt=raw"]
            words = ["amend", *image[:-2], *more, *image[-2:]]
        chosen = self.both(words)
        if not self.shape.base or target == "base":
            return
        self.shape = self.shape._replace(base="raw" if target else "", deep=False)
        self.held = dict.fromkeys(self.held)
        self.base = self.other if target else b""
        for folder in (self.now, *self.sides.values()):
            if target:
                shutil.copy(folder / "other", folder / "base")
        if target:
            self.alone(["rebase", "-u", "-b", "base", "-F", "raw", *self.image()])
        if unsafe:
            self.model = bytearray(self.content("theirs", chosen))

    def _commit(self) -> None:
        more = self.rng.choice(([], ["-d"], ["-b", "deep"] if self.shape.deep else []))
        self.both(["commit", "-q", *more, *self.image()])
        self.held = dict.fromkeys(self.held)
        if self.shape.base in ("luks", "aes"):
            self.base = bytes(self.model) + self.base[len(self.model) :]
        else:
            out = self.folder / "out"
            words = ["convert", "-f", self.shape.base, "-O", "raw", "base", str(out)]
            status, text = self.tools["theirs"](self.now, words)
            assert status == 0, text
            self.base = out.read_bytes()

    def _convert(self) -> None:
        rng = self.rng
        shape = Shape.drawn(rng, target=True)
        shape = shape._replace(size=len(self.model))
        if "data_file" in shape.options:
            shape.options["data_file"] = "new.raw"
        words = ["convert", "-q", *OBJECTS, "-O", "qcow2"]
        words += rng.choice(([], ["-W"], ["-m", "16", "-W"], ["-m", "1"], ["-C"], ["--salvage"]))
        words += rng.choice(([], ["-S", "0"], ["-S", "64k"], ["-T", "none"], ["-r", "100M"]))
        words += rng.choice(([], [], ["-t", "writeback"], ["-t", "none"]))
        if rng.random() < 0.25:
            words.append("-c")
        over = self.shape.base in ("raw", "qcow2") and rng.random() < 0.5
        if over:
            shape = shape._replace(base=self.shape.base, deep=self.shape.deep)
            words += ["-B", "base", "-F", shape.base]
        if self.bitmaps and rng.random() < 0.5 and not self.shape.base:
            words += ["--bitmaps"]
        name = ""
        if self.held and rng.random() < 0.3 and "--bitmaps" not in words:
            name = rng.choice(list(self.held))
            words += ["-l", name]
        if rng.random() < 0.25 and not shape.encrypted:
            made = ["create", "-q", "-f", "qcow2", "-o", shape.words()]
            made += ["-b", "base", "-F", shape.base] if over else []
            self.both([*made, "new", str(len(self.model))])
            words.append("-n")
            if not over and rng.random() < 0.5:
                words.append("--target-is-zero")
        else:
            words += ["-o", shape.words()]
        self.both([*words, "--image-opts", self.described(), "new"])
        if name:
            # In the size of now (theirs) or then (ours).
            for folder in (self.now, *self.sides.values()):
                for new in ("new", "new.raw"):
                    (folder / new).unlink(missing_ok=True)
            return
        for folder in (self.now, *self.sides.values()):
            (folder / "data.raw").unlink(missing_ok=True)
            (folder / "new").replace(folder / "disk")
        self.shape = shape
        self.secret, self.spare, self.held, self.vm_state = "s0", "", {}, False
        self.base = self.base if over else b""
        if "--bitmaps" not in words:
            self.bitmaps = []

    def _mend(self) -> None:
        if self.held and self.bitmaps:
            raise Refused  # QEMU's loses the snapshots
        self.both(["check", "-q", "-r", self.rng.choice(("leaks", "all")), *self.image()])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
