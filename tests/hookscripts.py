"""Hook scripts as administrators of VDSM write them: what they do to a domain, and what they should not do.

Each is the text of an executable. `#!hook` at its begin stands for Python with `import hooking`.
"""

from pathlib import Path

PYTHON = "#!/usr/bin/python3\nimport hooking, json, os, sys, time\n"


def install(directory: Path, name: str, text: str, mode: int = 0o755) -> Path:
    """Writes the script into a point's directory, which is made if need be."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    path = directory / name
    path.write_text(text.replace("#!hook\n", PYTHON, 1))
    path.chmod(mode)
    return path


# {name: (text, custom properties, path of what must be there afterwards)}
EDITS: dict[str, tuple[str, dict[str, str], str]] = {
    "qemucmdline": (
        """#!hook
if "qemu_cmdline" in os.environ:
    domain = hooking.read_domxml()
    root = domain.getElementsByTagName("domain")[0]
    root.setAttribute("xmlns:qemu", "http://libvirt.org/schemas/domain/qemu/1.0")
    line = domain.createElement("qemu:commandline")
    for argument in json.loads(os.environ["qemu_cmdline"]):
        element = domain.createElement("qemu:arg")
        element.setAttribute("value", argument)
        line.appendChild(element)
    root.appendChild(line)
    hooking.write_domxml(domain)
""",
        {"qemu_cmdline": '["-fw_cfg", "name=opt/hook,string=yes"]'},
        "{http://libvirt.org/schemas/domain/qemu/1.0}commandline"
        "/{http://libvirt.org/schemas/domain/qemu/1.0}arg[@value='-fw_cfg']",
    ),
    "cpuflags": (
        """#!hook
domain = hooking.read_domxml()
root = domain.documentElement
cpu = (domain.getElementsByTagName("cpu") or [root.appendChild(domain.createElement("cpu"))])[0]
for flag in os.environ["cpuflags"].split(","):
    feature = domain.createElement("feature")
    feature.setAttribute("name", flag[1:])
    feature.setAttribute("policy", {"+": "require", "-": "disable"}[flag[0]])
    cpu.appendChild(feature)
hooking.write_domxml(domain)
""",
        {"cpuflags": "+vmx,-aes"},
        "cpu/feature[@name='vmx'][@policy='require']",
    ),
    "numa": (
        """#!hook
if "numaset" in os.environ:
    try:
        mode, nodes = os.environ["numaset"].split(":")
        domain = hooking.read_domxml()
        tune = domain.createElement("numatune")
        memory = domain.createElement("memory")
        memory.setAttribute("mode", mode)
        memory.setAttribute("nodeset", nodes)
        tune.appendChild(memory)
        domain.documentElement.appendChild(tune)
        hooking.write_domxml(domain)
    except Exception as error:
        hooking.exit_hook("numa: %s" % error)
""",
        {"numaset": "strict:0"},
        "numatune/memory[@nodeset='0']",
    ),
    "hugepages": (
        """#!hook
domain = hooking.read_domxml()
backing = domain.createElement("memoryBacking")
backing.appendChild(domain.createElement("hugepages"))
domain.documentElement.appendChild(backing)
hooking.write_domxml(domain)
""",
        {},
        "memoryBacking/hugepages",
    ),
    "pincpu": (
        """#!hook
domain = hooking.read_domxml()
vcpu = domain.getElementsByTagName("vcpu")[0]
vcpu.setAttribute("cpuset", os.environ["pincpu"])
hooking.write_domxml(domain)
""",
        {"pincpu": "0"},
        "vcpu[@cpuset='0']",
    ),
    "viodiskcache": (
        """#!hook
domain = hooking.read_domxml()
for disk in domain.getElementsByTagName("disk"):
    if disk.getElementsByTagName("target")[0].getAttribute("bus") == "virtio":
        driver = disk.getElementsByTagName("driver")[0]
        driver.setAttribute("cache", os.environ["viodiskcache"])
        driver.removeAttribute("io")
hooking.write_domxml(domain)
""",
        {"viodiskcache": "writethrough"},
        "devices/disk/driver[@cache='writethrough']",
    ),
    "macspoof": (
        """#!hook
