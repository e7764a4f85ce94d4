"""Who is admitted: the rules, and how they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diskwright.authz import RuleFile
from diskwright.errors import UnsupportedFeature, UsageError
from diskwright.ops.secrets import secrets_of


def admits(definition: str | dict[str, Any], *identities: str) -> list[str]:
    authz = secrets_of([definition]).authz["a"]
    return [name for name in identities if authz.allows(name)]


def test_the_first_rule_that_fits_decides() -> None:
    rules = [
        {"match": "CN=fred", "policy": "allow"},
        {"match": "CN=f*d", "policy": "deny", "format": "glob"},
        {"match": "CN=?*", "policy": "allow", "format": "glob"},
    ]
    names = ("CN=fred", "CN=fRed", "CN=bob", "CN=", "O=x,CN=bob", "CN=f*d", "CN=a\nb")
    found = ["CN=fred", "CN=bob", "CN=a\nb"]
    assert admits({"qom-type": "authz-list", "id": "a", "rules": rules}, *names) == found
    flat = [f"rules.{i}.{key}={value}" for i in range(3) for key, value in rules[i].items()]
    assert admits(",".join(["authz-list,id=a", *flat]), *names) == found
    assert admits("authz-list,id=a", *names) == []
    assert admits("authz-list,id=a,policy=allow", *names) == list(names)
    assert admits("authz-simple,id=a,identity=CN=bob", *names) == ["CN=bob"]
    odd = "authz-list,id=a,rules.0.match=[a]*,rules.0.policy=allow,rules.0.format=glob"
    assert admits(odd, "a", "[a]", "[a]b") == ["[a]", "[a]b"]


def test_a_file_of_rules_that_changes(tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text(json.dumps({"rules": [{"match": "me", "policy": "allow"}]}))
    fixed = RuleFile(str(path), False, lambda name: Path(name).read_bytes())
    authz = secrets_of([f"authz-listfile,id=a,filename={path}"]).authz["a"]
    assert authz.allows("me") and not authz.allows("you")
    path.write_text(json.dumps({"policy": "allow"}))
    assert authz.allows("you") and not fixed.allows("you")
    path.write_text("{")
    assert not authz.allows("me") and fixed.allows("me")
    path.write_text(json.dumps({"policy": "allow"}))
    assert authz.allows("me")
    path.unlink()
    assert not authz.allows("me")


@pytest.mark.parametrize(
    ("text", "said"),
    [  # as qemu-nbd 10.0 words them
        ("policy=foo", "Parameter 'policy' does not accept value 'foo'"),
        ("rules.0.match=x", "Parameter 'rules.0.policy' is missing"),
        ("rules.0.policy=deny", "Parameter 'rules.0.match' is missing"),
        (
            "rules.0.match=x,rules.0.policy=deny,rules.0.format=regex",
            "Parameter 'format' does not accept value 'regex'",
        ),
        ("rules.1.match=x,rules.1.policy=allow", "Parameter 'rules.0' missing"),
        ("rules=x", "Invalid parameter type for 'rules', expected: array"),
        ("rules.x.y=z", "Parameter 'rules.x.y' is unexpected"),
    ],
)
def test_what_is_no_list(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"^{said}$"):
        secrets_of([f"authz-list,id=a,{text}"])


def test_other_types() -> None:
    with pytest.raises(UnsupportedFeature, match="authz-pam"):
        secrets_of(["authz-pam,id=a,service=x"])
    with pytest.raises(UsageError, match="does not accept value 'authz-x'"):
        secrets_of(["authz-x,id=a"])
    with pytest.raises(UsageError, match="Unable to read rules"):
        secrets_of(["authz-listfile,id=a,filename=/nothing/there"])
