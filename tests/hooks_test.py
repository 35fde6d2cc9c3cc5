"""Hook scripts, run by the runner alone: what they get, what is taken from them, and what they cannot do."""

import dataclasses
import hashlib
import json
import os
import re
import resource
import signal
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import hookscripts
from tests.until import running, until
from vdsm import config, errors, leases
from vdsm.hooks import environment, installed, points, process, runner
from vdsm.virt import domxml, hookedxml, spec

VM_ID = "0b0fbe2b-5b6f-4f0e-9b3c-0d4e1f9a7c11"
DISKS = ("e2f1c0aa-6a0d-4a7e-8f39-0d3f6f3a1b01", "e2f1c0aa-6a0d-4a7e-8f39-0d3f6f3a1b02")
AFTER_START = points.AFTER_VM_START
JSON_POINT = points.AFTER_GET_CAPS


@dataclasses.dataclass(frozen=True)
class Source:
    path: str
    format: str
    backing: tuple[dict[str, Any], ...] = ()
    size_bytes: int = 1 << 20
    is_volume: bool = False


def planned() -> str:
    """The domain of a VM with two disks, one on a chain."""
    wanted = spec.VmSpec.parse(
        {
            "vm_id": VM_ID,
            "name": "blau-grün",
            "disks": [{"image_id": DISKS[0]}, {"image_id": DISKS[1], "read_only": True}],
            "nics": [{}],
        }
    )
    lease = leases.Lease("lockspace", DISKS[0], "/data/repo/leases", 0, False)
    metadata = domxml.Metadata(wanted, "lockspace", (), (lease,), 1.5)
    base = {"path": "/data/repo/images/base", "format": "raw", "size_bytes": 1 << 20}
    sources = [
        Source(
            f"/data/repo/images/{DISKS[0]}",
            "qcow2",
            (base,),
        ),
        Source(f"/data/repo/images/{DISKS[1]}", "raw"),
    ]
    ground = domxml.Ground("qemu", "/usr/libexec/vdsm/leased-exec", "/usr/bin/qemu-system-x86_64")
    return domxml.build(metadata, sources, {"leases": []}, ground)


PLANNED = planned()