domain = hooking.read_domxml()
for nic in domain.getElementsByTagName("interface"):
    if hooking.tobool(os.environ.get("macspoof")):
        filter = domain.createElement("filterref")
        filter.setAttribute("filter", "no-mac-spoofing")
        nic.appendChild(filter)
hooking.write_domxml(domain)
""",
        {"macspoof": "True"},
        "devices/interface/filterref",
    ),
    "floppy": (
        """#!hook
domain = hooking.read_domxml()
disk = domain.createElement("disk")
disk.setAttribute("type", "file")
disk.setAttribute("device", "floppy")
source = domain.createElement("source")
source.setAttribute("file", os.environ["floppy"])
target = domain.createElement("target")
target.setAttribute("dev", "fda")
disk.appendChild(source)
disk.appendChild(target)
domain.getElementsByTagName("devices")[0].appendChild(disk)
hooking.write_domxml(domain)
""",
        {"floppy": "/usr/share/floppies/drivers.img"},
        "devices/disk[@device='floppy']/source[@file='/usr/share/floppies/drivers.img']",
    ),
    "hostusb": (
        """#!hook
domain = hooking.read_domxml()
vendor, product = os.environ["hostusb"].split(":")
device = domain.createElement("hostdev")
device.setAttribute("mode", "subsystem")
device.setAttribute("type", "usb")
source = device.appendChild(domain.createElement("source"))
for name, number in (("vendor", vendor), ("product", product)):
    source.appendChild(domain.createElement(name)).setAttribute("id", number)
domain.getElementsByTagName("devices")[0].appendChild(device)
hooking.write_domxml(domain)
""",
        {"hostusb": "0x1234:0xbeef"},
        "devices/hostdev/source/vendor[@id='0x1234']",
    ),
    "smbios": (
        """#!hook
import xml.dom.minidom
with open(os.environ["_hook_domxml"]) as file:
    domain = xml.dom.minidom.parseString(file.read())
root = domain.getElementsByTagName("domain")[0]
info = root.appendChild(domain.createElement("sysinfo"))
info.setAttribute("type", "smbios")
entry = info.appendChild(domain.createElement("system")).appendChild(domain.createElement("entry"))
entry.setAttribute("name", "family")
entry.appendChild(domain.createTextNode("für " + os.environ["vmId"]))
with open(os.environ["_hook_domxml"], "w") as file:
    domain.writexml(file, addindent="  ", newl="\\n")
""",
        {},
        "sysinfo/system/entry",
    ),
    "sed": (
        """#!/bin/sh -e
sed -i 's|<on_crash>destroy|<on_crash>preserve|' "$_hook_domxml"
""",
        {},
        "[on_crash='preserve']",
    ),
    "pretty": (
        """#!hook
domain = hooking.read_domxml()
devices = domain.getElementsByTagName("devices")[0]
devices.appendChild(domain.createElement("watchdog")).setAttribute("model", "i6300esb")
pretty = domain.toprettyxml(encoding="utf-8")
open(os.environ["_hook_domxml"], "wb").write(pretty)
""",
        {},
        "devices/watchdog",
    ),
}

# {name: (text, exit code, what the problem says)}: each fails in a way of its own.
FAILURES: dict[str, tuple[str, int | None, str]] = {
    "fails": ("#!hook\nhooking.exit_hook('no luck', 1)\n", 1, "exit code 1"),
    "odd exit code": ("#!/bin/sh\nexit 7\n", 7, "exit code 7"),
    "traceback": ("#!hook\nhooking.read_domxml().no_such_thing\n", 1, "exit code 1"),
    "crash": ("#!/bin/sh\nkill -SEGV $$\n", -11, "signal 11"),
    "no interpreter": ("#!/no/such/interpreter\n", 127, "exit code 127"),
    "unreadable interpreter": ("#!/etc/shadow\n", 126, "exit code 126"),
    "broken xml": ("#!/bin/sh\necho '<domain>' > \"$_hook_domxml\"\n", 0, "broken XML"),
    "empty": ('#!/bin/sh\n: > "$_hook_domxml"\n', 0, "broken XML"),
    "no text": ("#!/bin/sh\nprintf '<domain>\\377</domain>' > \"$_hook_domxml\"\n", 0, "codec"),
    "other encoding": (
        '#!/bin/sh\nprintf \'<?xml version="1.0" encoding="latin-1"?><domain/>\' > "$_hook_domxml"\n',
        0,
        "must be UTF-8",
    ),
    "external entity": (
        """#!/bin/sh
