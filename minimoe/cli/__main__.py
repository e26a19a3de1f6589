"""`python -m minimoe.cli`, as torchrun starts it."""

from minimoe.cli import program

program()
