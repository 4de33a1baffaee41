"""The folder of a run: whose it is, what is in it, and whether there is room for the work.

Its name says what ran. A finished run is replaced only when asked to; a lock, which ends with the process that holds
it, however that ends, keeps two processes out of one folder; and that the folder can be written to is known before the
work begins.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from training import checkpoints, processes
from training.settings import MAY_CHANGE_ON_RESUME, Settings

_SHORT = {"sphere": "sp", "oblique": "ob", "stiefel": "st", "euclidean": "euc"}
_MARGIN = 16 * 2**20  # bytes for tables and pictures
_FILES = ("run.yaml", "results.json", "model.pt", "curves.png", "epochs.csv", "checkpoints", "tensorboard")


class FolderError(RuntimeError):
    """A folder that the run cannot have: the message says why, and what to do."""


def name_of(settings: Settings) -> str:
    """What ran: data, model, method, manifolds, seed."""
    data, geometry, optim = settings.data, settings.geometry, settings.optim
    words = [data.data, settings.model.model, optim.optimizer]
    kinds = "+".join(_SHORT[kind] for kind in geometry.manifolds or ())
    if kinds != "euc" or geometry.linear_manifold != "euclidean":
        words += [geometry.strategy or "pio", kinds]
    words += [word for word, is_set in _extras(settings) if is_set]
    return "-".join([*words, f"seed{settings.run.seed}"])


def _extras(s: Settings) -> list[tuple[str, bool]]:
    optim = s.optim
    return [
        (f"on-{optim.on_manifolds}", optim.on_manifolds != "none"),
        ("projected", optim.project),
        ("renormalized", s.geometry.renormalize),
        (f"scales-{s.geometry.scales}", s.geometry.scales != "none"),
        (optim.channel_directed, optim.channel_directed != "none"),
        ("constant", optim.step_size == "constant"),
        ("validation", s.data.validation),
    ]


class RunFolder:
    """The folder of one run, held by this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.results = path / "results.json"
        self.settings = path / "run.yaml"

    def finished(self) -> dict[str, Any] | None:
        """The results of the run, None if it has not come to its end."""
        try:
            return json.loads(self.results.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def begun(self) -> dict[str, Any] | None:
        """The settings of the run in it, None if there is none."""
        try:
            content = yaml.safe_load(self.settings.read_text(encoding="utf-8"))
        except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
            return None
        return content if isinstance(content, dict) else None

    def write_settings(self, settings: Settings) -> None:
        """Leave the effective settings, as a file for ``--config``."""
        text = yaml.safe_dump(settings.plain(), sort_keys=False, allow_unicode=True)
        checkpoints.write(self.settings, text.encode())

    def clear(self) -> None:
        """Delete the run in it, and nothing else that may lie there."""
        for name in _FILES:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def recorded(arguments: list[str]) -> dict[str, Any]:
    """The settings of the run that ``--resume --output FOLDER`` names, {} if these are not given."""
    if "--resume" not in arguments:
        return {}
    for number, word in enumerate(arguments):
        if word == "--output" and number + 1 < len(arguments):
            return RunFolder(Path(arguments[number + 1])).begun() or {}
        if word.startswith("--output="):
            return RunFolder(Path(word.partition("=")[2])).begun() or {}
    return {}


@contextmanager
def opened(settings: Settings) -> Iterator[RunFolder]:
    """Hold the folder of a run; on many processes, the first does for all.

    Raises:
        FolderError: If another process has it, it holds another run or a finished one, or cannot be written to.
    """
    folder = RunFolder(settings.run.output or settings.run.runs / name_of(settings))
    lock, problem = None, None
    if processes.is_first():
        try:
            lock = _lock(folder)
            _claim(folder, settings)
        except FolderError as error:
            problem = str(error)
    problem = processes.from_first(problem)
    try:
        if problem:
            raise FolderError(problem)
        yield folder
    finally:
        if lock is not None:
            lock.release()


def _lock(folder: RunFolder) -> FileLock:
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.path / ".lock")
        lock.acquire(blocking=False)
    except Timeout as error:
        raise FolderError(
            f"another process is at work in {folder.path}: wait for it, or choose another --output or --seed"
        ) from error
    except OSError as error:
        raise FolderError(
            f"cannot write to {folder.path} ({error.strerror}): choose another --output or --runs"
        ) from error
    return lock


def _claim(folder: RunFolder, settings: Settings) -> None:
    """Refuse what would be lost, and clear what is to be replaced."""
    run, begun = settings.run, folder.begun()
    if run.overwrite:
        folder.clear()
        begun = None
    if begun is not None and (run.resume or folder.finished() is not None or _is_worth_keeping(folder)):
        _compare(folder, settings, begun)
    if not run.resume and folder.finished() is None:
        if _is_worth_keeping(folder):
            raise FolderError(
                f"{folder.path} holds an interrupted run: add --resume to continue it, --overwrite to delete it, or "
                "choose another --output or --seed"
            )
        folder.clear()
    try:
        folder.checkpoints.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.checkpoints) as file:
            file.write(b"0")
    except OSError as error:
        raise FolderError(f"cannot write to {folder.path} ({error.strerror}): choose another --output") from error
    checkpoints.remove_unfinished(folder.path)
    checkpoints.remove_unfinished(folder.checkpoints)


def _is_worth_keeping(folder: RunFolder) -> bool:
    """Whether there is a step to continue from: a whole checkpoint that is not of the very start."""
    state = checkpoints.load(folder.checkpoints).state
    return state is not None and state["progress"]["step"] > 0


def _compare(folder: RunFolder, settings: Settings, begun: dict[str, Any]) -> None:
    asked = settings.plain()
    for name in sorted({*asked, *begun} - MAY_CHANGE_ON_RESUME):
        if asked.get(name) != begun.get(name):
            flag = f"--{name.replace('_', '-')}"
            what = f"{flag} {_shown(begun.get(name))}, not {_shown(asked.get(name))}"
            if settings.run.resume:
                if name == "time_constant":
                    what += f": it is a third of --epochs unless given, so add {flag} {_shown(begun.get(name))}"
                raise FolderError(f"--resume: the run in {folder.path} has {what}")
            raise FolderError(
                f"{folder.path} holds another run, with {what}: choose another --output, or add --overwrite to "
                "delete it"
            )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return ",".join(map(str, value)) if isinstance(value, list) else "auto" if value is None else str(value)


def require_room(folder: RunFolder, bytes_of_checkpoint: int) -> None:
    """Refuse to begin where the checkpoints of a run would not fit.

    Raises:
        FolderError: With the numbers.
    """
    needed = (checkpoints.KEPT + 1) * bytes_of_checkpoint + _MARGIN
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        raise FolderError(
            f"{folder.path} is on a disk with {free / 2**20:,.0f} MiB free; checkpoints need "
            f"{needed / 2**20:,.0f} MiB: make room, or choose another --output"
        )
