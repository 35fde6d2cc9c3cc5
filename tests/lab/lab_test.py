"""Every verb of the lab, once: what a test of shared storage relies on is seen to be so. Storage: `storage_test`."""

import concurrent.futures
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import lab
from tests.lab import blocks
from tests.lab.waiting import until
from tests.until import running
from vdsm.client import failures

# In seconds; an idle machine takes 2 to 4. Two cores with a load of ten have been seen to take 9.
BOOTED_S = 30.0
GREETER_PORT = 9000


# -- the hosts ---------------------------------------------------------------------------------------------------------


def test_hosts_are_ready_within_seconds(hosts: list[lab.Host]) -> None:
    assert all(0 < host.boot_s < BOOTED_S for host in hosts)


@pytest.mark.parametrize("what", ["/proc/sys/kernel/random/boot_id", "/etc/machine-id", "/proc/sys/kernel/hostname"])
def test_each_host_is_somebody_else(hosts: list[lab.Host], what: str) -> None:
    here = [Path(what).read_text()] if Path(what).exists() else []
    seen = [host.run(["cat", what]).out for host in hosts] + here
    assert len(set(seen)) == len(seen)


def test_a_host_changes_nothing_of_the_machine(one: lab.Host, two: lab.Host) -> None:
    for place in ("/etc", "/var/tmp", "/tmp", "/run", "/root"):
        path = f"{place}/vdsm-lab-was-here"
        one.run(["touch", path])
        assert not Path(path).exists()
        assert two.run(["test", "-e", path], check=False).code == 1


# -- commands ----------------------------------------------------------------------------------------------------------


def test_a_command_is_heard_out(one: lab.Host) -> None:
    done = one.run(["sh", "-c", "cat; echo oops >&2; exit 3"], given="hello\n", check=False)
    assert (done.code, done.out, done.err) == (3, "hello\n", "oops\n")


def test_a_failed_command_raises_with_its_output(one: lab.Host) -> None:
    with pytest.raises(lab.CommandError, match=r"host1: /bin/sh .* ended with 1\nsaid before"):
        one.sh("echo said before; false; echo never said")


def test_a_command_is_killed_at_its_deadline_with_its_children(one: lab.Host) -> None:
    with pytest.raises(lab.CommandError, match="killed after 1 s\nbegun"):
        one.sh("echo begun; sleep 4321 & wait", timeout_s=1)
    assert one.run(["pgrep", "-f", "sleep 4321"], check=False).code == 1


def test_a_daemon_that_a_command_leaves_is_not_waited_for(one: lab.Host) -> None:
    one.sh("sleep 4321 &", timeout_s=20)
    one.run(["pkill", "-f", "sleep 4321"])  # which finds it


# -- life and death ----------------------------------------------------------------------------------------------------


def test_a_killed_host_loses_its_memory_and_keeps_its_luns(one: lab.Host, two: lab.Host) -> None:
    blocks.write(one, one.luns[0].path, "x")
    one.run(["touch", "/root/in-memory"])
    one.kill()
    assert not one.running
    assert blocks.read(two, two.luns[0].path) == "x"
    with pytest.raises(lab.HostError, match="it is off"):
        one.run(["true"])
    one.boot()
    assert one.boot_s < BOOTED_S
    assert one.run(["test", "-e", "/root/in-memory"], check=False).code == 1
    assert blocks.read(one, one.luns[0].path) == "x"


def test_a_frozen_host_goes_on_where_it_was(one: lab.Host) -> None:
    one.freeze()
    with pytest.raises(lab.HostError, match="does not answer"):
        one.run(["true"], timeout_s=0.5)
    one.thaw()
    one.run(["true"])


@pytest.mark.parametrize("end", ["c", "b", "o"], ids=["panic", "reset", "power off"])
def test_a_host_that_ends_or_hangs_hangs_nobody(one: lab.Host, end: str) -> None:
    with pytest.raises(lab.HostError):
        one.run(["sh", "-c", f"echo {end} > /proc/sysrq-trigger; sleep 60"], timeout_s=3)
    one.mend()
    one.run(["true"])


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def greet(one: lab.Host, two: lab.Host) -> Iterator[Callable[[str], bool]]:
    """Whether host 2 reaches host 1 on a network, which waits a second for it at most."""
    one.sh(f"socat TCP-LISTEN:{GREETER_PORT},fork,reuseaddr EXEC:hostname &")

    def ask(net: str) -> bool:
        target = f"TCP:{one.address(net)}:{GREETER_PORT},connect-timeout=1"
        return two.run(["socat", "-T1", "-u", target, "-"], check=False).out == "host1\n"

    until(lambda: ask("ctl"))
    yield ask
    one.run(["pkill", "socat"])


@pytest.mark.parametrize("net", ["lan", "san"])
@pytest.mark.parametrize("cut", ["one", "two"])
def test_a_cut_network_is_silent_until_restored(
    one: lab.Host, two: lab.Host, greet: Callable[[str], bool], net: str, cut: str
) -> None:
    other = {"lan": "san", "san": "lan"}[net]
    host = {"one": one, "two": two}[cut]
    until(lambda: greet(net))
    host.cut(net)
    assert not greet(net)
    until(lambda: greet(other))
    host.restore(net)
    until(lambda: greet(net))


