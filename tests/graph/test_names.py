"""File names with protocols, json: objects, option strings, and names made for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.errors import DiskError, UsageError
from diskwright.graph import names
from diskwright.graph.create import create_image
from diskwright.graph.display import base_of, display_name
from diskwright.graph.gate import Gate
from diskwright.graph.opener import close_disk, open_disk
from diskwright.units import align_up

from .tools import run, shell


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("a.raw", ""),
        ("dir/a:b", ""),
        ("./a:b", ""),
        ("a:b", "a"),
        ("file:x", "file"),
        ("json:{}", "json"),
        ("/x:y", ""),
        ("", ""),
        ("nbd://host/x", "nbd"),
    ],
)
def test_a_protocol_stands_before_a_colon_that_comes_before_any_slash(
    name: str, protocol: str
) -> None:
    assert names.protocol_of(name) == protocol


def test_file_names_become_options() -> None:
    assert names.from_filename("a.raw") == {"driver": "file", "filename": "a.raw"}
    assert names.from_filename("file:a:b") == {"driver": "file", "filename": "a:b"}
    assert names.from_filename("./a:b") == {"driver": "file", "filename": "./a:b"}
    assert names.from_filename("null-co://") == {"driver": "null-co"}
    image = {"driver": "file", "filename": "x:y"}
    assert names.from_filename("blkdebug:c.cfg:./x:y") == {
        "driver": "blkdebug",
        "config": "c.cfg",
        "image": {**image, "filename": "./x:y"},
    }
    assert names.from_filename("blkdebug::file:x:y") == {"driver": "blkdebug", "image": image}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a:b.qcow2", "Unknown protocol 'a'"),
        ("blkdebug:", "blkdebug requires both config file and image path"),
        ("null-co:x", "The only allowed filename for this driver is 'null-co://'"),
        ("json:{", "Could not parse the JSON options"),
        ("json:[]", "Invalid JSON object given"),
        ("file:", "cannot be the name of a file"),
        ("", "requires a file name"),
        ("a\0b", "cannot be the name of a file"),
        ("a\ud800", "cannot be the name of a file"),
        ("json:" + "[" * 100000, "Could not parse the JSON options"),
        ("json:" + '{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
        ('json:{"' + "a." * 200 + 'a": 1}', "nested too deeply"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        names.parse(name)


def test_json_keys_may_be_dotted_nested_or_both() -> None:
    text = 'json:{"driver":"qcow2","file.driver":"file","file":{"filename":"x"},"a":[{"b":1},2]}'
    assert names.parse(text) == (
        {"driver": "qcow2", "file": {"driver": "file", "filename": "x"}, "a": [{"b": 1}, 2]},
        False,
    )


def test_option_strings() -> None:
    parse = names.parse_image_opts
    assert parse("driver=qcow2,file.driver=file,file.filename=a,,b=c,read-only,nofoo") == {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": "a,b=c"},
        "read-only": "on",
        "foo": "off",
    }
    assert parse("filename=x,,") == {"filename": "x,"}
    assert parse("a=,b=1") == {"a": "", "b": "1"}
    with pytest.raises(UsageError, match="Cannot find device='foo' nor node-name='foo'"):
        parse("foo")
    with pytest.raises(UsageError, match="conflicts"):
        parse("file=x,file.driver=y")
    with pytest.raises(UsageError, match="conflicts"):
        parse("file.driver=y,file=x")


@given(st.dictionaries(st.sampled_from(["a", "b", "c.d", "c.e", "l.0", "l.1"]), st.text()))
def test_values_survive_an_option_string(flat: dict[str, str]) -> None:
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in flat.items())
    assert names.flatten(names.parse_image_opts(text)) == flat


_TREES = st.recursive(
    st.integers() | st.text() | st.booleans(),
    lambda inner: (
        st.dictionaries(st.sampled_from("abcd"), inner, min_size=1)
        | st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from("abcd"), _TREES))
def test_nesting_reverses_flattening(tree: dict[str, Any]) -> None:
    assert names.nest(names.flatten(tree)) == tree


@given(st.text(max_size=60))
def test_no_name_makes_the_parser_fail_otherwise(text: str) -> None:
    for name in (text, "json:" + text, "json:{" + text + "}"):
        try:
            names.parse(name)
        except DiskError:
            pass
    try:
        names.parse_image_opts(text)
    except DiskError:
        pass


@pytest.mark.parametrize(
    ("base", "name", "resolved"),
    [
        ("d/o.qcow2", "../a", "d/../a"),
        ("o.qcow2", "a", "a"),
        ("/x/o.qcow2", "a/b", "/x/a/b"),
        ("d/o.qcow2", "/abs", "/abs"),
        ("d/o.qcow2", "nbd://h/x", "nbd://h/x"),
        ("d/o.qcow2", "file:x", "file:x"),
        ("d/o.qcow2", "./a:b", "d/./a:b"),
    ],
)
def test_relative_names_are_looked_up_beside_the_overlay(
    base: str, name: str, resolved: str
) -> None:
    assert names.resolve(base, name) == resolved


DESCRIPTIONS: list[dict[str, Any]] = [
    {"driver": "qcow2", "file": {"driver": "file", "filename": "a.qcow2"}},
    {"driver": "raw", "file": {"driver": "file", "filename": "ab"}},
    {"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "a.qcow2"}},
    {"driver": "raw", "file": {"driver": "raw", "file": {"driver": "file", "filename": "ab"}}},
    {"driver": "raw", "file": {"driver": "qcow2", "file.filename": "a.qcow2"}},
    {"driver": "null-co", "size": "1M"},
    {"driver": "raw", "file": {"driver": "null-co"}},
    {"driver": "file", "filename": "a.qcow2"},
]


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=json.dumps)
def test_names_for_people_are_as_the_real_tool_makes_them(
    description: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ab").write_bytes(bytes(1024))

    async def name(driver: Any) -> str:
        await create_image(driver, "a.qcow2", "qcow2", 1 << 20)
        node = await open_disk(driver, description)
        found = display_name(node)
        await close_disk(node)
        return found

    ours = run(name)
    text = "json:" + json.dumps(description)
    theirs = json.loads(shell(tmp_path, peer("qemu-img"), "info", "--output=json", text))

    def comparable(found: str) -> Any:
        if not found.startswith("json:"):
            return found
        # Numbers stay text there when they were given as text.
        return {key: str(v) for key, v in names.flatten(json.loads(found[5:])).items()}

    expected = comparable(theirs["filename"])
    if isinstance(expected, dict) and expected.get("size") == "1M":
        expected["size"] = str(1 << 20)
    assert comparable(ours) == expected
    # And the name opens the same disk (a file that is no disk has no sectors).
    size = run(lambda driver: _size(driver, ours, description["driver"]))
    assert align_up(size, 512) == theirs["virtual-size"]


async def _size(driver: Any, name: str, format: str) -> int:
    node = await open_disk(driver, name, format=None if name.startswith("json:") else format)
    size = node.size
    await close_disk(node)
    return size


def test_a_name_with_a_colon_keeps_its_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real tool calls this one "a:b", which it then cannot open.
    monkeypatch.chdir(tmp_path)
    Path("a:b").write_bytes(bytes(1024))

    async def work(driver: Any) -> None:
        for reference in ("file:a:b", "./a:b", {"driver": "raw", "file.filename": "./a:b"}):
            node = await open_disk(driver, reference, format="raw")
            assert display_name(node) == "./a:b"
            await close_disk(node)

    run(work)


def test_names_that_are_not_utf8_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, top = os.fsdecode(b"b\xff.qcow2"), os.fsdecode(b"\xfe/t\xff.qcow2")
    os.mkdir(b"\xfe")

    async def work(driver: Any) -> tuple[str, str]:
        await create_image(driver, base, "qcow2", 1 << 20)
        backing = {"backing_file": "../" + base, "backing_fmt": "qcow2"}
        await create_image(driver, top, "qcow2", None, backing)
        node = await open_disk(driver, top, gate=Gate("trusted"))
        below = node.child("backing")
        assert below is not None
        found = display_name(node), display_name(below)
        await close_disk(node)
        return found

    assert run(work) == (top, os.fsdecode(b"\xfe/../b\xff.qcow2"))


def test_a_leaf_without_directory_has_no_relatives() -> None:
    async def work(driver: Any) -> None:
        node = await open_disk(driver, {"driver": "raw", "file": {"driver": "null-co"}})
        try:
            with pytest.raises(UsageError, match="Cannot generate a base directory for null-co"):
                base_of(node)
        finally:
            await close_disk(node)

    run(work)
