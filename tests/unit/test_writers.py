"""Tests of the writers; LaTeX is read by rules that know nothing of how it was written."""

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
    depth, math, i = 0, False, 0
    while i < len(text):
        if command := re.match(r"\\([a-zA-Z]+|.)", text[i:], re.S):
            assert command[1].isalpha() or command[1] in "\\{}$&#_%", (
                f"no such command: {command[0]}"
            )
            i += len(command[0])
            # A command of letters would melt into a letter behind it.
            assert not (command[1].isalpha() and text[i : i + 1].isalnum())
            continue
        letter, i = text[i], i + 1
        assert letter.isprintable() or letter == "\n", repr(letter)
        assert letter not in "#%~" and (math or letter not in "_^"), (
            f"not escaped: {letter}"
        )
        depth += (letter == "{") - (letter == "}")
        math ^= letter == "$"
        assert depth >= 0
    assert depth == 0 and not math


def latex_rows(latex):
    """Returns the columns of a tabular and its rows of cells, of which every row has as many."""
    kinds = re.match(r"\\begin\{tabular\}\{([lr]+)\}\n", latex)[1]
    lines = latex.split("\n")
    assert lines[1] == r"\toprule" and lines[3] == r"\midrule"
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    rows = [lines[2], *lines[4:-2]]
    assert all(row.endswith(r" \\") for row in rows)
    rows = [re.split(r"(?<!\\)&", row[:-3]) for row in rows]
    assert {len(row) for row in rows} == {len(kinds)}
    # What follows the end of a line or a rule must not look like its argument.
    assert all(row[0].lstrip()[:1] not in ("[", "*") for row in rows)
    return kinds, [[cell.strip() for cell in row] for row in rows]


def test_latex_of_a_table():
    kinds, (head, first, second) = latex_rows(writers.as_latex(TABLE))
    assert (kinds, head) == ("lrrr", ["method", "all", "tail", "verdict"])
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
tables = st.integers(1, 4).flatmap(
    lambda n: st.builds(
        Table,
        st.lists(texts, min_size=n, max_size=n),
        st.lists(st.lists(cells | texts, min_size=n, max_size=n), max_size=3),
    )
)


@settings(max_examples=100, deadline=None)
@given(tables)
def test_any_table_is_valid(table):
    latex = writers.as_latex(table)
    check_latex(latex)
    assert len(latex_rows(latex)[1]) == 1 + len(table.rows)
    blocks = [
        writers.Block(table, table.header[0], table.header[-1], "a note"),
        writers.Block(None, table.header[0]),
    ]
    lines = writers.document(blocks, "latex").split("\n")
    check_latex("\n".join(line.removeprefix("%") for line in lines))
    # Markdown: a line for each row, with as many cells in each.
    lines = [
        re.sub(r"\\\\|\\\|", "", line)
        for line in writers.as_markdown(table).split("\n")
    ]
    assert (
        len(lines) == 2 + len(table.rows)
        and len({line.count("|") for line in lines}) == 1
    )


def test_text_aligns_decimal_points():
    _, rule, first, second = writers.as_text(TABLE).split("\n")
    assert set(rule) == {"─", " "}
    assert first.index("51.08") == second.index("48.70") and first.index(
        "27.21 ± 11.30"
    ) > rule.rindex("  ", 0, 50)


def test_document_has_the_same_content_in_every_form():
    title = "cifar_100, imbalance 100"
    blocks = [
        writers.Block(TABLE, title, "A headline.", "A note"),
        writers.Block(TABLE, words="Paired, the tail:"),
    ]
    text, markdown, latex = (writers.document(blocks, form) for form in writers.FORMS)
    assert (
        text.startswith(f"{title}\nA headline.\n\nmethod")
        and "\n(A note)\n\nPaired" in text
    )
    assert markdown.startswith(f"## {title}\n\nA headline.\n\n| method |")
    assert "\n\nA note.\n\nPaired, the tail:\n\n| method" in markdown
    assert (
        latex.count(r"\begin{table}")
        == latex.count(r"\end{table}")
        == latex.count(r"\caption{cifar\_100")
        == 2
    )
    assert r"\usepackage{booktabs}" in latex and "Paired, the tail.}" in latex
    for number in ("51.08", "48.70", "11.30"):
        assert text.count(number) == markdown.count(number) == 2 and number in latex
