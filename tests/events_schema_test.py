"""Events of the real agent against the schemas that `rpc.discover` gives of them."""

from typing import Any

import jsonschema

from tests import conftest
from vdsm import ids, standalone
from vdsm.client import transport


def test_every_topics_events_are_as_described(stack: standalone.Stack, repo: str, images: conftest.Images) -> None:
    seen: dict[str, set[str]] = {}
    with transport.connect(str(stack.socket_path)) as client:
        document = client.call("rpc.discover")
        client.subscribe()
        vm_id = _change_everything(client, stack, images)
        while "Down" not in seen.get("vm", ()):
            event = client.next_event(60)
            assert event is not None, seen
            _check(document, event)
            seen.setdefault(event["topic"], set()).add(event["data"].get("status", ""))
        client.call("VM.destroy", {"vmID": vm_id})
    assert seen.keys() == {"job", "vm", "image", "repository"}


def _change_everything(client: transport.Client, stack: standalone.Stack, images: conftest.Images) -> str:
    """Something of each topic: a copy, its images, a repository, and a VM that cannot start."""
    disk = images.disk()
    images.snapshot(disk)
    copied = client.call("Storage.copyImage", {"targetRepoId": images.repo_id, "imageId": disk})
    images.made.append(copied["imageId"])
    conftest.done(client, copied["jobId"])
    repo_id = f"r-{ids.new()[:8]}"
    where = {"repoFormat": "localfs-1.0", "connectionParameters": {"path": str(stack.storage_dir / repo_id)}}
    client.call("Storage.formatStorageRepository", {**where, "options": {"ioTimeout": 1}})
    client.call("Storage.connectStorageRepository", {"repoId": repo_id, **where})
    client.call("Storage.disconnectStorageRepository", {"repoId": repo_id})
    vm_id = ids.new()
    missing = [{"imageId": ids.new(), "repoId": images.repo_id}]
    client.call("VM.create", {"vmParams": {"vmId": vm_id, "disks": missing, "leaseRepoId": images.repo_id}})
    return vm_id


def _check(document: dict[str, Any], event: dict[str, Any]) -> None:
    described = document["x-events"]
    topic = next(topic for topic in described["topics"] if topic["name"] == event["topic"])
    for schema, value in ((described["params"], event), (topic["data"], event["data"])):
        validator = jsonschema.Draft202012Validator(schema | {"components": document["components"]})
        assert [error.message for error in validator.iter_errors(value)] == [], event
