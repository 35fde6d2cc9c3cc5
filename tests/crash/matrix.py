"""Every verb, stopped at each of its steps: what is done in one case, and what must be true after it.

    lay out the scene > run the verb with one thing injected > let everything end > start the agent anew
    > check and fix until nothing is left to fix > judge

The judge knows two states: what callers had before the verb, and what they have when it is run without any injection.
Whatever happened must end in one of them, whole; in the second one if the verb said that it was done. Nothing else may
be left in the repositories, and they must work. (The end of another verb, an abort, may also end as that one does.)
"""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import loopfs, sanlock_fixture, storage_fixture
from tests.crash import hosts, recovery, scenes, tracing, verbs, worlds
from tests.until import until
from vdsm import errors, ids, leases

# How a step goes wrong, besides an errno:
HOST = "kill"  # the process dies before the step, and its host with it
WORKER = "kill-worker"  # a job's worker dies, the agent lives and sees to it
TOOL = "kill-tool"  # a tool dies, whoever started it lives
TORN = "kill-torn"  # as `kill`, in the middle of writing a record: half of it is there

_SLOTS = ("/images/", "/vms/", "/.repository", tracing.RECORD)
CALLED = (*scenes.PLACES, scenes.FRESH)  # whose children do what a call asks for


class Case(NamedTuple):
    verb: str
    process: str
    step: tracing.Step
    kind: str

    def __str__(self) -> str:
        return f"{self.verb}/{self.process}/{self.step.name}/{self.kind}"


class Recording(NamedTuple):
    """A verb's run without any injection: what it began with, what it made, its steps in each process. `at_once`: what
    its `tells` told before and after it."""

    scene: scenes.Scene
    after: dict[str, Any]
    at_once: tuple[Any, Any]
    steps: dict[str, list[tracing.Step]]


