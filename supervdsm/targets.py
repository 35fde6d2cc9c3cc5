"""iSCSI by open-iscsi: discovery, login, logout, rescans.

open-iscsi keeps a text file for each portal that was asked and each portal of a target, from which `iscsiadm` and
`iscsid` take user, password and times. They are written here into those files, never given to a program: arguments can
be read by every user of the host.

    /etc/iscsi/send_targets/HOST,PORT/st_config         of a discovery; here in memory that goes with the call
    /etc/iscsi/nodes/TARGET/ADDRESS,PORT,TAG/default    of a portal: stays as long as its session, since iscsid reads it
                                                        again when it was started anew

Both are readable by root alone. A crash leaves the second one without a session; node.startup is manual, so that
nothing logs in by itself, and the next login writes it anew.
"""

import ctypes
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from supervdsm import calls, contract, settings, tools

DISCOVERIES = Path("/etc/iscsi/send_targets")
NODES = Path("/etc/iscsi/nodes")
SCSI_HOSTS = Path("/sys/class/scsi_host")
SCSI_DEVICES = Path("/sys/class/scsi_device")
INTERFACE = "default"

# Exit codes of iscsiadm(8).
_DONE, _LOGIN, _SESSION_EXISTS, _FATAL_LOGIN, _NOTHING_FOUND, _REFUSED = 0, 5, 15, 19, 21, 24
_SESSION_NOT_FOUND = 2
_UNREACHABLE = {4, 8, 11, 23}
# A login that is refused or not answered is tried once more, and each try has this long (seconds): together below the
# call's deadline.
LOGIN_S = 10
LOGIN_TRIES = 2

_CLONE_NEWNS = 0x00020000
_MS_REC_PRIVATE = 0x4000 | 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


def discover_targets(call: calls.DiscoverTargets, context: settings.Settings) -> calls.Answer:
    """The secret is in memory of this process's own mount namespace, and goes with it however the call ends."""
    _hide(DISCOVERIES)
    place = ["--type", "sendtargets", "--portal", _portal(call.host, call.port)]
    made = _iscsiadm("discoverydb", *place, "--op", "new")
    if made.returncode != _DONE:
        return _answer(made)
    (record,) = DISCOVERIES.glob("*/st_config")
    changes = {"discovery.sendtargets.timeo.login_timeout": str(LOGIN_S), "discovery.sendtargets.reopen_max": "1"}
    _change(record, changes | _credentials("discovery.sendtargets", call.user, call.password))
    found = _iscsiadm("discoverydb", *place, "--interface", INTERFACE, "--discover", "--op", "nonpersistent")
    lines = [line.strip() for line in found.stdout.splitlines() if line.strip()]
    if found.returncode == _NOTHING_FOUND and not found.stderr.strip():
        return calls.Answer("done", "", [])
    return calls.Answer("done", "", lines) if found.returncode == _DONE else _answer(found)


def login_target(call: calls.LoginTarget, context: settings.Settings) -> calls.Answer:
    """A session that is there already is done. When the login fails, nothing is kept."""
    portal = _node(call.address, call.port, call.tag, call.target)
    if _has_session(portal):
        return calls.Answer("done", "", [])
    _iscsiadm("node", *portal, "--op", "delete")  # what a crash has left
    made = _iscsiadm("node", *portal, "--interface", INTERFACE, "--op", "new")
    if made.returncode != _DONE:
        return _answer(made)
    times = {
        "node.startup": "manual",
        "node.conn[0].startup": "manual",
        "node.session.initial_login_retry_max": str(LOGIN_TRIES),
        "node.conn[0].timeo.login_timeout": str(LOGIN_S),
        "node.conn[0].timeo.noop_out_interval": str(call.noop_interval_s),
        "node.conn[0].timeo.noop_out_timeout": str(call.noop_timeout_s),
        "node.session.timeo.replacement_timeout": str(call.replacement_timeout_s),
    }
    record = NODES / call.target / f"{call.address},{call.port},{call.tag}" / INTERFACE
    _change(record, times | _credentials("node.session", call.user, call.password))
    done = _iscsiadm("node", *portal, "--login")
    if done.returncode in (_DONE, _SESSION_EXISTS):
        return calls.Answer("done", "", [])
    _iscsiadm("node", *portal, "--op", "delete")
    return _answer(done)


