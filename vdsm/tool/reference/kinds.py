"""docs/reference/jobs.md: the kinds of host jobs and their stages."""

import importlib
import inspect
import sys

from vdsm import storage, virt
from vdsm.jobs import worker
from vdsm.tool.reference import markdown

_HEAD = """\
A verb that takes long answers a `jobId`; `Host.getJobs`, `Job.wait` and events of topic `job` tell how far it is. The
module of a kind tells what a kill during each stage leaves. [jobs.md](../jobs.md) is how to write a kind."""


def page() -> str:
    for module in (*storage.preload(), *virt.preload()):
        importlib.import_module(module)
    ours = {kind: body for kind, body in worker.bodies().items() if body.__module__.startswith("vdsm.")}
    rows = [
        (markdown.code(kind), _summary(body), ", ".join(body.stages), body.job_type, markdown.code(_path(body)))
        for kind, body in sorted(ours.items())
    ]
    heading = ("kind", "", "stages", "type", "module")
    return markdown.page("# Kinds of jobs", markdown.NOTE, _HEAD, markdown.table(heading, rows))


def _summary(body: type[worker.Body]) -> str:
    """The first paragraph of the module's docstring, without the name that it begins with."""
    text = inspect.getdoc(sys.modules[body.__module__]) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return paragraph.partition(": ")[2] or paragraph


def _path(body: type[worker.Body]) -> str:
    return body.__module__.replace(".", "/") + ".py"
