"""Every failure the agent can name, one class each.

    VdsmError
      +- BadRequest        the caller must change the call
      +- Missing           the thing is not there
      +- Conflict          somebody else has it, or its state does not allow it
      +- Unavailable       not now; the same call may succeed later
      +- Broken            the thing itself is damaged
      +- Failed            the work was tried and went wrong

The branch says what the caller can do; the class says what happened. A class has a stable `code` (upstream VDSM's
number where the meaning is upstream's, otherwise ours from 10000; never reused), a stable `key`, a `message` template
over its facts, and a `hint`, a template too: the next thing to do. `state` says what condition the thing is in now.

Errors cross process borders as the dictionary of `to_wire`, and come back as the same class by `from_wire`.
"""

import re
from typing import Any, ClassVar, Self


class VdsmError(Exception):
    """A named failure. Facts are given as keywords in snake_case; values must be JSON."""

    code: ClassVar[int] = 100
    key: ClassVar[str] = "failed"
    message: ClassVar[str] = "The operation failed"
    hint: ClassVar[str] = "See the agent's log for the request's id."

    by_key: ClassVar[dict[str, type["VdsmError"]]] = {}

    def __init__(self, *, state: str | None = None, **facts: Any) -> None:
        self.state = state
        self.facts = facts
        super().__init__(self.message.format_map(_Facts(facts)))

    def __init_subclass__(cls) -> None:
        if "code" not in cls.__dict__:
            return  # a branch of the tree, not an error of its own
        taken = {known.code for known in cls.by_key.values()} | {VdsmError.code}
        if cls.key in cls.by_key or cls.code in taken:
            raise TypeError(f"error {cls.__name__} reuses code {cls.code} or key {cls.key}")
        cls.by_key[cls.key] = cls

    def to_wire(self) -> dict[str, Any]:
        """The JSON-RPC error object: {code, message, data: {key, facts, state, hint}}."""
        facts = {_camel(name): value for name, value in self.facts.items()}
        hint = self.hint.format_map(_Facts(self.facts))
        data = {"key": self.key, "facts": facts, "state": self.state, "hint": hint}
        return {"code": self.code, "message": str(self), "data": data}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> "VdsmError":
        """The error that `to_wire` described; an unknown key gives a plain `VdsmError` with the same words."""
        data = wire.get("data") or {}
        facts = {_snake(name): value for name, value in (data.get("facts") or {}).items()}
        kind = cls.by_key.get(data.get("key", ""))
        if kind is None:
            return Unexpected(reason=wire.get("message", "unknown"))
        return kind(state=data.get("state"), **facts)

    @classmethod
    def branch(cls) -> type["VdsmError"]:
        """The branch of the tree, whose docstring tells what the caller can do."""
        return next(kind for kind in reversed(cls.__mro__) if VdsmError in kind.__mro__[1:])

    @classmethod
    def fact_names(cls) -> tuple[str, ...]:
        """The facts that the message and the hint speak of, as the wire spells them."""
        names = _Names()
        cls.message.format_map(names), cls.hint.format_map(names)
        return tuple(names)

    @classmethod
    def templates(cls) -> tuple[str, str]:
        """The message and the hint, with the facts in braces as the wire spells them."""
        return cls.message.format_map(_Names()), cls.hint.format_map(_Names())

    def with_state(self, state: str) -> Self:
        """The same error, with the state the thing is in now."""
        self.state = state
        return self


class _Facts(dict[str, Any]):
    """A template may name a fact that a caller left out: say so instead of failing inside an error."""

    def __missing__(self, name: str) -> str:
        return "?"


class _Names(dict[str, str]):
    """Gives every fact that a template names as `{factOnTheWire}`; its keys are the names that were asked for."""

    def __missing__(self, name: str) -> str:
        wire_name = _camel(name)
        self[wire_name] = "{" + wire_name + "}"
        return self[wire_name]


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(part.capitalize() for part in tail)


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda found: "_" + found[0].lower(), name)


class BadRequest(VdsmError):
    """The caller must change the call."""


class Missing(VdsmError):
    """The thing is not there."""


class Conflict(VdsmError):
    """Somebody else has it, or its state does not allow the call."""


