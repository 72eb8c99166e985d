"""Loss and accuracy on the validation split, every few steps; which checkpoint is the best, and when to stop.

All that it knows it reads from metrics.jsonl, which a run that goes on goes on with.
"""

from __future__ import annotations

from typing import Any

from rdo.runtime.errors import UserError
from rdo.runtime.files import Damaged, read_json_lines
from rdo.runtime.processes import broadcast
from rdo.runtime.progress import say
from rdo.sequences.layout import LayoutName
from rdo.settings import TrainingConfig
from rdo.tracking import Tracker
from rdo.training.engine import Checkpoints, Engine
from rdo.training.step import Task, deal_step, training_step

LOSS, ACCURACY = "validation/loss", "validation/accuracy"


class Validation:
    """Validates one run of training. task: None where it has none, and then nothing is done."""

    def __init__(self, task: Task | None, config: TrainingConfig, tracker: Tracker, checkpoints: Checkpoints):
        """Takes up what the tracker knows, after it has resumed."""
        self.task, self.config, self.tracker, self.checkpoints = task, config, tracker, checkpoints
        self.done: list[dict[str, Any]] = broadcast(
            lambda: [line for line in read_json_lines(tracker.file) if LOSS in line] if tracker.file.exists() else []
        )
        self.keep()

    @property
    def best(self) -> int:
        """The place in `done` of the first best validation, by keep_best."""
        name = self.config.keep_best or LOSS
        sign = -1 if name == ACCURACY else 1
        return min(range(len(self.done)), key=lambda n: sign * self.done[n][name])

    def keep(self) -> None:
        """Keeps the checkpoint of the best validation, whatever comes after it."""
        if self.config.keep_best and self.done:
            self.checkpoints.kept = self.done[self.best]["step"]

    @property
    def exhausted(self) -> bool:
        """Whether `patience` validations have brought nothing better."""
        patience = self.config.patience
        return bool(patience and self.done) and len(self.done) - 1 - self.best >= (patience or 0)

    def after(self, step: int, last: bool, engine: Engine, layout: LayoutName, budget: int, title: str) -> None:
        """Validates after so many steps, where it is due and not done. Raises Stopped between two micro-batches."""
        every = self.config.validate_every_steps
        if self.task is None or every is None or (step % every and not last) or not step:
            return
        if self.done and self.done[-1]["step"] == step:
            return
        examples = [self.task.example(number, 0) for number in range(len(self.task))]
        measured = training_step(self.task, engine, layout, deal_step(examples, layout, budget), False)
        values = {LOSS: measured["loss"]}
        if (accuracy := measured.get("accuracy", measured.get("implicit_reward_accuracy"))) is not None:
            values[ACCURACY] = accuracy
        self.done.append({"step": step, **values})
        if self.config.keep_best and self.best == len(self.done) - 1:
            self.keep()
            if not last:
                self.checkpoints.save(step, engine)
        self.tracker.log(step, values)
        numbers = ", ".join(f"{name.partition('/')[2]} {value:.4f}" for name, value in values.items())
        say(f"[{title}] validation after {step} steps: {numbers}")

    def take_best(self, step: int, engine: Engine, title: str) -> None:
        """Goes back to the weights of the best validation. Raises UserError where their checkpoint is damaged."""
        if not self.config.keep_best or not self.done or (best := self.done[self.best]["step"]) == step:
            return
        path = self.checkpoints.path(best, engine)
        try:
            engine.load(path)
        except (Damaged, OSError) as error:
            raise UserError(f"{path}, the best by keep_best, is damaged; delete {path.parent.parent}") from error
        say(f"[{title}] the weights after {best} of {step} steps are kept, the best by {self.config.keep_best}")
