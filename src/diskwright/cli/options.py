"""Command-line options as getopt_long(3) takes them: options and operands in any order, short
flags combined, ``--name=value``, and every unique beginning of a long name.

Written by hand because the standard library's parsers cost more at start-up than ``info`` does.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..records import NamedTuple


class Opt(NamedTuple):
    """One option.  ``short`` is a letter or empty, ``long`` a name or empty; ``value`` names the
    argument, empty when there is none; ``help`` is shown by ``--help`` (empty: not shown).
    With ``words`` only the long form takes the argument, which must be one of them or missing;
    with ``optional`` it may be missing, and stands behind ``=`` otherwise."""

    short: str
    long: str
    value: str = ""
    help: str = ""
    words: tuple[str, ...] = ()
    optional: bool = False

    @property
    def key(self) -> str:
        """What :class:`Args` knows it by: the long name, or the letter."""
        return self.long or self.short


HELP = Opt("h", "help", "", "show this help and exit")
FORMAT = Opt("f", "format", "FMT", "format of the image (otherwise it is probed)")
IMAGE_OPTS = Opt("", "image-opts", "", "FILENAME is a list of options, not a file name")
FORCE_SHARE = Opt("U", "force-share", "", "open the image although others write to it")
OBJECT = Opt("", "object", "DEF", "define a secret: 'secret,id=ID,file=PATH'")
QUIET = Opt("q", "quiet", "", "print nothing but errors")
PROGRESS = Opt(
    "p", "progress", "WHEN", "show progress ('--progress json': as lines of JSON)", ("json",)
)
OUTPUT = Opt("", "output", "OFMT", "human or json")
PICTURE = (
    Opt("", "picture", "", "show what each layer holds as a strip of columns"),
    Opt("", "svg", "FILE", "write that picture to FILE as SVG"),
)
POLICY = Opt(
    "", "policy", "POLICY", "what images may name: untrusted, local (default) or trusted"
)
ALLOW = Opt("", "allow", "DIR", "open what images name below DIR, too (repeatable)")
MAP_PATH = Opt("", "map-path", "FROM=TO", "where a path is here that images name (repeatable)")
GATE = (POLICY, ALLOW, MAP_PATH)
"""What decides about the files that images name."""
TRACE = Opt("", "trace", "WHAT", "time requests, and tell at SIGUSR2 what they wait for: on, "
            "slow=SECONDS (also once one takes longer), file=PATH (each as JSON)")  # fmt: skip
METRICS = Opt("", "metrics", "ADDRESS", "answer HTTP requests for /metrics (Prometheus) at "
              "HOST:PORT, PORT (of this machine alone) or unix:PATH")  # fmt: skip
BUDGETS = (
    Opt("", "max-time", "SECONDS", "give up after so long"),
    Opt("", "max-memory", "SIZE", "give up when metadata need more memory"),
    Opt("", "max-metadata", "SIZE", "give up when more metadata are read from images"),
)
"""What every verb may use (see docs/security.md)."""


class OptionError(Exception):
    """An option that does not exist or lacks its argument; the text is getopt's."""


class Args:
    """What was given: ``options`` in their order as (key, value), and the operands."""

    def __init__(self, options: list[tuple[str, str]], operands: list[str]) -> None:
        self.options = options
        self.operands = operands

    def __contains__(self, key: str) -> bool:
        return any(name == key for name, _ in self.options)

    def get(self, key: str) -> str | None:
        """The last value given; None without."""
        for name, value in reversed(self.options):
            if name == key:
                return value
        return None

    def all(self, key: str) -> list[str]:
        """All values given, in their order."""
        return [value for name, value in self.options if name == key]


def parse(argv: Sequence[str], declared: Sequence[Opt], *, in_order: bool = False) -> Args:
    """Sort ``argv`` into options and operands; ``in_order`` stops at the first operand.

    Raises :class:`OptionError`.
    """
    short = {option.short: option for option in declared if option.short}
    long = {option.long: option for option in declared if option.long}
    found: list[tuple[str, str]] = []
    operands: list[str] = []
    rest = list(argv)
    rest.reverse()
    while rest:
        word = rest.pop()
        if word == "--":
            rest.reverse()
            operands += rest
            break
        if word.startswith("--"):
            found.append(_long(word[2:], long, rest))
        elif word.startswith("-") and word != "-":
            found += _short(word[1:], short, rest)
        elif in_order:
            rest.append(word)
            rest.reverse()
            operands += rest
            break
        else:
            operands.append(word)
    return Args(found, operands)


def _long(word: str, declared: dict[str, Opt], rest: list[str]) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    option = declared.get(name)
    if option is None:
        matches = [opt for known, opt in declared.items() if known.startswith(name)]
        if not matches:
            raise OptionError(f"unrecognized option '--{name}'")
        if len(matches) > 1:
            known = " ".join(f"'--{match.long}'" for match in matches)
            raise OptionError(f"option '--{name}' is ambiguous; possibilities: {known}")
        option = matches[0]
    if not option.value:
        if equals:
            raise OptionError(f"option '--{option.long}' doesn't allow an argument")
    elif option.words:
        if not equals and rest and rest[-1] in option.words:
            value = rest.pop()
        elif equals and value not in option.words:
            raise OptionError(f"option '--{option.long}' doesn't allow the argument '{value}'")
    elif not equals and not option.optional:
        if not rest:
            raise OptionError(f"option '--{option.long}' requires an argument")
        value = rest.pop()
    return option.key, value


def _short(word: str, declared: dict[str, Opt], rest: list[str]) -> list[tuple[str, str]]:
    found = []
    for i, letter in enumerate(word):
        option = declared.get(letter)
        if option is None:
            raise OptionError(f"invalid option -- '{letter}'")
        if option.value and not option.words:
            value = word[i + 1 :]
            if not value:
                if not rest:
                    raise OptionError(f"option requires an argument -- '{letter}'")
                value = rest.pop()
            found.append((option.key, value))
            break
        found.append((option.key, ""))
    return found


def help_text(usage: str, summary: str, declared: Sequence[Opt]) -> str:
    """The text of ``--help``."""
    lines = [f"Usage: {usage}", summary, "", "Options:"]
    for option in declared:
        if not option.help:
            continue
        short = f"-{option.short}" if option.short else "  "
        long = f"--{option.long}" if option.long else ""
        joint = ", " if option.short and option.long else "  "
        value = option.value
        if value:
            value = f" [{'|'.join(option.words)}]" if option.words else f" {value}"
            value = f"[={option.value}]" if option.optional else value
        left = f"  {short}{joint}{long}{value}"
        if len(left) > 30:
            lines.append(left)
            left = ""
        lines.append(f"{left:<32}{option.help}")
    return "\n".join(lines) + "\n"
