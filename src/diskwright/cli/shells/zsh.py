"""Completion for zsh, by its own ``_arguments`` and ``_values``."""

from __future__ import annotations

from collections.abc import Iterator

from ..completion import (
    FILES,
    FOLDERS,
    FORMATS,
    OPTION_LIST,
    WORDS,
    Choice,
    Flag,
    Program,
    Verb,
)

_SCRIPT = """\
#compdef @names@
# Completion of @names@ for zsh, made by 'diskwright completion zsh'.
@function@_options() {
    # A list of options, of the format behind one of the flags $2...
    local group=$1 format=${opt_args[$2]:-${opt_args[$3]:-${1/#%create/raw}}}
    case "$group ${format#=}" in
@options@
    esac
}

@function@() {
    local curcontext=$curcontext state line
    local -A opt_args
@body@
}

if [[ $funcstack[1] == _* ]]; then
    @function@ "$@"  # out of a folder of $fpath
else
    compdef @function@ @names@
fi
"""
_VERBS = """\
    local -a verbs=(
@verbs@
    )
    if ((CURRENT == 2)); then
        _describe verb verbs
        return
    fi
    local verb=$words[2]
    shift words
    ((CURRENT--))
    case $verb in
@cases@
    esac"""


def script(program: Program) -> str:
    """The script for one tool."""
    if program.verbs[0].name:
        body = _VERBS.replace(
            "@verbs@", "\n".join(f"        {_quoted(f'{v.name}:{v.help}')}" for v in program.verbs)
        ).replace(
            "@cases@",
            "\n".join(f"        {v.name})\n{_arguments(program, v)} ;;" for v in program.verbs),
        )
    else:
        body = _arguments(program, program.verbs[0])
    out = _SCRIPT.replace("@options@", "\n".join(_options(program))).replace("@body@", body)
    return out.replace("@function@", program.function).replace("@names@", " ".join(program.names))


def _options(program: Program) -> Iterator[str]:
    for (group, fmt), choices in program.options.items():
        if choices:
            words = " ".join(_quoted(_value(choice)) for choice in choices)
            yield f"        '{group} {fmt}') _values -s , 'options of {fmt}' {words} ;;"


def _value(choice: Choice) -> str:
    values = f"({' '.join(choice.values)})" if choice.values else ""
    return f"{choice.name}[{_plain(choice.help)}]:value:{values}"


def _arguments(program: Program, verb: Verb) -> str:
    operands = f"({' '.join(verb.operands)})" if verb.operands else "_files"
    lines = ["_arguments -s -S :", *_flags(program, verb), f"'*:operand:{operands}'"]
    return "            " + " \\\n                ".join(lines)


def _flags(program: Program, verb: Verb) -> Iterator[str]:
    for flag in verb.flags:
        said = f"[{_plain(flag.help)}]"
        action = _action(program, flag)
        for spelling in flag.spellings:
            if flag.optional:
                if spelling.startswith("--"):
                    yield _quoted(f"*{spelling}=-{said}::{action}")
                else:
                    yield _quoted(f"*{spelling}{said}")
            elif not flag.kind:
                yield _quoted(f"*{spelling}{said}")
            else:
                mark = "=" if spelling.startswith("--") else "+"
                yield _quoted(f"*{spelling}{mark}{said}:{action}")


def _action(program: Program, flag: Flag) -> str:
    if flag.kind == FORMATS:
        return f"format:({' '.join(program.formats)})"
    if flag.kind == WORDS:
        return f"value:({' '.join(flag.words)})"
    if flag.kind == OPTION_LIST:
        # The blank keeps _arguments from putting arguments of its own before these.
        return f"options: {program.function}_options {flag.group} {' '.join(flag.chosen_by)}"
    return {FILES: "file:_files", FOLDERS: "folder:_files -/"}.get(flag.kind, "value: ")


def _plain(text: str) -> str:
    """Help inside of brackets."""
    return text.replace("[", "(").replace("]", ")").replace(":", "\\:")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