class Unavailable(VdsmError):
    """Not now: the same call may succeed later."""


class Broken(VdsmError):
    """The thing itself is damaged."""


class Failed(VdsmError):
    """The work was tried and went wrong."""


# -- the call itself -------------------------------------------------------------------------------------------------


class InvalidParameters(BadRequest):
    code, key = -32602, "invalid_parameters"
    message = "Parameter {parameter}: {reason}"
    hint = "Compare the call with the verb's entry in the reference."


class UnknownMethod(BadRequest):
    code, key = -32601, "unknown_method"
    message = "There is no method {method}"
    hint = "Namespaces and verbs are listed by `vdsm-client --help`."


class Forbidden(BadRequest):
    code, key = 10000, "forbidden"
    message = "{verb} needs the role {role}; this connection has {has}"
    hint = "Call it over a connection with that role."


class Unexpected(Failed):
    code, key = -32603, "internal_error"
    message = "Unexpected failure: {reason}"
    hint = "The agent's log has the details under the request's id."


class DeadlinePassed(Unavailable):
    code, key = 10001, "deadline_passed"
    message = "{what} did not end within {seconds} s"
    hint = "The work may still go on. Look at the state before trying again."


class Overloaded(Unavailable):
    code, key = 1100, "resource_exhausted"
    message = "Too many {what}: the limit of {limit} is reached"
    hint = "Try again when some have ended."


class HelperUnavailable(Unavailable):
    code, key = 10002, "helper_unavailable"
    message = "The root helper does not answer: {reason}"
    hint = "Check that supervdsmd runs."


class HelperFailed(Failed):
    code, key = 10003, "helper_failed"
    message = "The root helper refused or failed {call}: {reason}"
    hint = "The helper's audit log has a line for this call."


class ParseError(BadRequest):
    code, key = -32700, "parse_error"
    message = "This is not JSON that the agent reads: {reason}"
    hint = "Send one JSON value in UTF-8, without NaN, lone surrogates or deep nesting."


class InvalidRequest(BadRequest):
    code, key = -32600, "invalid_request"
    message = "This is not a JSON-RPC 2.0 request: {reason}"
    hint = 'A request is an object with "jsonrpc": "2.0", "method", "params" and "id", or an array of such.'


class NoEventsHere(BadRequest):
    code, key = 10004, "no_events_here"
    message = "Events do not arrive over {transport}"
    hint = "Subscribe over the Unix socket or a WebSocket."


class Stopping(Unavailable):
    code, key = 10005, "stopping"
    message = "The agent is stopping"
    hint = "Call again when it is back. Jobs and VMs go on as their records say."


# -- jobs ------------------------------------------------------------------------------------------------------------


class NoSuchJob(Missing):
    code, key = 66, "no_such_job"
    message = "There is no job {job_id}"
    hint = "Jobs end with their host's agent; the record of the image or VM tells how the work ended."


class JobNotDone(Conflict):
    code, key = 68, "job_not_done"
    message = "Job {job_id} is {status}"
    hint = "Abort it first, or wait until it has ended."


class JobExists(Conflict):
    code, key = 69, "job_exists"
    message = "Job {job_id} exists and is another request"
    hint = "Choose a fresh jobId for a new request."


class JobNotActive(Conflict):
    code, key = 84, "job_not_active"
    message = "Job {job_id} has ended: {status}"
    hint = "There is nothing to abort."


class Aborted(Failed):
    code, key = 443, "aborted"
    message = "The job was aborted"
    hint = "Nothing of it is left."


class Stopped(Failed):
    code, key = 10013, "stopped"
    message = "The job was stopped by its caller"
    hint = "checkStorageRepository lists the fix that goes on with it; removeImage takes away what it was making."


class Superseded(Conflict):
    code, key = 10010, "superseded"
    message = "The record of {entity} names other work: {work}"
    hint = "Somebody took the work over. Read the record for who and when."


class GenerationMismatch(Conflict):
    code, key = 911, "generation_mismatch"
    message = "{entity} has generation {actual}; the request expects {expected}"
    hint = "Read the status, decide again, and send the generation found."


