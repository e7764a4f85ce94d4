"""Rules of blkdebug from a configuration file and from options."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from ..errors import UsageError
from ..graph.options import boolean
from ..hints import Any
from .blkdebug_rules import EVENTS, IOTYPES, InjectError, SetState

MOST_BYTES = 1 << 20
"""Largest configuration file that is read."""

_GROUP = re.compile(r'\s*\[\s*([^]\s"]+)(?:\s+"[^"]*")?\s*\]')
# As the other tools read it: the name ends at a blank, so `key="value"` is one odd name.
_OPTION = re.compile(r'\s*(\S{1,63})(?:\s*=\s*"([^"]*)")?')
_INT64 = 1 << 63

_INJECT = ("event", "state", "iotype", "errno", "sector", "once", "immediately")
_STATE = ("event", "state", "new_state")
_GROUPS = {"inject-error": _INJECT, "set-state": _STATE}

Section = tuple[str, dict[str, Any]]
Rules = tuple[list[InjectError], list[SetState]]


def read_config(path: str) -> list[Section]:
    """The sections of a configuration file: (``inject-error`` or ``set-state``, its options)."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"Could not read blkdebug config file: {error.strerror}") from error
    if len(raw) > MOST_BYTES:
        raise UsageError(f"The blkdebug config file '{os.fsdecode(path)}' is too large")
    return parse_config(raw.decode("utf-8", "surrogateescape"))


def parse_config(text: str) -> list[Section]:
    """Sections in the form ``[group]`` with lines ``name = "value"``; ``#`` begins a comment."""
    sections: list[Section] = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        group = _GROUP.match(line)
        if group is not None:
            if group.group(1) not in _GROUPS:
                raise UsageError(f"There is no option group '{group.group(1)}'")
            sections.append((group.group(1), {}))
            continue
        if not sections:
            raise UsageError("no group defined")
        name, options = sections[-1]
        found = _OPTION.match(line)
        key = found.group(1) if found else line.strip()
        if key not in _GROUPS[name]:
            raise UsageError(f"Invalid parameter '{key}'")
        options[key] = (found.group(2) if found else None) or ""
    return sections


def option_sections(group: str, value: Any) -> list[Section]:
    """The sections that an option (a list of dicts, or one dict) describes."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        numbered = [key for key in value if str(key).partition(".")[0].isdigit()]
        if numbered:
            raise UsageError(f"Unused option '{numbered[0]}' for [{group}]")
        value = [value]
    if not isinstance(value, list):
        raise UsageError(f"Option '{group}' is a list of rules")
    sections = []
    for options in value:
        if not isinstance(options, Mapping):
            raise UsageError(f"Option '{group}' is a list of rules")
        for key in options:
            if key not in _GROUPS[group]:
                raise UsageError(f"[{group}] section doesn't support the option '{key}'")
        sections.append((group, dict(options)))
    return sections


def make_rules(sections: list[Section]) -> Rules:
    """Check the sections' values and make them rules, in order."""
    inject: list[InjectError] = []
    states: list[SetState] = []
    for group, options in sections:
        event = _choice(options, "event", EVENTS)
        if event is None:
            raise UsageError("Missing event name for rule")
        if group == "inject-error":
            inject.append(
                InjectError(
                    event,
                    _number(options, "state", 0),
                    _choice(options, "iotype", IOTYPES),
                    _number(options, "errno", 5),
                    _number(options, "sector", -1),
                    boolean("once", options.get("once", False)),
                    boolean("immediately", options.get("immediately", False)),
                )
            )
        else:
            states.append(
                SetState(event, _number(options, "state", 0), _number(options, "new_state", 0))
            )
    return inject, states


def _choice(
    options: dict[str, Any], name: str, choices: frozenset[str] | tuple[str, ...]
) -> str | None:
    value = options.get(name)
    if value is not None and value not in choices:
        raise UsageError(f"invalid parameter value: {value}")
    return value


def _number(options: dict[str, Any], name: str, default: int) -> int:
    value = options.get(name, default)
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            value = None
    if not isinstance(value, int) or isinstance(value, bool) or not -_INT64 <= value < _INT64:
        raise UsageError(f"Parameter '{name}' expects a number")
    return value
