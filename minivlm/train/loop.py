"""One stage of training: steps, learning rate, clipping, held-out loss, progress, saving.

It knows nothing of pictures or models: a stage hands it parameters, a function from step to batch, and a loss.
Forward and backward run in bfloat16 on a working copy; the optimiser keeps float32 masters of what it trains
(Micikevicius et al. 2018, section 3.1), because steps smaller than a bfloat16's last digit must add up.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minivlm.errors import NumericError
from minivlm.train.optim import build_optimizers, cosine
from minivlm.train.state import Progress, append_log, load_optimizers, save_state

CLIP_NORM = 1.0
HELD_OUT_BATCHES = 4


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe; the numbers that define it."""

    name: str
    trains: tuple[str, ...]  # prefixes of parameter names; everything else is frozen
    steps: int
    batch: int
    lr: float
    warmup: int  # steps
    weight_decay: float = 0.05
    renews: tuple[str, ...] = ()  # prefixes of parameter names that begin the stage untrained


class Steps(Dataset):
    """Batches as a function of the step: `make(step)`; what makes a resumed run repeat the same batches."""

    def __init__(self, make: Callable[[int], Any], first: int, steps: int):
        self.make, self.first, self.steps = make, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> Any:
        return self.make(self.first + index)


def mean_report(results: Iterable[tuple[Tensor, dict[str, float]]]) -> dict[str, float]:
    """The means over held-out batches of (loss, what else to report), named held_out_..."""
    reports = [{"loss": loss.item(), **report} for loss, report in results]
    return {f"held_out_{key}": sum(report[key] for report in reports) / len(reports) for key in reports[0]}


class Masters:
    """float32 parameters with gradients from, and values copied to, a working copy of the same modules."""

    def __init__(self, masters: nn.ModuleDict, working: nn.ModuleDict, trains: tuple[str, ...]):
        self.pairs, self.named = [], []
        copies = dict(working.named_parameters())
        with torch.no_grad():
            for name, parameter in masters.named_parameters():
                trained = name.startswith(trains)
                copies[name].copy_(parameter)
                copies[name].requires_grad_(trained)
                if trained:
                    self.pairs.append((parameter, copies[name]))
                    self.named.append((name, parameter))

    def take_gradients(self) -> None:
        """Move the working copy's gradients to the masters, clipped to a global norm of CLIP_NORM."""
        for master, copy in self.pairs:
            master.grad = None if copy.grad is None else copy.grad.to(master)
            copy.grad = None
        nn.utils.clip_grad_norm_([master for master, _ in self.pairs], CLIP_NORM)

    def give_values(self) -> None:
        """Round the masters' new values into the working copy."""
        with torch.no_grad():
            for master, copy in self.pairs:
                copy.copy_(master)


def run_stage(
    stage: Stage,
    first: int,
    recipe: str,
    folder: Path,
    modules: nn.ModuleDict,
    working: nn.ModuleDict,
    task: Any,
    save_seconds: float,
    workers: int,
) -> None:
    """Train `stage` from step `first` (its optimiser's moments are read from `folder` when that is not 0).

    modules: float32 masters; working: their copy that `task` computes with. task has make_batch(step) -> batch,
    loss(batch) -> (loss, what else to report) and held_out() -> report, called at every tenth of the stage.
    """
    masters = Masters(modules, working, stage.trains)
    optimizers = build_optimizers(masters.named, stage.lr, stage.weight_decay)
    if first:
        load_optimizers(folder, optimizers)
    loader = DataLoader(Steps(task.make_batch, first, stage.steps), batch_size=None, num_workers=workers)
    bar = tqdm(loader, desc=stage.name, initial=first, total=stage.steps, unit="step")
    saved = time.monotonic()
    for done, batch in enumerate(bar, first + 1):
        loss, report = task.loss(batch)
        if not torch.isfinite(loss):
            raise NumericError(f"stage {stage.name}, step {done}: the loss is {loss.item()}")
        loss.backward()
        masters.take_gradients()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * cosine(done - 1, stage.steps, stage.warmup)
            optimizer.step()
        masters.give_values()
        report = {"loss": loss.item(), **report}
        append_log(folder, {"stage": stage.name, "step": done, **report})
        bar.set_postfix({key: f"{value:.3f}" for key, value in report.items()})
        if done % max(1, stage.steps // 10) == 0 or done == stage.steps:
            append_log(folder, {"stage": stage.name, "step": done, **task.held_out()})
        if done == stage.steps or time.monotonic() - saved > save_seconds:
            save_state(folder, Progress(recipe, stage.name, done), modules, optimizers)
            saved = time.monotonic()
