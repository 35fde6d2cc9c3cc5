"""`make docs`: writes what is made from the code into the source tree. It starts nothing, and takes seconds."""

from pathlib import Path

from vdsm.tool import reference

ROOT = Path(__file__).resolve().parents[3]


def main() -> None:
    for path, text in reference.pages(reference.document()).items():
        place = ROOT / path
        if not place.exists() or place.read_text() != text:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
