"""A training run on disk: written atomically, resumed exactly. Safetensors and JSON only.

A run's folder holds `state.safetensors` (parameters, optimiser moments, and in its metadata which step of which
stage they belong to) and `log.jsonl` (one line per report). Killed at any moment, a run continues from the last
state with the same batches and the same loss curve, because a batch is a function of its stage and step alone.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from minivlm.errors import InputError

STATE, LOG, LOCK = "state.safetensors", "log.jsonl", ".lock"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the next step of which stage, under which recipe."""

    recipe: str
    stage: str
    step: int


def is_unused(folder: Path) -> bool:
    """Whether a run can begin here: nothing is there, an empty folder, or what a first state cut short has left."""
    if not folder.exists():
        return True
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {_unfinished(folder / STATE).name, LOCK}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One run at a time in a folder; raises InputError where another is at work."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise InputError(f"{folder}: another process is training in it") from None


def write_atomically(path: Path, write) -> None:
    """Call write(temporary path), flush to disk, then rename: readers see the old file or the new one, never half."""
    temporary = _unfinished(path)
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_state(
    folder: Path, progress: Progress, modules: nn.ModuleDict, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Write parameters and optimiser moments of a run."""
    tensors = {f"modules.{name}": value.contiguous() for name, value in _unique(modules).items()}
    for i, optimizer in enumerate(optimizers):
        for parameter, moments in optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"optimizers.{i}.{parameter}.{name}"] = torch.as_tensor(value).contiguous()
    metadata = {"recipe": progress.recipe, "stage": progress.stage, "step": str(progress.step)}
    # Not save_file, which writes to a temporary name of its own and leaves it behind when it is killed.
    write_atomically(folder / STATE, lambda path: path.write_bytes(save(tensors, metadata)))


def read_progress(folder: Path) -> Progress | None:
    """Where the run in this folder stands; None where none was started. Raises InputError for a damaged state."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged ({' '.join(str(error).split())}); delete it to begin anew") from None
    if not {"recipe", "stage", "step"} <= metadata.keys():
        raise InputError(f"{path}: not the state of a training run")
    if not re.fullmatch("[0-9]{1,9}", metadata["step"]):
        raise InputError(f"{path}: step {metadata['step'][:20]!r} is not a number of steps; delete it to begin anew")
    return Progress(metadata["recipe"], metadata["stage"], int(metadata["step"]))


def load_modules(folder: Path, modules: nn.ModuleDict) -> None:
    """Fill `modules` from the run's state; raises InputError where names or shapes differ."""
    with safe_open(folder / STATE, "pt") as file:
        found = {name for name in file.keys() if name.startswith("modules.")}  # noqa: SIM118 (not a dict)
        wanted = _unique(modules)
        if found != {f"modules.{name}" for name in wanted}:
            differing = sorted(found ^ {f"modules.{name}" for name in wanted})
            raise InputError(f"{folder / STATE}: parameters differ from the recipe's, first {differing[0]}")
        for name, parameter in wanted.items():
            values = file.get_tensor(f"modules.{name}")
            if values.shape != parameter.shape:
                raise InputError(
                    f"{folder / STATE}: {name} has shape {list(values.shape)}, expected {list(parameter.shape)}"
                )
            parameter.data.copy_(values)


def load_optimizers(folder: Path, optimizers: list[torch.optim.Optimizer]) -> None:
    """Fill the optimisers' moments from the run's state; raises InputError where it has none, or they do not fit."""
    sizes = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in optimizers]
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    with safe_open(folder / STATE, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            if key.startswith("optimizers."):
                found = re.fullmatch(r"optimizers\.(\d)\.(\d{1,6})\.(\w+)", key)
                i, parameter = (int(found[1]), int(found[2])) if found else (len(sizes), 0)
                if i >= len(sizes) or parameter >= sizes[i]:
                    raise InputError(f"{folder / STATE}: {key} is not of this recipe's optimisers")
                states[i].setdefault(parameter, {})[found[3]] = file.get_tensor(key)
    if not any(states):
        raise InputError(f"{folder / STATE}: the optimisers' moments are missing")
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def append_log(folder: Path, entry: dict) -> None:
    """Add one line to the run's log."""
    with open(folder / LOG, "a") as file:
        file.write(json.dumps(entry) + "\n")


def truncate_log(folder: Path, keep: Callable[[str, int], bool]) -> None:
    """Keep only the log lines that `keep(stage, step)` wants, so no step is reported twice.

    A last line cut short, as a killed run leaves it, is dropped; any other that is no report is an InputError.
    """
    path = folder / LOG
    if not path.exists():
        return
    lines, kept = path.read_text(errors="replace").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if keep(entry["stage"], entry["step"]):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise InputError(f"{path}: line {number} is not a report of this run's") from None
    write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _unique(modules: nn.ModuleDict) -> dict[str, Tensor]:
    """Parameters by name, tied ones once."""
    return {name: parameter.detach() for name, parameter in modules.named_parameters()}
