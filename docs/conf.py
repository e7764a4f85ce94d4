"""The site: `make docs` builds it with every warning an error, and what it builds names no other
host's fonts, styles or scripts."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "src")]

import diskwright  # noqa: E402

project = "diskwright"
author = "the diskwright developers"
release = version = diskwright.__version__
html_title = f"diskwright {release}"
html_theme = "furo"
smartquotes = False  # they would make one dash of two, in options too
html_copy_source = html_show_sourcelink = html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "declared"]
exclude_patterns = ["_build", "_ext"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
# A page says "not run" and "setup" to the tests, in comments.
suppress_warnings = ["myst.strikethrough"]

nitpicky = True
# What annotations name and the reference does not describe: types of Python, aliases, parts of the
# inside.  Everything that a docstring names by a role must be there.
nitpick_ignore_regex = [("py:(class|data|obj)", r"(?!diskwright\.).*|diskwright\.aio\._Opening")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"exclude-members": "__init__, __new__, count, index"}
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries = False
maximum_signature_line_length = 90