def test_a_slow_network_delays(one: lab.Host, two: lab.Host, greet: Callable[[str], bool]) -> None:
    script = f"import socket, time; b = time.monotonic(); socket.create_connection(('{one.address()}', {GREETER_PORT}))"
    script += "; print(time.monotonic() - b)"

    def connect_s() -> float:
        return float(two.run(["python3", "-c", script]).out)

    with two.slow_network("lan", 400):
        assert connect_s() > 0.4
    until(lambda: connect_s() < 0.4)
    with two.slow_network("lan", 0, loss_percent=100):
        assert not greet("lan")
    until(lambda: greet("lan"))


# -- LUNs --------------------------------------------------------------------------------------------------------------


def test_hosts_see_what_the_others_write(one: lab.Host, two: lab.Host) -> None:
    for number, (first, second) in enumerate(("ax", "by", "cz")):  # the others are volume groups'
        blocks.write(one, one.luns[number].path, first)
        assert blocks.read(two, two.luns[number].path) == first
        blocks.write(two, two.luns[number].path, second)
        assert blocks.read(one, one.luns[number].path) == second


def test_a_cut_lun_fails_in_its_host_only(one: lab.Host, two: lab.Host) -> None:
    one.luns[0].cut()
    assert not blocks.readable(one.luns[0])
    assert blocks.readable(two.luns[0])
    one.luns[0].heal()
    assert blocks.readable(one.luns[0])


def test_bad_sectors_fail_until_they_are_written(one: lab.Host) -> None:
    disk = one.luns[0]
    disk.dust(blocks.BLOCK_BYTES // 512)
    assert [blocks.readable(disk, block) for block in range(3)] == [True, False, True]
    blocks.write(one, disk.path, "x", block=1)
    assert blocks.read(one, disk.path, block=1) == "x"


def test_a_slow_lun_delays(one: lab.Host) -> None:
    one.luns[0].delay(700)
    began = time.monotonic()
    blocks.readable(one.luns[0])
    assert time.monotonic() - began > 0.7


def test_a_flaky_lun_comes_and_goes(one: lab.Host) -> None:
    one.luns[0].flake(2, 2)
    until(lambda: not blocks.readable(one.luns[0]), 20)
    until(lambda: blocks.readable(one.luns[0]), 20)


def test_a_hanging_lun_holds_even_the_killed(one: lab.Host) -> None:
    """What waits is stuck in the kernel. Its command is given up in time all the same, and ends when the LUN heals."""
    path = one.luns[0].path
    one.luns[0].hang()
    with pytest.raises(lab.CommandError, match="killed after 1 s"):
        one.run(["dd", f"if={path}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"], timeout_s=1)
    assert one.run(["pgrep", "-x", "dd"], check=False).code == 0
    one.luns[0].heal()
    until(lambda: one.run(["pgrep", "-x", "dd"], check=False).code == 1)
    assert blocks.readable(one.luns[0])


# -- the project in the hosts ------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_an_agent_answers_in_each_host(hosts: list[lab.Host]) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lab.Host.start_agent, hosts))
    for host in hosts:
        with host.agent() as agent:
            assert agent.call("Host.ping2") is None
            assert agent.call("rpc.discover")["info"]["title"]
        settings = host.run(["grep", "-A2", r"^\[host\]", "/run/vdsm/etc/vdsm.toml"]).out
        assert f"id = {host.number}\n" in settings
    one, two = hosts
    one.kill()
    with pytest.raises(failures.ClientError), one.agent() as agent:
        agent.call("Host.ping2")
    with two.agent() as agent:
        agent.call("Host.ping2")
    two.renew()


# -- the end -----------------------------------------------------------------------------------------------------------

OWNER = """
import sys
from tests import lab
with lab.Lab(hosts=1, luns_mib=(16,)) as made:
    made.hosts[0].start_sanlock()
    print(made.directory, flush=True)
    sys.stdin.read()
"""


def test_nothing_outlives_a_killed_owner() -> None:
    reason = lab.missing()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        directory = owner.stdout.readline().strip()
        pids = processes_of(directory)
        assert len(pids) > 4  # a host, what carries to it, and what holds the network
        owner.send_signal(signal.SIGKILL)
    until(lambda: not processes_of(directory))
    until(lambda: not any(running(pid) for pid in pids))
    lab.remove_abandoned()
    assert not Path(directory).exists()


def processes_of(directory: str) -> list[int]:
    """Those that are called with something of this lab, and all others in the network namespace of these."""
    called, namespaces = set(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            namespaces[int(entry.name)] = (entry / "ns" / "net").readlink()
            if directory in (entry / "cmdline").read_text():
                called.add(int(entry.name))
    theirs = {namespaces[pid] for pid in called} - {Path("/proc/self/ns/net").readlink()}
    return sorted(called | {pid for pid, namespace in namespaces.items() if namespace in theirs})
