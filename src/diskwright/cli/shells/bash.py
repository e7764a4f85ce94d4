"""Completion for bash, 3.2 and later: everything is in the script, so the program is not asked."""

from __future__ import annotations

from collections.abc import Iterator

from ..completion import FILES, FOLDERS, FORMATS, OPTION_LIST, TEXT, WORDS, Flag, Program

# What is typed is looked at as words between blanks, since bash also cuts words at = and :.
_SCRIPT = """\
# Completion of @names@ for bash, made by 'diskwright completion bash'.
@function@_reply() {
    # What fits of the words $3 to $2, behind $1; bash wants it without what is before a break.
    local breaks=${COMP_WORDBREAKS//[^=:]/} cut=
    [[ -n $breaks ]] && cut=${word%"${word##*[$breaks]}"}
    local IFS=$' \\n'
    COMPREPLY=($(compgen -P "$1" -W "$3" -- "$2"))
    [[ -n $cut ]] && COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then
        compopt -o nospace 2>/dev/null
    fi
}

@function@_options() {
    # A list of options: name=value,name=value
    local before=$1 last=$2
    [[ $last == *,* ]] && before+="${last%,*}," && last=${last##*,}
    if [[ $last == *=* ]]; then
        before+="${last%%=*}="
        case "$group $format ${last%%=*}" in
@values@
        esac
        return
    fi
    case "$group $format" in
@options@
    esac
}

@function@() {
    local line=${COMP_LINE:0:COMP_POINT} words word last verb= flag= value before= i
    local group format=raw
    COMPREPLY=()
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    last=$((${#words[@]} - 1))
    word=${words[last]}
@find_verb@
    value=$word
    if [[ $word == --*=* ]]; then
        flag=${word%%=*} value=${word#*=} before="${word%%=*}="
    elif ((last > 1)); then
        flag=${words[last - 1]}
    fi
    case "$verb $flag" in
@arguments@
    esac
    [[ $word == -* ]] || verb+=" operand"
    case "$verb" in
@flags@
    esac
}
complete -o default -F @function@ @names@
"""
_FIND_VERB = """\
    for ((i = 1; i < last; i++)); do
        [[ ${words[i]} == -* ]] || { verb=${words[i]}; break; }
    done
    if [[ -z $verb ]]; then
        @function@_reply "" "$word" "@verbs@ --help --version"
        return
    fi"""
_LIST = """\
            format={default}
            for ((i = 1; i < last; i++)); do
                case ${{words[i]}} in
                    {choosers}) format=${{words[i + 1]}} ;;
                    {equals}) format=${{words[i]#*=}} ;;
                esac
            done
            group={group}
            @function@_options "$before" "$value"
            return ;;"""


def script(program: Program) -> str:
    """The script for one tool."""
    verbs = " ".join(verb.name for verb in program.verbs)
    find = _FIND_VERB.replace("@verbs@", verbs) if verbs else ""
    parts = {
        "find_verb": find,
        "values": "\n".join(_values(program)),
        "options": "\n".join(_options(program)),
        "arguments": "\n".join(_arguments(program)),
        "flags": "\n".join(_flags(program)),
        "names": " ".join(program.names),
        "function": program.function,
    }
    out = _SCRIPT
    for name, text in parts.items():
        out = out.replace(f"@{name}@", text)
    return out


def _values(program: Program) -> Iterator[str]:
    for (group, fmt), choices in program.options.items():
        for choice in choices:
            if choice.values:
                reply = f'@function@_reply "$before" "${{last#*=}}" "{" ".join(choice.values)}"'
                yield f'            "{group} {fmt} {choice.name}") {reply} ;;'


def _options(program: Program) -> Iterator[str]:
    for (group, fmt), choices in program.options.items():
        words = " ".join(f"{choice.name}=" for choice in choices)
        if words:
            yield f'        "{group} {fmt}") @function@_reply "$before" "$last" "{words}" ;;'


def _arguments(program: Program) -> Iterator[str]:
    """By what completes them: the verbs and flags."""
    found: dict[str, list[str]] = {}
    for verb in program.verbs:
        for flag in verb.flags:
            if flag.kind:
                patterns = [f'"{verb.name} {spelling}"' for spelling in flag.spellings]
                found.setdefault(_completed(program, flag), []).extend(patterns)
    for text, patterns in found.items():
        yield "        " + "|".join(patterns) + ")\n" + text


def _completed(program: Program, flag: Flag) -> str:
    if flag.kind == OPTION_LIST:
        return _LIST.format(
            default="raw" if flag.group == "create" else "",
            choosers="|".join(flag.chosen_by),
            equals="|".join(f"{one}=*" for one in flag.chosen_by if one.startswith("--")),
            group=flag.group,
        )
    if flag.kind in (FORMATS, WORDS):
        words = program.formats if flag.kind == FORMATS else flag.words
        reply = f'@function@_reply "$before" "$value" "{" ".join(words)}"'
        if flag.optional:  # behind = only: the next word may well be something else
            return f"            [[ -z $before ]] || {{ {reply}; return; }} ;;"
        return f"            {reply}\n            return ;;"
    if flag.kind == FOLDERS:
        return "            compopt -o dirnames +o default 2>/dev/null\n            return ;;"
    if flag.kind == TEXT:
        return "            compopt +o default 2>/dev/null\n            return ;;"
    assert flag.kind == FILES
    return "            return ;;"  # bash's own completion


def _flags(program: Program) -> Iterator[str]:
    for verb in program.verbs:
        words = " ".join(spelling for flag in verb.flags for spelling in flag.spellings)
        yield f'        "{verb.name}") @function@_reply "" "$word" "{words}" ;;'
        if verb.operands:
            words = " ".join(verb.operands)
            yield f'        "{verb.name} operand") @function@_reply "" "$word" "{words}" ;;'
