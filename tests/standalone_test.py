"""The standalone stack without the agent: what it gives, and that nothing is left of it whoever was killed."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.until import until
from vdsm import leases, standalone
from vdsm.standalone import daemons, ending, ground, layout, namespace, processes, state

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(os.geteuid() != 0, reason="the standalone stack needs root"),
]

# No guest code: firmware finds nothing to boot and stays there.
DOMAIN = """
<domain type='qemu'>
  <name>bios</name><memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <serial type='pty'><log file='{console}/bios.log'/></serial>
  </devices>
</domain>
"""
# Starts a stack and keeps it until it is killed.
OWNER = """
import sys
from vdsm import standalone
stack = standalone.Stack(agent=False).start()
print(stack.run_dir, flush=True)
sys.stdin.read()
"""
# Leaves a stack behind in the directory given.
STARTER = """
import pathlib, sys
from vdsm import standalone
standalone.Stack(pathlib.Path(sys.argv[1]), agent=False, background=True).start()
"""
# Takes a lease as the agent's workers do, and asks sanlock what it has.
HOLDER = """
import sys
from vdsm import leases
with leases.Session() as session:
    session.acquire([leases.Lease("test", "thing", sys.argv[1], leases.LEASE_BYTES)], 10)
    print(session.held())
"""
# A daemon whose child ends after it was left by its own parent, as QEMU's first process leaves the second.
LEAVER = """
sh -c '(sleep 0.1 & echo $!)'
exec sleep 300
"""


@pytest.fixture(scope="module")
def bare() -> Iterator[standalone.Stack]:
    with standalone.Stack(agent=False) as running:
        yield running


def as_agent(stack: standalone.Stack, *argv: str) -> subprocess.CompletedProcess[str]:
    """Runs a program as the agent's user, outside the stack's namespace."""
    command = daemons.as_user(ground.USER, ground.USER, list(argv))
    environment = daemons.environment(stack.place)
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", timeout=60)


def virsh(stack: standalone.Stack, *words: str) -> str:
    done = as_agent(stack, "virsh", "-c", stack.place.libvirt_uri, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def machine() -> tuple[list[str], list[Path], list[Path]]:
    """What a stack could leave behind outside its run directory. Tests beside this one mount in temporary places."""
    found = Path("/proc/self/mountinfo").read_text().splitlines()
    mounts = [line for line in found if not line.split()[4].startswith(("/tmp/", "/var/tmp/"))]
    return mounts, sorted(Path("/run").iterdir()), sorted(Path("/var/log").iterdir())


def gone(run_dir: Path) -> bool:
    return not run_dir.exists() and processes.inside(run_dir) == []


# -- what it gives ---------------------------------------------------------------------------------------------------


def test_agents_user_runs_a_domain(bare: standalone.Stack) -> None:
    definition = bare.place.imports / "bios.xml"
    definition.write_text(DOMAIN.format(console=bare.place.console))
    virsh(bare, "create", str(definition))
    try:
        pid = int((bare.place.libvirt / "run" / "qemu" / "bios.pid").read_text())
        status = Path(f"/proc/{pid}/status").read_text()
        uid = int(status.partition("\nUid:\t")[2].split()[0])
        assert uid == int(subprocess.check_output(["id", "-u", ground.QEMU_USER]))
        assert pid in [process.pid for process in processes.inside(bare.run_dir)]
    finally:
        virsh(bare, "destroy", "bios")
    assert virsh(bare, "list", "--name").strip() == ""


def test_other_users_cannot_reach_libvirt(bare: standalone.Stack) -> None:
    command = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
    command += ["virsh", "-c", bare.place.libvirt_uri, "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode != 0
    assert "Permission denied" in done.stderr


def test_agents_user_takes_a_lease(bare: standalone.Stack) -> None:
    area = bare.storage_dir / "leases"
    area.write_bytes(b"")
    os.truncate(area, 4 * leases.LEASE_BYTES)
    shutil.chown(area, ground.USER, ground.STORAGE_GROUP)
    area.chmod(0o660)
    sanlock = ["sanlock", "client"]
    name = f"test:1:{area}:0"
    for action in (
        ["init", "-s", f"test:0:{area}:0", "-o", "1"],
        ["init", "-r", f"test:thing:{area}:{leases.LEASE_BYTES}"],
        ["add_lockspace", "-s", name, "-o", "1"],
    ):
        done = as_agent(bare, *sanlock, *action)
        assert done.returncode == 0, done.stdout
    try:
        held = as_agent(bare, "/usr/bin/python3", "-c", HOLDER, str(area))
        assert held.stdout.strip() == "{('test', 'thing', False)}", held.stderr
    finally:
        as_agent(bare, *sanlock, "rem_lockspace", "-s", name)


def test_agents_user_can_read_the_installed_code_and_nobody_can_change_it(bare: standalone.Stack) -> None:
    done = as_agent(
        bare, "/usr/bin/python3", "-c", "import aiohttp, pydantic, vdsm.daemon; print(vdsm.daemon.__file__)"
    )
    assert done.stdout.strip() == f"{bare.place.code}/vdsm/daemon.py", done.stderr
    assert all(path.stat().st_mode & 0o022 == 0 for path in bare.place.code.rglob("*"))
    assert os.access(bare.place.launcher, os.X_OK)


def test_machine_sees_nothing_of_the_private_directories(bare: standalone.Stack) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    assert str(bare.run_dir.name) not in mounts
    theirs = subprocess.check_output(bare.inside(["ls", "/run/libvirt"]), text=True)
    assert "libvirt-sock" in theirs
    assert not Path("/run/libvirt/virtlogd.pid").exists()


# -- what is left of it ----------------------------------------------------------------------------------------------


def test_nothing_is_left_after_a_stop_with_a_running_domain_and_a_stray_process() -> None:
    before = machine()
    stack = standalone.Stack(agent=False).start()
    run_dir = stack.run_dir
    definition = stack.place.imports / "bios.xml"
    definition.write_text(DOMAIN.format(console=stack.place.console))
    virsh(stack, "create", str(definition))
    stray = subprocess.Popen(stack.inside(["setsid", "sh", "-c", "trap '' TERM; sleep 300 & wait"]))
    until(lambda: stray.pid in [process.pid for process in processes.inside(run_dir)])
    try:
        stack.stop()
        assert gone(run_dir)
        assert stray.wait(30) == -signal.SIGKILL
    finally:
        stray.kill()
        stray.wait()
    assert machine() == before


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree of its own, where only root may go."""
    top = tmp_path_factory.mktemp("home", numbered=True)
    top.chmod(0o700)
    place = top / "a clone"
    for name in ("vdsm", "supervdsm", "build/runtime"):
        shutil.copytree(ground.SOURCE / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    return place


@pytest.fixture
def owner(clone: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns a stack, started with a strict umask; its first line of output is the run directory."""
    command = [sys.executable, "-c", OWNER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=clone, stdin=pipe, stdout=pipe, text=True, umask=0o077) as running:
        yield running
        running.kill()


def run_dir_of(owner: subprocess.Popen[str]) -> Path:
    assert owner.stdout is not None
    return Path(owner.stdout.readline().strip())


def test_stack_of_a_killed_owner_ends_by_itself(owner: subprocess.Popen[str], clone: Path) -> None:
    run_dir = run_dir_of(owner)
    assert processes.inside(run_dir)
    owner.kill()
    until(lambda: gone(run_dir))
    until(lambda: list((clone / "build" / "stacks").iterdir()) == [])


def test_next_start_ends_what_a_killed_owner_and_watcher_left(owner: subprocess.Popen[str], clone: Path) -> None:
    run_dir = run_dir_of(owner)
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        words = entry.read_bytes().split(b"\0")
        if b"watch" in words and os.fsencode(run_dir) in words:
            os.kill(int(entry.parent.name), signal.SIGKILL)
    owner.kill()
    owner.wait()
    assert processes.inside(run_dir)
    command = [sys.executable, "-c", "from vdsm.standalone import ending; ending.stop_abandoned()"]
    subprocess.run(command, cwd=clone, check=True, timeout=60)
    assert gone(run_dir)


def test_a_stack_whose_owner_lives_is_not_abandoned(bare: standalone.Stack) -> None:
    assert bare.run_dir not in [place.run_dir for place in state.abandoned()]


def test_background_stack_outlives_its_starter_and_ends_by_its_run_directory(clone: Path) -> None:
    run_dir = Path(tempfile.mkdtemp(dir="/var/tmp"))  # where every user of the stack may go
    subprocess.run([sys.executable, "-c", STARTER, str(run_dir)], cwd=clone, check=True, timeout=60)
    place = layout.Layout(run_dir)
    found = state.read(place)
    assert found is not None
    assert found.supervisor is None
    assert all(processes.alive(process) for process in found.daemons.values())
    ending.stop(place)
    assert gone(run_dir)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_sanlock_that_cannot_kill_holders_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = daemons.sanlock

    def powerless(place: layout.Layout, host_name: str) -> daemons.Daemon:
        daemon = real(place, host_name)
        return daemon._replace(argv=tuple("-all" if word == "-all,+kill" else word for word in daemon.argv))

    monkeypatch.setattr(daemons, "sanlock", powerless)  # as where root has no CAP_KILL to give
    stack = standalone.Stack(agent=False)
    with pytest.raises(standalone.StartError, match="cannot kill processes of user root"):
        stack.start()


def test_daemon_that_does_not_start_shows_its_log_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground, "LIBVIRTD_CONF", 'auth_unix_rw = "nonsense"\n')
    run_dir = Path(tempfile.mkdtemp(prefix="vdsm-test-", dir="/var/tmp"))
    with pytest.raises(standalone.StartError, match=r"(?s)libvirtd ended with 1:.*unsupported auth nonsense"):
        standalone.Stack(run_dir, agent=False).start()
    assert not run_dir.exists()
    assert not (state.STACKS / run_dir.name).exists()


def test_unknown_option_is_refused() -> None:
    with pytest.raises(standalone.StartError, match=r"unknown option storage\.no_such"):
        standalone.Stack(agent=False, overrides={"storage": {"no_such": 1}}).start()


def test_occupied_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(standalone.GroundError, match="is not empty"):
        standalone.Stack(tmp_path, agent=False).start()
    assert (tmp_path / "precious").read_text() == "kept"


# -- processes and the namespace -------------------------------------------------------------------------------------


def test_a_pid_that_was_used_again_is_never_signalled() -> None:
    with subprocess.Popen(["sleep", "300"]) as bystander:
        found = processes.identify(bystander.pid)
        assert found is not None
        predecessor = found._replace(start=found.start - 1)
        assert not processes.send(predecessor, signal.SIGKILL)
        assert processes.end([predecessor], 1) == []
        assert bystander.poll() is None
        assert processes.end([found], 5) == []
        assert bystander.wait() == -signal.SIGTERM


def test_end_kills_what_ignores_sigterm() -> None:
    command = ["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as deaf:
        assert deaf.stdout is not None
        assert deaf.stdout.readline() == "deaf\n"
        found = processes.identify(deaf.pid)
        assert found is not None
        assert processes.end([found], 0.2) == []
        assert deaf.wait() == -signal.SIGKILL


def test_orphans_of_a_daemon_are_buried_at_once() -> None:
    """Whoever asks for the end of a guest waits until its process is no zombie any more."""
    command = [sys.executable, "-m", "vdsm.standalone.reaper", "sh", "-c", LEAVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ground.SOURCE) as reaper:
        assert reaper.stdout is not None
        orphan = int(reaper.stdout.readline())
        until(lambda: not Path(f"/proc/{orphan}").exists())
        reaper.terminate()
        assert reaper.wait() == signal.SIGTERM


@pytest.mark.skipif(not namespace.KVM.exists(), reason="this machine has no /dev/kvm")
@pytest.mark.parametrize(("word", "may"), [("kvm", True), ("no-kvm", False)])
def test_kvm_that_qemu_may_not_use_is_hidden_from_libvirt_too(word: str, may: bool) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as top:
        place = layout.Layout(Path(top))
        ground.make_directories(place)
        test = daemons.as_user(ground.QEMU_USER, ground.STORAGE_GROUP, ["test", "-w", str(namespace.KVM)])
        command = [sys.executable, "-m", namespace.__name__, top, word, *test]
        assert (subprocess.run(command, cwd=ground.SOURCE).returncode == 0) is may


def test_namespace_enters_only_with_its_directories(tmp_path: Path) -> None:
    command = [sys.executable, "-m", namespace.__name__, str(tmp_path), "kvm", "true"]
    done = subprocess.run(command, cwd=ground.SOURCE, capture_output=True, text=True)
    assert done.returncode != 0
    assert "No such file or directory" in done.stderr
