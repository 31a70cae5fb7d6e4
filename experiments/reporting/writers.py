"""A table, and the one way it is written: for a terminal, as Markdown, as LaTeX, as HTML.

Whatever a number stands in, it was rounded once, where its `Cell` was made.
"""

import dataclasses
import html
import re
import unicodedata


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table's cell: a text, what follows it in a quieter voice, and how it is marked."""

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
        return [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in self.rows]


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a document: a heading, what is said, a table, and what stands below it; any of them may be absent."""

    table: Table | None
    title: str = ""
    words: str = ""
    note: str = ""


# For a terminal.


def as_text(table):
    """Writes a table for a terminal, in aligned columns."""
    columns = []
    for i, (title, *cells) in enumerate(zip(table.header, *table.cells())):
        side = "<" if i < table.left else ">"
        note = max((len(cell.note) + 1 for cell in cells if cell.note), default=0)
        lines = [title + " " * note, *(cell.text + f" {cell.note}".ljust(note)[:note] for cell in cells)]
        lines = [_printable(line) for line in lines]
        width = max(map(len, lines))
        columns.append([f"{line:{side}{width}}" for line in [lines[0], "─" * width, *lines[1:]]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


def _printable(text):
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _text_block(block):
    lines = [_printable(line) for line in (block.title, block.words) if line]
    if block.table:
        lines += [*[""] * bool(block.title), as_text(block.table)]
    return "\n".join([*lines, *[_printable(f"({block.note})")] * bool(block.note)])


# As Markdown.


def as_markdown(table):
    """Writes a table as Markdown."""
    lines = [[escape_markdown(title) for title in table.header]]
    lines.append(["---" if i < table.left else "---:" for i in range(len(table.header))])
    for row in table.cells():
        texts = [escape_markdown(f"{cell.text} {cell.note}") for cell in row]
        lines.append([f"**{text}**" if cell.bold else text for cell, text in zip(row, texts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(text):
    """Escapes what would end a cell or begin HTML."""
    text = " ".join(str(text).split()).replace("\\", "\\\\")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _markdown_block(block):
    parts = [f"## {escape_markdown(block.title)}"] if block.title else []
    parts += [escape_markdown(block.words)] if block.words else []
    parts += [as_markdown(block.table)] if block.table else []
    return "\n\n".join([*parts, *[f"{escape_markdown(block.note)}."] * bool(block.note)])


# As LaTeX, in ASCII, so that every engine reads it.

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", **{c: f"\\{c}" for c in "{}$&#_%"},
    # At the start of a row they would be an argument of the line before.
    **{c: f"{{{c}}}" for c in "[]*"},
    "→": r"$\rightarrow$", "−": "$-$", "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$", "≥": r"$\geq$",
    "≤": r"$\leq$", "–": r"\textendash{}", "—": r"\textemdash{}", "…": r"\ldots{}",
    "‘": "`", "’": "'", "“": "``", "”": "''", "°": r"$^\circ$",
    "ß": r"\ss{}", "ø": r"\o{}", "Ø": r"\O{}", "æ": r"\ae{}", "Æ": r"\AE{}", "œ": r"\oe{}", "Œ": r"\OE{}",
    "ł": r"\l{}", "Ł": r"\L{}", "ı": r"\i{}",
}  # fmt: skip
_ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327", "`'^~=u.\"rHvc"))
_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi"


def as_latex(table):
    """Writes a table as a LaTeX tabular; it needs the package booktabs.

    >>> print(as_latex(Table(["method", "all"], [["ltkd_bs", Cell("51.08", "± 0.20", bold=True)]])))
    \\begin{tabular}{lr}
    \\toprule
    method & all \\\\
    \\midrule
    ltkd\\_bs & \\textbf{51.08} $\\pm$ 0.20 \\\\
    \\bottomrule
    \\end{tabular}
    """
    lines = [" & ".join(escape_latex(title) for title in table.header)]
    cells = table.cells()
    notes = [max((escape_latex(row[i].note) for row in cells), key=len, default="") for i in range(len(table.header))]
    lines += [" & ".join(map(_latex_cell, row, notes)) for row in cells]
    head, *body = [f"{line} \\\\" for line in lines]
    kinds = "".join("l" if i < table.left else "r" for i in range(len(table.header)))
    rows = [f"\\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(rows)


def _latex_cell(cell, longest):
    text = escape_latex(cell.text)
    text = f"\\textbf{{{text}}}" if cell.bold else text
    # Room for the column's longest note, so that the decimal points stay under each other.
    note = escape_latex(cell.note) if cell.note or not longest else f"\\phantom{{{longest}}}"
    return f"{text} {note}".strip()


def escape_latex(text):
    """Writes any text in LaTeX's ASCII; a letter it has no name for becomes its code point, U+4E2D."""
    text = unicodedata.normalize("NFC", " ".join(str(text).split()))
    return re.sub("-(?=-)", "-{}", "".join(map(_latex_letter, text)))  # two hyphens would become a dash


