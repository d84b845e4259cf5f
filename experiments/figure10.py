"""Figure 10 of the paper, small: spectra of the representation under DirectCLR and under SimCLR's projectors.

    python experiments/figure10.py    # from the runs that are there; --data trains the rest

Writes experiments/results/figure10.json (of each regime: head -> a list a seed of singular values of the covariance,
descending; relaxed: the same of each temperature of relaxation.npz; floor) and figures/figure10.png and .pdf.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "networks"))
import summary

if __name__ == "__main__":
    summary.spectra(__file__, ("directclr", "mlp", "linear", "none"), "singular_values")
