"""Whether minimoe computes on this GPU what it computes elsewhere, how fast, and what it learns meanwhile."""
