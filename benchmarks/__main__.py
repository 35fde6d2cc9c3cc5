"""`make bench`: every benchmark's rows in one table. Arguments name benchmarks; `--rounds N` (default 5)."""

import argparse
import importlib

from benchmarks import table

ALL = ("wire", "client", "jobs", "copying", "memory")  # formats, in the lab, is run by its name: it takes long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=ALL, metavar="NAME", help=", ".join(ALL))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rows: list[table.Row] = []
    for name in given.names:
        print(f"-- {name} ...", flush=True)
        rows += importlib.import_module(f"benchmarks.{name}").rows(given.rounds)
    print(table.render(rows))


if __name__ == "__main__":
    main()