class Ground:
    """The repositories and the fork server that all cases use, one after the other. `mender` has everything checked and
    fixed after each; None: the same host does, with an agent that has just started."""

    def __init__(
        self, world: worlds.World, host: hosts.Host, kept: Path, mender: recovery.Mender | None = None
    ) -> None:
        self.world = world
        self.host = host
        self._mender = mender
        self._kept = kept
        self._scenes: dict[scenes.Build | verbs.Interrupted, scenes.Scene] = {}
        self._recordings: dict[str, Recording] = {}
        self._places = world.seen(*CALLED, scenes.EXPORT)

    def run_before(self, case: Case) -> list[str]:
        """As `run`, for a verb that ends in another state each time, killed when it could not have come so far."""
        scene = self.scene(verbs.VERBS[case.verb].scene)
        outcome = self._act(case.verb, scene, _plan(case))
        if outcome is None:
            return ["the step was not met"]
        return self._judge([scene.before], outcome)

    def recording(self, verb: str) -> Recording:
        if verb not in self._recordings:
            self._recordings[verb] = self._record(verb)
        return self._recordings[verb]

    def _record(self, verb: str) -> Recording:
        known = verbs.VERBS[verb]
        scene = self.scene(known.scene)
        scene.lay_out(self.world)
        at_first = known.tells(self.world, scene.ids)
        plan = hosts.Plan(wound=known.wound, hang=known.hang, host_dies=False)
        outcome = self._act(verb, scene, plan)
        assert plan.wound or outcome is None, f"{verb} failed without any injection: {outcome}"
        at_once = known.tells(self.world, scene.ids)
        logs = {process: self.host.log(process) for process in self.host.processes()}
        steps = {process: tracing.steps(log, self._places) for process, log in logs.items()}
        wrong = self._recover() + scenes.strays(self.world) + scenes.hidden(self.world)
        assert wrong == [], f"{verb}: {wrong}"
        return Recording(scene, scenes.state(self.world), (at_first, at_once), steps)

    def scene(self, wanted: scenes.Build | verbs.Interrupted) -> scenes.Scene:
        if wanted not in self._scenes:
            names = self._interrupt(wanted) if isinstance(wanted, verbs.Interrupted) else self._build(wanted)
            made = scenes.Scene(self._kept / str(len(self._scenes)), names)
            made.keep(self.world)
            if isinstance(wanted, verbs.Interrupted):  # whoever does nothing now finds it mended
                wrong = self._recover()
                assert wrong == [], f"{wanted}: {wrong}"
                made.before = scenes.state(self.world)
            self._scenes[wanted] = made
        return self._scenes[wanted]

    def _build(self, build: scenes.Build) -> dict[str, Any]:
        scenes.empty(self.world)
        with self._agent() as agent:
            return {**build(scenes.Builder(agent)), "new": ids.new(), "newer": ids.new(), "job": ids.new()}

    def _interrupt(self, wanted: verbs.Interrupted) -> dict[str, Any]:
        scene = self.scene(verbs.VERBS[wanted.verb].scene)
        call, _, number = wanted.step.partition("#")
        step = tracing.Step(call, int(number), "to be interrupted")
        case = Case(wanted.verb, wanted.process, step, wanted.kind)
        self._act(wanted.verb, scene, _plan(case))
        met = tracing.met(self.host.log(case.process), tracing.fails(case.kind))
        assert met, f"{wanted} was not interrupted"
        return scene.ids

    def cases(self, verb: str) -> list[Case]:
        """All of a verb, in the order of its steps; when it is the end of another one, those since a tool has hung."""
        known = verbs.VERBS[verb]
        return [
            Case(verb, process, step, kind)
            for process, steps in self.recording(verb).steps.items()
            if not known.only or process.startswith(known.only)
            for step in (_since_tools(steps) if known.hang and known.only != "conclude" else steps)
            if step.changes or not process.startswith("tool-")
            for kind in _kinds(process, step)
        ]

    def run(self, case: Case) -> list[str]:
        """What is wrong after the case, in words; empty when all is well."""
        recording, log = self._recordings_of(case), self.host.log(case.process)
        outcome = self._act(case.verb, recording.scene, _plan(case))
        if not tracing.met(log, tracing.fails(case.kind)):
            step = case.step
            if (case.process.startswith("tool-") or step.call == "sendto") and step.number > 1:
                # The threads of a tool share its work in another way each time, and a worker says more or less often
                # how far it is: then it is one call earlier.
                return self.run(case._replace(step=step._replace(number=step.number - 1)))
            told = log.read_text()[-300:] if log.exists() else "no log"
            return [f"the step was not met, the verb ended with {outcome!r}: {told}"]
        if case.kind == TORN:
            tracing.tear(log)
        unnamed = tracing.fails(case.kind) and getattr(outcome, "key", None) == "unexpected"
        wrong = [f"a failure without a name: {outcome}"] if unnamed else []
        return wrong + self._judge_case(case, recording, outcome)

    def _recordings_of(self, case: Case) -> Recording:
        """The verb's; the one that it is judged by besides is made too, before the case has begun."""
        or_else = verbs.VERBS[case.verb].or_else
        if or_else:
            self.recording(or_else)
        return self.recording(case.verb)

    def _judge_case(self, case: Case, recording: Recording, outcome: BaseException | None) -> list[str]:
        known, dead = verbs.VERBS[case.verb], case.kind in (HOST, TORN)
        told = known.tells(self.world, recording.scene.ids)
        wrong = [f"it is at once {told}, not {recording.at_once}"] if told not in recording.at_once else []
        if outcome is None and told != recording.at_once[1]:
            wrong.append(f"it is at once {told}, and said to be done")
        other = [self.recording(known.or_else).after] if known.or_else else []
        wrong += self._judge([recording.scene.before, *other, recording.after], outcome)
        undone = not dead and not case.step.call.startswith("unlink") and not case.process.startswith("conclude")
        wrong += scenes.hidden(self.world) if undone else []
        return wrong + (self._ask_again(case.verb, recording) if known.again else [])

    def _ask_again(self, verb: str, recording: Recording) -> list[str]:
        """What is wrong after the same request has come again: it does what is still to be done."""
        done = scenes.state(self.world) == recording.after
        outcome = self._run(verb, recording.scene, None, bool)
        wrong = [] if outcome is None or done else [f"the same request again: {outcome}"]
        state = scenes.state(self.world)
        if state != recording.after:
            wrong += ["not as it should be after the same request again:", *_difference(state, recording.after)]
        return wrong + scenes.hidden(self.world)

    def run_full(self, verb: str, free_bytes: int) -> tuple[list[str], bool]:
        """(what is wrong when the verb is run with no more than that free, in words; whether space was what it failed
        for).

        As long as there is no space, the records tell the truth, and an image that the verb has nothing to do with is
        removed.
        """
        recording = self.recording(verb)
        before, after = recording.scene.before, recording.after
        spare = [recording.scene.ids["beside"]] if "beside" in recording.scene.ids else []
        wrong: list[str] = []

        def remove(agent: hosts.Agent) -> None:
            for name, image in scenes.state(self.world)["main"].items():
                if image not in (before["main"].get(name), after["main"].get(name)) and "broken" not in image:
                    wrong.append(f"while full: main/{name} is {image}")
            for name in spare:
                agent.storage.remove_image("main", name)

        recording.scene.lay_out(self.world)
        with loopfs.filled(self.world.directory, free_bytes):
            outcome = self._run(verb, recording.scene, hosts.Plan("nothing", host_dies=False), remove)
        wrong += self._judge([_without(before, spare), _without(after, spare)], outcome)
        return wrong, getattr(outcome, "key", None) == errors.RepositoryFull.key

    def _act(self, verb: str, scene: scenes.Scene, plan: hosts.Plan) -> BaseException | None:
        """Runs the verb in its scene; how it failed. Nothing of it runs any more then."""
        scene.lay_out(self.world)
        return self._run(verb, scene, plan, bool)

    def _run(
        self, verb: str, scene: scenes.Scene, plan: hosts.Plan | None, then: Callable[[hosts.Agent], object]
    ) -> BaseException | None:
        with self._agent() as agent, self.host.planned(plan) if plan else contextlib.nullcontext():
            try:
                verbs.VERBS[verb].act(agent, scene.ids)
            except (errors.VdsmError, hosts.Failed) as failure:
                return failure
            finally:
                agent.settle()
                then(agent)
        return None

    @contextlib.contextmanager
    def _agent(self) -> Iterator[hosts.Agent]:
        """An agent that has just started; at the end all that it started has ended."""
        with hosts.Agent(self.world, self.host).running() as agent:
            yield agent
        until(lambda: self.host.children() == [] and self.world.settled(), 60)
        self.host.close_lines()
        until(
            lambda: scenes.held(self.world) == []
        )  # or another host's check would leave out what sanlock still gives up

    def _recover(self) -> list[str]:
        """What no fix was found for, how fixing failed, and what does not work afterwards."""
        with self._fixer() as fixer:
            try:
                wrong = recovery.recover(fixer)
            except recovery.FAILURES as error:
                wrong = [f"fixing failed: {error!r}"]
            fixer.later()
            try:
                list(recovery.everywhere(lambda place: _try_out(fixer, place)))
            except recovery.FAILURES as error:
                wrong.append(f"the repositories do not work any more: {error!r}")
            return wrong

    @contextlib.contextmanager
    def _fixer(self) -> Iterator[recovery.Mender]:
        if self._mender is None:
            with self._agent() as agent:
                yield agent
        else:
            yield self._mender

    def _judge(self, states: list[dict[str, Any]], outcome: BaseException | None) -> list[str]:
        """The last of `states` is what the verb makes."""
        wrong = [*scenes.unguarded(self.world), *self._recover()]
        state = scenes.state(self.world)
        allowed = states[-1:] if outcome is None else states
        if state not in allowed:
            wrong.append(f"in none of the states it may be in, with the outcome {outcome!r}:")
            wrong += _difference(state, *allowed)
        return wrong + scenes.strays(self.world) + self._leases()

    @staticmethod
    def _leases() -> list[str]:
        """Leases that somebody still holds although nobody is left. LVM's are another matter: `Place.busy`."""
        held = subprocess.run(["sanlock", "client", "status"], capture_output=True, text=True, check=True).stdout
        lines = [line for line in held.splitlines() if line.startswith("r ") and not line.startswith("r lvm_")]
        return [f"a lease is still held: {line}" for line in lines]


