"""Tables, and how they are written as text, Markdown and LaTeX; `page` writes HTML.

tabulate is not used: it cannot align decimal points before notes of different lengths,
escapes no `|` in Markdown, and has no LaTeX format with booktabs in which some cells
are bold and all are escaped.
"""

import dataclasses
import re


def signed(value: float, decimals: int = 2) -> str:
    """Returns a difference with its sign; no zero is negative.

    >>> signed(-1.005), signed(-0.001), signed(2, 1)
    ('−1.00', '+0.00', '+2.0')
    """
    # Adding 0 makes −0.0 positive. A minus sign is as wide as a plus sign, and a hyphen
    # is not.
    return f"{round(value, decimals) + 0.0:+.{decimals}f}".replace("-", "−")


def format_duration(seconds: object) -> str:
    """Returns a wall time as "2 h 05 min" or "3 min 12 s", "–" if there is none.

    >>> format_duration(7500), format_duration(192.4), format_duration(None)
    ('2 h 05 min', '3 min 12 s', '–')
    """
    if not isinstance(seconds, (int, float)):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@dataclasses.dataclass(frozen=True)
class Cell:
    """Holds the content of a table's cell.

    Attributes:
      text: the content, such as a mean.
      note: an addition in a paler colour, such as a deviation.
      bold: whether the text is bold.
      quiet: whether the text is paler.
    """

    text: str
    note: str = ""
    bold: bool = False
    quiet: bool = False


@dataclasses.dataclass
class Table:
    """Holds a header and rows of cells.

    Attributes:
      header: a string for each column.
      rows: lists of `Cell` or of plain strings.
      num_text_columns: how many columns, from the left, hold words. They are aligned
        to the left, and the others, with numbers, to the right.
    """

    header: list
    rows: list
    num_text_columns: int = 1

    def cells(self):
        """Returns the rows with every entry as a `Cell`."""
        rows = []
        for row in self.rows:
            rows.append([c if isinstance(c, Cell) else Cell(str(c)) for c in row])
        return rows

    def longest_notes(self):
        """Returns the longest note of each column."""
        notes = [""] * len(self.header)
        for row in self.cells():
            notes = [max(note, cell.note, key=len) for note, cell in zip(notes, row)]
        return notes


@dataclasses.dataclass(frozen=True)
class Block:
    """Describes a part of a document, of which any field may be empty.

    Attributes:
      table: the table, or None.
      title: a heading.
      text: a paragraph above the table.
      note: a remark below the table.
    """

    table: Table | None
    title: str = ""
    text: str = ""
    note: str = ""


# Text.


def as_text(table):
    """Returns a table for a terminal, in aligned columns."""
    columns = []
    for i, (title, *cells) in enumerate(zip(table.header, *table.cells())):
        # Every cell of a column with notes is padded to the longest one, so that the
        # decimal points are aligned.
        note_width = max((len(cell.note) + 1 for cell in cells if cell.note), default=0)
        lines = [title + " " * note_width]
        for cell in cells:
            note = f" {cell.note}" if cell.note else ""
            lines.append(cell.text + note.ljust(note_width))
        lines = [printable(line) for line in lines]
        width = max(map(len, lines))
        lines.insert(1, "─" * width)
        align = str.ljust if i < table.num_text_columns else str.rjust
        columns.append([align(line, width) for line in lines])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


