"""Table 1 of the paper, small: SimCLR with a two-layer, a linear and no projector, and DirectCLR; 3 seeds each.

    python experiments/table1.py                                  # from the runs that are there
    python experiments/table1.py --data cifar10.zip               # train what is missing, see study.py
    torchrun ... experiments/study.py --data imagenet --preset imagenet --only mlp-s0     # a row's seed on ImageNet

Writes experiments/results/table1.json (rows: method, head, and a list over the seeds of each measure; claims: each pair
of rows, with the interval of the difference and Welch's p) and figures/table1.png and .pdf.
"""

import study
import summary
from summary import Meta


def summarise(runs: summary.Runs) -> Meta:
    """Rows and claims."""
    table = summary.rows(runs, ("mlp", "linear", "none", "directclr"), 3)
    return {"rows": table, "claims": summary.claims(table), "rank_claims": summary.claims(table, "effective_rank")}


def report(found: Meta) -> str:
    """Table and claims."""
    return f"{summary.table_text(found['rows'])}\n{summary.claims_text(found['claims'])}"


if __name__ == "__main__":
    patterns = [f"{head}-s[0-2]" for head in study.FOUR]
    summary.main(__file__, patterns, summarise, report, lambda found: summary.draw_table(found["rows"]))
