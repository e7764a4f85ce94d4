"""What the images of the random matrix are made of."""

from __future__ import annotations

import random
from typing import NamedTuple

KIB, MIB = 1 << 10, 1 << 20
WIDTHS = ("1", "2", "4", "8", "16", "32", "64")
CLUSTERS = (9, 10, 11, 12, 13, 14, 15, 16, 16, 16, 16, 17, 18, 19, 20, 21)
"""Their sizes, as powers of two."""
PARTS = (
    "main-header", "active-l1", "active-l2", "refcount-table", "refcount-block", "snapshot-table",
    "inactive-l1", "inactive-l2", "bitmap-directory",
)  # fmt: skip


class Shape(NamedTuple):
    """What an image is made of."""

    size: int
    """As it is asked for; disks are whole sectors."""
    cluster: int
    options: dict[str, str]
    base: str
    """"" for none, otherwise the format of a backing file."""
    base_size: int = 0
    deep: bool = False
    """The backing file has one, too."""

    @property
    def encrypted(self) -> str:
        return self.options.get("encrypt.format", "")

    @property
    def external(self) -> bool:
        return "data_file" in self.options

    @property
    def most(self) -> int:
        """Bytes; of small clusters there would be too many."""
        return min(self.cluster << 10, 3 * MIB)

    @classmethod
    def drawn(cls, rng: random.Random, target: bool = False) -> Shape:
        """Options that need not fit together: then both must refuse them."""
        cluster = 1 << rng.choice(CLUSTERS)
        options = {"cluster_size": str(cluster)}
        old = rng.random() < 0.15
        if old:
            options["compat"] = "0.10"
        draws: list[tuple[float, str, str]] = [
            (0.4 if not old else 0.03, "refcount_bits", rng.choice(WIDTHS)),
            (0.2 if not old else 0.03, "lazy_refcounts", "on"),
            (0.4 if cluster >= 16384 and not old else 0.03, "extended_l2", "on"),
            (0.25 if not old else 0.03, "compression_type", "zstd"),
            (0.2 if not old else 0.03, "data_file", "data.raw"),
            (0.3, "preallocation", rng.choice(["metadata", "falloc", "full"])),
            (0.05, "extent_size_hint", rng.choice(["0", "64k", "1M"])),
        ]
        for chance, name, value in draws:
            if rng.random() < chance:
                options[name] = value
        if "data_file" in options and rng.random() < 0.5:
            options["data_file_raw"] = "on"
        if rng.random() < 0.3:
            options |= _encryption(rng)
            for reads_as_noise in ("preallocation", "data_file_raw"):  # in QEMU's
                options.pop(reads_as_noise, None)
        most = min(cluster << 10, 3 * MIB)
        size = rng.randrange(most // 4, most)
        if rng.random() < 0.5:
            size = max(size // cluster * cluster, cluster)
        elif rng.random() < 0.7:
            size -= size % 512
        kinds = ("raw", "qcow2", "qcow2", "luks", "aes")
        base = "" if target or rng.random() < 0.5 else rng.choice(kinds)
        base_size = 0
        if base:
            base_size = size + rng.choice((0, 0, 512, -512, 65536, -65536, -size // 2))
            base_size = max(512, base_size) // 512 * 512
        return cls(size, cluster, options, base, base_size, base == "qcow2" and rng.random() < 0.5)

    def words(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.options.items())


def _encryption(rng: random.Random) -> dict[str, str]:
    kind = rng.choice(("luks", "luks", "aes"))
    options = {"encrypt.format": kind, "encrypt.key-secret": "s0"}
    if kind == "aes":
        return options
    options["encrypt.iter-time"] = "1"
    if rng.random() < 0.4:
        mode, vector = rng.choice((("xts", "plain64"), ("xts", "plain"), ("cbc", "essiv")))
        # QEMU's aborts on the 192 bits.
        options["encrypt.cipher-alg"] = rng.choice(("aes-128", "aes-256"))
        options["encrypt.cipher-mode"], options["encrypt.ivgen-alg"] = mode, vector
        options["encrypt.hash-alg"] = rng.choice(("sha1", "sha224", "sha384", "sha512"))
        if vector == "essiv":
            options["encrypt.ivgen-hash-alg"] = "sha256"
    return options


def base_options(rng: random.Random) -> str:
    """Creation options of a qcow2 backing file."""
    cluster = 1 << rng.choice(CLUSTERS)
    words = [f"cluster_size={cluster}"]
    if rng.random() < 0.2:
        words.append("compat=0.10")
    else:
        words.append(f"refcount_bits={rng.choice(WIDTHS)}")
        words.append(f"compression_type={rng.choice(('zlib', 'zstd'))}")
        if cluster >= 16384 and rng.random() < 0.4:
            words.append("extended_l2=on")
    return ",".join(words)


def runtime_options(rng: random.Random, cluster: int) -> list[str]:
    """Options of an image that is opened for writing: caches, discards, checks of overlaps."""
    draws: list[tuple[float, str]] = [
        (0.2, f"l2-cache-size={rng.choice((0, cluster, 4 * cluster, MIB))}"),
        (0.2, f"l2-cache-entry-size={rng.choice((512, cluster))}"),
        (0.2, f"refcount-cache-size={rng.choice((0, 4 * cluster, 16 * cluster))}"),
        (0.2, f"cache-clean-interval={rng.choice((0, 1))}"),
        (0.2, f"lazy-refcounts={rng.choice(('on', 'off'))}"),
        (0.3, f"overlap-check={rng.choice(('none', 'constant', 'cached', 'all'))}"),
        (0.2, f"overlap-check.{rng.choice(PARTS)}={rng.choice(('on', 'off'))}"),
        *[
            (0.3, f"pass-discard-{kind}={rng.choice(('on', 'off'))}")
            for kind in ("request", "snapshot", "other")
        ],
        (0.2, f"detect-zeroes={rng.choice(('off', 'on', 'unmap,discard=unmap'))}"),
    ]
    chosen = [text for chance, text in draws if rng.random() < chance]
    if any(text.startswith("overlap-check=") for text in chosen):
        chosen = [t.replace("overlap-check=", "overlap-check.template=") for t in chosen]
    return chosen
