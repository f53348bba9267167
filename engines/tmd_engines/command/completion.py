"""What a shell asks of a command when somebody presses Tab. Loaded for that alone.

Click knows how to answer bash, zsh and fish. Its script for bash splits words where bash does, at each colon too, which
loses `builtin:tiny`, and offers folders only where nothing else fits. Its script for fish cuts a word at its first
comma. So these two get scripts of our own.
"""

from __future__ import annotations

import os

from click.shell_completion import BashComplete, CompletionItem, FishComplete, add_completion_class, split_arg_string

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' line answer kind value word shown=""
    local typed="${COMP_LINE:0:COMP_POINT}" cut="${COMP_WORDBREAKS//[^:=]/}"
    answer=$(env COMP_WORDS="$typed" COMP_CWORD="$COMP_CWORD" %(complete_var)s=bash_complete "$1")
    # Bash replaces what stands behind the last character that ends words for it.
    word="${typed##*[[:space:]]}"
    [[ $word == --*=* ]] && word="${word#*=}"
    [[ -n $cut ]] && shown="${word%%"${word##*[$cut]}"}"
    COMPREPLY=()
    for line in $answer; do
        kind="${line%%%%,*}" value="${line#*,}"
        case $kind in
            dir) compopt -o plusdirs 2>/dev/null ;;
            file) compopt -o default 2>/dev/null ;;
            plain) COMPREPLY+=("${value#"$shown"}") ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

_FISH = """\
function %(complete_func)s
    set -l typed (commandline -cp)
    set -l answer (env %(complete_var)s=fish_complete COMP_WORDS=$typed COMP_CWORD=(commandline -t) %(prog_name)s)
    for line in $answer
        set -l found (string split -m 1 , -- $line)
        switch $found[1]
            case dir
                __fish_complete_directories $found[2]
            case file
                __fish_complete_path $found[2]
            case plain
                echo $found[2]
        end
    end
end
complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


class WholeWords(BashComplete):
    """Reads the command line itself instead of the words that bash made of it."""

    name = "bash"
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the cursor without the program's name, and the one that is being typed."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)[1:]
        begun = words.pop() if words and not line[-1:].isspace() else ""
        return words, begun

    def format_completion(self, item: CompletionItem) -> str:
        """Bash takes a word literally, and a script could not tell a line feed in it from the next word."""
        return f"{item.type},{item.value}".replace("\n", " ")


class WholeLists(FishComplete):
    """Keeps the commas of a word."""

    name = "fish"
    source_template = _FISH


def install() -> None:
    """From here on click gives bash and fish our scripts."""
    add_completion_class(WholeWords)
    add_completion_class(WholeLists)
