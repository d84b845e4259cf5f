"""The rows of an array, block by block, over the processes of torch.distributed."""

from collections.abc import Iterable
from typing import Any

from collapse import InputError
from collapse.encoders import processes
from collapse.spectra.measurement import Measurement


def update_shared(rows: Measurement, batches: Iterable[Any]) -> None:
    """Add the batches (b, d), one in N in each of N processes, until each has the statistics of all.

    Raises InputError: of the first batch that is refused, in all processes; torch.distributed was not started.
    """
    processes.require(True)
    refused: tuple[int, InputError] | None = None
    place = 0
    try:
        for place, batch in enumerate(batches):
            rows.update(batch, elsewhere=place % processes.world() != processes.rank())
    except InputError as error:
        refused = place, error
    errors = [refusal for refusal in processes.collect(refused) if refusal is not None]
    if errors:
        raise min(errors, key=lambda refusal: refusal[0])[1]
    rows.all_reduce()
