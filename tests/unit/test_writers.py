"""Tests of the writers: one table, and its LaTeX read by rules of our own, which know nothing of how it was written."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.reporting import writers
from experiments.reporting.writers import Cell, Table

TABLE = Table(
    ["method", "all", "tail", "told"],
    [
        ["ltkd (alpha=0.5, num_groups=5)", Cell("51.08", "± 0.20", bold=True), Cell("27.21", "± 11.30"), "better"],
        ["bikd over ltkd", Cell("48.70", "± 0.31"), Cell("–", quiet=True), "−0.45 ± 0.46, 95 % → n = 3"],
    ],
)


def groups_of(text):
    """Checks LaTeX's braces and math, and that each special character is escaped; returns the words it would print."""
    printed, depth, math, i = [], 0, False, 0
    while i < len(text):
        if command := re.match(r"\\([a-zA-Z]+|.)", text[i:], re.S):
            assert command[1].isalpha() or command[1] in "\\{}$&#_%`'^~=.\"", f"no such command: {command[0]}"
            # A command of letters swallows the space behind it and would melt into a letter there.
            assert not (command[1].isalpha() and len(command[1]) > 1 and text[i + len(command[0]) :][:1].isalnum())
            printed.append(command[0])
            i += len(command[0])
            continue
        letter, i = text[i], i + 1
        assert letter.isascii() and (letter.isprintable() or letter == "\n"), repr(letter)
        assert letter not in "#%~" and (math or letter not in "_^"), f"not escaped: {letter}"
        depth += (letter == "{") - (letter == "}")
        math ^= letter == "$"
        assert depth >= 0
        printed.append(letter)
    assert depth == 0 and not math
    return printed


def rows_of(latex):
    """Splits a tabular into its rows of cells; every row has as many as the preamble says."""
    kinds = re.match(r"\\begin\{tabular\}\{([lr]+)\}\n", latex)[1]
    lines = latex.splitlines()
    assert lines[1] == r"\toprule" and lines[3] == r"\midrule"
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    rows = [lines[2], *lines[4:-2]]
    assert all(row.endswith(r" \\") for row in rows)
    rows = [re.split(r"(?<!\\)&", row[:-3]) for row in rows]
    assert {len(row) for row in rows} == {len(kinds)}
    # What follows a line's end or a rule must not look like its argument.
    assert all(row[0].lstrip()[:1] not in ("[", "*") for row in rows)
    return kinds, [[cell.strip() for cell in row] for row in rows]


def test_latex_of_a_table():
    kinds, (head, first, second) = rows_of(writers.as_latex(TABLE))
    assert (kinds, head) == ("lrrr", ["method", "all", "tail", "told"])
    assert first == [r"ltkd (alpha=0.5, num\_groups=5)", r"\textbf{51.08} $\pm$ 0.20", r"27.21 $\pm$ 11.30", "better"]
    assert second[2:] == [r"\textendash{} \phantom{$\pm$ 11.30}", r"$-$0.45 $\pm$ 0.46, 95 \% $\rightarrow$ n = 3"]
    groups_of(writers.as_latex(TABLE))


@pytest.mark.parametrize(
    "text, written",
    [
        ("a_b & 5 % #1 ^~", r"a\_b \& 5 \% \#1 \textasciicircum{}\textasciitilde{}"),
        ("\\frac{1}{2} $x$", r"\textbackslash{}frac\{1\}\{2\} \$x\$"),
        ("[x] * --- <b>|", r"{[}x{]} {*} -{}-{}- \textless{}b\textgreater{}\textbar{}"),
        ("Blüte, naïve, Łódź, Çalı", r"Bl\"{u}te, na\"{i}ve, \L{}\'{o}d\'{z}, \c{C}al\i{}"),
        ("e\u0301tude τ = 4", r"\'{e}tude $\tau$ = 4"),
        ("花 🌸\x00\nb", "U+82B1 U+1F338? b"),
    ],
)
def test_latex_escapes(text, written):
    assert writers.escape_latex(text) == written


texts = st.text(max_size=20) | st.text(st.sampled_from("\\{}$&#_%^~<>|\"-[]*`' ±→−–αß\u0301\n"), max_size=12)
cells = st.builds(Cell, texts, texts, st.booleans(), st.booleans())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4).flatmap(lambda n: st.tuples(st.lists(texts, min_size=n, max_size=n),
       st.lists(st.lists(cells | texts, min_size=n, max_size=n), max_size=3))))  # fmt: skip
def test_any_table_is_sound_latex(content):
    header, rows = content
    table = Table(header, rows)
    latex = writers.as_latex(table)
    groups_of(latex)
    _, found = rows_of(latex)
    assert len(found) == 1 + len(rows)
    text = writers.document(
        [writers.Block(table, header[0], header[-1], "a note"), writers.Block(None, header[0])], "latex"
    )
    groups_of("\n".join(line.removeprefix("%") for line in text.splitlines()))
    # Markdown: a row a line, and as many cells in each.
    lines = [re.sub(r"\\\\|\\\|", "", line) for line in writers.as_markdown(table).split("\n")]
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1


def test_a_document_says_the_same_in_every_form():
    blocks = [writers.Block(TABLE, "cifar_100, imbalance 100", "A headline.", "Mean ± deviation"),
              writers.Block(TABLE, words="Paired, the tail:")]  # fmt: skip
    text, markdown, latex = (writers.document(blocks, form) for form in writers.FORMS)
    assert (
        text.startswith("cifar_100, imbalance 100\nA headline.\n\nmethod") and "\n(Mean ± deviation)\n\nPaired" in text
    )
    assert markdown.startswith("## cifar_100, imbalance 100\n\nA headline.\n\n| method |")
    assert "\n\nMean ± deviation.\n\nPaired, the tail:\n\n| method" in markdown
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == latex.count(r"\caption{cifar\_100") == 2
    assert r"\usepackage{booktabs}" in latex and "Paired, the tail.}" in latex
    for number in ("51.08", "48.70", "11.30"):
        assert text.count(number) == markdown.count(number) == 2 and number in latex
