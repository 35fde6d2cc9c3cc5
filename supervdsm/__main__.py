"""supervdsmd: what the agent needs root for, as a closed list of calls (`--list`).

Start it as `python3 -P -m supervdsm` with a PYTHONPATH that only root can write: without -P Python looks for modules in
the current directory first.
"""

import argparse
import logging
import os
import pathlib
import socket
import sys

from supervdsm import audit, contract, listener, server, settings

LOG_FORMAT = "%(asctime)s %(levelname)-7s [%(name)s] %(process)d %(message)s"


def main() -> int:
    """Serves until SIGTERM: 0. 1: it cannot start, with the reason on standard error."""
    options = _parser().parse_args()
    if options.list:
        print(contract.describe())
        return 0
    os.umask(0o077)
    os.chdir("/")
    try:
        _serve(options)
    except (settings.SettingsError, OSError) as error:
        print(f"supervdsm: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(options: argparse.Namespace) -> None:
    if os.geteuid() != 0:
        raise settings.SettingsError("it must run as root")
    names = (options.user, options.group, options.storage_group)
    context = settings.resolve(*names, options.localfs_dir, options.mount_dir, options.volume_device)
    settings.check_place("--audit", options.audit)
    if options.log:
        settings.check_place("--log", options.log)
    logging.basicConfig(filename=options.log, level=logging.INFO, format=LOG_FORMAT)
    trail = audit.Trail(options.audit)
    serving = server.Server(context, trail)
    with listener.listening(options.socket, context.uid, context.gid) as link:
        logging.info("serving user %s on %s", options.user, options.socket)
        _notify("READY=1")
        serving.run(link)
    logging.info("ended")


def _notify(state: str) -> None:
    """Tells systemd, when it is there (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="supervdsm", description="The root helper of the host agent.")
    parser.add_argument("--list", action="store_true", help="print the closed list of calls and exit")
    parser.add_argument("--socket", type=_absolute, default="/run/vdsm/svdsm.sock", help="(%(default)s)")
    parser.add_argument("--user", default="vdsm", help="the agent's user, who may call beside root (%(default)s)")
    parser.add_argument("--group", default="vdsm", help="group of the socket (%(default)s)")
    parser.add_argument("--storage-group", default="kvm", help="group of repository directories (%(default)s)")
    parser.add_argument("--localfs-dir", action="append", default=[], help="repositories may lie under it; repeatable")
    parser.add_argument("--mount-dir", default="/run/vdsm-mounts", help="exports are mounted under it (%(default)s)")
    parser.add_argument(
        "--volume-device",
        action="append",
        default=[],
        metavar="PATTERN",
        help="shared volume groups may be on such disks, e.g. '/dev/mapper/3*'; repeatable",
    )
    parser.add_argument("--audit", type=_absolute, default="/var/log/supervdsm/audit.log", help="(%(default)s)")
    parser.add_argument("--log", type=_absolute, help="log file (standard error)")
    return parser


def _absolute(path: str) -> str:
    return str(pathlib.Path(path).absolute())


if __name__ == "__main__":
    sys.exit(main())
