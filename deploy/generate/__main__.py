"""`python -m deploy.generate` writes the files that follow from the program; with `--check` it only compares."""

import argparse
import sys
from pathlib import Path
from typing import Final

from deploy.generate import alertmanager, boards, kubernetes, metrics_page, prometheus

ROOT: Final = Path(__file__).parents[2]

MODULES: Final = (prometheus, alertmanager, kubernetes, boards, metrics_page)
"""Each has a function `files()`: the texts of its files, by their paths below the root."""

OWN_FOLDERS: Final = ("deploy/prometheus/rules", "deploy/grafana/dashboards")
"""Whatever else is in these was made once and is no more."""


def files() -> dict[str, str]:
    """The text of every file that is generated. Raises ValueError when two modules make the same one."""
    made: dict[str, str] = {}
    for module in MODULES:
        for path, text in module.files().items():
            if path in made:
                raise ValueError(f"{path} is made twice.")
            made[path] = text
    return made


def outdated(root: Path = ROOT) -> dict[str, str | None]:
    """The files that differ from what would be made, with the text they should have; None where there should be
    no file."""
    made = files()
    present = (path for folder in OWN_FOLDERS for path in (root / folder).glob("*"))
    left_over = {str(path.relative_to(root)) for path in present} - made.keys()
    return {path: text for path, text in made.items() if _read(root / path) != text} | dict.fromkeys(left_over)


def generate(root: Path = ROOT) -> dict[str, str | None]:
    """Brings the files up to date; answers those that were not."""
    found = outdated(root)
    for path, text in found.items():
        if text is None:
            (root / path).unlink()
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
    return found


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 and name the files that are out of date")
    if not parser.parse_args().check:
        for path in sorted(generate()):
            print(path)
    elif found := outdated():
        sys.exit("\n".join(["Out of date; `make generate` mends it:", *sorted(found)]))


if __name__ == "__main__":
    main()
