"""Completion scripts, tried in the shells that are there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.support import ours
from diskwright.cli.main import IMG_VERBS, OWN_VERBS

# What bash does on TAB: it calls the function with these variables set.
DRIVER = """
source {script}
complete -p {name} >/dev/null || exit 9
while IFS= read -r COMP_LINE; do
    COMP_POINT=${{#COMP_LINE}} COMPREPLY=()
    {function}
    echo "${{COMPREPLY[*]}}"
done
"""


def made(shell: str, folder: Path, *names: str) -> Path:
    words = [word for name in names for word in ("--name", name)]
    done = ours("completion", shell, *words, name="diskwright")
    assert not done.status, done.err
    path = folder / f"script.{shell}"
    path.write_bytes(done.out)
    return path


def on_tab(script: Path, name: str, function: str, lines: list[str]) -> list[list[str]]:
    driver = DRIVER.format(script=script, name=name, function=function)
    command = ["bash", "--norc", "-c", driver]
    text = "\n".join(lines) + "\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


EXPECTED = {
    "dw co": ["commit", "compare", "completion", "convert"],
    "dw nonsense --": [],
    "dw convert -O q": ["qcow2"],
    "dw convert -f raw --target-format=v": ["vhdx", "vmdk"],
    "dw info --back": ["--backing-chain"],
    "dw map --policy ": ["untrusted", "local", "trusted"],
    "dw convert -O qcow2 -o cl": ["cluster_size="],
    # bash cuts words at = and replaces what is behind it
    "dw create -f qcow2 -o size=1,lazy_refcounts=o": ["on", "off"],
    "dw create -f qcow2 -o size=1,pre": ["1,preallocation="],
    "dw convert --target-format=vhdx -o subformat=d": ["dynamic", "differencing"],
    "dw amend -f qcow2 -o cl": [],
    "dw amend -f qcow2 -o comp": ["compat="],
    "dw salvage -f qcow2 -O raw --assume cl": ["cluster_size="],
    "dw check -r ": ["leaks", "all"],
    "dw check -r all fi": [],
    "dw digest --algorithm=sha5": ["sha512"],
    "dw convert --digest=t": ["tree"],
    "dw convert --digest t": [],
    "dw completion f": ["fish"],
    "dw serve --disca": ["--discard"],
    "dw io --cache=w": ["writeback", "writethrough"],
}


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bash(tmp_path: Path) -> None:
    lines = ["dw ", *EXPECTED]
    verbs, *found = on_tab(made("bash", tmp_path), "dw", "_diskwright", lines)
    assert verbs == [*sorted({**IMG_VERBS, **OWN_VERBS}), "--help", "--version"]
    assert dict(zip(EXPECTED, found, strict=True)) == EXPECTED


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_links_of_other_names_complete_as_the_tools_they_are(tmp_path: Path) -> None:
    script = made("bash", tmp_path, "qemu-img", "qemu-io")
    lines = ["qemu-img dig", "qemu-img inf", "qemu-img create -f qcow2 -o compression_l"]
    assert on_tab(script, "qemu-img", "_qemu_img", lines) == [[], ["info"], []]
    assert on_tab(script, "qemu-io", "_qemu_io", ["qemu-io --rea"]) == [["--read-only"]]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_others_can_read_theirs(shell: str, tmp_path: Path, peer: Callable[[str], str]) -> None:
    script = made(shell, tmp_path)
    text = script.read_text()
    for verb in {**IMG_VERBS, **OWN_VERBS}:
        assert verb in text
    subprocess.run([peer(shell), "-n", script], check=True, timeout=30)
    if shell == "fish":
        command = [shell, "-c", f"source {script}; complete -C 'dw create -f qcow2 -o size=1,pre'"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        assert done.stdout.splitlines()[0].startswith("size=1,preallocation=")


def test_what_is_refused() -> None:
    for words in (["completion"], ["completion", "tcsh"], ["completion", "--name", "a b", "bash"]):
        assert ours(*words, name="diskwright").status == 1
    assert ours("completion", "bash").status == 1  # qemu-img has no such verb
