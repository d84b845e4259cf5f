"""Table 1 of the paper, small: SimCLR with a two-layer, a linear and no projector, and DirectCLR; 3 seeds each.

    python experiments/table1.py                        # from the runs that are there
    python experiments/table1.py --data cifar10.zip     # train what is missing, see networks/study.py

Writes experiments/results/table1.json and figures/table1.png and .pdf.  rows: method, head, and a list over seeds of
each measure, of the regime chosen; each regime with its rows and claims: pairs of rows, with the interval of the
difference and Welch's p; rank_claims and collapsed_claims: the same of effective_rank and collapsed_dimensions_1e-03.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "networks"))
import summary

if __name__ == "__main__":
    summary.tables(__file__, ("mlp", "linear", "none", "directclr"))
