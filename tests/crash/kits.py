"""What the crash workloads must know of each kind of image."""

from __future__ import annotations

import random
from typing import Any

from diskwright.graph import registry
from diskwright.testing.memory import POISON
from races import sesparse
from races.cases import SECRETS, new_image, random_base
from races.packed import Recall

KIB, MIB = 1 << 10, 1 << 20
EXTERNAL = ("data-file", "raw-data-file", "data-file-backing", "extended-data-file")
DATA_FILE = (*EXTERNAL, "data-file-bitmaps", "data-file-snapshots")
PLAIN = ("plain", "backing", "lazy", "v2", "narrow", "wide", "zeroing", "packed")
FEATURES = ("extended", "extended-packed", *EXTERNAL, "bitmaps", "extended-bitmaps",
            "data-file-bitmaps", "aes", "aes-backing", "aes-bitmaps", "luks", "snapshots",
            "snapshots-backing", "snapshots-packed", "snapshots-v2", "extended-snapshots",
            "extended-snapshots-packed", "aes-snapshots", "luks-snapshots", "data-file-snapshots",
            "amend", "amend-snapshots", "luks-amend")  # fmt: skip
QCOW2 = PLAIN + FEATURES
VHDX = ("vhdx", "vhdx-4096", "vhdx-differencing")
VMDK = ("vmdk", "vmdk-zeroed", "vmdk-backing", "vmdk-split", "sesparse", "sesparse-backing")
KINDS = QCOW2 + VHDX + VMDK


