"""Which records are in each step, and the learning rate of each: functions of the seed and the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rdo.runtime.errors import UserError
from rdo.runtime.store import stable_seed
from rdo.settings import TrainingConfig


@dataclass(frozen=True)
class Plan:
    """How many steps a run takes, and which records are in each."""

    records: int
    batch_size: int
    steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.records / self.batch_size)

    def epoch(self, step: int) -> int:
        """The epoch of a step, from 0."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> tuple[int, list[int]]:
        """Epoch and record numbers of a step; the last batch of an epoch may be smaller."""
        epoch, within = self.epoch(step), step % self.steps_per_epoch
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "order", epoch))
        order = torch.randperm(self.records, generator=generator).tolist()
        return epoch, order[within * self.batch_size : (within + 1) * self.batch_size]


def make_plan(config: TrainingConfig, records: int, seed: int) -> Plan:
    """Raises UserError where there is nothing to train on."""
    if records == 0:
        raise UserError("there is no record to train on: see dataset.*, min_responses and max_records of the stage")
    steps = config.epochs * math.ceil(records / config.batch_size)
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    return Plan(records, config.batch_size, steps, seed)


def learning_rate_factor(step: int, steps: int, config: TrainingConfig) -> float:
    """The schedule at a step (from 0), as a factor of the learning rate: linear warm-up, then the chosen curve."""
    warmup = math.ceil(config.warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    curves = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return curves[config.schedule]
