"""The exit statuses of ``check``, ``-r leaks`` and ``-r all`` beside those of qemu-img, for every
damage that the documentation lists (docs/formats/qcow2.md, "Exit statuses")."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskwright.cli.main import main
from sansio import damages, feature_damages, oracle

UNSEEN = {"zero-in-v2", "extended-reserved", "external-elsewhere"}
"""What qemu-img does not find."""
SET_BY_LEAKS = {"external-uncopied"}

Files = dict[str, bytes]


def files(damage: damages.Damage | feature_damages.Damage) -> Files:
    if isinstance(damage, damages.Damage):
        return {"image.qcow2": damage.image(), "base.raw": bytes(damages.SIZE)}
    made = feature_damages.base(damage.kind)
    stride = 2 if damage.kind == "extended" else 1
    file = feature_damages.File(made["image.qcow2"], stride)
    damage.make(file)
    return {**made, "image.qcow2": bytes(file.data)}


def named(kind: str, folder: Path) -> list[str]:
    image = f"driver=qcow2,file.filename={folder}/image.qcow2"
    if kind == "data-file":
        more = f"data-file.driver=file,data-file.filename={folder}/data.raw"
        return ["--image-opts", f"{image},{more}"]
    if kind == "luks":
        secret = ["--object", feature_damages.SECRET]
        return [*secret, "--image-opts", f"{image},encrypt.key-secret=s"]
    return ["-f", "qcow2", f"{folder}/image.qcow2"]


@pytest.mark.long
@oracle.needs_qemu
@pytest.mark.parametrize(
    "damage", [*damages.DAMAGES, *feature_damages.DAMAGES], ids=lambda d: d.name
)
def test_statuses(
    damage: damages.Damage | feature_damages.Damage,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = files(damage)
    found: list[tuple[int, int]] = []
    for fix in ([], ["-r", "leaks"], ["-r", "all"]):
        arguments = ["check", *fix, *named(getattr(damage, "kind", ""), tmp_path)]
        statuses = []
        for ours in (True, False):
            for name, data in made.items():
                (tmp_path / name).write_bytes(data)
            if ours:
                statuses.append(main("diskwright", arguments))
            else:
                statuses.append(oracle.run("qemu-img", *arguments).returncode)
        found.append((statuses[0], statuses[1]))
    capsys.readouterr()
    check, leaks, everything = found
    assert everything[0] == 0
    unseen = damage.name in UNSEEN
    for ours, theirs in (check, leaks):
        # 1: it did not finish.
        assert (
            ours == theirs
            or (ours == 2 and (theirs == 1 or (unseen and theirs == 0)))
            or (damage.name in SET_BY_LEAKS and (ours, theirs) == (2, 0))
        )
