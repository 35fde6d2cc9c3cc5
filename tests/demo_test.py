"""The demo's story, lived with the tiny guest: what `make demo` calls, but for the template, and what it reads."""

from typing import Any

import pytest

from vdsm import standalone
from vdsm.tool import demo, guestimage, guestrecipe

REPO = "demo"
DISK_BYTES = 32 << 20


class Short(demo.Story):
    """The tiny guest has no disk to boot from, no agent, and nothing that virt-sysprep could clean."""

    def spec(self, vm_id: str, name: str, disk: str) -> dict[str, Any]:
        kernel = {**self.boot_files(), "cmdline": "console=ttyS0 quiet"}
        return super().spec(vm_id, name, disk) | {"directKernel": kernel, "agentChannel": False}

    def template(self, vm_id: str, disk: str) -> str:
        answer = self.call("Storage", "createSnapshot", f"targetRepoId={REPO}", f"baseVirtualDiskId={disk}")
        return str(answer["imageId"])


def test_demo_lives_its_story(
    stack: standalone.Stack,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tiny = guestimage.build_tiny(guestimage.default_cache())
    disk = tmp_path_factory.mktemp("demo") / "disk.raw"
    disk.write_bytes(b"guest".ljust(DISK_BYTES, b"\0"))
    image = guestimage.GuestImage(disk, tiny.kernel_path, tiny.initrd_path, tiny.hash)
    monkeypatch.setattr(demo, "LAST_WORD", guestrecipe.TINY_GREETING)
    monkeypatch.setattr(demo, "compare", lambda first, second: None)  # the tiny guest does not say who it is
    story = Short(stack, image, REPO)
    story.live()
    told = capfd.readouterr().out
    for wanted in ("repository demo is joined", f"| {guestrecipe.TINY_GREETING}", "is Down", "copyImage"):
        assert wanted in told
    assert story.steps[-1][0] == "Clean up"
    assert "in all" in story.table()


def test_two_guests_that_share_an_identity_are_told() -> None:
    first = {"machine-id": "1", "host-key": "2", "old-logs": "none"}
    with pytest.raises(demo.DemoFailed, match="machine-id"):
        demo.compare(first, first | {"host-key": "3", "old-logs": "some"})
