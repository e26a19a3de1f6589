"""Faster forms of the definitions in `model/`."""
