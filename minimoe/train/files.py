"""Names of what is in the folder of a run."""

from __future__ import annotations

CONFIG_FILE, STATUS_FILE = "config.yaml", "status.json"
FACTS_FILE = "run.json"  # what was known at the start: sizes, versions, machine
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"  # texts that the model made while it was trained: step, prompt, text, seconds
ROLLOUTS_FILE = "rollouts.jsonl"  # of GRPO: every answer
REPORT_FILE = "report.html"
CHARTS_FOLDER = "charts"  # the report's charts as PNGs
CHECKPOINTS = "checkpoints"
SKIPPED_FOLDER = "skipped"  # batches of the steps that were left out