def _try_out(fixer: recovery.Mender, place: str) -> None:
    fixer.storage.remove_image(place, fixer.storage.create_virtual_disk(place, 1 << 16)["image_id"])


def _without(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {place: {name: image for name, image in state[place].items() if name not in names} for place in state}


def _plan(case: Case) -> hosts.Plan:
    return hosts.Plan(
        case.process,
        tracing.injection(case.step, case.kind),
        wound=verbs.VERBS[case.verb].wound,
        hang=verbs.VERBS[case.verb].hang,
        host_dies=case.kind in (HOST, TORN),
        deadly=case.kind in (HOST, WORKER),
    )


def _since_tools(steps: list[tracing.Step]) -> list[tracing.Step]:
    """What a process does when it has started its last tool."""
    starts = [number for number, step in enumerate(steps) if step.call in tracing.STARTING]
    return steps[starts[-1] + 1 :] if starts else []


def _kinds(process: str, step: tracing.Step) -> list[str]:
    tool, place = process.startswith("tool-"), process.rpartition("-")[0] in CALLED
    deaths = [HOST]
    if tool:
        deaths += [TOOL, WORKER]
    elif not place:
        deaths.append(WORKER)
    if step.changes:
        torn = [TORN] if step.call.startswith("pwrite") and any(slot in step.what for slot in _SLOTS) else []
        return [*deaths, *torn, *tracing.ERRNOS]
    if not step.what.startswith("sanlock"):
        return deaths
    # A worker also tells its agent how far it is, more or less often: its calls cannot be counted on to meet the head
    # of a message to sanlock, and half a message would leave both sides waiting for each other.
    return [*deaths, *([tracing.DAEMON_GONE] if place else []), "EINTR"]


def _difference(state: dict[str, Any], *allowed: dict[str, Any]) -> list[str]:
    """Where the state differs from each of the allowed ones."""
    told = []
    names = [*("before", "or")[: len(allowed) - 1], "after"]
    for name, wanted in zip(names, allowed, strict=True):
        for place in wanted:
            for image_id in sorted(state[place].keys() | wanted[place].keys()):
                found, expected = state[place].get(image_id), wanted[place].get(image_id)
                if found != expected:
                    told.append(f"  {name}: {place}/{image_id} is {found}, not {expected}")
    return told


def _quick_place() -> str | None:
    """Memory, where a sync costs nothing, if its file system knows direct I/O; else wherever temporary files go.

    What a kill leaves is in the page cache in either case.
    """
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir="/dev/shm") as made:
        os.close(os.open(made.name, os.O_RDWR | os.O_DIRECT))
        return "/dev/shm"
    return None


