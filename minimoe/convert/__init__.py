"""Models that leave for other programs, models that come from elsewhere, and dense models that become MoEs."""
