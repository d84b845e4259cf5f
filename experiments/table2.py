"""Table 2 of the paper, small: what a projector must be, trainable, diagonal, low-rank or fixed; 2 seeds or more each.

    python experiments/table2.py    # from the runs that are there; --data trains the rest

The fixed low-rank diagonal projector is DirectCLR.  Writes experiments/results/table2.json (as table1.json) and
figures/table2.png and .pdf.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "networks"))
import summary

if __name__ == "__main__":
    summary.tables(__file__, ("none", "orthogonal", "linear", "diagonal", "lowrank", "directclr"))
