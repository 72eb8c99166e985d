"""What a command is about to make beside what it was asked for, why, and how to do without: said before any of it."""

from __future__ import annotations

from collections.abc import Sequence

from rdo.runtime.processes import is_rank0
from rdo.settings import Config
from rdo.stages.scorer import STAGE_OF


def announce(config: Config, missing: Sequence[tuple[str, str]]) -> None:
    """missing: stage and label of each result that is not there yet, in the order in which they are made."""
    for stage, label in missing:
        if stage != config.stage.name and stage in REASONS and is_rank0():
            print(f"[plan] {stage} ({label}) is made first: {REASONS[stage](config)}", flush=True)


def base_policy(config: Config) -> str:
    if config.model.path is None:
        return "the base policy, from scratch"
    return "model.path is fine-tuned on the data; sft.enabled=false takes it as the base policy as it is"


def scorer(config: Config, kind: str) -> str:
    """Everything of a command that reads a scorer."""
    evaluates = config.stage.name == "eval"
    readers = {
        f"rc={kind}": config.rc.name == kind,
        f"loss.ranking={config.loss.get('ranking')}": str(config.loss.get("ranking")).startswith(kind),
        f"eval.judges=[{','.join(config.eval.judges)}]": evaluates
        and kind in config.eval.judges
        and config.eval.subject not in STAGE_OF,
        f"eval.subject={kind}": evaluates and config.eval.subject == kind,
    }
    said = " and ".join(name for name, reads in readers.items() if reads)
    return f"for {said}: do without it there, or give a finished one as {STAGE_OF[kind]}.path"


REASONS = {
    "sft": base_policy,
    "rm": lambda config: scorer(config, "reward"),
    "diffmodel": lambda config: scorer(config, "diff"),
    "align": lambda config: "the policy that is evaluated",
}