class WorkerDied(Failed):
    code, key = 10011, "worker_died"
    message = "The job's worker process ended unexpectedly ({how})"
    hint = "The record of the image or VM says how far it got."


class ToolFailed(Failed):
    code, key = 10012, "tool_failed"
    message = "{program} failed with exit code {exit_code}: {reason}"
    hint = "The last lines of its output are in the facts."


# -- leases ----------------------------------------------------------------------------------------------------------


class LeaseHeld(Conflict):
    code, key = 651, "lease_held"
    message = "{resource} is in use by {holder}"
    hint = "Wait for the holder to end, or end it."


class LeaseFailed(Failed):
    code, key = 10020, "lease_failed"
    message = "sanlock refused {call} on {resource}: {reason} ({errno})"
    hint = "See sanlock's log."


class LeaseNotReady(Unavailable):
    code, key = 10021, "lease_not_ready"
    message = "Repository {repo_id} is still joining its lockspace: {reason}, about {seconds_left} s left"
    hint = "Reads work now; try the write again, or wait for the repository's event."


class LeaseDaemonDown(Unavailable):
    code, key = 10022, "lease_daemon_down"
    message = "sanlock does not answer: {reason}"
    hint = "Check that sanlock runs."


class NoSuchLease(Missing):
    code, key = 10023, "no_such_lease"
    message = "There is no lease {lease_id} in {repo_id}"
    hint = "Lease.create makes a VM's; an image has one as long as it exists."


class OwnerUndecided(Unavailable):
    code, key = 10024, "owner_undecided"
    message = "{resource} belongs to host {host_id}, which is {host_state}: it may live and write"
    hint = "Try again: at most {seconds} s after it was last seen, host {host_id} is declared dead, or is back."


class WorkCommitted(Conflict):
    code, key = 10025, "work_committed"
    message = "The work of job {job_id} on {entity} is past its commit point: it can only be finished"
    hint = "Any host can finish it; checkStorageRepository lists how."


class HostIdTaken(Conflict):
    code, key = 661, "host_id_taken"
    message = "Host id {host_id} is used by {holder} in this repository"
    hint = "Give each host an id of its own (host.id)."


# -- records and repositories ----------------------------------------------------------------------------------------


class NoRecord(Missing):
    code, key = 10030, "no_record"
    message = "{path} holds no valid record: {reason}"
    hint = "A check of the repository lists what to do."


class RecordChanged(Conflict):
    code, key = 10031, "record_changed"
    message = "The record of {entity} changed under the writer"
    hint = "Read it again and decide again."


class RecordNotOwned(Broken):
    code, key = 10063, "record_not_owned"
    message = "The record of {entity} says that it was written by {writer}; its lease says {owner}"
    hint = (
        "Nothing was changed, and it can be read. Find out who wrote it and whether what it says is right; "
        "Lease.fence with force then accepts it."
    )


class NoSuchRepository(Missing):
    code, key = 358, "no_such_repository"
    message = "No repository is connected as {repo_id}"
    hint = "Connect it first; listStorageRepositories shows what is connected."


class RepositoryExists(Conflict):
    code, key = 10032, "repository_exists"
    message = "{repo_id} is connected already, to {place}"
    hint = "Choose another repoId, or disconnect that one."


class RepositoryInUse(Conflict):
    code, key = 10033, "repository_in_use"
    message = "Repository {repo_id} is in use by {users}"
    hint = "End them first."


class NotARepository(Missing):
    code, key = 10034, "not_a_repository"
    message = "{place} holds no {repo_format} repository: {reason}"
    hint = "Format it first."


class NotEmpty(Conflict):
    code, key = 10035, "not_empty"
    message = "{place} is not empty: {reason}"
    hint = "Formatting takes an empty place only; nothing was changed."


class UnknownFormat(BadRequest):
    code, key = 10036, "unknown_format"
    message = "Unknown repository format {repo_format}"
    hint = "Known formats: {known}."


class RepositoryFull(Failed):
    code, key = 10037, "repository_full"
    message = "Repository {repo_id} has no space left"
    hint = "Remove images, or add space."


