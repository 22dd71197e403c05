"""The scripts of the shells: each asks ``luthier completion candidates SHELL LINE`` at every TAB."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from luthier.errors import LuthierError, unknown
from luthier_plugins.commands.completion.candidates import candidates

BASH = """\
_luthier() {
    local IFS=$'\\n'
    COMPREPLY=($(luthier completion candidates bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o bashdefault -o default -F _luthier luthier
"""
ZSH = """\
_luthier() {
    local -a found
    found=("${(@f)$(luthier completion candidates zsh "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    if [[ -n ${found[1]} ]]; then compadd -S '' -- $found; else _files; fi
}
compdef _luthier luthier
"""
FISH = """\
function __luthier_knows
    set -g __luthier_candidates (luthier completion candidates fish (commandline -cp) 2>/dev/null)
    test -n "$__luthier_candidates"
end
complete -c luthier -n __luthier_knows -f -a '$__luthier_candidates'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def run(words: Sequence[str]) -> int:
    """Print the script of a shell, or the candidates for a line; return the exit status.

    Raises:
        LuthierError: There is no such shell.
    """
    if len(words) == 3 and words[0] == "candidates":
        found = candidates(words[2])
        if words[1] == "bash":  # which completes what follows the last `=` by itself
            found = [
                candidate if candidate.endswith("=") else candidate.rpartition("=")[2] for candidate in found
            ]
        sys.stdout.write("".join(f"{candidate}\n" for candidate in found))
        return 0
    if "-h" in words or "--help" in words:
        sys.stdout.write(
            f"usage: luthier completion {'|'.join(SCRIPTS)}\n\nPrints a script for that shell.\n"
        )
        return 0
    if len(words) != 1 or words[0] not in SCRIPTS:
        raise LuthierError(unknown("shell", " ".join(words), SCRIPTS))
    sys.stdout.write(SCRIPTS[words[0]])
    return 0
