"""``completion``: scripts for shells, made of what the verbs and formats declare of themselves."""

from __future__ import annotations

from importlib import import_module

from ..graph import registry
from ..graph.gate import POLICIES
from ..ops.check import REPAIRS
from ..ops.digest import ALGORITHMS
from ..ops.inspect import VERDICTS
from ..ops.resize import PREALLOCATIONS
from ..records import NamedTuple
from .images import READ_CACHES, arguments
from .main import IMG_VERBS, OWN_NAMES, OWN_VERBS, TOOLS, tool_of
from .options import BUDGETS, HELP, Opt
from .output import Call, UsageProblem

SHELLS = ("bash", "zsh", "fish")

OPTIONS = (
    Opt("", "name", "NAME", "for a link of this name, as that tool (repeatable; otherwise for "
        f"{' and '.join(OWN_NAMES)})"),
)  # fmt: skip

FORMATS, FILES, FOLDERS, OPTION_LIST, WORDS, TEXT = (
    "formats", "files", "folders", "options", "words", "text"
)  # fmt: skip
"""What completes an argument."""
_KINDS = {"FMT": FORMATS, "FILE": FILES, "PATH": FILES, "DIR": FOLDERS, "OPTS": OPTION_LIST}
_WORDS = {
    "OFMT": ("human", "json"),
    "POLICY": POLICIES,
    "CACHE": READ_CACHES,
    "AIO": ("threads", "native", "io_uring"),
    "DISCARD": ("ignore", "unmap"),
    "DETECT": ("off", "on", "unmap"),
    "PREALLOC": PREALLOCATIONS,
    "REPAIR": REPAIRS,
    "MAPFMT": ("text", "json"),
    "ALGO": ALGORITHMS,
    "VERDICT": VERDICTS,
}
"""The arguments that options take, by the name that their declarations give to them."""


class Flag(NamedTuple):
    """An option: ``short`` and ``long`` without dashes, either may be empty.  ``kind`` is what
    completes its argument (empty: it has none), ``words`` of that kind; ``optional``: only the long
    form takes it.  An option list is one of the group ``group`` (``create``, ``amend``,
    ``salvage``) for the format that the flags ``chosen_by`` say."""

    short: str
    long: str
    help: str
    kind: str = ""
    words: tuple[str, ...] = ()
    optional: bool = False
    group: str = ""
    chosen_by: tuple[str, ...] = ()

    @property
    def spellings(self) -> list[str]:
        """As they are typed."""
        return [f"-{self.short}"] * bool(self.short) + [f"--{self.long}"] * bool(self.long)


class Verb(NamedTuple):
    """A subcommand; of a tool without verbs the name is empty.  ``operands`` are the words that it
    takes instead of files."""

    name: str
    help: str
    flags: tuple[Flag, ...]
    operands: tuple[str, ...] = ()


class Choice(NamedTuple):
    """An option of a format, and its values where they are few."""

    name: str
    help: str
    values: tuple[str, ...]


class Program(NamedTuple):
    """One tool under its ``names``.  ``options`` are those of formats, by group and format."""

    names: tuple[str, ...]
    verbs: tuple[Verb, ...]
    formats: tuple[str, ...]
    options: dict[tuple[str, str], tuple[Choice, ...]]

    @property
    def function(self) -> str:
        """A beginning for the names of functions."""
        return "_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in self.names[0])


def main(call: Call, argv: list[str]) -> int:
    """Print the completion script of a shell."""
    summary = "Print what completes command lines in a shell: bash, zsh or fish."
    args = arguments(call, argv, OPTIONS, "SHELL", summary)
    if args is None:
        return 0
    if len(args.operands) != 1 or args.operands[0] not in SHELLS:
        raise UsageProblem(f"Expecting a shell: {', '.join(SHELLS)}")
    write = import_module(f"{__package__}.shells.{args.operands[0]}").script
    by_tool: dict[str, list[str]] = {}
    for name in args.all("name") or OWN_NAMES:
        if not name or not all(char.isalnum() or char in "-_.+" for char in name):
            raise UsageProblem(f"'{name}' is not the name of a command")
        by_tool.setdefault(tool_of(name), []).append(name)
    programs = [program(tool, tuple(names)) for tool, names in by_tool.items()]
    call.out("".join(write(one) for one in programs), "")
    return 0


def program(tool: str, names: tuple[str, ...]) -> Program:
    """What ``tool`` declares."""
    if tool in TOOLS:
        verbs = [_verb(TOOLS[tool], "", "")]
    else:
        known = IMG_VERBS if tool == "qemu-img" else {**IMG_VERBS, **OWN_VERBS}
        verbs = [_verb(name, name, text) for name, text in sorted(known.items())]
    formats = tuple(n for n, entry in registry.BUILTIN.items() if entry.kind == "format")
    options = {}
    for fmt in formats:
        found = registry.driver(fmt)
        for group, declared in (
            ("create", found.create_options),
            ("amend", found.amend_options),
            ("salvage", found.salvage_options),
        ):
            options[group, fmt] = tuple(
                Choice(o.name, o.help, ("on", "off") if o.type == "bool" else o.choices)
                for o in declared
                if not (o.own and tool != "diskwright")
            )
    return Program(names, tuple(verbs), formats, options)


def _verb(module: str, name: str, text: str) -> Verb:
    declared: tuple[Opt, ...] = import_module(f"{__package__}.{module}").OPTIONS
    every = {option.key: option for option in (HELP, *declared, *BUDGETS)}
    flags = tuple(_flag(option, name, declared) for option in every.values())
    return Verb(name, text, flags, SHELLS if name == "completion" else ())


def _flag(option: Opt, verb: str, declared: tuple[Opt, ...]) -> Flag:
    plain = Flag(option.short, option.long, option.help, optional=option.optional)
    if option.words:
        return plain._replace(kind=WORDS, words=option.words, optional=True)
    if option.value in _WORDS:
        return plain._replace(kind=WORDS, words=_WORDS[option.value])
    kind = _KINDS.get(option.value, TEXT if option.value else "")
    if kind != OPTION_LIST:
        return plain._replace(kind=kind)
    # Those of a new image are of the format behind -O, where a verb has that.
    group = {"amend": "amend"}.get(verb, "salvage" if option.key == "assume" else "create")
    letter = "O" if group == "create" and any(o.short == "O" for o in declared) else "f"
    chooser = next(o for o in declared if o.short == letter)
    spelled = tuple(_flag(chooser, verb, declared).spellings)
    return plain._replace(kind=kind, group=group, chosen_by=spelled)
