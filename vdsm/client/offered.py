"""The verbs that this client was made with. Made from the code by `make docs`; what is changed by hand is lost."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    Param = tuple[str, str, str, tuple[str, ...]]

# fmt: off
# {"Namespace.verb": (summary, ((dotted name, type and need, description, the few values it can have), ...))}
VERBS: dict[str, tuple[str, tuple[Param, ...]]] = {
    "Host.echo": ("Answers the message.", (
        ("message", "string, required", "any text", ()),
    )),
    "Host.getAllVmStats": ("Statistics of all VMs, as last sampled.", (
    )),
    "Host.getCapabilities": ("What this host is and can do.", (
    )),
    "Host.getHardwareInfo": ("What the firmware says of the machine; a field is null where it says nothing, and `reasons` says why.", (
    )),
    "Host.getJobs": ("Host jobs by id.", (
        ("job_type", "string or null, optional", "storage or virt; all when left out", ()),
        ("job_ids", "list of string or null, optional", "only these; all when left out", ()),
    )),
    "Host.getVMList": ("VMs of this host: their ids, or with onlyUUID=false what VM.getInfo tells of each.", (
        ("fullStatus", "boolean, default false", "accepted for upstream's clients; has no effect", ("true", "false")),
        ("vmList", "list of string, default []", "only these; all when empty", ()),
        ("onlyUUID", "boolean, default true", "ids only, otherwise what getInfo tells", ("true", "false")),
    )),
    "Host.ping2": ("Answers, and does nothing else.", (
    )),
    "Host.reconcile": ("Compares the table of VMs with libvirt now, corrects the table, and tells every difference.", (
    )),
    "Host.subscribe": ("Sends events over this connection from now on, or from after `since`.", (
        ("topics", "list of \"job\" or \"vm\" or \"image\" or \"repository\" or \"host\" or \"hook\" or null, optional", "only these; all when absent", ()),
        ("instanceId", "string or null, optional", "the instance that `since` counts in", ()),
        ("since", "integer or null, optional", "the last event already seen; from now on when absent", ()),
    )),
    "Host.unsubscribe": ("Ends the connection's subscription; false when it had none.", (
    )),
    "Job.abort": ("Asks a job to end. A pending one is aborted at once, a running one when its worker has undone its work.", (
        ("jobId", "string, required", "the job", ()),
    )),
    "Job.delete": ("Forgets an ended job.", (
        ("jobId", "string, required", "the job", ()),
    )),
    "Job.stop": ("Asks a job to end without taking away what it was making: the image stays, broken, and a fix goes on with it.", (
        ("jobId", "string, required", "the job", ()),
    )),
    "Job.wait": ("Answers when the job has ended, or with its present state when `timeout` is over.", (
        ("jobId", "string, required", "the job", ()),
        ("timeout", "number or null, optional", "seconds; without it, as long as the job takes", ()),
    )),
    "Lease.create": ("A lease and an empty record for the VM of that id. One that exists stays as it is, also while it is held.", (
        ("lease", "object, required", "A lease by name. Upstream's spelling, sd_id and lease_id, is understood too.", ()),
        ("lease.repoId", "string, required", "repository that holds it", ()),
        ("lease.leaseId", "string, required", "id of its VM or image", ()),
    )),
    "Lease.delete": ("Removes a VM's lease with its record. Refused while somebody holds it or work on the VM is open.", (
        ("lease", "object, required", "A lease by name. Upstream's spelling, sd_id and lease_id, is understood too.", ()),
        ("lease.repoId", "string, required", "repository that holds it", ()),
        ("lease.leaseId", "string, required", "id of its VM or image", ()),
    )),
    "Lease.fence": ("Takes the open work on a VM or an image away from its host, for good, and counts the generation.", (
        ("lease", "object, required", "A lease by name. Upstream's spelling, sd_id and lease_id, is understood too.", ()),
        ("lease.repoId", "string, required", "repository that holds it", ()),
        ("lease.leaseId", "string, required", "id of its VM or image", ()),
        ("generation", "integer or null, optional", "generation that the record must have", ()),
        ("jobId", "string or null, optional", "job that the open work must be", ()),
        ("force", "boolean, default false", "kill the holder if it lives, on whatever host", ("true", "false")),
    )),
    "Lease.info": ("Where the lease of a VM or an image is.", (
        ("lease", "object, required", "A lease by name. Upstream's spelling, sd_id and lease_id, is understood too.", ()),
        ("lease.repoId", "string, required", "repository that holds it", ()),
        ("lease.leaseId", "string, required", "id of its VM or image", ()),
    )),
    "Lease.status": ("Who has the lease of a VM or an image, and the fate of its last work, or of a job.", (
        ("lease", "object, required", "A lease by name. Upstream's spelling, sd_id and lease_id, is understood too.", ()),
        ("lease.repoId", "string, required", "repository that holds it", ()),
        ("lease.leaseId", "string, required", "id of its VM or image", ()),
        ("jobId", "string or null, optional", "job whose fate is asked for; the last one when left out", ()),
    )),
    "Storage.checkStorageRepository": ("Reads a whole repository and lists what could be better. Changes nothing, and leaves out what is being done.", (
        ("repositoryId", "string, required", "the repository", ()),
        ("options", "object, optional", "Options of checkStorageRepository.", ()),
        ("options.takeover", "boolean, default false", "count what waits in another host's queue as nobody's", ("true", "false")),
    )),
    "Storage.connectStorageRepository": ("Connects a repository under a handle of the caller's choice, and answers at once.", (
        ("repoId", "string, required", "handle for this connection, not persisted", ()),
        ("repoFormat", "string, required", "localfs-1.0", ()),
        ("connectionParameters", "object, optional", "what the format needs; localfs-1.0: path", ()),
    )),
    "Storage.copyImage": ("Copies an image, with all that lies below it, into a new image, as a job. A snapshot keeps its id.", (
        ("targetRepoId", "string, required", "repository in which the image is made", ()),
        ("imageId", "string, required", "image to copy, looked for in all connected repositories", ()),
        ("baseImageId", "string or null, optional", "image of the target repository; only the difference to it is stored", ()),
        ("userData", "object, optional", "the caller's own, stored and returned untouched", ()),
        ("options", "object, optional", "Options that the verbs of images share.", ()),
        ("options.imageId", "string or null, optional", "id of the new image; made up when left out", ()),
        ("options.jobId", "string or null, optional", "id of the job; made up when left out", ()),
        ("options.generation", "integer or null, optional", "generation that the changed image must have", ()),
        ("options.strategy", "\"space\" or \"performance\", default \"space\"", "what to prefer", ("space", "performance")),
        ("options.participatingRepositories", "list of string or null, optional", "look for images only here", ()),
        ("options.imageHints", "object of string, optional", "{image id: the one repository to look in}", ()),
        ("options.AutoFix", "boolean, default true", "false: only note it; a fix does the work", ("true", "false")),
    )),
    "Storage.createSnapshot": ("An immutable image of what the disk holds now. The disk must not be in use. Complete at return.", (
        ("targetRepoId", "string, required", "repository of the disk; the snapshot is made there", ()),
        ("baseVirtualDiskId", "string, required", "the disk", ()),
        ("userData", "object, optional", "the caller's own, stored and returned untouched", ()),
        ("options", "object, optional", "Options that the verbs of images share.", ()),
        ("options.imageId", "string or null, optional", "id of the new image; made up when left out", ()),
        ("options.jobId", "string or null, optional", "id of the job; made up when left out", ()),
        ("options.generation", "integer or null, optional", "generation that the changed image must have", ()),
        ("options.strategy", "\"space\" or \"performance\", default \"space\"", "what to prefer", ("space", "performance")),
        ("options.participatingRepositories", "list of string or null, optional", "look for images only here", ()),
        ("options.imageHints", "object of string, optional", "{image id: the one repository to look in}", ()),
        ("options.AutoFix", "boolean, default true", "false: only note it; a fix does the work", ("true", "false")),
    )),
    "Storage.createVirtualDisk": ("A new disk: empty, or starting with what a snapshot holds. Complete at return.", (
        ("targetRepoId", "string, required", "repository in which the image is made", ()),
        ("size", "integer, required", "bytes; 0 with a base means the base's size", ()),
        ("baseSnapshotId", "string or null, optional", "snapshot whose content the disk starts with", ()),
        ("userData", "object, optional", "the caller's own, stored and returned untouched", ()),
        ("options", "object, optional", "Options that the verbs of images share.", ()),
        ("options.imageId", "string or null, optional", "id of the new image; made up when left out", ()),
        ("options.jobId", "string or null, optional", "id of the job; made up when left out", ()),
        ("options.generation", "integer or null, optional", "generation that the changed image must have", ()),
        ("options.strategy", "\"space\" or \"performance\", default \"space\"", "what to prefer", ("space", "performance")),
        ("options.participatingRepositories", "list of string or null, optional", "look for images only here", ()),
        ("options.imageHints", "object of string, optional", "{image id: the one repository to look in}", ()),
        ("options.AutoFix", "boolean, default true", "false: only note it; a fix does the work", ("true", "false")),
    )),
    "Storage.disconnectStorageRepository": ("Forgets the handle, after the host has left the lockspace. Refused while jobs or VMs use the repository.", (
        ("repoId", "string, required", "as given to connectStorageRepository", ()),
    )),
    "Storage.exportImage": ("Writes what an image shows into a file of this host, as a job. The image must not be in use.", (
        ("repositoryId", "string, required", "repository that holds the image", ()),
        ("imageId", "string, required", "the image", ()),
        ("path", "string, required", "file to be made on this host, under a configured directory", ()),
        ("format", "\"raw\" or \"qcow2\", required", "the file's format; raw files are sparse", ("raw", "qcow2")),
        ("options", "object, optional", "Options of an export.", ()),
        ("options.jobId", "string or null, optional", "id of the job; made up when left out", ()),
        ("options.generation", "integer or null, optional", "generation that the image must have", ()),
        ("options.overwrite", "boolean, default false", "replace a plain file that is there", ("true", "false")),
    )),
    "Storage.fixStorageRepository": ("Starts the job of a fix that a check has listed, on this host or another. It may be sent again at any time:", (
        ("repositoryId", "string, required", "the repository that was checked, on whichever host", ()),
        ("fix", "object, required", "as checkStorageRepository answered it", ()),
        ("fix.type", "\"clean\" or \"optimize\" or \"merge\" or \"mend\", required", "what kind of work it is", ("clean", "optimize", "merge", "mend")),
        ("fix.imageId", "string or null, optional", "the image; of a merge, the deleted one", ()),
        ("fix.vmId", "string or null, optional", "the VM, when it is about a VM's record", ()),
        ("fix.description", "string, default \"\"", "what is going to be done, for people", ()),
        ("fix.bytes", "integer or null, optional", "space that it frees; null: not known", ()),
        ("fix.data", "object, required", "opaque: to be sent back as it came", ()),
        ("options", "object, optional", "Options of fixStorageRepository.", ()),
        ("options.takeover", "boolean, default false", "count what waits in another host's queue as nobody's", ("true", "false")),
        ("options.jobId", "string or null, optional", "id of the job; made up when left out", ()),
    )),
    "Storage.formatStorageRepository": ("Makes an empty repository. An existing one, and anything else that is there, is never overwritten.", (
        ("repoFormat", "string, required", "localfs-1.0", ()),
        ("connectionParameters", "object, required", "what the format needs; localfs-1.0: path", ()),
        ("options", "object, optional", "Options of a new repository.", ()),
        ("options.ioTimeout", "integer, default 10", "sanlock's, seconds; a lost host is dead after 8 and a minute", ()),
    )),
    "Storage.getImage": ("What an image is.", (
        ("repositoryId", "string, required", "repository that holds the image", ()),
        ("imageId", "string, required", "the image", ()),
    )),
    "Storage.getImageStatus": ("How an image is and what became of the work on it, from storage: any host may ask, at any time.", (
        ("repositoryId", "string, required", "repository that holds the image", ()),
        ("imageId", "string, required", "the image", ()),
        ("jobId", "string or null, optional", "job whose fate is asked for; the last one when left out", ()),
    )),
    "Storage.importImage": ("Copies a file of this host into a new disk, as a job. Its header is checked before any tool sees it.", (
        ("targetRepoId", "string, required", "repository in which the image is made", ()),
        ("path", "string, required", "file on this host, under a configured directory", ()),
        ("format", "\"raw\" or \"qcow2\", required", "the file's format; never guessed", ("raw", "qcow2")),
        ("userData", "object, optional", "the caller's own, stored and returned untouched", ()),
        ("options", "object, optional", "Options that the verbs of images share.", ()),
        ("options.imageId", "string or null, optional", "id of the new image; made up when left out", ()),
        ("options.jobId", "string or null, optional", "id of the job; made up when left out", ()),
        ("options.generation", "integer or null, optional", "generation that the changed image must have", ()),
        ("options.strategy", "\"space\" or \"performance\", default \"space\"", "what to prefer", ("space", "performance")),
        ("options.participatingRepositories", "list of string or null, optional", "look for images only here", ()),
        ("options.imageHints", "object of string, optional", "{image id: the one repository to look in}", ()),
        ("options.AutoFix", "boolean, default true", "false: only note it; a fix does the work", ("true", "false")),
    )),
    "Storage.listImages": ("All images of a repository that are not deleted.", (
        ("repositoryId", "string, required", "the repository", ()),
    )),
    "Storage.listStorageRepositories": ("What is connected. One whose storage hangs is listed without its space.", (
    )),
    "Storage.removeImage": ("Removes an image: its id is gone when this answers. Data that other images are based on stays with them.", (
        ("repositoryId", "string, required", "repository that holds the image", ()),
        ("imageId", "string, required", "the image", ()),
        ("options", "object, optional", "Options that the verbs of images share.", ()),
        ("options.imageId", "string or null, optional", "id of the new image; made up when left out", ()),
        ("options.jobId", "string or null, optional", "id of the job; made up when left out", ()),
        ("options.generation", "integer or null, optional", "generation that the changed image must have", ()),
        ("options.strategy", "\"space\" or \"performance\", default \"space\"", "what to prefer", ("space", "performance")),
        ("options.participatingRepositories", "list of string or null, optional", "look for images only here", ()),
        ("options.imageHints", "object of string, optional", "{image id: the one repository to look in}", ()),
        ("options.AutoFix", "boolean, default true", "false: only note it; a fix does the work", ("true", "false")),
    )),
    "Storage.resizeVirtualDisk": ("Grows a disk that nobody uses; it has its new size when this answers. Disks never shrink.", (
        ("repositoryId", "string, required", "repository that holds the image", ()),
        ("imageId", "string, required", "the image", ()),
        ("size", "integer, required", "bytes, rounded up to 4096; not less than now", ()),
        ("options", "object, optional", "Options that the verbs of images share.", ()),
        ("options.imageId", "string or null, optional", "id of the new image; made up when left out", ()),
        ("options.jobId", "string or null, optional", "id of the job; made up when left out", ()),
        ("options.generation", "integer or null, optional", "generation that the changed image must have", ()),
        ("options.strategy", "\"space\" or \"performance\", default \"space\"", "what to prefer", ("space", "performance")),
        ("options.participatingRepositories", "list of string or null, optional", "look for images only here", ()),
        ("options.imageHints", "object of string, optional", "{image id: the one repository to look in}", ()),
        ("options.AutoFix", "boolean, default true", "false: only note it; a fix does the work", ("true", "false")),
    )),
    "Storage.setImageUserData": ("Replaces an image's user data. Allowed while a VM runs on it.", (
        ("repositoryId", "string, required", "repository that holds the image", ()),
        ("imageId", "string, required", "the image", ()),
        ("userData", "object, required", "the caller's own, stored and returned untouched", ()),
    )),
    "VM.cont": ("Lets a paused guest go on, if it still holds all its leases.", (
        ("vmID", "string, required", "the VM", ()),
    )),
    "VM.create": ("Reserves the id and answers WaitForLaunch; the start goes on behind the answer.", (
        ("vmParams", "object, required", "What a VM shall be.", ()),
        ("vmParams.vmId", "string, required", "UUID, chosen by the caller", ()),
        ("vmParams.name", "string, default \"\"", "the vmId when left out", ()),
        ("vmParams.memory", "integer, default 1024", "MiB", ()),
        ("vmParams.vcpus", "integer, default 1", "virtual processors, 1 to 255", ()),
        ("vmParams.machine", "\"q35\" or \"pc\", default \"q35\"", "QEMU's machine type", ("q35", "pc")),
        ("vmParams.firmware", "\"bios\" or \"uefi\", default \"bios\"", "what boots the guest", ("bios", "uefi")),
        ("vmParams.bootOrder", "list of \"disk\" or \"network\", default [\"disk\"]", "kinds of devices to boot from, tried one after the other", ("disk", "network")),
        ("vmParams.directKernel", "object or null, optional", "boot this kernel instead of a boot loader", ()),
        ("vmParams.directKernel.kernel", "string, required", "file on this host, under a configured directory", ()),
        ("vmParams.directKernel.initrd", "string or null, optional", "likewise", ()),
        ("vmParams.directKernel.cmdline", "string, default \"\"", "the kernel's command line", ()),
        ("vmParams.disks", "list of object, default []", "its disks, in the guest's order", ()),
        ("vmParams.disks[].imageId", "string, required", "the image", ()),
        ("vmParams.disks[].repoId", "string or null, optional", "where to look; all connected repositories when left out", ()),
        ("vmParams.disks[].bus", "\"virtio\" or \"sata\" or \"scsi\", default \"virtio\"", "what the guest sees it on", ("virtio", "sata", "scsi")),
        ("vmParams.disks[].readOnly", "boolean, default false", "the guest cannot write to it; not on sata", ("true", "false")),
        ("vmParams.disks[].serial", "string or null, optional", "the image's id when left out", ()),
        ("vmParams.disks[].bootOrder", "integer or null, optional", "rank among the VM's disks, from 1", ()),
        ("vmParams.nics", "list of object, default []", "its network cards", ()),
        ("vmParams.nics[].type", "\"user\", default \"user\"", "user: the guest reaches out, nobody reaches in", ("user",)),
        ("vmParams.nics[].model", "\"virtio\" or \"e1000\", default \"virtio\"", "what the guest sees", ("virtio", "e1000")),
        ("vmParams.nics[].mac", "string or null, optional", "unicast MAC address; chosen by libvirt when left out", ()),
        ("vmParams.consoleLog", "boolean, default true", "keep what the guest writes to its serial console", ("true", "false")),
        ("vmParams.vnc", "object or null, optional", "a console over VNC; none when left out", ()),
        ("vmParams.vnc.listen", "\"127.0.0.1\", default \"127.0.0.1\"", "this host only", ("127.0.0.1",)),
        ("vmParams.vnc.password", "string or null, optional", "1 to 8 characters; told to nobody", ()),
        ("vmParams.agentChannel", "boolean, default true", "channel of the QEMU guest agent", ("true", "false")),
        ("vmParams.customProperties", "object of string, optional", "handed to hook scripts", ()),
        ("vmParams.leaseRepoId", "string or null, optional", "repository of the VM's lease and record; that of the first disk when left out", ()),
        ("vmParams.onLeaseLost", "\"kill\", default \"kill\"", "what happens when its leases are lost", ("kill",)),
    )),
    "VM.destroy": ("Ends the VM at once, and forgets it. Its leases are free when this answers.", (
        ("vmID", "string, required", "the VM", ()),
    )),
    "VM.getInfo": ("All that is known of the VM.", (
        ("vmID", "string, required", "the VM", ()),
    )),
    "VM.getStats": ("The VM's statistics, as last sampled: a list of one, as upstream's clients expect.", (
        ("vmID", "string, required", "the VM", ()),
    )),
    "VM.makeTemplate": ("Snapshots, sysprepped, of copies of all disks of a VM that does not run: one job, one abort.", (
        ("vmID", "string, required", "the VM", ()),
        ("targetRepoId", "string or null, optional", "where it is made; the VM's repository if not given", ()),
        ("leaseRepoId", "string or null, optional", "repository of the VM's record; looked for if not given", ()),
        ("userData", "object, optional", "stored with each image of the template", ()),
        ("options", "object, optional", "Options of makeTemplate.", ()),
        ("options.jobId", "string or null, optional", "id of the job; made up when left out", ()),
        ("options.generation", "integer or null, optional", "generation that the VM's record must have", ()),
        ("options.imageIds", "object of string, optional", "{disk: id of its template}; made up if not given", ()),
        ("options.strategy", "\"space\" or \"performance\", default \"space\"", "what to prefer", ("space", "performance")),
    )),
    "VM.pause": ("Stops the guest's CPUs. It keeps its memory and its leases.", (
        ("vmID", "string, required", "the VM", ()),
    )),
    "VM.reset": ("Presses the reset button.", (
        ("vmID", "string, required", "the VM", ()),
    )),
    "VM.shutdown": ("Asks the guest to end: its agent first, then ACPI, each for `timeout`. Answers at once.", (
        ("vmID", "string, required", "the VM", ()),
        ("delay", "integer, default 0", "seconds before the guest is asked", ()),
        ("message", "string, default \"\"", "reason, for the log and the event", ()),
        ("reboot", "boolean, default false", "reboot instead of power off", ("true", "false")),
        ("timeout", "number, default 30", "seconds for each way of asking", ()),
        ("force", "boolean, default false", "destroy it when it does not obey in time", ("true", "false")),
    )),
    "VM.sysprep": ("Removes what makes a guest unique (host keys, machine id, logs, ...) from all its disks, as one job.", (
        ("vmID", "string, required", "the VM", ()),
        ("leaseRepoId", "string or null, optional", "repository of the VM's record; looked for if not given", ()),
        ("options", "object, optional", "Options of the jobs of VMs.", ()),
        ("options.jobId", "string or null, optional", "id of the job; made up when left out", ()),
        ("options.generation", "integer or null, optional", "generation that the VM's record must have", ()),
    )),
    "rpc.discover": ("The OpenRPC document of this agent.", (
    )),
}
TOPICS = ("job", "vm", "image", "repository", "host", "hook")
