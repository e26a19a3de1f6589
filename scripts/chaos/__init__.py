"""The long proof that a run survives; the tests use the same code for a short one.

    python -m scripts.chaos --kills 100 --seed 0

Kills real training runs at random moments, at every failpoint of saving and by full disks (`kills.py`), feeds
malformed input to every command (`malformed.py`), and puts the same accidents to transformers.Trainer and accelerate
(`peers.py`). About 15 minutes on 2 cores for 100 kills. Writes runs/chaos/*.json and docs/results/chaos.md
(`report.py`); exits with 1 when anything was not as promised. Another seed gives other moments and other input.
"""
