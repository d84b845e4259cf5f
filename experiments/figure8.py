"""Figure 8 of the paper, small: spectra of the representation with and without a projector; 3 seeds each.

    python experiments/figure8.py    # from the runs that are there; --data trains the rest

Writes experiments/results/figure8.json (of each regime: head -> a list a seed of singular values of the covariance,
descending; relaxed: the same of each temperature of relaxation.npz; floor) and figures/figure8.png and .pdf.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "networks"))
import summary

if __name__ == "__main__":
    summary.spectra(__file__, ("mlp", "linear", "none"), "singular_values")
