"""Who is admitted: the objects ``authz-simple``, ``authz-list`` and ``authz-listfile``.

An identity is what a peer has proven, for NBD the distinguished name of its certificate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .errors import UnsupportedFeature, UsageError
from .records import NamedTuple

POLICIES = ("deny", "allow")
FORMATS = ("exact", "glob")
TYPES = ("authz-simple", "authz-list", "authz-listfile", "authz-pam")

Read = Callable[[str], bytes]


class Authz(Protocol):
    """An authorisation."""

    def allows(self, identity: str) -> bool:
        """Whether ``identity`` is admitted."""
        ...


class Simple(NamedTuple):
    """Admits one identity."""

    identity: str

    def allows(self, identity: str) -> bool:
        """Whether it is that one."""
        return identity == self.identity


class Rule(NamedTuple):
    """What is done with the identities that ``match``: the text itself, or as a ``glob`` with ``*``
    for any text and ``?`` for any character."""

    match: str
    policy: str
    format: str = "exact"

    def fits(self, identity: str) -> bool:
        """Whether the rule is for ``identity``."""
        if self.format == "exact":
            return identity == self.match
        parts = (
            {"*": ".*", "?": "."}.get(char, re.escape(char))
            for char in re.sub(r"\*+", "*", self.match)
        )
        return re.fullmatch("".join(parts), identity, re.DOTALL) is not None


class RuleList(NamedTuple):
    """The first rule that fits decides; ``policy`` where none does."""

    rules: tuple[Rule, ...] = ()
    policy: str = "deny"

    def allows(self, identity: str) -> bool:
        """What the rules say."""
        for rule in self.rules:
            if rule.fits(identity):
                return rule.policy == "allow"
        return self.policy == "allow"


class RuleFile:
    """A list of rules in a file, as JSON: ``{"policy": ..., "rules": [{"match": ...}, ...]}``.

    With ``refresh`` it is read again for each peer.  Nobody is admitted while it cannot be used.
    Raises UsageError for a file that cannot be used at the beginning.
    """

    def __init__(self, name: str, refresh: bool, read: Read) -> None:
        self.name, self.refresh, self._read = name, refresh, read
        self._list = self._load()

    def allows(self, identity: str) -> bool:
        """What the file says now."""
        if self.refresh:
            try:
                self._list = self._load()
            except UsageError:
                return False
        return self._list.allows(identity)

    def _load(self) -> RuleList:
        try:
            found = json.loads(self._read(self.name))
        except (OSError, ValueError, RecursionError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"Unable to read rules from '{self.name}': {why}") from error
        if not isinstance(found, dict):
            raise UsageError(f"'{self.name}' holds no object of rules")
        return _list(found)


def authz_of(kind: str, given: Mapping[str, Any], read: Read | None) -> Authz:
    """The authorisation of the type ``kind`` with these properties, those of a list nested or, as
    on a command line, ``rules.0.match`` and so on.  ``read`` reads a file; without it none is read.

    Raises UsageError and UnsupportedFeature.
    """
    if kind == "authz-simple":
        return Simple(_text(_only(given, ("identity",)), "identity"))
    if kind == "authz-list":
        return _list(_nested(given))
    if kind == "authz-listfile":
        _only(given, ("filename", "refresh"))
        refresh = given.get("refresh", True)
        if refresh not in (True, False, "on", "off", "yes", "no", "true", "false"):
            raise UsageError("Parameter 'refresh' expects 'on' or 'off'")
        name = _text(given, "filename")
        if read is None:
            raise UsageError(f"Unable to read {name}: files are not read here")
        return RuleFile(name, refresh in (True, "on", "yes", "true"), read)
    raise UnsupportedFeature(f"the object type '{kind}'")


def _list(given: Mapping[str, Any]) -> RuleList:
    _only(given, ("policy", "rules"))
    rules = given.get("rules", ())
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise UsageError("Invalid parameter type for 'rules', expected: array")
    policy = _word(given, "policy", POLICIES, "deny")
    return RuleList(tuple(_rule(rule, i) for i, rule in enumerate(rules)), policy)


def _rule(given: Any, number: int) -> Rule:
    where = f"rules.{number}"
    if not isinstance(given, Mapping):
        raise UsageError(f"Invalid parameter type for '{where}', expected: object")
    _only(given, ("match", "policy", "format"), f"{where}.")
    match = _text(given, "match", f"{where}.")
    if "policy" not in given:
        raise UsageError(f"Parameter '{where}.policy' is missing")
    policy = _word(given, "policy", POLICIES, "")
    return Rule(match, policy, _word(given, "format", FORMATS, "exact"))


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """``rules.0.match`` and so on as a list."""
    out = {key: value for key, value in given.items() if not key.startswith("rules.")}
    rules: dict[int, dict[str, Any]] = {}
    for key in given.keys() - out.keys():
        number, _, name = key.removeprefix("rules.").partition(".")
        if not (number.isascii() and number.isdecimal() and len(number) < 6 and name):
            raise UsageError(f"Parameter '{key}' is unexpected")
        rules.setdefault(int(number), {})[name] = given[key]
    if rules:
        missing = next((i for i in range(len(rules)) if i not in rules), None)
        if missing is not None:
            raise UsageError(f"Parameter 'rules.{missing}' missing")
        out["rules"] = [rules[i] for i in range(len(rules))]
    return out


def _only(given: Mapping[str, Any], names: tuple[str, ...], where: str = "") -> Mapping[str, Any]:
    for key in given:
        if key not in names:
            raise UsageError(f"Parameter '{where}{key}' is unexpected")
    return given


def _text(given: Mapping[str, Any], key: str, where: str = "") -> str:
    if key not in given:
        raise UsageError(f"Parameter '{where}{key}' is missing")
    if not isinstance(given[key], str):
        raise UsageError(f"Invalid parameter type for '{where}{key}', expected: string")
    return str(given[key])


def _word(given: Mapping[str, Any], key: str, words: tuple[str, ...], default: str) -> str:
    value = given.get(key, default)
    if value not in words:
        raise UsageError(f"Parameter '{key}' does not accept value '{value}'")
    return str(value)
