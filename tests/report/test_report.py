"""The report: the frame, baselines and numbers by hand, nothing from the data taken as markup, nothing fetched."""

from __future__ import annotations

import math
import re
import unicodedata
from base64 import b64decode
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from rdo.checks import compose_config, plain
from rdo.evaluation.numbers import number
from rdo.evaluation.scorers import evaluate_scorer
from rdo.objectives.intervals import mean_interval
from rdo.report.results import Row, at_equal_kl, difference, frame_of, rows_of, sweeps
from rdo.runtime.errors import UserError
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


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


@pytest.fixture
def full(folder: Folder) -> Folder:
    """Two seeds of a baseline, a row and an ablation, two of a swept setting, and scorers; hostile names throughout."""
    for seed in range(2):
        folder.policy("dpo", 2.0, 0.5, seed)
        folder.policy(f"dpo {EVIL}", 2.5 + 0.01 * seed, 0.6, seed, REWARD)
        folder.policy("dpo shuffled", 1.9, 0.4, seed, {**REWARD, "ablation": "shuffle"})
        folder.policy("none", 2.8, 0.9, seed, REWARD, learning_rate=1e-3)
        folder.scorer(f"_scorer {EVIL}", seed)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The frame and its rows
# ---------------------------------------------------------------------------------------------------------------------

SHARED = {"scores": ["reward"]}
BASELINES: list[tuple[str, dict[str, Any], bool]] = [
    ("the same", {}, True),
    ("more scores than it reads", {"scores": []}, True),
    ("other judges", {"judges": ["gold", "reward"]}, True),
    ("another loss", {"loss": "kto"}, False),
    ("a setting of the loss", {"beta": 0.3}, False),
    ("another rate", {"learning_rate": 1e-3}, False),
    ("another seed", {"seed": 1}, False),
    ("another split", {"split": "validation"}, False),
    ("another base policy", {"data": "other"}, False),
    ("with coefficients itself", {"rc": {**REWARD, "alpha": 1.0}}, False),
    ("scores that the row does not read", {"scores": ["reward", "diff"]}, False),
]


@pytest.mark.parametrize(("what", "other", "found"), BASELINES, ids=[case[0] for case in BASELINES])
def test_the_baseline_is_the_same_without_coefficients(
    folder: Folder, what: str, other: dict[str, Any], found: bool
) -> None:
    base, row = folder.policy("a", 2.0, **{**SHARED, **other}), folder.policy("b", 2.5, rc=REWARD, **SHARED)
    frame = frame_of(folder.run_dir)[0].set_index("folder")
    assert frame.loc[str(row.folder), "baseline"] == (str(base.folder) if found else None) or not found
    assert pd.notna(frame.loc[str(row.folder), "baseline"]) == found
    assert pd.isna(frame.loc[str(base.folder), "baseline"])


def test_one_seed_is_compared_prompt_by_prompt_and_several_seed_by_seed(folder: Folder) -> None:
    folder.policy("dpo", 1.0)
    folder.policy("dpo_reward", 1.25, rc=REWARD)
    change = folder.rows()["dpo_reward"].number("difference.gold")
    assert change == (0.25, 0.25, 0.25)  # the same on every prompt
    for seed, (base, gain) in enumerate([(5.0, 0.2), (9.0, 0.3)], start=1):
        folder.policy("dpo", base, seed=seed)
        folder.policy("dpo_reward", base + gain, seed=seed, rc=REWARD)
    row = folder.rows()["dpo_reward"]
    assert row.baseline is not None
    assert row.baseline.name == "dpo"
    change, reward = row.number("difference.gold"), row.number("rewards.gold")
    assert change is not None
    half = 4.30265 * 0.05 / math.sqrt(3)  # t of two degrees, standard deviation over seeds
    assert change == pytest.approx((0.25, 0.25 - half, 0.25 + half), abs=1e-4)
    assert change.verdict == "higher"
    assert reward is not None
    assert reward.value == pytest.approx((1.25 + 5.2 + 9.3) / 3)
    assert row.number("nothing") is None


def test_rows_are_named_by_their_file_or_by_what_they_differ_in(folder: Folder) -> None:
    for rate in (1e-4, 1e-3):
        folder.policy("none", rc=REWARD, learning_rate=rate)
    folder.policy("mine", loss="kto")
    for seed in range(2):
        folder.scorer("none", seed, beta0=0.5)
    assert set(folder.rows()) == {
        "dpo-reward, align.learning_rate=0.0001",
        "dpo-reward, align.learning_rate=0.001",
        "mine",
        "scorer-diff",
    }