class Scripts:
    """A directory for scripts, and a runner of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.root.mkdir(mode=0o755)
        self.deadlines(60, 60)

    def deadlines(self, script_s: float, point_s: float) -> None:
        self.runner = runner.Runner(config.Hooks(str(self.root), script_s, point_s))

    def add(self, name: str, text: str, point: points.Point = points.BEFORE_VM_START, mode: int = 0o755) -> Path:
        return hookscripts.install(self.root / point.name, name, text, mode)

    def run(
        self,
        point: points.Point = points.BEFORE_VM_START,
        data: str = PLANNED,
        *,
        unwanted: Callable[[], bool] = lambda: False,
        **properties: str,
    ) -> runner.Outcome:
        check: runner.Check | None = None
        if point is points.BEFORE_VM_START and data is PLANNED:
            check = lambda edited: hookedxml.check(PLANNED, edited, ["/data/repo"])  # noqa: E731
        return self.runner.run(point, lambda: data, vm_id=VM_ID, properties=properties, check=check, unwanted=unwanted)


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path / "hooks")


SAYS_ENVIRONMENT = "#!hook\nhooking.log(json.dumps(dict(os.environ)))\n"


def environment_of(outcome: runner.Outcome) -> dict[str, str]:
    (result,) = outcome.results
    assert result.problem is None, result
    return dict(json.loads(result.stderr))


# -- the classic contract ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "properties", "path"), hookscripts.EDITS.values(), ids=hookscripts.EDITS)
def test_classic_scripts_edit_the_domain(scripts: Scripts, text: str, properties: dict[str, str], path: str) -> None:
    scripts.add("50_script", text)
    before = ET.fromstring(f"<top>{PLANNED}</top>")
    assert before.find(f"domain{path}" if path.startswith("[") else f"domain/{path}") is None
    outcome = scripts.run(**properties)
    outcome.check()
    assert outcome.data is not None
    after = ET.fromstring(f"<top>{outcome.data[outcome.data.index('<domain') :]}</top>")
    assert after.find(f"domain{path}" if path.startswith("[") else f"domain/{path}") is not None


def test_all_classic_scripts_one_after_the_other(scripts: Scripts) -> None:
    """Each finds what the one before it left, whatever wrote it: minidom, pretty or not, or sed."""
    everything: dict[str, str] = {}
    for name, (text, properties, _) in hookscripts.EDITS.items():
        scripts.add(name, text)
        everything |= properties
    outcome = scripts.run(**everything)
    assert [result.problem for result in outcome.results] == [None] * len(hookscripts.EDITS)
    after = ET.fromstring(outcome.data or "")
    for _, _, path in hookscripts.EDITS.values():
        assert path.startswith("[") or after.find(path) is not None


def test_scripts_run_in_the_order_of_their_names(scripts: Scripts) -> None:
    for name in ("b", "50_z", "B", "5_a", "é"):
        scripts.add(name, "#!/bin/sh\n")
    assert [result.script for result in scripts.run().results] == ["50_z", "5_a", "B", "b", "é"]


def test_json_goes_from_script_to_script(scripts: Scripts) -> None:
    count = "#!hook\ndata = hooking.read_json()\ndata['n'] += 1\nhooking.write_json(data)\n"
    scripts.add("1", count, JSON_POINT)
    scripts.add("2", count, JSON_POINT)
    outcome = scripts.run(JSON_POINT, '{"n": 1, "name": "ä"}')
    assert json.loads(outcome.data or "") == {"n": 3, "name": "ä"}


@pytest.mark.parametrize("left", ["[1]", "{", "NaNaN", "[" * 200_000], ids=["list", "cut", "no json", "deep"])
def test_json_that_cannot_be_used_is_not_taken(scripts: Scripts, left: str) -> None:
    scripts.add("1", f"#!hook\nopen(os.environ['_hook_json'], 'w').write({left[:1]!r} * {len(left)})\n", JSON_POINT)
    outcome = scripts.run(JSON_POINT, '{"n": 1}')
    assert outcome.results[0].problem is not None
    assert outcome.data == '{"n": 1}'


def test_a_veto_ends_the_list_and_the_operation(scripts: Scripts) -> None:
    scripts.add("1", "#!hook\nhooking.log('checking')\nhooking.exit_hook('no licence left')\n")
    scripts.add("2", "#!/bin/sh\n")
    outcome = scripts.run()
    assert [result.script for result in outcome.results] == ["1"]
    with pytest.raises(errors.HookFailed) as refused:
        outcome.check()
    assert str(refused.value) == "Hook script 1 of before_vm_start failed: exit code 2: no licence left"
    assert refused.value.facts["stderr"] == "checking\nno licence left"
    assert refused.value.code == 1500


@pytest.mark.parametrize(("text", "exit_code", "problem"), hookscripts.FAILURES.values(), ids=hookscripts.FAILURES)
def test_a_script_that_fails_is_named_and_the_others_go_on(
    scripts: Scripts, text: str, exit_code: int | None, problem: str
) -> None:
    """It is named also when one after it does well, and nothing of what it left is taken."""
    scripts.add("1", text)
    scripts.add("2", hookscripts.EDITS["hugepages"][0])
    outcome = scripts.run()
    first, second = outcome.results
    assert (first.script, first.exit_code, second.problem) == ("1", exit_code, None)
    assert problem in (first.problem or "")
    assert outcome.launch_flags == 0
    assert ET.fromstring(outcome.data or "").find("memoryBacking") is not None
    assert ET.fromstring(outcome.data or "").findtext("uuid") == VM_ID
    with pytest.raises(errors.HookFailed, match="script 1 "):
        outcome.check()


def test_the_first_that_failed_is_named(scripts: Scripts) -> None:
    """It may be why the others did."""
    for name in "123":
        scripts.add(name, f"#!/bin/sh\necho failure {name} >&2\nexit 1\n")
    with pytest.raises(errors.HookFailed, match=r"script 1 .*failure 1"):
        scripts.run().check()


def test_where_scripts_may_not_veto_failure_is_told_and_no_more(scripts: Scripts) -> None:
    scripts.add("1", "#!/bin/sh\necho late >&2; exit 1\n", points.AFTER_VM_START)
    outcome = scripts.run(points.AFTER_VM_START)
    outcome.check()
    told = outcome.results[0].to_dict()
    assert (told["script"], told["exit"], told["problem"], told["stderr"]) == ("1", 1, "exit code 1", "late")


def test_where_scripts_may_not_change_the_domain_the_next_one_finds_it_as_it_was(scripts: Scripts) -> None:
    scripts.add("1", "#!/bin/sh\necho '<domain/>' > $_hook_domxml\n", points.BEFORE_VM_PAUSE)
    scripts.add("2", "#!/bin/sh\ngrep -q '<name>' $_hook_domxml\n", points.BEFORE_VM_PAUSE)
    outcome = scripts.run(points.BEFORE_VM_PAUSE)
    outcome.check()
    assert outcome.data == PLANNED


def test_points_without_data_name_no_file(scripts: Scripts) -> None:
    scripts.add("1", SAYS_ENVIRONMENT, points.BEFORE_VDSM_START)
    told = environment_of(scripts.runner.run(points.BEFORE_VDSM_START))
    assert not [name for name in told if name.startswith("_hook") or name == "vmId"]


def test_without_scripts_nobody_is_asked_for_data(scripts: Scripts) -> None:
    def never() -> str:
        raise AssertionError("asked")

    assert scripts.runner.run(points.AFTER_VM_START, never).results == ()


def test_launch_flags_go_from_script_to_script(scripts: Scripts) -> None:
    scripts.add("1", "#!hook\nhooking.dump_vm_launch_flags_to_file(os.environ['vmId'], 1)\n")
    scripts.add("2", "#!hook\nassert hooking.load_vm_launch_flags_from_file(os.environ['vmId']) == 1\n")
    outcome = scripts.run()
    outcome.check()
    assert outcome.launch_flags == points.START_PAUSED


def test_the_flags_of_a_start_are_told_after_it(scripts: Scripts) -> None:
    """Scripts that had the guest wait let it go on then."""
    scripts.add("1", "#!hook\nhooking.log(hooking.load_vm_launch_flags_from_file(os.environ['vmId']))\n", AFTER_START)
    outcome = scripts.runner.run(AFTER_START, lambda: PLANNED, vm_id=VM_ID, launch_flags=points.START_PAUSED)
    assert outcome.results[0].stderr == "1"


def test_big_domains_pass(scripts: Scripts) -> None:
    add = (
        "domain.documentElement.appendChild(domain.createElement('description')).appendChild(domain.createTextNode('x'"
    )
    text = f"#!hook\ndomain = hooking.read_domxml()\n{add} * 2000000))\nhooking.write_domxml(domain)\n"
    scripts.add("1", text)
    scripts.add("2", "#!hook\nassert len(hooking.read_domxml().toxml()) > 2000000\n")
    outcome = scripts.run()
    outcome.check()
    assert len(outcome.data or "") > 2_000_000


@pytest.mark.parametrize(
    ("value", "truth"),
    [
        ("true", True),
        ("TRUE", True),
        ("1", True),
        ("-1", True),
        ("0", False),
        ("yes", False),
        ("", False),
        (None, False),
    ],
)
def test_tobool_is_the_classic_one(value: object, truth: bool) -> None:
    import importlib.util

    found = importlib.util.spec_from_file_location("hooking", environment.MODULES / "hooking.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert module.tobool(value) is truth


def test_the_module_runs_commands(scripts: Scripts) -> None:
    scripts.add(
        "1",
        "#!hook\nassert hooking.execCmd(['cat'], data='a\\nb') == (0, [b'a', b'b'], [])\n"
        "assert hooking.execCmd(['sh', '-c', 'echo $0 >&2; exit 3', 'x'], raw=True) == (3, b'', b'x\\n')\n",
    )
    scripts.run().check()


def test_the_module_is_alone_in_its_directory() -> None:
    """It is on the path of every script: nothing else of ours may get in their way."""
    assert [path.name for path in environment.MODULES.iterdir() if path.name != "__pycache__"] == ["hooking.py"]


# -- what scripts may not do to a domain -------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "reason"), hookscripts.FORBIDDEN.values(), ids=hookscripts.FORBIDDEN)
def test_what_must_not_change_is_not_taken(scripts: Scripts, line: str, reason: str) -> None:
    scripts.add("50_bad", hookscripts.FORBIDDEN_TEXT.replace("{line}", line))
    outcome = scripts.run()
    assert reason in (outcome.results[0].problem or ""), outcome.results
    assert outcome.data == PLANNED
    with pytest.raises(errors.HookFailed, match="50_bad"):
        outcome.check()


GUIDE = Path(__file__).resolve().parent.parent / "docs" / "hooks.md"


def test_the_guides_example_works(scripts: Scripts) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    scripts.add("50_numa", example)
    assert scripts.run().data == PLANNED  # without the property
    outcome = scripts.run(numaset="0")
    outcome.check()
    assert ET.fromstring(outcome.data or "").find("numatune/memory[@nodeset='0']") is not None
    assert outcome.results[0].stderr == "memory from nodes 0"


def test_the_guide_lists_all_points_as_they_are() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|", GUIDE.read_text(), re.MULTILINE)
    words = {"domxml": "domain", "json": "JSON", "none": "none"}
    told = {name: (data.split(",")[0], "may be changed" in data, "fails" in failure) for name, data, failure in rows}
    assert told == {
        point.name: (words[point.data], point.may_change, point.may_veto) for point in points.POINTS.values()
    }


def test_an_untouched_domain_passes() -> None:
    hookedxml.check(PLANNED, PLANNED, ["/data/repo"])


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_a_hanging_script_is_killed_at_its_deadline_with_what_it_started(scripts: Scripts, tmp_path: Path) -> None:
    """SIGTERM would not do, and neither would killing the script alone."""
    scripts.deadlines(2, 60)
    scripts.add("1", f"#!/bin/sh\ntrap '' TERM\nsleep 300 & echo $! > {tmp_path}/pid\necho waiting >&2\nwait\n")
    scripts.add("2", "#!/bin/sh\n")
    first, second = scripts.run().results
    assert (first.exit_code, first.stderr, second.problem) == (None, "waiting", None)
    assert "its deadline passed" in (first.problem or "")
    assert 2 <= first.seconds < 60
    until(lambda: not running(int((tmp_path / "pid").read_text())))


def test_all_scripts_of_a_point_have_one_deadline(scripts: Scripts) -> None:
    scripts.deadlines(60, 0.5)
    for name in "123":
        scripts.add(name, "#!/bin/sh\nsleep 300\n")
    began = time.monotonic()
    killed, *others = scripts.run().results
    assert time.monotonic() - began < 60
    assert "deadline" in (killed.problem or "")
    assert ["it is not run" in (other.problem or "") for other in others] == [True, True]


def test_what_a_script_leaves_behind_ends_with_it(scripts: Scripts, tmp_path: Path) -> None:
    """A child in the background may hold the script's pipe: nobody waits for it."""
    scripts.add("1", f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path}/pid\n")
    began = time.monotonic()
    scripts.run().check()
    assert time.monotonic() - began < 60
    until(lambda: not running(int((tmp_path / "pid").read_text())))


