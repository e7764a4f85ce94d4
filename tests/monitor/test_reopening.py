"""Other options and other children for nodes in use, beside qemu-storage-daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monitor.running import needs_qsd, needs_unix
from monitor.test_nodes import Step, compare

pytestmark = [needs_unix, needs_qsd]

LOWER = {"driver": "file", "filename": "disk.raw"}


def test_reopening(tmp_path: Path) -> None:
    def again(**options: Any) -> Step:
        return "blockdev-reopen", {
            "options": [{key.replace("_", "-"): value for key, value in options.items()}]
        }

    raw = {"driver": "raw", "node_name": "raw"}
    top = {"driver": "qcow2", "node_name": "over3", "file": "image"}
    show: Step = ("query-named-block-nodes", {"flat": True})
    script: list[Step] = [
        ("blockdev-add", {**LOWER, "node-name": "one"}),
        ("blockdev-add", {"driver": "file", "filename": "over1.qcow2", "node-name": "two"}),
        ("blockdev-add", {"driver": "raw", "node-name": "raw", "file": "one"}),
        ("blockdev-add", {"driver": "qcow2", "node-name": "over2",
                          "file": {"driver": "file", "filename": "over2.qcow2"}}),
        ("blockdev-add", {"driver": "qcow2", "node-name": "over3", "file":
                          {"driver": "file", "filename": "over3.qcow2", "node-name": "image"}}),
        again(**raw, file="two"),
        show,
        again(**raw, file="one", read_only=True, detect_zeroes="on", discard="unmap"),
        show,
        again(**raw, file="one"),
        show,
        again(**raw, file="missing"),
        again(**raw, file="raw"),
        again(**raw, file=LOWER),
        again(**raw, file="one", force_share=True),
        again(**{**raw, "driver": "qcow2"}, file="one"),
        again(**top, backing="over2"),
        show,
        again(**top),
        again(**top, backing="missing"),
        again(**top, backing="over3"),
        ("blockdev-del", {"node-name": "over2"}),
        again(**top, backing=None),
        show,
        ("blockdev-del", {"node-name": "over2"}),
        again(node_name="one", driver="file", filename="two"),
        again(node_name="one", driver="file", filename="disk.raw", read_only=True),
        show,
    ]  # fmt: skip
    compare(tmp_path, script)
