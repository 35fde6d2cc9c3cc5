"""Versions of the packages that the agent drives, from the system's package database."""

from vdsm import programs

# Upstream VDSM's name of each package, and Debian's.
PACKAGES = {
    "libvirt": "libvirt-daemon",
    "qemu-kvm": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "sanlock": "sanlock",
    "guestfs-tools": "guestfs-tools",
}

QUERY_S = 10.0
INSTALLED = "installed"


def versions() -> dict[str, dict[str, str] | None]:
    """{name of `PACKAGES`: {"version", "release"}, or None when it is not installed}. Blocks for a child process.

    Raises `ToolFailed` where there is no dpkg, and `DeadlinePassed`.
    """
    form = "${Package}\\t${Version}\\t${db:Status-Status}\\n"
    completed = programs.run(["dpkg-query", "--show", f"--showformat={form}", *PACKAGES.values()], timeout_s=QUERY_S)
    # Exit code 1 says that one of them is not known; the others are listed all the same.
    if completed.exit_code not in (0, 1):
        programs.check(completed, "dpkg-query")
    rows = [line.split("\t") for line in completed.stdout.decode().splitlines()]
    found = {package: split(version) for package, version, status in rows if status == INSTALLED}
    return {name: found.get(package) for name, package in PACKAGES.items()}


def split(version: str) -> dict[str, str]:
    """Debian's [epoch:]version[-release] in upstream VDSM's shape; the epoch only orders, so it is left out."""
    without_epoch = version.split(":", 1)[-1]
    upstream, dash, release = without_epoch.rpartition("-")
    return {"version": upstream, "release": release} if dash else {"version": without_epoch, "release": ""}
