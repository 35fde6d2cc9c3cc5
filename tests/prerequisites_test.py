"""`vdsm/tool/prerequisites.sh`: what it asks for, and that no service can start while packages are installed.

The installing runs work on a copy of the tree with a package list of their own, see an empty /usr/sbin (in a mount
namespace of their own) and an apt-get that only notes what it would have met.
"""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.until import until
from vdsm.standalone import ground

TOOL = ground.SOURCE / "vdsm" / "tool"
POLICY = "policy-rc.d"
# Says whether a service could start now, and ends as ENDING tells.
APT_GET = """\
#!/bin/sh
case " $* " in *" install "*) ;; *) exit 0 ;; esac
/usr/sbin/policy-rc.d ssh start
echo "$? $*" >>"$NOTES"
eval "$ENDING"
"""


@pytest.fixture
def copy() -> Iterator[Path]:
    """A tree whose Python parts are up to date and whose lists name what cannot be installed. Any user may run it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as top:
        Path(top).chmod(0o755)
        yield make_copy(Path(top) / "tree")


def make_copy(place: Path) -> Path:
    shutil.copytree(TOOL, place / "vdsm" / "tool", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (place / "vdsm" / "tool" / "packages-demo.txt").write_text(
        "# a list\n\nno-such-package-one | no-such-package-two # its reason\nno-such-package-three # | dpkg\n"
        "no-such-package-four | dpkg # the second is there\ndpkg # is there\n"
    )
    shutil.copy(ground.SOURCE / "pyproject.toml", place)
    made_from = place / "build" / "runtime" / ".made-from"
    made_from.parent.mkdir(parents=True)
    version = subprocess.check_output(["/usr/bin/python3", "-V"])
    made_from.write_text(hashlib.sha256((place / "pyproject.toml").read_bytes() + version).hexdigest() + "\n")
    return place


def start(copy: Path, *, ending: str = "true", policy: str | None = None) -> subprocess.Popen[str]:
    """The script in a namespace where /usr/sbin holds only `policy`."""
    programs = copy / "bin"
    programs.mkdir()
    (programs / "apt-get").write_text(APT_GET)
    (programs / "apt-get").chmod(0o755)
    private = copy / "sbin"
    private.mkdir()
    if policy is not None:
        (private / POLICY).write_text(policy)
        (private / POLICY).chmod(0o755)
    command = f'mount --bind "{private}" /usr/sbin && exec "{copy}/vdsm/tool/prerequisites.sh" demo'
    # A shell cannot trap what was ignored when it began, as it is below nohup and in a script's background.
    usual = ["env", "--default-signal=HUP,INT,TERM"]
    return subprocess.Popen(
        [*usual, "unshare", "--mount", "--propagation", "private", "sh", "-c", command],
        env={"PATH": f"{programs}:/usr/bin:/bin", "NOTES": str(copy / "notes"), "ENDING": ending},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def notes(copy: Path) -> list[str]:
    path = copy / "notes"
    return path.read_text().splitlines() if path.exists() else []


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount namespace")


@pytest.mark.parametrize("name", ["packages-demo.txt", "packages-test.txt", "packages-lab.txt"])
def test_every_package_has_its_reason(name: str) -> None:
    lines = [line for line in (TOOL / name).read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        packages, _, reason = line.partition("#")
        assert packages.strip(), line
        assert reason.strip(), f"{line}: why?"


def test_a_ready_machine_takes_under_a_second() -> None:
    command = [str(TOOL / "prerequisites.sh"), "test"]
    subprocess.run(command, capture_output=True, check=True)  # now it is ready
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.stdout, done.stderr) == ("", "")
    # Of the processor: it waits for nobody, and what else the machine does is not its time.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_check_names_what_is_missing_and_changes_nothing(copy: Path) -> None:
    command = [str(copy / "vdsm/tool/prerequisites.sh"), "demo", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "missing Debian packages: no-such-package-one no-such-package-three\n"


def test_outdated_dependencies_are_noticed(copy: Path) -> None:
    with (copy / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    command = [str(copy / "vdsm/tool/prerequisites.sh"), "demo", "--check"]
    assert "missing or outdated: build/runtime" in subprocess.run(command, capture_output=True, text=True).stdout


@needs_root
def test_other_users_are_told_the_command(copy: Path) -> None:
    command = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
    done = subprocess.run([*command, copy / "vdsm/tool/prerequisites.sh", "demo"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "apt-get install --no-install-recommends no-such-package-one no-such-package-three" in done.stderr


@needs_root
@pytest.mark.parametrize(("ending", "code"), [("true", 0), ("exit 100", 100)], ids=["apt succeeds", "apt fails"])
def test_services_are_forbidden_while_packages_are_installed(copy: Path, ending: str, code: int) -> None:
    with start(copy, ending=ending) as running:
        assert running.wait(30) == code
    assert notes(copy) == ["101 -q install -y --no-install-recommends no-such-package-one no-such-package-three"]
    assert not (copy / "sbin" / POLICY).exists()


@needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_killed_run_forbids_services_until_apt_has_ended(copy: Path, number: int) -> None:
    with start(copy, ending=f'until [ -e "{copy}/go" ]; do sleep 0.02; done') as running:
        until(lambda: notes(copy))
        running.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.3)
        assert (copy / "sbin" / POLICY).exists()
        (copy / "go").touch()
        assert running.wait(30) != 0
    assert not (copy / "sbin" / POLICY).exists()


@needs_root
def test_what_a_run_without_mercy_left_is_removed_by_the_next(copy: Path) -> None:
    with start(copy, ending=f'until [ -e "{copy}/go" ]; do sleep 0.02; done') as running:
        until(lambda: notes(copy))
        running.kill()
        running.wait()
        (copy / "go").touch()
    left = (copy / "sbin" / POLICY).read_text()
    shutil.rmtree(copy / "bin")
    shutil.rmtree(copy / "sbin")
    with start(copy, policy=left) as running:
        assert running.wait(30) == 0
    assert not (copy / "sbin" / POLICY).exists()


@needs_root
def test_the_machines_own_policy_stays(copy: Path) -> None:
    own = "#!/bin/sh\nexit 104\n"
    with start(copy, policy=own) as running:
        assert running.wait(30) == 0
    assert notes(copy)[0].startswith("104 ")
    assert (copy / "sbin" / POLICY).read_text() == own
