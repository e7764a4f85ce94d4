"""A chain of which each layer has another secret, through whatever walks along chains: by our tool
and by QEMU's on copies of it, each judged by the other one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from interop.test_matrix import Ours, Theirs

KIB = 1 << 10
SECRETS = {"s0": "of the base", "s1": "of the middle", "s2": "of the top"}
OBJECTS = [w for i, v in SECRETS.items() for w in ("--object", f"secret,id={i},data={v}")]
# name, how it is encrypted, secret, size in KiB, what is written to it (pattern, offset, length)
LAYERS = [
    ("base", "luks", "s0", 900, [(1, 0, 300), (2, 700, 200)]),
    ("middle", "aes", "s1", 600, [(3, 64, 100), (4, 500, 100)]),
    ("top", "luks", "s2", 800, [(5, 128, 70), (0, 260, 20)]),
]
JSON = '{"driver":"qcow2","encrypt.key-secret":"%s","file.filename":"%s"}'


def described(*names: str) -> str:
    """The image ``names[0]`` over the others, in the words of ``--image-opts``."""
    words, prefix = [], ""
    for name, _, secret, *_ in LAYERS[::-1]:
        if name in names:
            words += [f"{prefix}driver=qcow2", f"{prefix}encrypt.key-secret={secret}"]
            words.append(f"{prefix}file.filename={name}")
            prefix += "backing."
    return ",".join(words)


def content(*names: str) -> bytes:
    """What the chain of these holds."""
    disk = b""
    for name, _, _, size, writes in LAYERS:
        if name in names:
            layer = bytearray(disk[: size * KIB].ljust(size * KIB, b"\0"))
            for pattern, offset, length in writes:
                layer[offset * KIB : (offset + length) * KIB] = bytes([pattern]) * length * KIB
            disk = bytes(layer)
    return disk


class Chain:
    def __init__(self, folder: Path, tools: dict[str, Ours | Theirs]) -> None:
        self.folder, self.tools = folder, tools
        self.first = folder / "first"
        self.first.mkdir()
        below: list[str] = []
        for name, cipher, secret, size, writes in LAYERS:
            options = f"encrypt.format={cipher},encrypt.key-secret={secret},cluster_size=4096"
            options += ",encrypt.iter-time=1" if cipher == "luks" else ""
            over = ["-u", "-F", "qcow2", "-b", below[0]] if below else []
            tool = "theirs" if name == "middle" else "ours"
            words = ["create", "-q", *OBJECTS, "-f", "qcow2", *over, "-o", options, name]
            self.do(tool, self.first, [*words, f"{size}k"])
            below.insert(0, name)
            io = [w for p, o, n in writes for w in ("-c", f"write -q -P {p} {o}k {n}k")]
            self.do(tool, self.first, ["io", *OBJECTS, "--image-opts", *io, described(*below)])

    def do(self, tool: str, folder: Path, words: list[str]) -> str:
        status, text = self.tools[tool](folder, words)
        assert status == 0 and "Traceback" not in text, f"{tool}: {words}: {text}"
        return text

    def check(self, folder: Path, names: tuple[str, ...], wanted: bytes) -> None:
        """Both tools read it so, and QEMU's finds its first layers whole."""
        for tool in self.tools:
            out = folder / "out"
            words = ["convert", *OBJECTS, "--image-opts", described(*names), "-O", "raw", str(out)]
            self.do(tool, folder, words)
            assert out.read_bytes() == wanted, f"{names}, read by {tool}"
        self.do("theirs", folder, ["check", "-q", *OBJECTS, "--image-opts", described(*names)])
        if len(names) > 1:
            below = described(*names[1:])
            self.do("theirs", folder, ["check", "-q", *OBJECTS, "--image-opts", below])

    def both(self, words: list[str]) -> Iterator[Path]:
        """Copies of the chain to which each tool did this."""
        for tool in self.tools:
            folder = self.folder / tool
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run(["cp", "-r", "--sparse=always", self.first, folder], check=True)
            self.do(tool, folder, [words[0], *OBJECTS, *words[1:]])
            yield folder


@pytest.fixture
def chain(tmp_path: Path, peer: Callable[[str], str]) -> Iterator[Chain]:
    ours = Ours(tmp_path / "printed")
    theirs = Theirs({name: peer(name) for name in ("qemu-img", "qemu-io")})
    try:
        yield Chain(tmp_path, {"ours": ours, "theirs": theirs})
    finally:
        ours.close()


def test_each_layer_has_its_own_secret(chain: Chain) -> None:
    whole, three = described("top", "middle", "base"), ("top", "middle", "base")
    chain.check(chain.first, three, content(*three))
    told = [
        chain.do(tool, chain.first, ["map", "--output=json", *OBJECTS, "--image-opts", whole])
        for tool in chain.tools
    ]
    assert told[0] == told[1]
    plain = chain.first / "plain"
    plain.write_bytes(content(*three))
    same = ["compare", *OBJECTS, "--image-opts", whole, "driver=raw,file.filename=plain"]
    for tool in chain.tools:
        assert "identical" in chain.do(tool, chain.first, same)


def test_commit_rebase_and_growth(chain: Chain) -> None:
    three = ("top", "middle", "base")
    whole, wanted = described(*three), content(*three)
    for folder in chain.both(["commit", "-q", "--image-opts", whole]):
        chain.check(folder, three[1:], wanted)
        chain.check(folder, three, wanted)
    base = "json:" + JSON % ("s0", "base")
    for folder in chain.both(["rebase", "-q", "-b", base, "-F", "qcow2", "--image-opts", whole]):
        chain.check(folder, ("top", "base"), wanted)
    for folder in chain.both(["rebase", "-q", "-b", "", "--image-opts", whole]):
        chain.check(folder, ("top",), wanted)
    words = ["rebase", "-q", "-u", "-b", "base", "-F", "qcow2", "--image-opts", described("top")]
    for folder in chain.both(words):
        chain.check(folder, ("top", "base"), content("top", "base"))
    # The base is longer than the middle, and that is longer after the growth: zeroes, no old tails.
    middle = described("middle", "base")
    for folder in chain.both(["resize", "-q", "--image-opts", middle, "900k"]):
        chain.check(folder, three[1:], content(*three[1:]).ljust(900 * KIB, b"\0"))
        chain.check(folder, three, wanted)
    for folder in chain.both(["resize", "-q", "--image-opts", whole, "1M"]):
        chain.check(folder, three, wanted.ljust(1024 * KIB, b"\0"))
