"""Kill a training run at many moments, resume it, and compare it to the bit with a run that nobody killed.

    python tests/kill_training.py                    # 20 moments; one process, and two by DDP and by FSDP2
    python tests/kill_training.py --moments 5 --only fsdp2

A moment is a call of something that matters: gradients, an evaluation, or, while a checkpoint is written, the flush to
the disk and the renaming, before and after each. ``SIGKILL`` leaves no time for anything there. The processes are
forked from a server that has imported everything, so that a moment takes a second or two.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import trainer
from trainer import bits, load

os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["trainer"])
RUN = ("--fraction", "0.1", "--batch-size", "16", "--epochs", "2", "--checkpoint-steps", "4", "--evaluate-every", "1")


def child(arguments: Sequence[str], environment: dict[str, str], log: Path, prepare: Callable[[], None] | None) -> None:
    """Train, in a process of its own, with output into a file."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    trainer.reporting.draw_curves = lambda path, history: None  # half a second
    if prepare is not None:
        prepare()
    status = trainer.train.main(list(arguments))
    sys.stdout.flush()
    os._exit(status)  # at once: nothing of this process is to be waited for


def start(
    arguments: Sequence[str], log: Path, world: int = 1, prepare: Mapping[int, Callable[[], None]] | None = None
) -> list[BaseProcess]:
    """Start a run on one or many processes, after preparing some of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for number in range(world):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
        environment |= {"RANK": str(number), "LOCAL_RANK": str(number)}
        log_of = log.with_suffix(f".{number}.log")
        arguments_of = (arguments, environment, log_of, (prepare or {}).get(number))
        processes.append(CONTEXT.Process(target=child, args=arguments_of))
        processes[-1].start()
    return processes


def finish(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Wait until all have ended, or one has died, which ends the others, as torchrun would; return exit codes."""
    running = list(processes)
    while running:
        ended = wait([process.sentinel for process in running], timeout=120)
        if not ended or any(process.exitcode not in (0, None) for process in processes):
            for process in processes:
                process.kill()
        running = [process for process in running if process.is_alive()]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


class Moments:
    """Count the moments of a run, and kill its process at one of them (0: at none)."""

    def __init__(self, at: int, count_into: Path | None = None) -> None:
        self.at, self.count_into, self.count = at, count_into, 0

    def __call__(self) -> None:
        """Watch what matters."""
        engine = trainer.engine
        engine.accumulate_gradients = self._watched(engine.accumulate_gradients)
        engine.evaluate = self._watched(engine.evaluate)
        os.fsync = self._watched(os.fsync)
        Path.replace = self._watched(Path.replace)  # pyright: ignore

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            self._pass()
            result = function(*args)
            self._pass()
            return result

        return watched

    def _pass(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count_into is not None:
            self.count_into.write_text(str(self.count))


def kill_and_resume(folder: Path, moments: int, world: int, flags: Sequence[str] = ()) -> list[tuple[int, int, str]]:
    """Kill a run at evenly spread moments; return (moment, process killed, "identical" or what else came of it)."""
    straight, counts = folder / "straight", [folder / f"count{rank}" for rank in range(world)]
    arguments = (*RUN, *flags)
    log = folder / "log"
    counting = {rank: Moments(0, count) for rank, count in enumerate(counts)}
    codes = finish(start([*arguments, "--output", str(straight)], log, world, counting))
    assert codes == [0] * world, log.with_suffix(".0.log").read_text()
    expected = bits(load(straight))
    outcomes = []
    for number in range(moments):
        victim = number % world
        at = 1 + int(int(counts[victim].read_text()) * (number + 0.5) / moments)
        output = folder / "killed"
        shutil.rmtree(output, ignore_errors=True)
        codes = finish(start([*arguments, "--output", str(output)], log, world, {victim: Moments(at)}))
        killed = codes[victim] == -signal.SIGKILL
        codes = finish(start([*arguments, "--resume", "--output", str(output)], log, world))
        if not killed:
            outcome = "NOT KILLED"
        elif codes != [0] * world:
            outcome = f"NOT RESUMED, status {codes}: {log.with_suffix('.0.log').read_text()[-300:]!r}"
        else:
            outcome = "identical" if bits(load(output)) == expected else "DIFFERS"
        outcomes.append((at, victim, outcome))
    return outcomes


def elastic(arguments: Sequence[str], log: Path, at: int) -> None:
    """What torchrun does with ``--max-restarts 1 --nproc-per-node 2``; the first time, process 1 dies in a step."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.dup2(os.open(log.with_suffix(".agent.log"), os.O_WRONLY | os.O_CREAT), 2)
    config = LaunchConfig(
        1,
        1,
        2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        start_method="forkserver",
        local_addr="localhost",
    )
    elastic_launch(config, worker)(list(arguments), log, at)


def worker(arguments: list[str], log: Path, at: int) -> None:
    """One of the processes that torchrun starts, and starts again."""
    is_restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    with log.with_suffix(f".{os.environ['RANK']}.{int(is_restarted)}.log").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    engine, steps = trainer.engine, itertools.count(1)
    take_step = engine.take_step

    def fatal(*args: Any) -> Any:
        if next(steps) == at and not is_restarted and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(*args)

    engine.take_step = fatal
    if trainer.train.main(arguments):
        raise RuntimeError("the run has failed")


WAYS = {
    "one": (1, ()),
    "ddp": (2, ()),
    "fsdp2": (2, ("--parallel", "fsdp2", "--norm", "batch", "--ema", "0.9")),
}


def main() -> int:
    """Print the outcome of every moment; return the exit status."""
    parser = argparse.ArgumentParser(description="Kill a training run at many moments, and resume it.")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--only", choices=WAYS, nargs="+", default=list(WAYS))
    settings = parser.parse_args()
    good = True
    for name in settings.only:
        world, flags = WAYS[name]
        with tempfile.TemporaryDirectory() as folder:
            outcomes = kill_and_resume(Path(folder), settings.moments, world, flags)
        for at, victim, outcome in outcomes:
            print(f"{name}: killed process {victim} of {world} at moment {at}: {outcome}")
        same = sum(outcome == "identical" for *_, outcome in outcomes)
        print(f"{name}, {world} process(es): {same} of {len(outcomes)} identical", flush=True)
        good &= same == len(outcomes)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
