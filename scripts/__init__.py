"""Programs beside the package: the quickstart's corpus and scorer, the benchmark, and accidents for training runs.

They are run from the repository's root, as `python -m scripts.benchmark`, or by the shell scripts in this folder.
"""