@contextlib.contextmanager
def ground(file_system_bytes: int | None = None, *, real_tools: bool = False) -> Iterator[Ground]:
    """Everything that the cases need; takes a few seconds to make. With a size, the repositories have a file system of
    their own. virt-sysprep is a quick stand-in unless `real_tools`."""
    with contextlib.ExitStack() as entered:
        patch = entered.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(tempfile, "tempdir", _quick_place())
        world = entered.enter_context(_world(file_system_bytes))
        sanlock_fixture.use(world.run_dir)
        directory = Path(entered.enter_context(tempfile.TemporaryDirectory(prefix="vdsm-crash-")))
        host = hosts.Host(directory, world.seen(*CALLED), real_tools=real_tools)
        for name, value in host.environment().items():
            patch.setenv(name, value)
        host.start()
        entered.callback(host.stop)
        yield Ground(world, host, directory / "scenes")


@contextlib.contextmanager
def _world(file_system_bytes: int | None) -> Iterator[worlds.World]:
    with contextlib.ExitStack() as entered:
        if file_system_bytes is None:
            yield entered.enter_context(storage_fixture.making_world(worlds.World))
        else:
            daemon = entered.enter_context(sanlock_fixture.running())
            place = entered.enter_context(loopfs.mounted(file_system_bytes))
            loopfs.unreserve(place)
            world = worlds.World(place, daemon.run_dir)
            yield world
            for repo in (world.main, world.other):  # before it is unmounted
                leases.leave(repo.lockspace())
