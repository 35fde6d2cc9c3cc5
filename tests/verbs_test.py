"""Every verb of the agent through every transport, against real storage and real QEMU (guests without guest code)."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests import conftest
from vdsm import ids, standalone
from vdsm.client import failures, transport


@pytest.fixture(params=["unix", "http", "websocket"])
def client(request: pytest.FixtureRequest, stack: standalone.Stack) -> Iterator[transport.Client]:
    addresses = {
        "unix": str(stack.socket_path),
        "http": f"http://127.0.0.1:{stack.tcp_port}",
        "websocket": f"ws://127.0.0.1:{stack.tcp_port}",
    }
    with transport.connect(addresses[request.param]) as connected:
        yield connected


def refusal(client: transport.Client, verb: str, params: dict[str, Any]) -> dict[str, Any]:
    """The key, facts, state and hint of the error that the verb answers."""
    with pytest.raises(failures.ClientError) as caught:
        client.call(verb, params)
    return dict(caught.value.data)


# -- the host ----------------------------------------------------------------------------------------------------------


def test_host_answers(client: transport.Client) -> None:
    assert client.call("Host.ping2") is None
    assert client.call("Host.echo", {"message": "häh?"}) == "häh?"


def test_hardware_info_is_null_with_reasons_where_there_is_no_firmware(client: transport.Client) -> None:
    info = client.call("Host.getHardwareInfo")
    reasons = info.pop("reasons")
    assert set(info) >= {"systemManufacturer", "systemProductName", "systemUUID", "systemSerialNumber"}
    assert {name for name, value in info.items() if value is None} == set(reasons)


def test_capabilities_tell_the_domain_type_that_was_proved(client: transport.Client, stack: standalone.Stack) -> None:
    capabilities = client.call("Host.getCapabilities")
    assert capabilities["hostID"] == stack.settings.host.id
    assert capabilities["kvmEnabled"] in ("true", "false")
    assert capabilities["repositoryFormats"] == ["clvm-1.2", "localfs-1.0", "nfs-3.4"]
    assert capabilities["reasons"].keys() <= {name for name, value in capabilities.items() if value is None}


def test_schema_has_every_verb(client: transport.Client) -> None:
    document = client.call("rpc.discover")
    names = {method["name"] for method in document["methods"]}
    assert names >= {
        *(f"Host.{verb}" for verb in ("ping2", "echo", "getVMList", "getAllVmStats", "getHardwareInfo", "getJobs")),
        *(f"VM.{verb}" for verb in ("create", "destroy", "pause", "cont", "shutdown", "reset", "getStats", "getInfo")),
        *(f"VM.{verb}" for verb in ("sysprep", "makeTemplate")),
        *(f"Lease.{verb}" for verb in ("create", "delete", "info", "status", "fence")),
        *(f"Job.{verb}" for verb in ("abort", "stop", "delete", "wait")),
        *(f"Storage.{verb}StorageRepository" for verb in ("format", "connect", "disconnect")),
        *(f"Storage.{verb}" for verb in ("importImage", "createVirtualDisk", "createSnapshot", "copyImage")),
        *(
            f"Storage.{verb}"
            for verb in ("removeImage", "getImageStatus", "getImage", "listImages", "setImageUserData")
        ),
    }


# -- storage -----------------------------------------------------------------------------------------------------------


def test_repository_is_formatted_connected_and_left(client: transport.Client, stack: standalone.Stack) -> None:
    repo_id = f"r-{ids.new()[:8]}"
    where = {"repoFormat": "localfs-1.0", "connectionParameters": {"path": str(stack.storage_dir / repo_id)}}
    name = client.call("Storage.formatStorageRepository", {**where, "options": {"ioTimeout": "1"}})

    connected = client.call("Storage.connectStorageRepository", {"repoId": repo_id, **where})

    assert (connected["name"], connected["state"]) == (name, "joining")
    assert client.call("Storage.listImages", {"repositoryId": repo_id}) == []  # reads need no lockspace
    assert refusal(client, "Storage.formatStorageRepository", where)["key"] == "not_empty"
    client.call("Storage.disconnectStorageRepository", {"repoId": repo_id})
    assert refusal(client, "Storage.listImages", {"repositoryId": repo_id})["key"] == "no_such_repository"


def test_images_live(client: transport.Client, repo: str) -> None:
    chosen, job_id = ids.new(), ids.new()
    disk = client.call(
        "Storage.createVirtualDisk",
        {"targetRepoId": repo, "size": "5000", "userData": {"name": "first"}, "options": {"imageId": chosen}},
    )
    assert disk == {"imageId": chosen, "jobId": None}
    here = {"repositoryId": repo, "imageId": chosen}
    assert client.call("Storage.getImage", here)["size"] == 8192  # whole blocks

    snapshot = client.call("Storage.createSnapshot", {"targetRepoId": repo, "baseVirtualDiskId": chosen})["imageId"]
    child = client.call("Storage.createVirtualDisk", {"targetRepoId": repo, "size": 0, "baseSnapshotId": snapshot})[
        "imageId"
    ]
    copied = client.call("Storage.copyImage", {"targetRepoId": repo, "imageId": chosen, "options": {"jobId": job_id}})
    assert copied["jobId"] == job_id
    job = conftest.done(client, job_id)
    assert (job["kind"], job["job_type"], job["progress"]) == ("copyImage", "storage", 100)
    assert client.call("Host.getJobs", {"job_type": "storage", "job_ids": [job_id]})[job_id]["status"] == "done"
    client.call("Job.delete", {"jobId": job_id})
    assert refusal(client, "Job.abort", {"jobId": job_id})["key"] == "no_such_job"

    client.call("Storage.setImageUserData", {**here, "userData": {"name": "second", "deep": {"list": [1, None]}}})
    assert client.call("Storage.getImage", here)["userData"] == {"name": "second", "deep": {"list": [1, None]}}
    client.call("Storage.resizeVirtualDisk", {**here, "size": "20000"})
    assert client.call("Storage.getImage", here)["size"] == 20480
    assert refusal(client, "Storage.resizeVirtualDisk", {**here, "size": 4096})["key"] == "invalid_parameters"
    status = client.call("Storage.getImageStatus", here)
    assert (status["status"], status["last_error"]) == ("optimized", None)

    known = {image["imageId"] for image in client.call("Storage.listImages", {"repositoryId": repo})}
    assert known >= {chosen, snapshot, child, copied["imageId"]}
    for image_id in (copied["imageId"], child, chosen, snapshot):
        client.call("Storage.removeImage", {"repositoryId": repo, "imageId": image_id})
    assert refusal(client, "Storage.getImage", here)["key"] == "no_such_image"


def test_import(client: transport.Client, repo: str, stack: standalone.Stack) -> None:
    source = stack.import_dir / f"{ids.new()}.raw"
    source.write_bytes(b"real" * 4096)
    source.chmod(0o644)
    try:
        given = {"targetRepoId": repo, "path": str(source), "format": "raw"}
        answer = client.call("Storage.importImage", given)
        conftest.done(client, answer["jobId"])
        client.call("Storage.removeImage", {"repositoryId": repo, "imageId": answer["imageId"]})
        outside = refusal(client, "Storage.importImage", {**given, "path": "/etc/passwd"})
        assert outside["key"] == "path_not_allowed"
    finally:
        source.unlink()


def test_export(client: transport.Client, repo: str, images: conftest.Images, stack: standalone.Stack) -> None:
    disk, path = images.bytes(b"real" * 4096), stack.export_dir / f"{ids.new()}.raw"
    given = {"repositoryId": repo, "imageId": disk, "path": str(path), "format": "raw"}
    conftest.done(client, client.call("Storage.exportImage", given)["jobId"])
    assert path.read_bytes() == b"real" * 4096
    assert refusal(client, "Storage.exportImage", given)["key"] == "host_file_exists"
    conftest.done(client, client.call("Storage.exportImage", {**given, "options": {"overwrite": "true"}})["jobId"])
    path.unlink()
    outside = refusal(client, "Storage.exportImage", {**given, "path": "/tmp/out"})
    assert outside["key"] == "path_not_allowed"


# -- virtual machines --------------------------------------------------------------------------------------------------


def test_a_vm_lives(client: transport.Client, repo: str, images: conftest.Images) -> None:
    vm_id, disk = ids.new(), images.disk()
    machines = conftest.Machines(client)
    here = {"vmID": vm_id}
    try:
        machines.create(vmId=vm_id, name="verbs", disks=[{"imageId": disk, "repoId": repo}])
        machines.wait(vm_id, "Up")
        assert client.call("Host.getVMList") == [vm_id]
        (listed,) = client.call("Host.getVMList", {"onlyUUID": "false"})
        assert (listed["vmId"], listed["foreign"], listed["spec"]["vmId"]) == (vm_id, False, vm_id)
        assert client.call("VM.pause", here)["status"] == "Paused"
        assert client.call("VM.getStats", here)[0]["status"] == "Paused"
        assert client.call("VM.cont", here)["status"] == "Up"
        client.call("VM.reset", here)
        assert vm_id in {stats["vmId"] for stats in client.call("Host.getAllVmStats")}
        assert client.call("VM.getInfo", here)["spec"]["disks"][0]["imageId"] == disk
        assert refusal(client, "VM.create", {"vmParams": {"vmId": vm_id}})["key"] == "vm_exists"
        client.call("VM.shutdown", {**here, "timeout": 1, "force": "true"})  # no guest that could obey
        machines.wait(vm_id, "Down")
    finally:
        machines.clean_up()
    assert client.call("Host.getVMList") == []


@pytest.mark.parametrize(
    ("verb", "params", "key"),
    [
        ("Storage.getImage", {"repositoryId": "nowhere", "imageId": ids.new()}, "no_such_repository"),
        ("Storage.createVirtualDisk", {"targetRepoId": "main", "size": -1}, "invalid_parameters"),
        ("Storage.createVirtualDisk", {"targetRepoId": "main", "size": 4096, "colour": "red"}, "invalid_parameters"),
        ("Storage.createVirtualDisk", {"targetRepoId": "main"}, "invalid_parameters"),
        ("VM.pause", {"vmID": ids.new()}, "no_such_vm"),
        ("VM.create", {"vmParams": {"vmId": "x"}}, "invalid_parameters"),
        ("Job.wait", {"jobId": ids.new()}, "no_such_job"),
        ("Host.reboot", {}, "unknown_method"),
    ],
)
def test_refusals_carry_facts_and_a_hint(
    client: transport.Client, repo: str, verb: str, params: dict[str, Any], key: str
) -> None:
    data = refusal(client, verb, params)
    assert data["key"] == key
    assert set(data) == {"key", "facts", "state", "hint"}
    assert data["hint"]


def test_events_tell_every_state_of_a_job(stack: standalone.Stack, repo: str, images: conftest.Images) -> None:
    disk = images.disk(64 << 20)
    with transport.connect(f"ws://127.0.0.1:{stack.tcp_port}") as client:
        client.subscribe(["job"])
        answer = client.call("Storage.copyImage", {"targetRepoId": repo, "imageId": disk})
        images.made.append(answer["imageId"])
        seen: list[str] = []
        while seen[-1:] not in (["done"], ["failed"]):
            event = client.next_event(30)
            assert event is not None, seen
            if event["subject"] == answer["jobId"] and event["data"]["status"] not in seen:
                seen.append(event["data"]["status"])
    assert seen == ["pending", "running", "done"]
