"""Completion for fish."""

from __future__ import annotations

from collections.abc import Iterator

from ..completion import FILES, FOLDERS, FORMATS, OPTION_LIST, WORDS, Flag, Program, Verb

_SCRIPT = """\
# Completion of @names@ for fish, made by 'diskwright completion fish'.
function _@function@_options
    # A list of options, of the format behind one of the flags $argv[2..]
    set -l token (string replace -r -- '^--[^=]*=' '' (commandline -ct))
    set -l before (string match -r -- '.*,' $token)
    set -l format
    test $argv[1] = create; and set format raw
    set -l words (commandline -opc)
    for i in (seq (count $words))
        if contains -- $words[$i] $argv[2..]; and test $i -lt (count $words)
            set format $words[(math $i + 1)]
        else if contains -- (string replace -r -- '=.*' '' $words[$i]) $argv[2..]
            set format (string replace -r -- '^[^=]*=' '' $words[$i])
        end
    end
    switch "$argv[1] $format"
@options@
    end
end

"""


def script(program: Program) -> str:
    """The script for one tool."""
    out = _SCRIPT.replace("@options@", "\n".join(_options(program)))
    out = out.replace("_@function@", f"_{program.function}")
    out = out.replace("@names@", " ".join(program.names))
    lines = [line for verb in program.verbs for line in _verb(program, verb)]
    return out + "".join(f"complete -c {n} {line}\n" for n in program.names for line in lines)


def _options(program: Program) -> Iterator[str]:
    for (group, fmt), choices in program.options.items():
        if not choices:
            continue
        pairs = [
            f'"$before"{choice.name}={value} {_quoted(choice.help)}'
            for choice in choices
            for value in choice.values or ("",)
        ]
        yield f"        case '{group} {fmt}'"
        yield "            printf '%s\\t%s\\n' " + " ".join(pairs)


def _verb(program: Program, verb: Verb) -> Iterator[str]:
    where = ""
    if verb.name:
        yield f"-n __fish_use_subcommand -f -a {verb.name} -d {_quoted(verb.help)}"
        where = f"-n '__fish_seen_subcommand_from {verb.name}' "
    if verb.operands:
        yield f"{where}-f -a '{' '.join(verb.operands)}'"
    for flag in verb.flags:
        short = f"-s {flag.short} " if flag.short else ""
        long = f"-l {flag.long} " if flag.long else ""
        yield f"{where}{short}{long}{_takes(program, flag)}-d {_quoted(flag.help)}"


def _takes(program: Program, flag: Flag) -> str:
    if not flag.kind or flag.optional:
        # fish has no way to say that an argument may be missing for one of the forms only.
        return ""
    if flag.kind == FILES:
        return "-r -F "
    words = {
        FORMATS: " ".join(program.formats),
        WORDS: " ".join(flag.words),
        OPTION_LIST: f"(_{program.function}_options {flag.group} {' '.join(flag.chosen_by)})",
        FOLDERS: "(__fish_complete_directories (commandline -ct))",
    }.get(flag.kind)
    return f"-x -a {_quoted(words)} " if words else "-x "


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
