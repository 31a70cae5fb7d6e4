"""Configures Sphinx; pages with code cells are notebooks, run at each build."""

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
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"

# Kernels inherit this environment's `python`, the checkout's packages and a compilation
# cache. Figures are SVG with a transparent background; custom.css inverts them on dark
# pages.
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
    "c = get_config()\n"
    'c.InlineBackend.figure_formats = {"svg"}\n'
    "c.IPKernelApp.log_level = 40\n"
)
# At INFO, traitlets reports the execution of each page a second time.
logging.getLogger("traitlets").setLevel(logging.WARNING)

# The API reference. Single backticks in docstrings are code, and a link if they name an
# object.

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings give shapes; most type hints are ArrayLike
napoleon_custom_sections = [("Attributes", "params_style")]
add_module_names = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

# Appearance.

html_theme = "furo"
# MathJax is part of the site, so that pages need no network. As a Sphinx extension the
# package would not allow a parallel build (`-j`).
mathjax = pathlib.Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
html_static_path = ["_static", str(mathjax / "static")]
mathjax_path = "mathjax/tex-chtml.js"
html_css_files = ["custom.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"


def _markup(app, what, name, obj, options, lines):
    """Marks up plain-text docstrings: indented paragraphs are verbatim formulas."""
    marked_up = []
    previous = ""  # the last line that is not blank
    in_formula = False
    in_example = False
    for line in lines:
        if line.strip():
            indented = line.startswith("    ")
            after_blank = bool(marked_up) and not marked_up[-1].strip()
            formula_begins = (
                indented and after_blank and previous and not previous.startswith(" ")
            )
            if formula_begins:
                marked_up += [".. code-block:: text", ""]
            in_formula = bool(formula_begins) or (in_formula and indented)
            previous = line
        in_example = line.lstrip().startswith(">>>") or (
            in_example and bool(line.strip())
        )
        if not in_formula and not in_example:
            # Else `|x|` would be a substitution and `**2` the start of bold text.
            line = line.replace("|", r"\|").replace("**", r"\*\*")
        marked_up.append(line)
    lines[:] = marked_up


def _skip_fields(app, what, name, obj, skip, options):
    """Skips the fields of named tuples, which their docstrings describe."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _library():
    """Returns a hash of the code; a change of this config value rebuilds all pages."""
    digest = hashlib.sha256()
    for package in ("ltkd_jax", "experiments", "configs"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def setup(app):
    app.add_config_value("library", _library(), "env")
    app.connect("autodoc-process-docstring", _markup, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", _skip_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
