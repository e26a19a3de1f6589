"""The docs as a site: `bash scripts/docs.sh`."""

project = "minimoe"
author = "minimoe authors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "minimoe"
exclude_patterns = ["_build", "results/*.json"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
suppress_warnings = ["myst.header"]  # pages of results begin where their makers begin