def test_a_daemon_with_a_session_of_its_own_lives_on(scripts: Scripts, tmp_path: Path) -> None:
    """Before and after hooks talk to each other that way."""
    scripts.add(
        "1",
        f"#!/bin/sh\nsetsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 300' >/dev/null 2>&1 &\n"
        f"until test -s {tmp_path}/pid; do :; done\n",
    )
    scripts.run().check()
    pid = int((tmp_path / "pid").read_text())
    try:
        assert running(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_flood_of_output_fills_no_memory(scripts: Scripts, stream: str) -> None:
    size = 200 << 20
    scripts.add(
        "1", f"#!hook\nfor _ in range({size} >> 20): sys.{stream}.write('x' * (1 << 20))\nhooking.log('\\nend')\n"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (result,) = scripts.run().results
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10  # KiB
    assert result.problem is None
    assert result.stderr.endswith("end")
    assert len(result.stderr) <= process.TAIL_BYTES


def test_a_flood_without_an_end_ends_at_the_deadline(scripts: Scripts) -> None:
    scripts.deadlines(0.7, 60)
    scripts.add("1", "#!/bin/sh\nexec yes >&2\n")
    (result,) = scripts.run().results
    assert "deadline" in (result.problem or "")


def test_a_script_reads_nothing_from_standard_input(scripts: Scripts) -> None:
    scripts.add("1", "#!hook\nassert sys.stdin.read() == ''\n")
    scripts.run().check()


def test_whoever_no_longer_wants_it_does_not_wait_for_it(scripts: Scripts, tmp_path: Path) -> None:
    scripts.add("1", f"#!/bin/sh\necho $$ > {tmp_path}/pid\nsleep 300\n")
    scripts.add("2", f"#!/bin/sh\ntouch {tmp_path}/second\n")
    pid = tmp_path / "pid"
    outcome = scripts.run(unwanted=lambda: pid.exists() and pid.read_text().endswith("\n"))
    assert ["not wanted" in (result.problem or "") for result in outcome.results] == [True]
    assert not running(int(pid.read_text()))
    assert not (tmp_path / "second").exists()


def test_the_agents_end_ends_what_runs(scripts: Scripts, tmp_path: Path) -> None:
    scripts.add("1", f"#!/bin/sh\ntouch {tmp_path}/begun\nsleep 300\n")
    outcomes: list[runner.Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(scripts.run()))
    thread.start()
    until((tmp_path / "begun").exists)
    scripts.runner.cancel()
    thread.join(30)
    assert not thread.is_alive()
    assert outcomes[0].results[0].exit_code is None


def test_a_run_leaves_no_files(scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    # The one place that says where temporary files go.
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    scripts.add("1", "#!hook\nhooking.write_domxml(hooking.read_domxml())\nhooking.log(os.environ['_hook_domxml'])\n")
    scripts.add("2", '#!/bin/sh\ntest "$(stat -c %a $(dirname $_hook_domxml))" = 700 && exit 1\n')
    first, second = scripts.run().results
    assert first.stderr.startswith(str(temporary))
    assert second.exit_code == 1  # only the agent's user can enter
    assert list(temporary.iterdir()) == []


# -- the environment ---------------------------------------------------------------------------------------------------

HOSTILE = (
    "PATH",
    "LD_PRELOAD",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "IFS",
    "ENV",
    "BASH_ENV",
    "SHELLOPTS",
)
HOSTILE += (
    "PS4",
    "PERL5OPT",
    "GCONV_PATH",
    "GLIBC_TUNABLES",
    "TMPDIR",
    "HOME",
    "LC_ALL",
    "NODE_OPTIONS",
    "_",
    "_hook_json",
)
HOSTILE += (
    "_hook_domxml",
    "_hook_launchflags",
    "vmId",
    "VMID",
    "http_proxy",
    "HTTPS_PROXY",
    "no_proxy",
    "BASH_FUNC_ls%%",
)
HOSTILE += ("", "1st", "with-dash", "x" * 65, "umlaut_ä", "x=y", "new\nline")


@pytest.mark.parametrize("name", HOSTILE)
def test_properties_that_are_not_the_callers_to_set(scripts: Scripts, name: str) -> None:
    """Refused when the VM is made; and a VM that has one all the same does not hand it to scripts."""
    with pytest.raises(errors.InvalidParameters):
        environment.check({name: "/tmp/evil"})
    assert "/tmp/evil" not in environment.build({name: "/tmp/evil"}, VM_ID, {}).values()


@pytest.mark.parametrize("name", ["sap_agent", "vmfex", "numaset", "qemu_cmdline", "Windows2019", "x", "proxy_user"])
def test_properties_reach_scripts_under_their_own_names(scripts: Scripts, name: str) -> None:
    value = "two words; $(touch /tmp/x) 'ü'\n"
    environment.check({name: value})
    scripts.add("1", SAYS_ENVIRONMENT)
    told = environment_of(scripts.run(**{name: value}))
    assert told[name] == value


def test_the_environment_is_clean(scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the agent itself was started with is not the scripts' concern.
    monkeypatch.setenv("SECRET", "of the agent")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/agent")
    scripts.add("1", SAYS_ENVIRONMENT)
    told = environment_of(scripts.run(pincpu="0", LD_PRELOAD="/tmp/evil.so", PATH="/tmp"))
    files = {name: told.pop(name) for name in ("_hook_domxml", "_hook_launchflags")}
    assert all(Path(path).is_absolute() for path in files.values())
    assert told.keys() - set(environment.INHERITED) == {
        *("PATH", "LC_ALL", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "vmId", "pincpu")
    }
    assert (told["PATH"], told["vmId"]) == (environment.PATH, VM_ID)


@pytest.mark.parametrize("value", ["a\0b", "x" * 70_000], ids=["zero byte", "too long"])
def test_values_that_no_environment_can_hold_are_refused(value: str) -> None:
    with pytest.raises(errors.InvalidParameters):
        environment.check({"good_name": value})


# -- which scripts there are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [("off", 0o644), *((name, 0o755) for name in ("a~", ".hidden", "#a#", "a.rpmsave", "a.dpkg-old", "a.bak"))],
)
def test_what_is_no_script(scripts: Scripts, name: str, mode: int) -> None:
    scripts.add(name, "#!/bin/sh\nexit 2\n", mode=mode)
    (scripts.root / "before_vm_start" / "directory").mkdir()
    (scripts.root / "before_vm_start" / "dangling").symlink_to("nowhere")
    assert scripts.run().results == ()
    assert not scripts.runner.has(points.BEFORE_VM_START)


def test_a_link_to_a_script_is_one(scripts: Scripts, tmp_path: Path) -> None:
    target = hookscripts.install(tmp_path / "package", "numa.py", "#!hook\nhooking.log(sys.argv[0])\n")
    directory = scripts.root / "before_vm_start"
    directory.mkdir()
    (directory / "50_numa").symlink_to(target)
    (result,) = scripts.run().results
    assert (result.script, result.stderr) == ("50_numa", str(directory / "50_numa"))


def writable(scripts: Scripts, tmp_path: Path) -> Path:
    return scripts.add("1", "#!/bin/sh\n", mode=0o757)


def writable_by_group(scripts: Scripts, tmp_path: Path) -> Path:
    return scripts.add("1", "#!/bin/sh\n", mode=0o775)


def in_a_writable_directory(scripts: Scripts, tmp_path: Path) -> Path:
    place = scripts.add("1", "#!/bin/sh\n").parent
    place.chmod(0o777)
    return place


def in_a_sticky_directory(scripts: Scripts, tmp_path: Path) -> Path:
    """Others could add a link to any program of root's."""
    place = scripts.add("1", "#!/bin/sh\n").parent
    place.chmod(0o1777)
    return place


def below_a_writable_directory(scripts: Scripts, tmp_path: Path) -> Path:
    scripts.add("1", "#!/bin/sh\n")
    scripts.root.chmod(0o777)
    return scripts.root


def of_somebody_else(scripts: Scripts, tmp_path: Path) -> Path:
    path = scripts.add("1", "#!/bin/sh\n")
    if os.geteuid() != 0:
        pytest.skip("needs root: gives a file away")
    os.chown(path, 65534, 65534)
    return path


def behind_a_link(scripts: Scripts, tmp_path: Path) -> Path:
    target = hookscripts.install(tmp_path / "open", "1", "#!/bin/sh\n")
    target.parent.chmod(0o777)
    directory = scripts.root / "before_vm_start"
    directory.mkdir()
    (directory / "1").symlink_to(target)
    return target.parent


def a_safe_script_by_a_link_that_others_could_replace(scripts: Scripts, tmp_path: Path) -> Path:
    target = hookscripts.install(tmp_path / "package", "1", "#!/bin/sh\n")
    directory = scripts.root / "before_vm_start"
    directory.mkdir()
    (directory / "1").symlink_to(target)
    scripts.root.chmod(0o777)
    return scripts.root


WAYS = (writable, writable_by_group, in_a_writable_directory, in_a_sticky_directory, below_a_writable_directory)
WAYS += (of_somebody_else, behind_a_link, a_safe_script_by_a_link_that_others_could_replace)


@pytest.mark.parametrize("make", WAYS, ids=lambda make: make.__name__)
def test_a_script_that_others_could_change_is_refused_and_vetoes(
    scripts: Scripts, tmp_path: Path, make: Callable[[Scripts, Path], Path]
) -> None:
    """Not skipped: whoever put a check there must not believe that it was made."""
    place = make(scripts, tmp_path)
    outcome = scripts.run()
    (result,) = outcome.results
    assert (result.script, result.exit_code) == ("1", None)
    assert f"it is not run: {place} " in (result.problem or "")
    with pytest.raises(errors.HookFailed):
        outcome.check()
    place_in_report = scripts.runner.report()["before_vm_start"]["1"]
    assert str(place) in place_in_report["refused"]


def test_capabilities_tell_scripts_with_checksums(scripts: Scripts) -> None:
    path = scripts.add("50_numa", "#!/bin/sh\n", points.AFTER_VM_START)
    scripts.add("off", "#!/bin/sh\n", points.AFTER_VM_START, mode=0o644)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert scripts.runner.report() == {"after_vm_start": {"50_numa": {"checksum": checksum}}}


def test_scripts_that_no_point_runs_are_told(scripts: Scripts, caplog: pytest.LogCaptureFixture) -> None:
    hookscripts.install(scripts.root / "before_vm_strat", "1", "#!/bin/sh\n")
    (scripts.root / "empty").mkdir()
    scripts.add("1", "#!/bin/sh\n")
    assert installed.strangers(scripts.root) == ["before_vm_strat"]
    scripts.runner.start()
    assert "before_vm_strat" in caplog.text


def test_a_directory_that_cannot_be_read_vetoes(scripts: Scripts) -> None:
    (scripts.root / "before_vm_start").write_text("a file, of all things")
    outcome = scripts.run()
    with pytest.raises(errors.HookFailed, match="before_vm_start"):
        outcome.check()


def test_no_process_can_be_made(scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise BlockingIOError("too many processes")

    # The machine's limit, which a test must not reach.
    monkeypatch.setattr("subprocess.Popen", full)
    scripts.add("1", "#!/bin/sh\n")
    with pytest.raises(errors.HookFailed, match="too many processes"):
        scripts.run().check()
