"""Tables, and how they are written as text, Markdown and LaTeX; `page` writes them as HTML.

tabulate is not used: it cannot align decimal points before notes of different lengths, escapes no `|` in Markdown, and
has no LaTeX format with booktabs in which some cells are bold and all are escaped.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table's cell: a text, a note after it in a quieter colour, and whether the text is bold or quiet."""

    text: str
    note: str = ""
    bold: bool = False
    quiet: bool = False


@dataclasses.dataclass
class Table:
    """A header and rows of cells (or plain strings); the first `left` columns are words, the others numbers."""

    header: list
    rows: list
    left: int = 1

    def cells(self):
        """Returns the rows with every entry a `Cell`."""
        return [
            [cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row]
            for row in self.rows
        ]

    def longest_notes(self):
        """Returns the longest note of each column."""
        return [
            max((row[i].note for row in self.cells()), key=len, default="")
            for i in range(len(self.header))
        ]


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a document: a heading, a paragraph, a table and what is written below it; any of them may be absent."""

    table: Table | None
    title: str = ""
    words: str = ""
    note: str = ""


# Text.


def as_text(table):
    """Returns a table for a terminal, in aligned columns."""
    columns = []
    for i, (title, *cells) in enumerate(zip(table.header, *table.cells())):
        side = "<" if i < table.left else ">"
        # Every cell of a column with notes has room for one, so that the decimal points are aligned.
        note_width = max((len(cell.note) + 1 for cell in cells if cell.note), default=0)
        lines = [title + " " * note_width]
        lines += [
            cell.text + (f" {cell.note}" if cell.note else "").ljust(note_width)
            for cell in cells
        ]
        lines = [printable(line) for line in lines]
        width = max(map(len, lines))
        columns.append(
            [f"{line:{side}{width}}" for line in (lines[0], "─" * width, *lines[1:])]
        )
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


def printable(text):
    """Returns a text with "?" for what could control a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _text_block(block):
    lines = [printable(line) for line in (block.title, block.words) if line]
    if block.table:
        lines += ["", as_text(block.table)] if block.title else [as_text(block.table)]
    if block.note:
        lines.append(printable(f"({block.note})"))
    return "\n".join(lines)


# Markdown.


def as_markdown(table):
    """Returns a table as Markdown."""
    lines = [[escape_markdown(title) for title in table.header]]
    lines.append(
        ["---" if i < table.left else "---:" for i in range(len(table.header))]
    )
    for row in table.cells():
        texts = [escape_markdown(f"{cell.text} {cell.note}") for cell in row]
        lines.append(
            [f"**{text}**" if cell.bold else text for cell, text in zip(row, texts)]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(text):
    """Escapes what would end a cell or begin HTML."""
    text = " ".join(str(text).split()).replace("\\", "\\\\")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _markdown_block(block):
    parts = [f"## {escape_markdown(block.title)}"] if block.title else []
    parts += [escape_markdown(block.words)] if block.words else []
    parts += [as_markdown(block.table)] if block.table else []
    parts += [f"{escape_markdown(block.note)}."] if block.note else []
    return "\n\n".join(parts)


# LaTeX.

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "±": r"$\pm$", "−": "$-$", "→": r"$\rightarrow$",
    **{c: f"\\{c}" for c in "{}$&#_%"},
    # At the start of a row these would be an argument of the line before.
    **{c: f"{{{c}}}" for c in "[]*"},
}  # fmt: skip


def as_latex(table):
    """Returns a table as a LaTeX tabular in UTF-8, which needs the package booktabs.

    >>> print(as_latex(Table(["method", "all"], [["ltkd_bs", Cell("51.08", "± 0.20", bold=True)]])))
    \\begin{tabular}{lr}
    \\toprule
    method & all \\\\
    \\midrule
    ltkd\\_bs & \\textbf{51.08} $\\pm$ 0.20 \\\\
    \\bottomrule
    \\end{tabular}
    """
    head = " & ".join(map(escape_latex, table.header))
    body = [
        " & ".join(map(_latex_cell, row, table.longest_notes()))
        for row in table.cells()
    ]
    kinds = "".join("l" if i < table.left else "r" for i in range(len(table.header)))
    lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", rf"{head} \\", r"\midrule"]
    lines += [rf"{line} \\" for line in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_cell(cell, longest_note):
    text = escape_latex(cell.text)
    text = rf"\textbf{{{text}}}" if cell.bold else text
    note = escape_latex(cell.note or longest_note)
    # A cell without a note has room for one, so that the decimal points are aligned.
    note = note if cell.note or not note else rf"\phantom{{{note}}}"
    return f"{text} {note}".strip()


def escape_latex(text):
    """Escapes what LaTeX would read as a command; two hyphens would become a dash."""
    text = "".join(_LATEX.get(c, c) for c in printable(" ".join(str(text).split())))
    return re.sub("-(?=-)", "-{}", text)


def _latex_block(block, heading):
    """Returns a floating table with its caption; the title and the paragraph are comments."""
    comments = [
        f"% {escape_latex(line)}" for line in (block.title, block.words) if line
    ]
    if not block.table:
        return "\n".join(comments)
    captions = [heading, "" if block.title else block.words.rstrip(":"), block.note]
    caption = ". ".join(escape_latex(part) for part in captions if part)
    small = r"\centering\footnotesize\setlength{\tabcolsep}{3pt}"
    table = [
        r"\begin{table}",
        small,
        rf"\caption{{{caption}.}}",
        as_latex(block.table),
        r"\end{table}",
    ]
    return "\n".join([*comments, *table])


# Documents.

FORMS = ("text", "markdown", "latex")


def document(blocks, form="text"):
    """Returns blocks one below the other, in one of `FORMS`."""
    if form != "latex":
        return "\n\n".join(
            map(_text_block if form == "text" else _markdown_block, blocks)
        )
    heading, parts = "", [r"% needs \usepackage{booktabs}"]
    for block in blocks:
        heading = block.title or heading
        parts.append(_latex_block(block, heading))
    return "\n\n".join(parts)
