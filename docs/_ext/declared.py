"""Reference that is made of the program's own declarations: options of verbs, options of formats.

``verb_text`` and ``format_text`` give Markdown and need nothing but the program; the directives
``verb`` and ``format-options`` put it into a page of the site.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from diskwright.cli.main import IMG_VERBS, OWN_VERBS
from diskwright.cli.main import main as run
from diskwright.cli.options import BUDGETS, GATE, HELP, OBJECT, Opt
from diskwright.declare import Driver, Option
from diskwright.graph.registry import driver

VERBS = {**IMG_VERBS, **OWN_VERBS}
COMMON = (HELP, *GATE, OBJECT, *BUDGETS)
"""What (nearly) every verb has is told once."""


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def option_row(option: Opt) -> str:
    value = f"[{'|'.join(option.words)}]" if option.words else option.value
    names = [f"-{option.short}"] if option.short else []
    names += [f"--{option.long}"] if option.long else []
    if option.optional:
        names[-1], value = f"{names[-1]}[={option.value}]", ""
    shown = f"{', '.join(names)} {value}".strip().replace("|", "\\|")
    return f"| `{shown}` | {cell(option.help or 'taken for command lines of QEMU')} |"


def options_table(options: Iterable[Opt]) -> str:
    return "\n".join(["| option | |", "|---|---|", *map(option_row, options)]) + "\n"


def declared(verb: str) -> tuple[Opt, ...]:
    """All options of a verb."""
    options: tuple[Opt, ...] = import_module(f"diskwright.cli.{verb}").OPTIONS
    return options


def usage(verb: str) -> str:
    """The first line that ``--help`` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run("diskwright", [verb, "--help"])
    return printed.getvalue().splitlines()[0].removeprefix("Usage: ")


def verb_text(verb: str) -> str:
    """How a verb is called, and its own options; ``common`` has those of all."""
    if verb == "common":
        return options_table(COMMON)
    own = [option for option in declared(verb) if option not in COMMON]
    return f"```text\n{usage(verb)}\n```\n\n{options_table(own)}"


def driver_options(name: str) -> list[tuple[str, tuple[Option, ...]]]:
    """The options of a driver, by what they are for."""
    found: Driver = driver(name)
    return [
        ("For a new image (`create -o`, `convert -o`)", found.create_options),
        ("For one that is there (`amend -o`)", found.amend_options),
        ("To open it (`--image-opts`, `options=` in Python)", found.options),
        ("To salvage it (`salvage --assume`)", found.salvage_options),
    ]


def format_text(name: str) -> str:
    """All options of a driver."""
    out = []
    for title, options in driver_options(name):
        if not options:
            continue
        out += [f"**{title}**", "", "| option | value | default | |", "|---|---|---|---|"]
        for option in sorted(options, key=lambda option: option.name):
            kinds = {"bool": "on, off", "enum": ", ".join(option.choices)}
            default = option.default
            if isinstance(default, bool):
                default = "on" if default else "off"
            shown = "" if default in (None, "") else f"`{default}`"
            value = cell(kinds.get(option.type, option.type))
            out.append(f"| `{option.name}` | {value} | {shown} | {cell(option.help)} |")
        out.append("")
    return "\n".join(out)


def setup(app: Any) -> dict[str, bool]:
    from sphinx.util.docutils import SphinxDirective

    class Verb(SphinxDirective):
        required_arguments = 1
        make = staticmethod(verb_text)

        def run(self) -> list[Any]:
            return list(self.parse_text_to_nodes(self.make(self.arguments[0])))

    class FormatOptions(Verb):
        make = staticmethod(format_text)

    app.add_directive("verb", Verb)
    app.add_directive("format-options", FormatOptions)
    return {"parallel_read_safe": True}