def _latex_letter(letter):
    if letter in _LATEX or letter.isascii():
        return _LATEX.get(letter, letter if letter.isprintable() else "?")
    base, *marks = unicodedata.normalize("NFD", letter)
    if len(marks) == 1 and marks[0] in _ACCENTS and base.isascii() and base.isalpha():
        return f"\\{_ACCENTS[marks[0]]}{{{base}}}"
    kind, _, name = unicodedata.name(letter, "").lower().replace("lamda", "lambda").rpartition(" ")
    if kind == "greek small letter" and name in f"{_GREEK} omega".split():
        return f"$\\{name}$"
    return f"U+{ord(letter):04X}"


def _latex_block(block, heading):
    """A floating table with its caption; what is said about it stands in comments."""
    said = [f"% {escape_latex(line)}" for line in (block.title, block.words) if line]
    if not block.table:
        return "\n".join(said)
    words = [heading] if block.title else [heading, block.words.rstrip(":")]
    caption = ". ".join(escape_latex(part) for part in [*words, block.note] if part)
    small = r"\centering\footnotesize\setlength{\tabcolsep}{3pt}"
    return "\n".join(
        [*said, r"\begin{table}", small, f"\\caption{{{caption}.}}", as_latex(block.table), r"\end{table}"]
    )


# As HTML.


def as_html(table):
    """Writes a table as HTML, in a box in which it scrolls when it is wider than the page."""
    kinds = [' class="words"' if i < table.left else "" for i in range(len(table.header))]
    noted = [any(row[i].note for row in table.cells()) for i in range(len(table.header))]
    head = [f'<th scope="col"{kind}>{html.escape(title)}</th>' for kind, title in zip(kinds, table.header)]
    body = []
    for row in table.cells():
        cells = [_html_cell(cell, i, kinds[i], noted[i]) for i, cell in enumerate(row)]
        body.append(f"<tr>{''.join(cells)}</tr>")
    head, body = "".join(head), "\n".join(body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(cell, i, kind, noted):
    text = html.escape(cell.text.replace(" ± ", "\u00a0±\u00a0"))
    text = f"<b>{text}</b>" if cell.bold else f'<span class="quiet">{text}</span>' if cell.quiet else text
    # Every cell of a column with notes gets one, so that the decimal points stay under each other.
    note = f' <span class="note">{html.escape(cell.note)}</span>' if noted else ""
    if i == 0:
        return f'<th scope="row"{kind}><span class="label">{text}</span>{note}</th>'
    return f"<td{kind}>{text}{note}</td>"


# A document of several.

FORMS = ("text", "markdown", "latex")


def document(blocks, form="text"):
    """Writes blocks one below the other, in one of `FORMS`."""
    if form == "latex":
        headings, parts = "", [r"% needs \usepackage{booktabs}"]
        for block in blocks:
            headings = block.title or headings
            parts.append(_latex_block(block, headings))
        return "\n\n".join(parts)
    return "\n\n".join(map({"text": _text_block, "markdown": _markdown_block}[form], blocks))
