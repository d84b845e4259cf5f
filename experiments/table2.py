"""Table 2 of the paper, small: what a projector must be, trainable, diagonal, low-rank or fixed; 2 seeds or more each.

    python experiments/table2.py     # from the runs that are there; --data trains the rest

The fixed low-rank diagonal projector is DirectCLR.  Writes experiments/results/table2.json (as table1.json) and
figures/table2.png and .pdf.
"""

import summary
from summary import Meta

HEADS = ("none", "orthogonal", "linear", "diagonal", "lowrank", "directclr")


def summarise(runs: summary.Runs) -> Meta:
    """Rows and claims."""
    table = summary.rows(runs, HEADS, 3)
    return {"rows": table, "claims": summary.claims(table), "rank_claims": summary.claims(table, "effective_rank")}


def report(found: Meta) -> str:
    """Table and claims."""
    return f"{summary.table_text(found['rows'])}\n{summary.claims_text(found['claims'])}"


if __name__ == "__main__":
    patterns = [f"{head}-s?" for head in HEADS]
    summary.main(__file__, patterns, summarise, report, lambda found: summary.draw_table(found["rows"]))
