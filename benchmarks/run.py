"""Run the benchmarks of the kernels and write what they print into docs/performance.md.

    python benchmarks/run.py [--device cuda] [--no-write]

Each section stops before its times if its results are not what the package promises. The page keeps
the part of the other device.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path

import dirichlet_kl
import linear_align
import training_step
from _report import machine, warn_if_busy

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
SECTIONS = {
    "cpu": [
        (dirichlet_kl.main, []),
        (linear_align.main, []),
        (training_step.main, ["--quick"]),
    ],
    "cuda": [
        (dirichlet_kl.main, ["--device", "cuda"]),
        (linear_align.main, ["--device", "cuda"]),
        (training_step.main, ["--device", "cuda"]),
    ],
}


class Both(io.TextIOBase):
    """Shows what is printed, and keeps it."""

    def __init__(self) -> None:
        self.text, self.out = "", sys.stdout

    def write(self, text: str) -> int:
        self.text += text
        return self.out.write(text)

    def flush(self) -> None:
        self.out.flush()


def insert(page: str, device: str, text: str) -> str:
    """Return the page with the part of a device replaced: what is between its two marks."""
    begin, end = f"<!-- {device}: written by benchmarks/run.py -->", f"<!-- end of {device} -->"
    part = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not part.search(page):
        raise SystemExit(f"{PAGE}: expected the marks {begin} and {end}")
    return part.sub(lambda _: f"{begin}\n\n{text.strip()}\n\n{end}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-write", action="store_true", help="leave docs/performance.md alone")
    arguments = parser.parse_args()
    both = Both()
    with contextlib.redirect_stdout(both):
        warn_if_busy()
        for section, options in SECTIONS[arguments.device]:
            section(options)
    # One heading less deep, and the machine once.
    line = machine(arguments.device)
    text = re.sub(r"^(#+) ", r"##\1 ", both.text.replace(f"{line}\n\n", ""), flags=re.MULTILINE)
    if not arguments.no_write:
        PAGE.write_text(insert(PAGE.read_text(), arguments.device, f"{line}\n\n{text}"))
        print(f"Written into {PAGE}")


if __name__ == "__main__":
    main()
