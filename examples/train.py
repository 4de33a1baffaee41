"""Train an image classifier whose weights live on manifolds, and see what came of it.

    python examples/train.py                      # digits, less than two minutes on two CPU cores
    python examples/train.py --method euc         # the same network without manifolds
    python examples/train.py --data fashion --method pio --seed 1
    python examples/train.py --config runs/.../run.yaml --lr 0.1
    python examples/train.py --resume             # continue after Ctrl-C, to the identical result
    torchrun --nproc-per-node 8 examples/train.py --data imagefolder --data-dir imagenet --model resnet50

``training.engine.build`` shows how to use ``fgo_geo``: say which weights live on which manifold, then train with
``RiemannianFGSGD`` as with any torch optimiser. The run prints a line per epoch and leaves its settings, figures,
curves, weights and checkpoints in its folder. The guide is docs/guides/train.md.
"""

from __future__ import annotations

import json
import shlex
import sys

from training import checkpoints, command_line, engine, folder, processes, reporting
from training.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says; return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    settings = command_line.parse(words, "train.py", command_line.words_of(folder.recorded(words)))
    display = reporting.Display()
    try:
        with processes.group(settings.run.device or "cpu"), folder.opened(settings) as here:
            return run(settings, here, display)
    except checkpoints.WriteError as error:
        return refuse(f"{error}: the checkpoint before it is kept; make room, then --resume")
    except (FileNotFoundError, ValueError, folder.FolderError) as error:
        return refuse(error)


def refuse(reason: object) -> int:
    """Say what is wrong, once; return the exit status."""
    if processes.is_first():
        print(f"error: {reason}", file=sys.stderr)
    return 2


def run(settings: Settings, here: folder.RunFolder, display: reporting.Display) -> int:
    """Train in a folder that is ours; return the exit status."""
    results = processes.from_first(here.finished())
    if results and results["settings"]["epochs"] >= settings.optim.epochs:
        display.say(f"This run is finished:\n{verdict(results, here)}")
        display.say(
            "Train it again with --overwrite, take another --seed, or train it longer with\n"
            f"--resume --time-constant {settings.optim.time_constant:g} and more --epochs."
        )
        return 0
    run = engine.build(settings)
    with checkpoints.agreed(here.path):
        if processes.is_first():
            folder.require_room(here, engine.bytes_of_state(run.model))
    try:
        restored = restore(run, here, display)
    except checkpoints.DamageError as error:
        display.say(str(error))
        return 2
    size = f"{len(run.splits.train):,} training images, {len(run.splits.test):,} {run.splits.held_out}"
    display.say(reporting.describe(settings, run.plan, run.model, size))
    if processes.is_first():
        here.write_settings(settings)
    if not restored:
        save(run, here)
    display.header()
    try:
        with display.progress_bar(), run.signals.handled():
            engine.fit(run, lambda run: save(run, here), display.epoch, display.track)
    except engine.Stopped:
        resume = ["python", sys.argv[0], "--resume", "--output", str(here.path)]
        progress = run.progress
        display.say(
            f"Interrupted; the checkpoint holds {progress.batch} of {run.order.batches} steps of epoch "
            f"{progress.epoch}. Continue with\n  {shlex.join(resume)}"
        )
        return 128 + (run.signals.received or 15)
    except engine.Diverged as error:
        kept = here.checkpoints
        display.say(
            f"Stopped: {error}. Start again with a smaller --lr, or with --clip; the last good checkpoint is in {kept}"
        )
        return 3
    results = write(run, here)
    display.say(verdict(results, here))
    return 0


def restore(run: engine.Run, here: folder.RunFolder, display: reporting.Display) -> bool:
    """Continue from the newest checkpoint that is whole; return whether there is one.

    Raises:
        DamageError: If all of them are damaged.
    """
    if not run.settings.run.resume:
        return False
    found = checkpoints.load(here.checkpoints)
    for line in found.damage:
        display.say(line)
    if found.state is None and found.damage:
        raise checkpoints.DamageError(f"No checkpoint in {here.checkpoints} can be read: start again with --overwrite")
    if found.state is None:
        display.say(f"Nothing to resume in {here.path}: starting")
        return False
    run.restore(found.state, found.path)
    progress = run.progress
    display.say(f"Resumed after {progress.step:,} steps, in epoch {progress.epoch}")
    return True


def save(run: engine.Run, here: folder.RunFolder) -> None:
    """Write a checkpoint, and the figures of the epochs so far."""
    state = run.state()
    if not engine.is_finite(run.model):
        raise engine.Diverged(f"a weight is not finite after step {run.progress.step} in epoch {run.progress.epoch}")
    if run.is_sharded:
        from training import sharded

        sharded.save(here.checkpoints, run.progress.step, state, run.shards(state["has_stepped"]))
    with checkpoints.agreed(here.path):
        if not processes.is_first():
            return
        if not run.is_sharded:
            checkpoints.save(here.checkpoints, run.progress.step, state)
        history = run.progress.history
        if history:
            reporting.write_csv(here.path / "epochs.csv", history)
            if run.settings.run.tensorboard and not run.progress.batch:
                reporting.write_tensorboard(here.path / "tensorboard", history[-1:])


def write(run: engine.Run, here: folder.RunFolder) -> dict[str, object]:
    """Write weights, curves and results; return the results."""
    final = engine.final_figures(run) | {"calibrated_loss": engine.calibrated(run)}
    results = {
        "settings": run.settings.plain(),
        "plan": json.loads(run.plan.to_json()) if run.plan else None,
        "final": final,
        "held_out": f"{len(run.splits.test)} {run.splits.held_out}",
        "epochs": run.progress.history,
        "versions": reporting.versions(),
    }
    with checkpoints.agreed(here.path):
        engine.save_model(run, here.path / "model.pt")
        if processes.is_first():
            reporting.draw_curves(here.path / "curves.png", run.progress.history)
            reporting.write_json(here.results, results)
    return results


def verdict(results: dict[str, object], here: folder.RunFolder) -> str:
    """Sum up a finished run."""
    final = results["final"]
    violation = final["largest_violation"]
    worst = "none, no weight is constrained" if violation is None else f"{violation:.1e} (relative)"
    skipped = f"\nSteps skipped, not finite: {final['skipped_steps']}" if final["skipped_steps"] else ""
    return (
        f"Final accuracy: {final['test_accuracy']:.2%} of {results['held_out']} ({final['seconds']:.0f} s)\n"
        f"Largest constraint violation: {worst}{skipped}\n"
        f"Files: {here.path}\n       results.json, epochs.csv, curves.png, model.pt"
    )


if __name__ == "__main__":
    sys.exit(main())