class RepositoryStuck(Unavailable):
    code, key = 10038, "repository_stuck"
    message = "Repository {repo_id} does not answer ({seconds} s)"
    hint = "Its storage hangs. Other repositories are not affected."


class PathNotAllowed(BadRequest):
    code, key = 10039, "path_not_allowed"
    message = "{path} is not under a configured directory"
    hint = "Allowed: {allowed}. See storage.* in the configuration."


class StorageFailed(Failed):
    code, key = 10060, "storage_failed"
    message = "The storage of repository {repo_id} failed: {reason}"
    hint = "See the kernel's log. The repository's other images may be well."


class NoWatchdog(Conflict):
    code, key = 10080, "no_watchdog"
    message = "{repo_format} is for several hosts, and sanlock runs without a watchdog on this one"
    hint = (
        "Start wdmd, and sanlock with its watchdog: without it a writer may outlive its lease. "
        "sanlock.unsafe_no_watchdog lets it pass, for tests."
    )


class ServerUnreachable(Unavailable):
    code, key = 10081, "server_unreachable"
    message = "{server} does not serve {export}: {reason}"
    hint = "Is the server up, does its firewall let this host in, is its name right? Then connect again."


class NoSuchExport(Missing):
    code, key = 10082, "no_such_export"
    message = "{server} has no export {export} in NFS {version}: {reason}"
    hint = (
        "showmount -e shows what a server exports, rpcinfo -p in which versions. Paths may differ between versions 3 "
        "and 4; a server that has just been stopped says the same of version 3."
    )


class StorageDenied(Conflict):
    code, key = 10083, "storage_denied"
    message = "{place} lets this host not in: {reason}"
    hint = (
        "The server must export it to this host, for writing, and its directory belong to the agent's user and QEMU's "
        "group (by number) with mode 2770; root may be squashed."
    )


class StorageStale(Unavailable):
    code, key = 10084, "storage_stale"
    message = "What repository {repo_id} is on has been made anew on its server: the old handles lead nowhere"
    hint = "Connect it again: it is mounted anew then. Jobs and VMs that had files open there have lost them."


class UnsafeMount(Conflict):
    code, key = 10085, "unsafe_mount"
    message = "{place} is not safe for leases: {reason}"
    hint = "docs/operations.md tells how io_timeout, the version of NFS and the server's lease time go together."


# -- disks and targets -----------------------------------------------------------------------------------------------


class TargetsUnknown(Failed):
    code, key = 475, "targets_unknown"
    message = "Portal {portal} does not tell its targets: {reason}"
    hint = "Check address and port, and whether the target serves this host."


class LoginFailed(Failed):
    code, key = 464, "login_failed"
    message = "No login to {target} at {portal}: {reason}"
    hint = "Nothing is left of the try. discoverSendTargets tells what the portal offers to this host."


class LoginRefused(BadRequest):
    code, key = 476, "login_refused"
    message = "{portal} refuses this host or its user and password: {reason}"
    hint = "Compare user and password with the target's, and its list of initiators with this host's name."


class LogoutFailed(Failed):
    code, key = 474, "logout_failed"
    message = "No logout from {target} at {portal}: {reason}"
    hint = "Its session may be there still: ISCSIConnection.getSessions tells."


class DiskInUse(Conflict):
    code, key = 10090, "disk_in_use"
    message = "{device} is in use: {users}"
    hint = "Disconnect the repository on it, or unmount it, first."


# -- images ----------------------------------------------------------------------------------------------------------


class NoSuchImage(Missing):
    code, key = 201, "no_such_image"
    message = "No image {image_id} in {where}"
    hint = "listImages shows what a repository holds."


class ImageExists(Conflict):
    code, key = 10040, "image_exists"
    message = "Image {image_id} exists in {repo_id} and is another request's"
    hint = "Choose a fresh imageId for a new request."


class IdTaken(Conflict):
    code, key = 10061, "id_taken"
    message = "{id} is the id of {owner} in {repo_id}"
    hint = "Leases of VMs and images are known by their ids. Choose a fresh one."


class ImageNotUsable(Conflict):
    code, key = 227, "image_not_usable"
    message = "Image {image_id} is {status}"
    hint = "getImageStatus tells what happened to it and what to do."


