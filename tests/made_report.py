"""A run folder whose results are made up, for tests of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rdo.checks import compose_config, plain
from rdo.evaluation.scorers import evaluate_scorer
from rdo.objectives.intervals import mean_interval
from rdo.report.results import Row, frame_of, rows_of
from rdo.runtime.files import write_json
from rdo.runtime.store import Artifact, Provenance, produce
from rdo.stages.report import make_report
from tiny import append_json_line

EVIL = "<script>alert('x')</script> a|b $x$ `c` &amp; {{ 7 * 7 }} ![x](http://x) <!-- \x1b[2J\u202e"
PROMPTS = (-1.0, 0.0, 1.5, -0.5)  # what the rewards of a policy's responses differ from their mean by


class Folder:
    """A run folder whose results are made up."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def make(
        self, stage: str, label: str, settings: Any, inputs: dict[str, Artifact], config: Any, **files: Any
    ) -> Artifact:
        def write(folder: Path) -> dict[str, Any]:
            for name, content in files.items():
                if isinstance(content, list):
                    for line in content:
                        append_json_line(folder / f"{name}.jsonl", line)
                elif name != "results":
                    write_json(folder / f"{name}.json", content)
            return files.get("results", {})

        provenance = Provenance(self.run_dir, f"python train.py {EVIL}", config)
        return produce(provenance, stage, label, settings, inputs, write)

    def policy(
        self,
        row: str = "none",
        reward: float = 1.0,
        kl: float = 0.5,
        seed: int = 0,
        rc: dict[str, Any] | None = None,
        judges: Sequence[str] = ("gold",),
        scores: Sequence[str] = (),
        split: str = "test",
        loss: str = "dpo",
        data: str = "toy",
        **settings: Any,
    ) -> Artifact:
        """An evaluated policy; double underscores in settings stand for dots."""
        config = {**plain(compose_config([f"seed={seed}"])), "row": row}
        config["dataset"] = {**config["dataset"], "name": data}
        beta, settings = settings.pop("beta", 0.1), {"learning_rate": 1e-4, **settings}
        base = self.make("sft", "base", {"seed": seed, "data": data}, {}, config)
        inputs = {"base": base, **{kind: self.make("score", kind, {"seed": seed}, {}, config) for kind in scores}}
        aligned = self.make(
            "align",
            f"{loss}-{rc['name'] if rc else 'none'}",
            {"loss": {"name": loss, "settings": {"beta": beta}}, "rc": rc, "training": settings, "seed": seed},
            inputs,
            config,
            metrics=[{"step": step, "loss": 1 / step} for step in range(1, 20)],
            results={"coefficients": {"effective_sample_size": 31.0, "negative_share": 0.25}, "records": 64}
            if rc
            else {},
        )
        values = {judge: [reward + offset for offset in PROMPTS] for judge in judges}
        lines = [
            {
                "id": str(n),
                "query": f"q{n} {EVIL}",
                "response": f"r {EVIL}",
                "rewards": {j: v[n] for j, v in values.items()},
            }
            for n in range(len(PROMPTS))
        ]
        evaluation = {
            "prompts": len(PROMPTS),
            "rewards": {judge: mean_interval(found) for judge, found in values.items()},
            "kl": {"value": kl, "low": kl - 0.1, "high": kl + 0.1, "count": 4},
            "against_base": None,
        }
        made = {"data": {"split": split}, "judges": list(judges), "seed": seed}
        inputs = {"policy": aligned, "base": base}
        return self.make(
            "eval", aligned.folder.name[:-11], made, inputs, config, evaluation=evaluation, generations=lines
        )

    def scorer(self, row: str = "reward_model", seed: int = 0, **settings: Any) -> Artifact:
        """An evaluated scorer."""
        random = np.random.default_rng(seed)
        truth = random.normal(size=200)
        forward = truth + random.normal(size=200)
        config = {**plain(compose_config([f"seed={seed}"])), "row": row}
        model = self.make("diffmodel", "paper", {"training": settings, "seed": seed}, {}, config)
        found = evaluate_scorer(forward, -forward, np.ones(200), truth, seed=seed)
        made = {"data": {"split": "test"}, "seed": seed}
        return self.make("eval", "scorer-diff", made, {"scorer": model}, config, evaluation=found)

    def rows(self) -> dict[str, Row]:
        return {row.name: row for row in rows_of(frame_of(self.run_dir)[0])}

    def report(self) -> tuple[str, str]:
        """The page and report.md."""
        config = compose_config([f"run_dir={self.run_dir}"])
        config.report.title = f"Title {EVIL}"
        make_report(config, {"kto": f"no such {EVIL}"})
        html, markdown = ((self.run_dir / "report" / f"report.{kind}").read_text() for kind in ("html", "md"))
        return html, markdown


REWARD = {"name": "reward", "alpha": 0.5, "ablation": "none"}
