"""The reference pages of the docs, made from the code: every key of a config, every command with its options.

python -m scripts.docs           write docs/reference/
bash scripts/docs.sh             that, and the site: docs/_build/html/index.html
"""
