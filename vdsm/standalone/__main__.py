"""`python3 -m vdsm.standalone up|down|status`: a stack that runs in the background, one for each source tree."""

import argparse
import json
import sys
from pathlib import Path

from vdsm.standalone import ending, ground, layout, processes, stack, state

# {"run_dir": ..., "socket": ...} of the stack that `up` left running.
POINTER = ground.BUILD / "standalone.json"


def main() -> int:
    options = _parser().parse_args()
    try:
        return int(options.verb(options))
    except (ground.GroundError, stack.StartError, ending.StuckError) as error:
        print(f"standalone: {error}", file=sys.stderr)
        return 1


def up(options: argparse.Namespace) -> int:
    """Starts it, or says that it runs."""
    place = _known(None)
    if place is None:
        running = stack.Stack(options.run_dir, tcp=options.tcp, background=True).start()
        place = running.place
        POINTER.write_text(json.dumps({"run_dir": str(place.run_dir), "socket": str(place.agent_socket)}) + "\n")
    return _print(place)


def down(options: argparse.Namespace) -> int:
    """Ends it, also when only parts of it are left."""
    place = _known(options.run_dir)
    if place is None:
        print("No stack runs.")
        return 0
    ending.stop(place)
    POINTER.unlink(missing_ok=True)
    print(f"Ended {place.run_dir}.")
    return 0


def status(options: argparse.Namespace) -> int:
    """0: all of it runs; 3: some or all of it does not."""
    place = _known(options.run_dir)
    if place is None:
        print("No stack runs.")
        return 3
    return _print(place)


def watch(options: argparse.Namespace) -> int:
    """Ends the stack when standard input does, which its owner's death brings about."""
    sys.stdin.read()
    ending.stop(layout.Layout(options.run_dir))
    return 0


def _print(place: layout.Layout) -> int:
    found = state.read(place)
    known = found.daemons if found else {}
    for name, process in known.items():
        print(f"{name:11} {process.pid if processes.alive(process) else 'ended'}  {place.log(name)}")
    settings = ground.settings(place)
    print(f"libvirt     {place.libvirt_uri}")
    print(f"socket      {place.agent_socket}")
    if settings.wire.tcp_port:
        print(f"http        http://127.0.0.1:{settings.wire.tcp_port}/jsonrpc")
    print(f"images      {place.imports} (what may be imported), {place.storage} (where repositories may be),")
    print(f"            {place.exports} (where exports go)")
    print(f"call        {place.client} Host getHardwareInfo")
    return 0 if known and all(processes.alive(process) for process in known.values()) else 3


def _known(run_dir: Path | None) -> layout.Layout | None:
    """The stack in `run_dir`, or the one that `up` started; None when there is none."""
    if run_dir is None:
        try:
            run_dir = Path(json.loads(POINTER.read_text())["run_dir"])
        except FileNotFoundError:
            return None
    place = layout.Layout(run_dir.resolve())
    return None if state.read(place) is None else place


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m vdsm.standalone", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="up|down|status")
    for verb in (up, down, status, watch):
        sub = verbs.add_parser(verb.__name__, help=None if verb is watch else verb.__doc__)
        sub.add_argument("--run-dir", type=Path, help="default: a fresh one, or the one that `up` made")
        sub.set_defaults(verb=verb)
        if verb is up:
            sub.add_argument("--tcp", action="store_true", help="listen on a free port of the loopback interface too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