class ImageInUse(Conflict):
    code, key = 10041, "image_in_use"
    message = "Image {image_id} is in use by {holder}"
    hint = "Wait for the holder to end, or end it."


class ImageBusy(Conflict):
    code, key = 10042, "image_busy"
    message = "Image {image_id} is being changed by job {job_id} ({state}, host {host_id})"
    hint = "Wait for the job, or abort it."


class WrongKind(BadRequest):
    code, key = 10043, "wrong_kind"
    message = "Image {image_id} is a {kind}; this needs a {needed}"
    hint = "Virtual disks are mutable, snapshots are not."


class BadImageFile(Broken):
    code, key = 10044, "bad_image_file"
    message = "{path} is refused: {reason}"
    hint = "Convert it on the host that made it to a plain qcow2 or raw file without references to other files."


class BadFix(BadRequest):
    code, key = 10048, "bad_fix"
    message = "This is no fix that a check of the repository has answered: {reason}"
    hint = "Check the repository, and send a fix back as it came."


class FixOutdated(Conflict):
    code, key = 10049, "fix_outdated"
    message = "{fix} of {entity} is outdated: {reason}"
    hint = "Check the repository again."


class CannotMend(Conflict):
    code, key = 10062, "cannot_mend"
    message = "Image {image_id} cannot be finished: {reason}"
    hint = "removeImage takes it away, which harms no other image."


class HostFileExists(Conflict):
    code, key = 10070, "host_file_exists"
    message = "{path} exists on this host"
    hint = "Choose another path; options.overwrite replaces a plain file."


class HostFileFailed(Failed):
    code, key = 10071, "host_file_failed"
    message = "{path} cannot be made: {reason}"
    hint = "Look at the directory: the agent's user must be able to write there, and the file must fit."


# -- virtual machines ------------------------------------------------------------------------------------------------


class NoSuchVm(Missing):
    code, key = 1, "no_such_vm"
    message = "There is no VM {vm_id} on this host"
    hint = "Host.getVMList shows what runs here."


class VmExists(Conflict):
    code, key = 4, "vm_exists"
    message = "VM {vm_id} exists on this host ({status})"
    hint = "Destroy it first, or choose another vmId."


class VmCreateFailed(Failed):
    code, key = 9, "vm_create_failed"
    message = "VM {vm_id} could not be started: {reason}"
    hint = "Nothing of it is left running."


class VmWrongState(Conflict):
    code, key = 10050, "vm_wrong_state"
    message = "VM {vm_id} is {status}; {verb} needs {needed}"
    hint = "Look at its state and try again."


class VmLeaseMismatch(Conflict):
    code, key = 10051, "vm_lease_mismatch"
    message = "VM {vm_id} does not hold its leases: missing {missing}"
    hint = "It stays paused. Destroy it, or free the leases and continue it."


class VmRuns(Conflict):
    code, key = 10052, "vm_runs"
    message = "VM {vm_id} is in use by {holder}"
    hint = "Shut it down first."


class GuestAgentSilent(Unavailable):
    code, key = 19, "guest_agent_silent"
    message = "The guest agent of VM {vm_id} does not answer"
    hint = "Install qemu-guest-agent in the guest, or use ACPI."


class HypervisorUnavailable(Unavailable):
    code, key = 40, "hypervisor_unavailable"
    message = "libvirt does not answer: {reason}"
    hint = "Check that libvirtd runs. VMs run on without it."


class HypervisorFailed(Failed):
    code, key = 10053, "hypervisor_failed"
    message = "libvirt refused {call}: {reason}"
    hint = "See libvirt's log."


class ForeignVm(Conflict):
    code, key = 10054, "foreign_vm"
    message = "Domain {name} ({vm_id}) was not started by this agent"
    hint = "It is shown and never touched. Use the tool that started it."


# -- hooks -----------------------------------------------------------------------------------------------------------


class HookFailed(Failed):
    code, key = 1500, "hook_failed"
    message = "Hook script {script} of {point} failed: {reason}"
    hint = "Mend the script or take its executable bit away; the facts have the end of what it said."
