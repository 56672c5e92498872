"""Completion of commands, options and names of experiments in bash, zsh and fish."""

from collections.abc import Mapping, Sequence
from string import Template

_BASH = Template("""\
_$function() {
  local word=$${COMP_WORDS[COMP_CWORD]} words=""
  if [ "$$COMP_CWORD" -eq 1 ]; then
    words="$commands"
  else
    case "$${COMP_WORDS[1]}" in
$cases
    esac
  fi
  COMPREPLY=($$(compgen -W "$$words" -- "$$word"))
}
complete -o default -F _$function $program
""")
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def completion(shell: str, program: str, words: Mapping[str, Sequence[str]]) -> str:
    """A completion script for a shell.

    Args:
        shell: bash, zsh or fish.
        program: name of the program.
        words: options and names of each command.
    """
    if shell == "fish":
        lines = [f"complete -c {program} -n __fish_use_subcommand -f -a '{' '.join(words)}'"]
        lines += [
            f"complete -c {program} -n '__fish_seen_subcommand_from {command}' -a '{' '.join(of_command)}'"
            for command, of_command in words.items()
        ]
        return "\n".join(lines) + "\n"
    cases = "\n".join(f'      {command}) words="{" ".join(of_command)}" ;;' for command, of_command in words.items())
    script = _BASH.substitute(
        function=program.replace("-", "_"), program=program, commands=" ".join(words), cases=cases
    )
    return (_ZSH if shell == "zsh" else "") + script