def logout_target(call: calls.LogoutTarget, context: settings.Settings) -> calls.Answer:
    """Absent when there is no session; what was kept for it is forgotten in any case but a failure."""
    portal = _node(call.address, call.port, call.tag, call.target)
    done = _iscsiadm("node", *portal, "--logout")
    if done.returncode not in (_DONE, _SESSION_NOT_FOUND, _NOTHING_FOUND):
        return _answer(done)
    _iscsiadm("node", *portal, "--op", "delete")
    return calls.Answer("done", "", []) if done.returncode == _DONE else calls.Answer("absent", tools.said(done), [])


def rescan_host(call: calls.RescanHost, context: settings.Settings) -> calls.Rescanned:
    """Writes to sysfs; the kernel then asks the disks. Those that do not run are left out: they would not answer."""
    try:
        (SCSI_HOSTS / f"host{call.number}" / "scan").write_text("- - -")
    except FileNotFoundError as error:
        raise contract.Refused(f"there is no SCSI host {call.number}") from error
    asked = []
    for place in sorted(SCSI_DEVICES.glob(f"{call.number}:*")):
        device = place / "device"
        if (device / "state").read_text().strip() == "running":
            (device / "rescan").write_text("1")
            asked += [disk.name for disk in (device / "block").glob("*")]
    return calls.Rescanned(asked)


def _portal(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _node(address: str, port: int, tag: int, target: str) -> list[str]:
    return ["--targetname", target, "--portal", f"{_portal(address, port)},{tag}"]


def _has_session(portal: list[str]) -> bool:
    listing = _iscsiadm("session").stdout
    wanted = [portal[3], portal[1]]
    return any(line.split()[2:4] == wanted for line in listing.splitlines())


def _iscsiadm(mode: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return tools.run(["iscsiadm", "--mode", mode, *arguments])


def _answer(done: subprocess.CompletedProcess[str]) -> calls.Answer:
    """What went wrong, told from the exit code."""
    code = done.returncode
    if code in (_REFUSED, _LOGIN, _FATAL_LOGIN):
        outcome = "refused"
    elif code in _UNREACHABLE:
        outcome = "unreachable"
    else:
        outcome = "absent" if code == _NOTHING_FOUND else "failed"
    return calls.Answer(outcome, f"{tools.said(done)} ({code})", [])


def _credentials(prefix: str, user: str | None, password: str | None) -> dict[str, str]:
    if user is None or password is None:
        return {f"{prefix}.auth.authmethod": "None"}
    names = {"authmethod": "CHAP", "username": user, "password": password}
    return {f"{prefix}.auth.{name}": value for name, value in names.items()}


def _change(record: Path, changes: Mapping[str, str]) -> None:
    """Sets these lines "name = value" of a file of open-iscsi, which is private and stays it."""
    kept = [line for line in record.read_text().splitlines() if line.partition(" = ")[0] not in changes]
    new = [f"{name} = {value}" for name, value in changes.items()]
    record.chmod(0o600)
    record.write_text("\n".join([*kept[:-1], *new, *kept[-1:], ""]))


def _hide(place: Path) -> None:
    """An empty `place` in memory, for this process and what it starts."""
    if not place.parent.is_dir():
        raise contract.Failed("open-iscsi is not installed")
    place.mkdir(mode=0o700, exist_ok=True)
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None), "mount /")
    _check(_libc.mount(b"private", bytes(place), b"tmpfs", ctypes.c_ulong(0), b"mode=700"), f"mount {place}")


def _check(answer: int, what: str) -> None:
    if answer != 0:
        raise contract.Failed(f"{what}: {os.strerror(ctypes.get_errno())}")
