"""Figure 2 of the paper, small: the spectrum of the embedding, behind SimCLR's two-layer projector; 3 seeds.

    python experiments/figure2.py    # from the runs that are there; --data trains the rest

Writes experiments/results/figure2.json (of each regime: head -> a list a seed of singular values of the covariance,
descending; relaxed: the same of each temperature of relaxation.npz; floor) and figures/figure2.png and .pdf.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "networks"))
import summary

if __name__ == "__main__":
    summary.spectra(__file__, ("mlp",), "embedding_singular_values", beside=("directclr",))
