"""The report: the frame, baselines and numbers by hand, nothing from the data taken as markup, nothing fetched."""

from __future__ import annotations

import math
import re
import unicodedata
import warnings
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest

from made_report import EVIL, REWARD, Folder
from rdo.checks import compose_config
from rdo.evaluation.numbers import number
from rdo.report.results import at_equal_kl, difference, frame_of, sweeps
from rdo.runtime.errors import UserError
from rdo.stages.report import make_report


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


def drawings(page: Page) -> list[ElementTree.Element]:
    """The page's figures, which are well-formed: nothing in them is markup that a name has brought."""
    coded = (address.removeprefix("data:image/svg+xml;base64,") for address in page.addresses)
    return [ElementTree.fromstring(b64decode(text).decode()) for text in coded]


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
    found = drawings(page)
    assert len(found) == page.tags.count("img") == 5
    assert hidden("".join(text for drawing in found for text in drawing.itertext())) == set()


def test_long_names_overprint_nothing(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        for n in range(9):
            row = f"{'a_long_name_of_a_row' * 6}_{n}"
            folder.policy(row, 2.0, 0.5, seed, beta=0.1 + n)
            folder.policy(f"{row}_reward", 2.5, 0.6, seed, REWARD, beta=0.1 + n)
        folder.scorer("another_long_name" * 9, seed)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as matplotlib's of a figure without room
        html, _ = folder.report()
    table = [line for line in capsys.readouterr().out.splitlines() if "a_long_name" in line and "[" in line][-18:]
    assert max(map(len, table)) < 150
    assert len({line.index("…") for line in table}) == 1
    for drawing in drawings(Page(html)):
        assert max(len(text) for text in drawing.itertext()) < 90


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
