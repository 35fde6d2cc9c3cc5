"""Completion scripts for bash and zsh: `source <(vdsm-client --completion bash)`.

All names are in the script, so that a key press asks neither an agent nor Python. They are those that this client was
made with (`offered`).
"""

from __future__ import annotations

from vdsm.client import arguments, offered

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# What both shells do. $1: the word that is being completed; then the words before it, without the command's name.
# Prints the candidates, one a line.
_CANDIDATES = """\
_vdsm_client_candidates() {
    local current=$1 previous= word
    local -a words
    words=()
    shift
    for word in "$@"; do
        case $previous in
            @VALUED@) previous=; continue ;;
        esac
        previous=$word
        case $word in
            -*|*=*) ;;
            *) [[ ${#words[@]} -lt 2 ]] && words+=("$word") ;;
        esac
    done
    case $previous in
        -o|--output) printf '%s\\n' @FORMATS@; return ;;
        --completion) printf '%s\\n' @SHELLS@; return ;;
        @VALUED@) return ;;
    esac
    case $current in
        -*) printf '%s\\n' @OPTIONS@; return ;;
    esac
    case "${words[*]}" in
        "") printf '%s\\n' @NAMESPACES@ events explain ;;
        explain) printf '%s\\n' @KEYS@ ;;
        events*) printf '%s\\n' @TOPICS@ instanceId= since= ;;
@VERBS@
@PARAMETERS@
    esac
}
"""

_BASH = """\
_vdsm_client() {
    local current=${COMP_WORDS[COMP_CWORD]} line=${COMP_LINE:0:COMP_POINT} candidate prefix
    local -a words
    # Not bash's own words: it breaks them at "=" as well.
    read -r -a words <<<"$line"
    [[ $line == *[[:space:]] || ${#words[@]} -eq 0 ]] && words+=("")
    current=${words[-1]}
    unset 'words[-1]'
    COMPREPLY=()
    if [[ $current == *=@* ]]; then
        COMPREPLY=($(compgen -f -- "${current#*=@}"))
        COMPREPLY=("${COMPREPLY[@]/#/@}")
        return
    fi
    # What stands before the last "=" is on the line already, as a word of bash's.
    prefix=${current%"${current##*=}"}
    while IFS= read -r candidate; do
        [[ $candidate == "$current"* ]] && COMPREPLY+=("${candidate#"$prefix"}")
    done < <(_vdsm_client_candidates "$current" "${words[@]:1}")
    case ${words[-1]} in
        -o|--output|--completion) ;;
        @VALUED@) COMPREPLY=($(compgen -f -- "$current")) ;;
    esac
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
}
complete -F _vdsm_client vdsm-client
"""

_ZSH = """\
_vdsm_client() {
    local current=${words[CURRENT]} candidate
    local -a found
    if [[ $current == *=@* ]]; then
        compset -P '*=@'
        _files
        return
    fi
    found=("${(@f)$(_vdsm_client_candidates "$current" "${(@)words[2,CURRENT-1]}")}")
    case ${words[CURRENT-1]} in
        -o|--output|--completion) ;;
        @VALUED@) _files; return ;;
    esac
    compadd -S '' -- ${(M)found:#*=}
    compadd -- ${found:#*=}
}
compdef _vdsm_client vdsm-client
"""


def script(shell: str) -> str:
    """What the user's shell reads. `shell` is one of `arguments.SHELLS`."""
    from vdsm import errors

    namespaces = dict.fromkeys(name.partition(".")[0] for name in offered.VERBS)
    filled = {
        "FORMATS": _words(arguments.FORMATS),
        "SHELLS": _words(arguments.SHELLS),
        "OPTIONS": _words(_options()),
        "NAMESPACES": _words(namespaces),
        "KEYS": _words(errors.VdsmError.by_key),
        "VALUED": "|".join(_options(valued=True)),
        "TOPICS": _words(offered.TOPICS),
        "VERBS": "\n".join(
            f"        {namespace}) printf '%s\\n' {_words(_verbs(namespace))} ;;" for namespace in namespaces
        ),
        "PARAMETERS": "\n".join(_parameters()),
    }
    text = _CANDIDATES + (_BASH if shell == "bash" else _ZSH)
    for mark, words in filled.items():
        text = text.replace(f"@{mark}@", words)
    return text


def _words(texts: Iterable[str]) -> str:
    return " ".join(texts)


def _options(valued: bool = False) -> Iterator[str]:
    """All options, or those that a value follows."""
    for name in arguments.LONG_OPTIONS:
        if name.endswith("=") or not valued:
            yield "--" + name.rstrip("=")
    letters = arguments.SHORT_OPTIONS
    for letter, after in zip(letters, letters[1:] + " ", strict=True):
        if letter != ":" and (after == ":" or not valued):
            yield f"-{letter}"


def _verbs(namespace: str) -> Iterator[str]:
    return (name.partition(".")[2] for name in offered.VERBS if name.startswith(f"{namespace}."))


def _parameters() -> Iterator[str]:
    """A case for each verb: `name=` of its parameters, and `name=value` where only a few values can be."""
    for verb, (_, params) in offered.VERBS.items():
        words = []
        for name, _, _, values in params:
            if "[]" not in name:  # a member of a list has no name on the command line
                words += [f"{name}=", *(f"{name}={value}" for value in values)]
        if words:
            yield f"        {verb.replace('.', chr(92) + ' ', 1)}) printf '%s\\n' {_words(words)} ;;"
