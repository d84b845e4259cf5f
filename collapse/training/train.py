"""Training without labels: SimCLR with any head, DirectCLR (arXiv 2110.09348, sections 3 and 6), and other losses.

`train` goes on where the RUN's last save is, and on a CPU gives the same weights and curve as if it had never stopped:
batches and draws are functions of (seed, epoch, image, view), the schedule of the step, and all else is in the save.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from collapse import InputError
from collapse.data.labelled import Labelled, to_memory
from collapse.encoders import processes
from collapse.recipes.config import Config
from collapse.training.loader import BatchOrder
from collapse.training.loop import Loop
from collapse.training.network import holds, resolve, save_encoder
from collapse.training.online import Evaluation
from collapse.training.run import Run
from collapse.training.state import Options, Training


def train(
    folder: Path, config: Config, data: Labelled, val: Labelled | None = None, options: Options | None = None
) -> Iterator[dict[str, Any]]:
    """Train, or go on training, in `folder`; yields each line of the log, as it is written, and at an epoch's end.

    val: held-out images for the spectra and the other measurements; None measures nothing.
    In several processes, every one calls it with the same arguments; the first writes. A finished run yields nothing.

    Raises:
        InputError: a run of another configuration or another process in `folder`, fewer images than a batch, a batch
            that the processes cannot share, a loss that is not finite, a disk without room, no memory.
        SystemExit, KeyboardInterrupt: `options.stop` returned a signal; the state is saved.
    """
    options = options or Options()
    plan = _plan(config, data)
    digests = {"images": len(data), "digest": data.digest, "held_digest": val.digest if val else None}
    same = {name: value for name, value in vars(options).items() if name not in ("device", "stop")}
    processes.agree(repr((resolve(config), digests, same, torch.__version__)), "configuration, options, data or torch")
    run = None
    try:
        training = Training(config, len(data.classes), plan, options)
        former = {"digest": data.names_digest, "held_digest": val.names_digest if val else None}
        run = _open_run(folder, training, digests, former)
        if processes.lead(lambda: run is not None and _finished(run, training)):
            return
        data = to_memory(data, options.workers)
        monitor = None
        if val is not None and (options.spectrum_every != 0 or options.knn_every):
            monitor = Evaluation(training.network, data, val, options.held, options.workers, options.device)
        yield from Loop(training, run, monitor).run(data)
        if run is not None:
            save_encoder(run.encoder, training.network)
            (folder / "resume.prev.pt").unlink(missing_ok=True)
    except (RuntimeError, MemoryError) as error:
        if _out_of_memory(error):
            raise InputError(
                f"out of memory at {plan.batch_size // plan.world} images a process; give checkpoint=True or chunks="
            ) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).partition("\n")[0][:150]
            raise InputError(f"torch.compile does not work here ({reason}); give compile=False") from error
        if isinstance(error, MemoryError) or not processes.is_lost(error):
            raise
        raise InputError("another process is gone; start all again: the run goes on from its last save") from error
    finally:
        if run is not None:
            run.close()


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _plan(config: Config, data: Labelled) -> BatchOrder:
    world = processes.world()
    if len(data) < config.batch_size:
        raise InputError(f"{len(data)} images, but a batch of {config.batch_size}; lower the batch size")
    if config.batch_size % world:
        raise InputError(f"a batch of {config.batch_size} cannot be shared by {world} processes; change one of them")
    per_process = config.batch_size // world
    if per_process % config.chunks:
        raise InputError(f"chunks: {config.chunks} do not divide the {per_process} images of each of {world} processes")
    return BatchOrder(len(data), config.batch_size, config.epochs, config.seed, processes.rank(), world)


def _open_run(folder: Path, training: Training, digests: dict[str, Any], former: dict[str, Any]) -> Run | None:
    """Open RUN in the first process; restore its state, if there is one, in all."""
    opened: list[Run] = []

    def act() -> dict[str, Any] | None:
        behind = training.device.startswith("cuda")  # a step of the device is worth more than a thread
        opened.append(Run(folder, training.config.as_dict(), digests, behind, former))
        size = sum(t.numel() * t.element_size() for t in training.network.state_dict().values())
        if not opened[0].encoder.exists():
            opened[0].require_space(2 * size)
        return opened[0].load()

    try:
        state = processes.lead(act)
        if state is not None:
            training.restore(state)
    except InputError:
        for run in opened:
            run.close()
        raise
    return opened[0] if opened else None


def _finished(run: Run, training: Training) -> bool:
    """Whether the final encoder is there and whole; if not, the log and the spectra are made ready to go on.

    Raises InputError: it is damaged, and there is no state to write it from.
    """
    ends = training.step == training.config.epochs * training.plan.per_epoch
    if run.encoder.exists():
        if holds(run.encoder, training.network if ends else None):
            return True
        if not training.step:
            raise InputError(f"{run.encoder}: damaged, and no state is left to write it from; choose another RUN")
        run.keep_aside(run.encoder, "it is written again from resume.pt")
    run.cut_log(training.log_bytes)
    run.check_spectra(training.step, training.measured)
    return False
