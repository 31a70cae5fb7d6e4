"""The site: Sphinx with MyST Markdown; every page with code cells is a notebook that is run when the site is built."""

import hashlib
import importlib.util
import logging
import os
import pathlib
import sys

import ltkd_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = pathlib.Path(os.environ.get("LTKD_DOCS_BUILD", ROOT / "docs" / "_build"))

project = "ltkd_jax"
version = release = ltkd_jax.__version__
html_title = "ltkd_jax"
copyright = "the authors of ltkd_jax, Apache 2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

# Pages.

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "myst-nb"}

# Cells.

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_merge_streams = True

# What a kernel inherits: this environment's `python`, the checkout's packages, a compilation cache, and figures that
# are SVG with a transparent ground (custom.css turns their ink around on dark pages).
os.environ["PATH"] = os.pathsep.join(
    [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
)
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.environ.get("LTKD_CACHE", str(ROOT / ".jax_cache"))
)
os.environ["MATPLOTLIBRC"] = str(ROOT / "docs" / "matplotlibrc")
os.environ["IPYTHONDIR"] = str(BUILD / "ipython")
profile = BUILD / "ipython" / "profile_default"
profile.mkdir(parents=True, exist_ok=True)
(profile / "ipython_kernel_config.py").write_text(
    'c = get_config()\nc.InlineBackend.figure_formats = {"svg"}\nc.IPKernelApp.log_level = 40\n'
)
logging.getLogger("traitlets").setLevel(logging.WARNING)  # or each page is told twice

# The reference. Single backticks of a docstring are code, and a link where they name something.

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings tell shapes, which say more than ArrayLike does
napoleon_custom_sections = [("Attributes", "params_style")]
add_module_names = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

# The look.

html_theme = "furo"
# MathJax lies in the site, so that a page needs no network. As an extension the package would forbid `-j`.
mathjax = pathlib.Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
html_static_path = ["_static", str(mathjax / "static")]
mathjax_path = "mathjax/tex-chtml.js"
html_css_files = ["custom.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"


def _markup(app, what, name, obj, options, lines):
    """A docstring is plain text: an indented paragraph is a formula, shown as it is typed; bars and asterisks stay."""
    marked_up = []
    last = ""
    formula = False
    example = False
    for line in lines:
        if line.strip():
            begins = (
                line.startswith("    ")
                and last
                and not last.startswith(" ")
                and not marked_up[-1].strip()
            )
            marked_up += [".. code-block:: text", ""] if begins else []
            formula = bool(begins) or (formula and line.startswith("    "))
            last = line
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        marked_up.append(
            line
            if formula or example
            else line.replace("|", r"\|").replace("**", r"\*\*")
        )
    lines[:] = marked_up


def _skip_fields(app, what, name, obj, skip, options):
    """A named tuple's fields stand in its docstring."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _library():
    """A hash of the code that the pages run: where it changes, all of them are run again."""
    files = (
        path
        for room in ("ltkd_jax", "experiments", "configs")
        for path in sorted((ROOT / room).rglob("*.py"))
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def setup(app):
    app.add_config_value("library", _library(), "env")
    app.connect("autodoc-process-docstring", _markup, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", _skip_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