cat > "$_hook_domxml" <<END
<!DOCTYPE domain [<!ENTITY leak SYSTEM "file:///etc/passwd">]>
<domain><name>&leak;</name></domain>
END
""",
        0,
        "document type",
    ),
    "removed": ('#!/bin/sh\nrm "$_hook_domxml"\n', 0, "No such file"),
    "link": ('#!/bin/sh\nln -sf /etc/passwd "$_hook_domxml"\n', 0, "symbolic links"),
    "pipe": ('#!/bin/sh\nrm "$_hook_domxml"; mkfifo "$_hook_domxml"\n', 0, "no regular file"),
    "directory": ('#!/bin/sh\nrm "$_hook_domxml"; mkdir "$_hook_domxml"\n', 0, "directory"),
    "too big": (
        "#!hook\nopen(os.environ['_hook_domxml'], 'w').write('<domain>' + 5000000 * ' ' + '</domain>')\n",
        0,
        "more than",
    ),
    "launch flags": ("#!hook\nhooking.dump_vm_launch_flags_to_file(os.environ['vmId'], 2)\n", 0, "launch flags 2"),
}

# What scripts may not do to a domain, in a line of Python with `domain` at hand: {name: (line, the refusal)}.
FORBIDDEN: dict[str, tuple[str, str]] = {
    "uuid": ("text('uuid').data = '11111111-1111-4111-8111-111111111111'", "uuid"),
    "second uuid": ("domain.documentElement.appendChild(text('uuid').parentNode.cloneNode(True))", "uuid"),
    "name": ("text('name').data = 'other'", "name"),
    "emulator": ("text('emulator').data = '/usr/bin/qemu-system-x86_64'", "emulator"),
    "metadata": ("remove('metadata')", "metadata"),
    "lease plan": ("remove('qemu:commandline')", "launcher's orders"),
    "another order": (
        "add('qemu:commandline', 'qemu:env', name='VDSM_LEASE_SOCKET', value='@x')",
        "launcher's orders",
    ),
    "owner label": ("remove('seclabel')", "owner"),
    "data path": ("first('source').setAttribute('file', '/var/tmp/other.img')", "data of a disk"),
    "data format": ("first('driver').setAttribute('type', 'raw')", "data of a disk"),
    "backing chain": ("remove('backingStore')", "data of a disk"),
    "offset in data": ("add('source', 'slices')", "data of a disk"),
    "disk taken away": ("remove('disk')", "took one away"),
    "disk twice": (
        "domain.getElementsByTagName('devices')[0].appendChild(first('disk').cloneNode(True))",
        "inside a repository",
    ),
    "another image": (
        "add('devices', 'filesystem').appendChild(make('source', dir='/data/repo/images'))",
        "inside a repository",
    ),
    "another image by a detour": (
        "add('devices', 'hostdev', path='/data/x/../repo/images/x')",
        "inside a repository",
    ),
    "another image for QEMU": (
        "add('qemu:commandline', 'qemu:arg', value='file=/data/repo/images/x,if=virtio')",
        "inside a repository",
    ),
    "no domain": ("domain = minidom.parseString('<network/>')", "not a <domain>"),
}

FORBIDDEN_TEXT = """#!hook
from xml.dom import minidom
domain = hooking.read_domxml()
def first(tag):
    return domain.getElementsByTagName(tag)[0]
def text(tag):
    return first(tag).firstChild
def remove(tag):
    first(tag).parentNode.removeChild(first(tag))
def make(tag, **attributes):
    element = domain.createElement(tag)
    for name, value in attributes.items():
        element.setAttribute(name, value)
    return element
def add(parent, tag, **attributes):
    return first(parent).appendChild(make(tag, **attributes))
{line}
hooking.write_domxml(domain)
"""
