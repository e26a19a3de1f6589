"""minimoe beside other implementations and beside itself, in one run; for learning there is `minimoe sweep`.

    python -m scripts.benchmark                                      all of it, about an hour on 2 cores
    python -m scripts.benchmark --section train --shape fine         a part of it
    python -m scripts.benchmark --beside ../old --section train decode --out beside.md

The last measures another checkout's `minimoe` as the subject `before`, in the same turns. What each job does is in
`training.py`, `generation.py` and `machine.py`; they run in processes of their own (`worker.py`), interleaved
(`turns.py`). The machine's ceilings (a large matmul, a large copy and sum) are measured first, and figures are given as
shares of them too.
"""