def printable(text):
    """Returns a text with "?" for characters that could control a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _text_block(block):
    lines = [printable(line) for line in (block.title, block.text) if line]
    if block.table:
        if block.title:
            lines.append("")
        lines.append(as_text(block.table))
    if block.note:
        lines.append(printable(f"({block.note})"))
    return "\n".join(lines)


# Markdown.


def as_markdown(table):
    """Returns a table as Markdown."""
    rules = []
    for i in range(len(table.header)):
        rules.append("---" if i < table.num_text_columns else "---:")
    lines = [[escape_markdown(title) for title in table.header], rules]
    for row in table.cells():
        line = []
        for cell in row:
            text = escape_markdown(f"{cell.text} {cell.note}")
            line.append(f"**{text}**" if cell.bold else text)
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(text):
    """Escapes what would end a cell or begin HTML, and joins lines."""
    text = " ".join(str(text).split()).replace("\\", "\\\\")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _markdown_block(block):
    paragraphs = []
    if block.title:
        paragraphs.append(f"## {escape_markdown(block.title)}")
    if block.text:
        paragraphs.append(escape_markdown(block.text))
    if block.table:
        paragraphs.append(as_markdown(block.table))
    if block.note:
        paragraphs.append(f"{escape_markdown(block.note)}.")
    return "\n\n".join(paragraphs)


# LaTeX.

_LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "−": "$-$",
    "→": r"$\rightarrow$",
}
_LATEX_ESCAPES |= {c: f"\\{c}" for c in "{}$&#_%"}
# At the start of a row, LaTeX would read these as an argument of the `\\` before it.
_LATEX_ESCAPES |= {c: f"{{{c}}}" for c in "[]*"}


def as_latex(table):
    r"""Returns a table as a LaTeX tabular in UTF-8, which needs the package booktabs.

    >>> cell = Cell("51.08", "± 0.20", bold=True)
    >>> print(as_latex(Table(["method", "all"], [["ltkd_bs", cell]])))
    \begin{tabular}{lr}
    \toprule
    method & all \\
    \midrule
    ltkd\_bs & \textbf{51.08} $\pm$ 0.20 \\
    \bottomrule
    \end{tabular}
    """
    num_numbers = len(table.header) - table.num_text_columns
    alignment = "l" * table.num_text_columns + "r" * num_numbers
    header = " & ".join(map(escape_latex, table.header))
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", rf"{header} \\"]
    lines.append(r"\midrule")
    longest_notes = table.longest_notes()
    for row in table.cells():
        line = " & ".join(map(_latex_cell, row, longest_notes))
        lines.append(rf"{line} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_cell(cell, longest_note):
    text = escape_latex(cell.text)
    if cell.bold:
        text = rf"\textbf{{{text}}}"
    if cell.note:
        return f"{text} {escape_latex(cell.note)}".strip()
    if not longest_note:
        return text.strip()
    # A cell without a note gets the room of one, so that decimal points are aligned.
    return rf"{text} \phantom{{{escape_latex(longest_note)}}}".strip()


def escape_latex(text):
    """Escapes what LaTeX would read as a command, and joins lines."""
    one_line = printable(" ".join(str(text).split()))
    escaped = "".join(_LATEX_ESCAPES.get(c, c) for c in one_line)
    # LaTeX would join two hyphens into a dash.
    return re.sub("-(?=-)", "-{}", escaped)


def _latex_block(block, heading):
    """Returns a floating table with a caption; title and paragraph become comments."""
    comments = []
    for line in (block.title, block.text):
        if line:
            comments.append(f"% {escape_latex(line)}")
    if not block.table:
        return "\n".join(comments)
    # Below a title the paragraph is long; without one it names the table.
    name = "" if block.title else block.text.rstrip(":")
    sentences = [escape_latex(text) for text in (heading, name, block.note) if text]
    lines = [
        *comments,
        r"\begin{table}",
        r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{'. '.join(sentences)}.}}",
        as_latex(block.table),
        r"\end{table}",
    ]
    return "\n".join(lines)


# Documents.

FORMATS = ("text", "markdown", "latex")


def document(blocks, output_format="text"):
    """Returns blocks one below the other, in one of `FORMATS`."""
    if output_format == "text":
        return "\n\n".join(map(_text_block, blocks))
    if output_format == "markdown":
        return "\n\n".join(map(_markdown_block, blocks))
    parts = [r"% needs \usepackage{booktabs}"]
    heading = ""
    for block in blocks:
        # The caption of a table without a title repeats the last title.
        heading = block.title or heading
        parts.append(_latex_block(block, heading))
    return "\n\n".join(parts)
