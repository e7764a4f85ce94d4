"""Secrets: the definitions that qemu's tools take, and where their bytes do not appear."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from diskwright.errors import UsageError
from diskwright.ops.gates import kept
from diskwright.ops.secrets import secrets_of
from diskwright.secrets import Secrets, find

KEY = base64.b64encode(bytes(range(32))).decode()
IV = base64.b64encode(bytes(16)).decode()


@pytest.mark.parametrize(
    "text, value",
    [
        ("secret,id=a,data=hunter2", b"hunter2"),
        ("secret,id=a,data=one,,two", b"one,two"),
        ("secret,id=a,data=", b""),
        ("secret,id=a,format=base64,data=aGVsbG8=", b"hello"),
        ("secret,id=a,format=base64,data=aGVsbG8", b"hello"),
        ("secret,id=a,format=raw,data=aGVsbG8=", b"aGVsbG8="),
        ("qom-type=secret,id=a,data=x", b"x"),
        ('{"qom-type": "secret", "id": "a", "data": "x,y"}', b"x,y"),
    ],
)
def test_a_definition(text: str, value: bytes) -> None:
    assert dict(secrets_of([text])) == {"a": value}


def test_a_file_is_taken_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"\xff\0abc\n")
    assert secrets_of([f"secret,id=a,file={path}"])["a"] == b"\xff\0abc\n"
    path.write_bytes(b"aGVs\nbG8=\n")
    assert secrets_of([f"secret,id=a,file={path},format=base64"])["a"] == b"hello"


# The words are those of qemu-img 10.
@pytest.mark.parametrize(
    "texts, message",
    [
        (["secret"], "Parameter 'id' is missing"),
        (["secret,id=a"], "Either 'file' or 'data' must be provided"),
        (["secret,id=a,data=x,file=y"], "'file' and 'data' are mutually exclusive"),
        (["secret,id=a,data=x,format=foo"], "Parameter 'format' does not accept value 'foo'"),
        (["secret,id=a,data=!!,format=base64"], "Base64 data contains invalid characters"),
        (["secret,id=a,data=x,bogus=1"], "Parameter 'bogus' is unexpected"),
        (["foo,id=a"], "Parameter 'qom-type' does not accept value 'foo'"),
        (["secret,id=1a,data=x"], "expects an identifier"),
        (["secret,id=a,data=x", "secret,id=a,data=y"], "attempt to add duplicate property 'a'"),
        (["secret,id=a,data=x,keyid=k"], "No secret with id 'k'"),
        (
            ["secret,id=k,data=short", f"secret,id=a,data=x,keyid=k,iv={IV}"],
            "Key should be 32 bytes in length",
        ),
        (
            [f"secret,id=k,data={KEY},format=base64", "secret,id=a,data=x,keyid=k"],
            "IV is required to decrypt secret",
        ),
        (
            [f"secret,id=k,data={KEY},format=base64", "secret,id=a,data=x,keyid=k,iv=AAAA"],
            "IV should be 16 bytes in length not 3",
        ),
        (
            [f"secret,id=k,data={KEY},format=base64", f"secret,id=a,data=x,keyid=k,iv={IV}"],
            "Length 1 must be a multiple of block size 16",
        ),
        (["secret,id=a,file=/nonexistent"], "Unable to read /nonexistent"),
        (['{"qom-type": "secret"'], "JSON parse error"),
        (['{"qom-type": "secret", "id": 5}'], "expected: string"),
    ],
)
def test_what_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        secrets_of(texts)
    assert message in str(caught.value)


def test_an_encrypted_secret() -> None:
    ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    cipher = ciphers.Cipher(ciphers.algorithms.AES(bytes(range(32))), ciphers.modes.CBC(bytes(16)))
    machine = cipher.encryptor()
    data = machine.update(b"correct horse".ljust(16, b"\3")) + machine.finalize()
    text = base64.b64encode(data).decode()
    found = secrets_of(
        [
            f"secret,id=k,data={KEY},format=base64",
            f"secret,id=a,data={text},keyid=k,iv={IV},format=base64",
        ]
    )
    assert found["a"] == b"correct horse"


def test_the_bytes_are_not_shown() -> None:
    secrets = Secrets({"a": "hunter2"})
    assert secrets["a"] == b"hunter2"
    assert "hunter2" not in f"{secrets!r} {secrets}"
    assert kept(secrets) is secrets
    with pytest.raises(UsageError, match="No secret with id 'b'"):
        find(secrets, "b")
    with pytest.raises(UsageError, match="No secret with id 'b'"):
        find(None, "b")
