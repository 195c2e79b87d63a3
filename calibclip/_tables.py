"""Tables as text, Markdown, LaTeX and HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from calibclip._checks import check_choice

STYLES = ("text", "markdown", "latex")
_LATEX = {
    **{letter: f"\\{letter}" for letter in "%&_#${}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


@dataclass(frozen=True)
class Table:
    """Cells of text under a title; a row of one cell is a heading within the table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def render(self, style: str) -> str:
        """Return the table in a style: ``"text"``, ``"markdown"`` or ``"latex"``."""
        check_choice("style", style, STYLES)
        if style == "latex":
            return self._latex()
        return self._markdown() if style == "markdown" else self._text()

    def html(self) -> str:
        """Return the table as an HTML element."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = []
        for label, *cells in self.rows:
            label = html.escape(label)
            if not cells:
                width = len(self.columns)
                body.append(
                    f'<tr><th colspan="{width}" style="text-align: left; padding-top: 0.7em">'
                    f"{label}</th></tr>"
                )
                continue
            numbers = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            body.append(f'<tr><td style="text-align: left">{label}</td>{numbers}</tr>')
        return (
            f'<table style="text-align: right"><caption>{html.escape(self.title)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        )

    def _widths(self) -> list[int]:
        lines = [self.columns, *(row for row in self.rows if len(row) > 1)]
        return [max(map(len, column)) for column in zip(*lines, strict=True)]

    def _text(self) -> str:
        widths = self._widths()
        lines = [self.title, _aligned(self.columns, widths), "-" * (sum(widths) + 2 * len(widths))]
        for row in self.rows:
            lines.append(_aligned(row, widths) if len(row) > 1 else f"\n{' '.join(row)}")
        return "\n".join(line.rstrip() for line in lines)

    def _markdown(self) -> str:
        width = len(self.columns)
        rule = ["---", *["---:"] * (width - 1)]
        rows = [
            row if len(row) > 1 else (f"**{''.join(row)}**", *[""] * (width - 1))
            for row in self.rows
        ]
        lines = [_piped(line) for line in (self.columns, rule, *rows)]
        return "\n".join([f"**{self.title}**", "", *lines])

    def _latex(self) -> str:
        width = len(self.columns)
        rows = [
            f"\\multicolumn{{{width}}}{{l}}{{\\emph{{{_escaped(row[0])}}}}} \\\\"
            if len(row) == 1
            else f"{' & '.join(map(_escaped, row))} \\\\"
            for row in self.rows
        ]
        return "\n".join(
            [
                f"% {self.title}; needs the package booktabs",
                f"\\begin{{tabular}}{{l{'r' * (width - 1)}}}",
                "\\toprule",
                f"{' & '.join(map(_escaped, self.columns))} \\\\",
                "\\midrule",
                *rows,
                "\\bottomrule",
                "\\end{tabular}",
            ]
        )


def number(value: float, style: str = ".4f") -> str:
    """Write a number for a cell, a dash for NaN."""
    return "-" if math.isnan(value) else format(value, style)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join([cells[0].ljust(len(first)), *rest])


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _escaped(cell: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in cell)