class Kit:
    """One kind of image, its particulars drawn from ``rng``."""

    def __init__(self, kind: str, rng: random.Random) -> None:
        self.kind = kind
        self.base = b""
        self.create: dict[str, Any] = {}
        self.opened: dict[str, Any] = {"writable": True}
        self.most = 1 << 30
        """Crash states looked at, of one workload."""
        self.exact_discard = True
        """What was discarded reads as zeroes."""
        self.others = True
        """Other programs can open it by itself."""
        self.bitmaps = kind.endswith("bitmaps")
        """It has persistent dirty bitmaps."""
        self.packs = kind.endswith("packed")
        """Some writes are compressed, by a codec of our own."""
        self.pack_unit = 512
        self.snapshots = "snapshots" in kind
        """Snapshots are taken, applied and given up."""
        self.amendments: list[dict[str, Any]] = []
        if self.bitmaps:
            self.most = 150
        if self.snapshots or "amend" in kind:
            self.most = 60
            self.others = kind in ("snapshots", "extended-snapshots")
        if kind in VHDX:
            self._vhdx(rng)
        elif kind.startswith("sesparse"):
            self._sesparse(rng)
        elif kind in VMDK:
            self._vmdk(rng)
        elif kind.startswith("extended"):
            self._extended(rng)
        else:
            self._qcow2(rng)
        self.zeroes_discards = kind == "zeroing" or rng.random() < (kind not in QCOW2) / 2
        self.create["size"] = self.size
        self.used = bytes([POISON]) * (rng.randrange(2) * self.create.get("cluster_size", 0) * 300)
        """Stands behind a new qcow2 image: what the clusters held that nobody uses yet."""
        if kind in QCOW2:
            for what in ("request", "snapshot", "other"):
                if rng.random() < 0.25:
                    self.opened[f"pass-discard-{what}"] = False
        if self.base:
            self.opened["backing"] = "given"

    def _qcow2(self, rng: random.Random) -> None:
        self.format, self.unit, self.steps = "qcow2", 512, 30
        unit = self.unit
        self.size = rng.choice([60 * unit, 160 * unit])
        self.sizes = [40 * unit, 100 * unit, 200 * unit, 300 * unit]
        self.lengths = [1, 100, unit, unit, 700, 4 * unit, 9 * unit]
        self.budget = 1600
        self.create["cluster_size"] = unit
        if self.kind in DATA_FILE:
            self.create["data_file"] = "data"
            self.opened["data-file"] = "given"
        if self.kind == "raw-data-file":
            self.create["data_file_raw"] = True
        if self.kind.endswith("backing"):
            self.base = random_base(rng, rng.choice([40 * unit, 20 * unit + 100]))
            self.create |= {"backing_file": "base", "backing_fmt": "raw"}
        if self.kind.startswith(("aes", "luks")):
            self._encrypted()
        if self.kind == "lazy":
            self.create["lazy_refcounts"] = True
        if self.kind.endswith("v2"):
            self.create["compat"] = "0.10"
        if self.kind in ("narrow", "wide"):
            self.create["refcount_bits"] = 1 if self.kind == "narrow" else 64
        if self.packs:
            self.create["refcount_bits"] = rng.choice([1, 2, 16])
            self.others = False
        if self.kind == "snapshots":
            self.create["refcount_bits"] = rng.choice([2, 4, 8, 64])
            self.create["lazy_refcounts"] = rng.random() < 0.3
        if "amend" in self.kind:
            self._amended()

    def _amended(self) -> None:
        self.amendments = [{"refcount_bits": 1 << n} for n in range(7)]
        self.amendments += [{"lazy_refcounts": True}, {"lazy_refcounts": False}]
        self.amendments += [{"compat": "0.10"}, {"compat": "1.1"}] * 2
        if self.kind.startswith("luks"):
            key = {"encrypt.new-secret": "s1", "encrypt.iter-time": 1}
            self.amendments = [
                {"encrypt.state": "active", **key},
                {"encrypt.state": "inactive", "encrypt.old-secret": "s1"},
                {"refcount_bits": 64},
            ]

    def _encrypted(self) -> None:
        self.others = False  # without a secret
        self.most = min(self.most, 200)
        cipher = self.kind.split("-")[0]
        self.create |= {"encrypt.format": cipher, "encrypt.key-secret": "s0"}
        self.opened |= {"encrypt.key-secret": "s0", "secrets": SECRETS}
        if cipher == "luks":  # a header of 2 MiB
            self.create |= {"encrypt.iter-time": 1, "cluster_size": 4096}
            self.unit, self.most, self.steps = 4096, 50, 20
            self.budget = 9000

    def _extended(self, rng: random.Random) -> None:
        """qcow2 with subclusters of 512 bytes."""
        self.format, self.unit, self.steps, self.most = "qcow2", 512, 24, 150
        cluster = self.pack_unit = 16 * KIB
        self.size = rng.choice([6 * cluster, 9 * cluster + 5 * 512])
        self.sizes = [5 * cluster, 7 * cluster + 3 * 512, 12 * cluster]
        self.lengths = [1, 100, 512, 700, 3 * 512, cluster, 2 * cluster + 512]
        self.budget = 40_000
        self.create |= {"cluster_size": cluster, "extended_l2": True}
        if self.kind in DATA_FILE:
            self.create["data_file"] = "data"
            self.opened["data-file"] = "given"
            self.create["data_file_raw"] = rng.random() < 0.5
        if not self.create.get("data_file_raw") and rng.random() < 0.6:
            self.base = random_base(rng, rng.choice([5 * cluster, 8 * cluster + 700]))
            self.create |= {"backing_file": "base", "backing_fmt": "raw"}
        if self.packs:
            # A part of a compressed cluster stays when it is discarded.
            self.others = self.exact_discard = False
        elif rng.random() < 0.3:
            self.create["preallocation"] = "metadata"

    def _vhdx(self, rng: random.Random) -> None:
        self.format, self.unit, self.steps = "vhdx", MIB, 14
        self.size = rng.choice([3 * MIB, 3 * MIB + 40 * KIB])
        self.sizes = [2 * MIB, 3 * MIB + 8 * KIB, 5 * MIB]
        self.lengths = [1, 512, 4096, 5000, 70_000, MIB, MIB + 4096]
        self.budget, self.most = 5000, 60
        self.create |= {"block_size": MIB, "log_size": MIB}
        if self.kind == "vhdx-4096":
            self.create["logical_sector_size"] = 4096
            self.others = False
        if self.kind == "vhdx-differencing":
            self.base = random_base(rng, rng.choice([2 * MIB, 2 * MIB + 8 * KIB]))
            identity = "{11111111-2222-3333-4444-555555555555}"
            self.create |= {"backing_file": "base.vhdx", "backing_fmt": "vhdx"}
            self.create |= {"backing_identity": identity}
            self.others = False

    def _vmdk(self, rng: random.Random) -> None:
        self.format, self.unit, self.steps = "vmdk", 64 * KIB, 24
        self.size = rng.choice([20 * self.unit, 20 * self.unit + 512])
        self.sizes = [12 * self.unit, 30 * self.unit, 30 * self.unit + 1024]
        self.lengths = [1, 512, 4096, 5000, self.unit, 3 * self.unit, 4 * self.unit + 512]
        self.budget, self.most = 4200, 120
        if self.kind == "vmdk-split":
            self.size -= self.size % self.unit
            self.others = False  # it is not one file
        if self.kind == "vmdk-zeroed":
            self.create["zeroed_grain"] = True
        if self.kind == "vmdk-backing":
            self.base = random_base(rng, rng.choice([12 * self.unit, 5 * self.unit + 512]))
            self.create |= {"backing_file": "base.vmdk", "backing_fmt": "vmdk"}
            self.create |= {"backing_identity": "12345678"}
            self.others = self.exact_discard = False

    def _sesparse(self, rng: random.Random) -> None:
        self.format, self.unit, self.steps = "vmdk", 4096, 24
        self.size = rng.choice([100 * self.unit, 100 * self.unit + 512])
        self.sizes = [60 * self.unit, 200 * self.unit, 200 * self.unit + 1024]
        self.lengths = [1, 512, 4096, 5000, 9 * self.unit, 20 * self.unit + 512]
        self.budget, self.most = 33_000, 120
        self.others = False
        if self.kind == "sesparse-backing":
            self.base = random_base(rng, rng.choice([60 * self.unit, 30 * self.unit + 512]))
            self.exact_discard = False

    @property
    def slots(self) -> tuple[str, ...]:
        """What the files of `files` fill."""
        if self.kind == "vmdk-split":
            return "file", "extent.0", "extent.1"
        return ("file", "data-file") if self.kind in DATA_FILE else ("file",)

    def files(self) -> list[bytes]:
        """A new image: its own file first."""
        if self.kind == "vmdk-split":
            return self._split()
        image = self._image() + self.used
        if self.kind not in DATA_FILE:
            return [image]
        raw = self.create.get("data_file_raw")
        return [image, bytes(self.size) if raw else self.used[: self.size].ljust(self.size, b"\0")]

    def _split(self) -> list[bytes]:
        """A descriptor and two sparse extents, which are images themselves."""
        first = 8 * self.unit
        sizes = [first, self.size - first]
        extents = [new_image("vmdk", ("size", size)) for size in sizes]
        lines = [f'RW {size >> 9} SPARSE "{name}"' for size, name in zip(sizes, "ab", strict=True)]
        text = [
            "# Disk DescriptorFile", "version=1", "CID=12345678", "parentCID=ffffffff",
            'createType="custom"', *lines, "#DDB", 'ddb.adapterType = "ide"', "",
        ]  # fmt: skip
        return ["\n".join(text).encode(), *extents]

    def _image(self) -> bytes:
        if self.kind.startswith("sesparse"):
            return sesparse.image(self.size)
        return new_image(self.format, *sorted(self.create.items()))

    def open(self) -> tuple[Any, Any]:
        """(format, opening procedure)."""
        if self.kind.startswith("sesparse"):
            return sesparse.alone(self.opened)
        open_format = registry.driver(self.format).open
        assert open_format is not None
        found: tuple[Any, Any] = open_format({"file-name": f"disk.{self.format}", **self.opened})
        if self.packs:
            found[0]._codec = Recall()
        return found

    def may_resize(self) -> bool:
        """The driver can."""
        # Version 2 does not say how large a disk was when its snapshot was taken.
        old = self.snapshots and self.create.get("compat") == "0.10"
        return not old and "resize" in registry.driver(self.format).capabilities
