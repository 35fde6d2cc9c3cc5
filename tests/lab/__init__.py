"""A few real hosts on one machine, for what a single host cannot show: shared storage, cut cables, dead hosts.

    with lab.Lab(hosts=2) as running:
        one, two = running.hosts
        one.run(["hostname"]).out           'host1'
        two.cut("san"); two.restore("san")
        one.kill(); one.boot()

A host is a User Mode Linux kernel, which is an ordinary process: it has its own kernel, network, devices, memory and
root, needs no virtualisation, and changes nothing of the machine. All hosts see the same LUNs. Every call has a
deadline, and everything ends with the process that made the lab, however that one ends.

    lab        the lab: its directory, its networks, its hosts
    host       one host: boot, run, cut, kill
    network    the networks between the hosts
    lun        what a host sees of a shared LUN, and its faults
    iscsi      a target with two paths, and its initiators
    nfs        a server for versions 3 and 4, and its clients
    blocks     writes and reads a block, to see who sees it
    inside/    what runs in the hosts
"""

from tests.lab.host import CommandError, Host, HostError
from tests.lab.lab import Lab, missing, remove_abandoned

__all__ = ["CommandError", "Host", "HostError", "Lab", "missing", "remove_abandoned"]
