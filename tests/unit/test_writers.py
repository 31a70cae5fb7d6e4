"""Tests of the writers; LaTeX is checked by rules that are independent of them."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.reporting import writers
from experiments.reporting.writers import Cell, Table

TABLE = Table(
    ["method", "all", "tail", "verdict"],
    [
        [
            "ltkd (alpha=0.5, num_groups=5)",
            Cell("51.08", "± 0.20", bold=True),
            Cell("27.21", "± 11.30"),
            "better",
        ],
        [
            "bikd over ltkd",
            Cell("48.70", "± 0.31"),
            Cell("–", quiet=True),
            "−0.45 ± 0.46, 95 % → n = 3",
        ],
    ],
)


def check_latex(text):
    """Checks LaTeX's braces and math, and that each special character is escaped."""
    depth = 0
    in_math = False
    i = 0
    while i < len(text):
        command = re.match(r"\\([a-zA-Z]+|.)", text[i:], re.S)
        if command:
            name = command[1]
            assert name.isalpha() or name in "\\{}$&#_%", f"no such command: {name}"
            i += len(command[0])
            # A command of letters would merge with a letter behind it.
            assert not (name.isalpha() and text[i : i + 1].isalnum())
            continue
        c = text[i]
        i += 1
        assert c.isprintable() or c == "\n", repr(c)
        assert c not in "#%~", f"not escaped: {c}"
        assert in_math or c not in "_^", f"not escaped: {c}"
        depth += (c == "{") - (c == "}")
        in_math ^= c == "$"
        assert depth >= 0
    assert depth == 0
    assert not in_math


def parse_latex(latex):
    """Returns the alignment of a tabular's columns and its rows of cells."""
    alignment = re.match(r"\\begin\{tabular\}\{([lr]+)\}\n", latex)[1]
    lines = latex.split("\n")
    assert lines[1] == r"\toprule"
    assert lines[3] == r"\midrule"
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    rows = []
    for line in (lines[2], *lines[4:-2]):
        assert line.endswith(r" \\")
        cells = re.split(r"(?<!\\)&", line.removesuffix(r" \\"))
        assert len(cells) == len(alignment)
        # LaTeX would read these as an argument of the end of the line before.
        assert cells[0].lstrip()[:1] not in ("[", "*")
        rows.append([cell.strip() for cell in cells])
    return alignment, rows


def test_latex_of_a_table():
    alignment, (header, first, second) = parse_latex(writers.as_latex(TABLE))
    assert alignment == "lrrr"
    assert header == ["method", "all", "tail", "verdict"]
    assert first == [
        r"ltkd (alpha=0.5, num\_groups=5)",
        r"\textbf{51.08} $\pm$ 0.20",
        r"27.21 $\pm$ 11.30",
        "better",
    ]
    assert second[2:] == [
        r"– \phantom{$\pm$ 11.30}",
        r"$-$0.45 $\pm$ 0.46, 95 \% $\rightarrow$ n = 3",
    ]


@pytest.mark.parametrize(
    "text, escaped",
    [
        ("a_b & 5 % #1 ^~", r"a\_b \& 5 \% \#1 \textasciicircum{}\textasciitilde{}"),
        ("\\frac{1}{2} $x$", r"\textbackslash{}frac\{1\}\{2\} \$x\$"),
        ("[x] * --- <b>|", r"{[}x{]} {*} -{}-{}- \textless{}b\textgreater{}\textbar{}"),
        ("Blüte 花 τ\x00\nb", "Blüte 花 τ? b"),
    ],
)
def test_latex_escapes(text, escaped):
    assert writers.escape_latex(text) == escaped


texts = st.text(max_size=20) | st.text(
    st.sampled_from("\\{}$&#_%^~<>|\"-[]*`' ±→−–αß\u0301\n"), max_size=12
)
cells = st.builds(Cell, texts, texts, st.booleans(), st.booleans())


@st.composite
def tables(draw):
    num_columns = draw(st.integers(1, 4))
    header = st.lists(texts, min_size=num_columns, max_size=num_columns)
    row = st.lists(cells | texts, min_size=num_columns, max_size=num_columns)
    return Table(draw(header), draw(st.lists(row, max_size=3)))


@settings(max_examples=100, deadline=None)
@given(tables())
def test_any_table(table):
    latex = writers.as_latex(table)
    check_latex(latex)
    _, rows = parse_latex(latex)
    assert len(rows) == 1 + len(table.rows)
    blocks = [
        writers.Block(table, table.header[0], table.header[-1], "a note"),
        writers.Block(None, table.header[0]),
    ]
    lines = writers.document(blocks, "latex").split("\n")
    check_latex("\n".join(line.removeprefix("%") for line in lines))
    # Markdown has a line for each row, with as many cells in each.
    lines = writers.as_markdown(table).split("\n")
    assert len(lines) == 2 + len(table.rows)
    unescaped = [re.sub(r"\\\\|\\\|", "", line) for line in lines]
    assert len({line.count("|") for line in unescaped}) == 1


def test_text_decimal_alignment():
    _, rule, first, second = writers.as_text(TABLE).split("\n")
    assert set(rule) == {"─", " "}
    assert first.index("51.08") == second.index("48.70")
    assert first.index("27.21 ± 11.30") > rule.rindex("  ", 0, 50)


def test_document_in_every_format():
    title = "cifar_100, imbalance 100"
    blocks = [
        writers.Block(TABLE, title, "A headline.", "A note"),
        writers.Block(TABLE, text="Paired, the tail:"),
    ]
    text, markdown, latex = (writers.document(blocks, name) for name in writers.FORMATS)
    assert text.startswith(f"{title}\nA headline.\n\nmethod")
    assert "\n(A note)\n\nPaired" in text
    assert markdown.startswith(f"## {title}\n\nA headline.\n\n| method |")
    assert "\n\nA note.\n\nPaired, the tail:\n\n| method" in markdown
    for command in (r"\begin{table}", r"\end{table}", r"\caption{cifar\_100"):
        assert latex.count(command) == 2
    assert r"\usepackage{booktabs}" in latex
    assert "Paired, the tail.}" in latex
    for number in ("51.08", "48.70", "11.30"):
        assert text.count(number) == markdown.count(number) == 2
        assert number in latex