def test_a_sweep_has_lines_of_what_differs_in_one_setting_and_a_conclusion(folder: Folder) -> None:
    for beta in (0.1, 0.2):
        for rate in (1e-4, 1e-3):
            folder.policy("none", 100 * rate + beta, kl=1000 * rate, beta=beta, learning_rate=rate)
            folder.policy(
                "none", 100 * rate + beta + 0.5, kl=1000 * rate + 0.3, rc=REWARD, beta=beta, learning_rate=rate
            )
    rows = folder.rows()
    lines = sweeps(rows.values())
    assert {name: [len(line) for line in found] for name, found in lines.items()} == {
        "loss.beta": [2, 2, 2, 2],
        "align.learning_rate": [2, 2, 2, 2],
    }
    for line in lines["align.learning_rate"]:
        assert [row.settings["align.learning_rate"] for row in line] == [1e-4, 1e-3]
        assert len({row.settings["loss.beta"] for row in line}) == len({row.rc for row in line}) == 1
    line = next(line for line in lines["align.learning_rate"] if line[0].rc == "reward")
    # Both rise by 0.1 a nat, the row's from 0.3 nats later on: 0.5 - 0.03 more at the same KL.
    assert at_equal_kl(line, "gold") == pytest.approx((0.47, 0.4, 1.0))
    assert difference(line[1], line[0], "rewards.gold") == pytest.approx((0.09, 0.09, 0.09))
    _, text = folder.report()
    assert "align.learning_rate, by rewards.gold: 0.001 is best" in text
    assert ", distinguishable from 0.0001." in text
    assert "At equal KL (0.40 to 1.00 nats)" in text


def test_results_are_saved_as_a_table(full: Folder) -> None:
    full.report()
    saved = pd.read_parquet(full.run_dir / "report" / "results.parquet")
    assert len(saved) == 10
    assert len(pd.read_csv(full.run_dir / "report" / "results.csv")) == 10
    assert {"settings.align.learning_rate", "settings.rc.ablation"} <= set(saved)
    assert "settings.loss.beta" not in saved  # which is the same in all
    assert saved.groupby("name")["rewards.gold.value"].mean()["dpo"] == pytest.approx(2.0)
    assert saved["coefficients.effective_sample_size.value"].dropna().unique() == [31.0]


def test_a_comparison_writes_its_report_again_only_when_results_have_changed(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.policy("dpo")
    config, page = compose_config([f"run_dir={folder.run_dir}"]), folder.run_dir / "report" / "report.html"
    capsys.readouterr()
    make_report(config, anew=False)
    said, written = capsys.readouterr().out, page.stat().st_mtime_ns
    make_report(config, anew=False)
    assert capsys.readouterr().out == said
    assert page.stat().st_mtime_ns == written
    folder.policy("dpo_reward", 1.5, rc=REWARD)
    make_report(config, anew=False)
    assert "dpo_reward" in capsys.readouterr().out
    assert page.stat().st_mtime_ns > written


def test_what_cannot_be_read_is_named_and_nothing_is_an_error(folder: Folder) -> None:
    with pytest.raises(UserError, match="nothing is evaluated there"):
        make_report(compose_config([f"run_dir={folder.run_dir}"]))
    folder.scorer()
    broken = folder.policy()
    (broken.folder / "manifest.json").write_text("{")
    html, _ = folder.report()
    assert "cannot be read" in html
    assert "Accuracy against the true reward" in html


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collects tags and every address that a browser would follow by itself or on a click."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.addresses.append(value or "")


def hidden(text: str) -> set[str]:
    """The characters of a text that a terminal would act upon or that nobody sees."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"}


@pytest.mark.filterwarnings("ignore:Glyph")  # which the figures' font has not
def test_nothing_from_the_data_becomes_markup_and_nothing_is_fetched(
    full: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    text, markdown = full.report()
    printed = capsys.readouterr().out.partition("\ntoy: ")[2]
    assert hidden(text) == hidden(markdown) == hidden(printed) == set()
    assert "\\x1b[2J" in printed
    assert "{{ 7 * 7 }}" in text
    assert "<!--" not in text
    assert not re.search(r"(?<!\\)\[x(?<!\\)\]\(", markdown)
    page = Page(text)
    assert not {"script", "link"} & set(page.tags)
    assert "&lt;script&gt;" in text
    assert not re.search(r"@import|url\(", text)
    drawings = [b64decode(address.removeprefix("data:image/svg+xml;base64,")).decode() for address in page.addresses]
    assert len(drawings) == page.tags.count("img") == 5
    for drawing in drawings:
        ElementTree.fromstring(drawing)  # well-formed: nothing in it is markup that a name has brought
        assert hidden(drawing) == set()


def test_markdown_tables_keep_their_columns(full: Folder) -> None:
    _, text = full.report()
    assert "<script" not in text
    tables = 0
    width = None
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        if cells is not None and width is not None:
            assert cells == width, line
        tables += cells is not None and width is None
        width = cells
    assert tables == 3  # policies, scorers, data


def test_the_sentences_say_what_the_numbers_say(full: Folder) -> None:
    html, text = full.report()
    assert "the coefficient helps in 1 of 1 rows, harms in 0" in text
    assert r"at KL 0.60 \[" in text
    assert "ablation: R shuffled over pairs" in html
    assert "over 2 seeds" in html
    # The answer and its picture come before everything else.
    assert html.index("the coefficient helps") < html.index("<img") < html.index("<table")


def test_a_section_for_each_data_set(folder: Folder) -> None:
    for data in ("toy", "toy_flipped"):
        folder.policy("dpo", data=data)
        folder.policy("dpo_reward", 1.5, rc=REWARD, data=data)
    html, text = folder.report()
    assert html.count('<section class="answer"') == 2
    assert text.count("the coefficient helps in 1 of 1 rows") == 2


def test_numbers_are_written_for_people() -> None:
    assert number(-0.001) == "0.00"
    assert number(-1.5, 1, signed=True) == "−1.5"
    assert number(0.25, signed=True) == "+0.25"
    assert number(math.nan) == "–"
