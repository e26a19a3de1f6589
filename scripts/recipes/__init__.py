"""What the stages after SFT reach on the quickstart, over several seeds: `python -m scripts.recipes --help`.

It needs a finished quickstart (`bash scripts/quickstart.sh`), takes an hour or more a seed on 2 cores, and writes
runs/recipes/*.json and docs/results/after_sft.md. Every figure is of held-out instructions that a program marks.
"""
