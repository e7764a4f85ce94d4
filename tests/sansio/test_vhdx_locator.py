"""Parent locators: what is written for which name, and what is read of it."""

from __future__ import annotations

import struct

import pytest

from diskwright.errors import MalformedImage, UnsupportedFeature, UsageError
from diskwright.formats.vhdx.locator import VHDX_TYPE, Locator, encode, locate, parse
from house.tinyvhdx import LOCATOR_TYPE, locator_item, utf16

ID = "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}"


def stored(locator: Locator) -> dict[str, str]:
    return {key: value.decode("utf-16-le") for key, value in locator.entries}


@pytest.mark.parametrize(
    ("name", "image", "paths", "names"),
    [
        ("base.vhdx", None, {"relative_path": ".\\base.vhdx"}, ["base.vhdx"]),
        ("./base.vhdx", "x", {"relative_path": ".\\base.vhdx"}, ["base.vhdx"]),
        ("../a/b.vhdx", "d/x", {"relative_path": "..\\a\\b.vhdx"}, ["../a/b.vhdx"]),
        ("a/b.vhdx", "/d/x", {"relative_path": ".\\a\\b.vhdx"}, ["a/b.vhdx"]),
        ("./a:b", "/d/x", {"relative_path": ".\\a:b"}, ["./a:b"]),
        (
            "/d/e/base",
            "/d/x",
            {"relative_path": ".\\e\\base", "absolute_win32_path": "/d/e/base"},
            ["e/base", "/d/e/base"],
        ),
        (
            "/e/base",
            "/d/f/x",
            {"relative_path": "..\\..\\e\\base", "absolute_win32_path": "/e/base"},
            ["../../e/base", "/e/base"],
        ),
        ("/e/base", "x", {"absolute_win32_path": "/e/base"}, ["/e/base"]),
        ("/e/b\\c", "/e/x", {"absolute_win32_path": "/e/b\\c"}, ["/e/b\\c"]),
        ("C:\\vm\\b", "/e/x", {"absolute_win32_path": "C:\\vm\\b"}, ["C:\\vm\\b"]),
        ("c:/vm/b", "/e/x", {"absolute_win32_path": "c:/vm/b"}, ["c:/vm/b"]),
        ("\\\\?\\d:\\b", None, {"absolute_win32_path": "\\\\?\\d:\\b"}, ["\\\\?\\d:\\b"]),
        ("\\\\srv\\s\\b", None, {"absolute_win32_path": "\\\\srv\\s\\b"}, ["\\\\srv\\s\\b"]),
        (
            "\\\\?\\Volume{26a21bda}\\b",
            None,
            {"volume_path": "\\\\?\\Volume{26a21bda}\\b"},
            ["\\\\?\\Volume{26a21bda}\\b"],
        ),
        ("..\\p\\b.vhdx", "/e/x", {"relative_path": "..\\p\\b.vhdx"}, ["../p/b.vhdx"]),
        ("nbd://host/x", "/e/x", {"absolute_win32_path": "nbd://host/x"}, ["nbd://host/x"]),
        ("Größe/Дом.vhdx", "x", {"relative_path": ".\\Größe\\Дом.vhdx"}, ["Größe/Дом.vhdx"]),
    ],
)
def test_what_is_written_for_a_name(
    name: str, image: str | None, paths: dict[str, str], names: list[str]
) -> None:
    locator = locate(name, [ID.upper()], image)
    assert stored(locator) == {"parent_linkage": ID, **paths}
    again = parse(encode(locator))
    assert again == locator
    assert list(again.names) == names
    assert again.linkages == (ID,)


def test_the_names_come_in_the_order_of_the_specification() -> None:
    item = locator_item(
        [
            ("absolute_win32_path", "\\\\?\\d:\\p\\parent.vhdx"),
            ("volume_path", "\\\\?\\Volume{x}\\parent.vhdx"),
            ("parent_linkage2", "{AAAAAAAA-24C8-49A6-A959-5E4BF1288BFB}"),
            ("parent_linkage", ID.upper()),
            ("relative_path", ".\\..\\path2\\sub3\\parent.vhdx"),
        ]
    )
    locator = parse(item)
    assert locator.names == (
        "../path2/sub3/parent.vhdx",
        "\\\\?\\Volume{x}\\parent.vhdx",
        "\\\\?\\d:\\p\\parent.vhdx",
    )
    assert locator.linkages == (ID, "{aaaaaaaa-24c8-49a6-a959-5e4bf1288bfb}")


def test_keys_of_others_survive_another_parent() -> None:
    old = Locator(
        VHDX_TYPE,
        (
            ("parent_linkage", utf16(ID)),
            ("made_by", b"\x00\xd8odd"),
            ("relative_path", utf16(".\\old")),
            ("volume_path", utf16("\\\\?\\Volume{x}\\old")),
        ),
    )
    new = locate("new", [ID], None, parse(encode(old)))
    assert new.raw("made_by") == b"\x00\xd8odd"
    assert new.names == ("new",)


def test_a_terminator_that_was_counted_is_no_part_of_a_name() -> None:
    item = locator_item([("parent_linkage", ID + "\0"), ("relative_path", "base\0")])
    assert parse(item).names == ("base",)
    assert parse(item).linkages == (ID,)


def item_with(offset: int, format: str, value: int) -> bytes:
    data = bytearray(locator_item([("parent_linkage", ID), ("relative_path", "base")]))
    struct.pack_into(format, data, offset, value)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        LOCATOR_TYPE,
        item_with(18, "<H", 0xFFFF),
        item_with(20, "<I", 0),
        item_with(20, "<I", 0xFFFFFFFF),
        item_with(24, "<I", 0xFFFFFFF0),
        item_with(24, "<I", 4),
        item_with(28, "<H", 0),
        item_with(28, "<H", 0xFFFF),
        item_with(28, "<H", 3),
        item_with(30, "<H", 0xFFFF),
        locator_item([("relative_path", "a"), ("relative_path", "b")]),
        bytes(16) + locator_item([("relative_path", "a")])[16:] + bytes(2 << 20),
    ],
)
def test_broken_items_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedImage):
        parse(data)


def test_entries_that_lie_over_each_other_are_bounded() -> None:
    """Few bytes on disk must not become gigabytes of keys and values."""
    count = 30_000
    end = 20 + 12 * count
    head = LOCATOR_TYPE + struct.pack("<HH", 0, count)
    table = b"".join(struct.pack("<IIHH", end + 2 * n, end, 2, 0xFFFF) for n in range(count))
    keys = b"".join(struct.pack("<H", 0x100 + n) for n in range(count))
    with pytest.raises(MalformedImage, match="longer"):
        parse(head + table + keys + bytes(0xFFFF))


@pytest.mark.parametrize("value", ["a\0b", "\udc80".encode("utf-16-le", "surrogatepass")])
def test_values_that_can_be_no_name(value: str | bytes) -> None:
    raw = value if isinstance(value, bytes) else utf16(value)
    with pytest.raises(MalformedImage):
        _ = Locator(VHDX_TYPE, (("relative_path", raw),)).names


def test_a_locator_of_another_type() -> None:
    with pytest.raises(UnsupportedFeature, match="parent"):
        parse(bytes(16) + locator_item([("relative_path", "a")])[16:])


@pytest.mark.parametrize("name", ["", "a\0b", "a/b\\c", "x" * 40_000, "\udcff"])
def test_names_that_cannot_be_stored(name: str) -> None:
    with pytest.raises(UsageError):
        encode(locate(name, [ID], "/d/x"))
