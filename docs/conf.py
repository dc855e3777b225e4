"""How Sphinx builds the documentation: `python -m sphinx -W -b html docs docs/_build`."""

import os
import sys
from pathlib import Path

import optclip

# Kernels of the pages start in the folder of their page: they find these wherever that is.
_here = Path(__file__).parent
_paths = [str(_here / "_support"), str(Path(optclip.__file__).parents[1])]
sys.path.insert(0, _paths[0])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*_paths, os.environ.get("PYTHONPATH")]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "optclip"
author = "The optclip authors"
copyright = "2026, The optclip authors"
version = release = optclip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
# Links into the pages of JAX and Optax need the network; a build without it must work as well.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
        "python": ("https://docs.python.org/3/", None),
    }

exclude_patterns = ["_build", "jupyter_execute", "**/.ipynb_checkpoints"]
suppress_warnings = ["mystnb.unknown_mime_type"]

# Pages are Markdown; their code cells are run while they are built, and again when they change.
nb_execution_mode = "cache"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_execution_excludepatterns: list[str] = []
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that cells make
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"  # of docstrings: a name in backticks is a link where it is documented
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # `scope=scopes.tree`, and not what that is made of
autodoc_typehints = "none"  # the docstrings say it in words
napoleon_use_ivar = True

toc_object_entries = False

html_theme = "sphinx_book_theme"
html_title = "optclip"
html_css_files = ["optclip.css"]
html_static_path = ["_static"]
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "show_navbar_depth": 2,
    "navbar_persistent": [],
}


def _keep_caches_in_the_output(app, config):
    config.nb_execution_cache_path = str(Path(app.outdir) / ".jupyter_cache")
    # Pages compile the same small programs; together they take a third of the time.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(app.doctreedir) / "jax_cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _returns_have_no_type(app, what, name, obj, options, lines):
    """Napoleon takes what stands before the first colon of "Returns:" for a type; not here."""
    for place, line in enumerate(lines):
        if line.strip() == "Returns:":
            lines.insert(place + 1, "    \\ ")
            return


def _list_what_there_is(app, page, source):
    import listing

    source[0] = listing.filled(source[0])


def setup(app):
    """What Sphinx calls when it has read this file."""
    app.connect("source-read", _list_what_there_is)
    app.connect("autodoc-process-docstring", _returns_have_no_type, priority=400)
    app.connect("config-inited", _keep_caches_in_the_output)
