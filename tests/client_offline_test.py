"""What vdsm-client knows by itself: errors explained, and completion in real shells."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vdsm import errors, events
from vdsm.client import arguments, completion, exits, failures, offered

ROOT = Path(__file__).resolve().parent.parent


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Where no agent is."""
    command = [sys.executable, "-m", "vdsm.client", "-a", "/nowhere/at/all", *argv]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=30, cwd=ROOT)


# -- explain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["image_in_use", "10041"])
def test_an_error_is_explained_by_its_key_and_its_code(wanted: str) -> None:
    done = run("explain", wanted)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "image_in_use (10041): Image {imageId} is in use by {holder}",
        "    means: Somebody else has it, or its state does not allow the call.",
        "    facts: imageId, holder",
        "    hint: Wait for the holder to end, or end it.",
        f"    exit code: {exits.CONFLICT}: {exits.MEANING[exits.CONFLICT]}",
    ]


def test_every_error_can_be_explained() -> None:
    from vdsm.client import catalogue

    for key, kind in errors.VdsmError.by_key.items():
        assert catalogue.explained(key) == catalogue.explained(str(kind.code))
        assert catalogue.explained(key).startswith(f"{key} ({kind.code}): ")
    for local in failures.LOCAL:
        assert local.hint in catalogue.explained(local.key_of_class)


def test_errors_with_negative_codes_are_found_too() -> None:
    assert run("explain", "--", "-32601").stdout.startswith("unknown_method (-32601)")


def test_all_errors_are_listed_by_code() -> None:
    lines = run("explain").stdout.splitlines()
    assert lines[0].split() == ["code", "key", "message"]
    assert [line.split()[1] for line in lines[1:]] == sorted(
        errors.VdsmError.by_key, key=lambda key: errors.VdsmError.by_key[key].code
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["image_is_in_use"], "no error image_is_in_use; did you mean image_in_use"),
        (["0"], "no error 0; `vdsm-client explain` lists all"),
        (["forbidden", "x"], "explain takes one code or key"),
        (["key=forbidden"], "explain takes one code or key"),
    ],
    ids=str,
)
def test_what_cannot_be_explained(argv: list[str], says: str) -> None:
    done = run("explain", *argv)
    assert (done.returncode, done.stdout) == (exits.USAGE, "")
    assert says in done.stderr


# -- completion --------------------------------------------------------------------------------------------------------


def bash(line: str, cwd: Path) -> list[str]:
    """What bash offers for `line`, with the cursor at its end. bash has cut words at "=" when it asks."""
    words = line.replace("=", " = ").split()
    if line.endswith((" ", "=")):
        words.append("")
    script = f"""
{completion.script("bash")}
COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
_vdsm_client
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    return _lines(["bash", "--norc", "-c", script], cwd)


def zsh(line: str, cwd: Path) -> list[str]:
    """What zsh offers. zsh's own machinery needs a terminal: its two commands that we call are stood in for."""
    words = line.split()
    if line.endswith(" "):
        words.append("")
    script = f"""
compdef() {{ }}
_files() {{ print -l -- *(N) }}
compset() {{ current=${{words[CURRENT]#*=@}} }}
compadd() {{ while [[ $1 != -- ]]; do shift; done; shift; for each in "$@"; do
    [[ $each == ${{words[CURRENT]}}* ]] && print -r -- $each; done }}
{completion.script("zsh")}
words=({shlex.join(words)}) CURRENT={len(words)}
_vdsm_client
"""
    return _lines(["zsh", "-f", "-c", script], cwd)


def _lines(command: list[str], cwd: Path) -> list[str]:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=30, cwd=cwd)
    assert done.stderr == "", done.stderr
    return sorted(line for line in done.stdout.splitlines() if line)


Offers = Callable[[str], list[str]]


@pytest.fixture(params=[bash, zsh], ids=["bash", "zsh"])
def offers(request: pytest.FixtureRequest, tmp_path: Path) -> Offers:
    """Gives what the shell offers for a command line."""
    shell = request.param.__name__
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: vdsm/tool/prerequisites.sh test")
    (tmp_path / "disk.json").touch()
    return lambda line: request.param(line, tmp_path)


NAMESPACES = {name.partition(".")[0] for name in offered.VERBS}


def test_the_shell_offers_namespaces_verbs_and_parameters(offers: Offers) -> None:
    assert set(offers("vdsm-client ")) == {*NAMESPACES, "events", "explain"}
    assert offers("vdsm-client Jo") == ["Job"]
    assert offers("vdsm-client Job ") == sorted(
        name.partition(".")[2] for name in offered.VERBS if name.startswith("Job.")
    )
    assert offers("vdsm-client Host ec") == ["echo"]
    assert offers("vdsm-client Host echo ") == ["message="]
    assert offers("vdsm-client Host ping2 ") == []
    assert offers("vdsm-client Nothing ") == []


def test_parameters_come_with_their_dotted_names(offers: Offers) -> None:
    known = offers("vdsm-client Storage copyImage targetRepoId=main options.j")
    assert known == ["options.jobId="]
    assert offers("vdsm-client Storage copyImage userData='{\"a b\": 1}' options.j") == ["options.jobId="]
    assert not [name for name in offers("vdsm-client VM create ") if "[]" in name]


def test_options_do_not_count_as_words(offers: Offers) -> None:
    assert offers("vdsm-client -a /some/where --wait Host -o table ec") == ["echo"]
    assert offers("vdsm-client -o ") == sorted(arguments.FORMATS)
    assert offers("vdsm-client Host echo --completion ") == sorted(arguments.SHELLS)
    assert set(offers("vdsm-client --")) == {f"--{name.rstrip('=')}" for name in arguments.LONG_OPTIONS}


def test_topics_and_keys_of_errors(offers: Offers) -> None:
    assert set(offers("vdsm-client events ")) == {*events.TOPICS, "instanceId=", "since="}
    assert offers("vdsm-client explain image_in") == ["image_in_use"]


def test_files_after_an_at_sign(offers: Offers) -> None:
    assert [name.removeprefix("@") for name in offers("vdsm-client VM create vmParams=@di")] == ["disk.json"]
    assert offers("vdsm-client -f di") == ["disk.json"]
    assert offers("vdsm-client Host ping2 --file di") == ["disk.json"]


def test_bash_offers_the_few_values_of_a_parameter(tmp_path: Path) -> None:
    """What stands before "=" is a word of its own for bash, and must not come again."""
    assert bash("vdsm-client Storage importImage format=", tmp_path) == ["qcow2", "raw"]
    assert bash("vdsm-client Storage importImage format=q", tmp_path) == ["qcow2"]
    assert bash("vdsm-client Host getVMList onlyUUID=", tmp_path) == ["false", "true"]


def test_zsh_offers_the_few_values_of_a_parameter(tmp_path: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed: vdsm/tool/prerequisites.sh test")
    assert zsh("vdsm-client Storage importImage format=", tmp_path) == ["format=", "format=qcow2", "format=raw"]


@pytest.mark.parametrize("shell", arguments.SHELLS)
def test_the_command_prints_the_script(shell: str) -> None:
    done = run("--completion", shell)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", completion.script(shell) + "\n")


def test_no_other_shells() -> None:
    done = run("--completion", "fish")
    assert (done.returncode, done.stdout) == (exits.USAGE, "")
    assert "--completion takes bash or zsh" in done.stderr
