"""The report: numbers over seeds by hand, nothing from the data taken as markup, and nothing fetched from anywhere."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdo.evaluation.scorers import evaluate_scorer
from rdo.evaluation.statistics import Estimate
from rdo.report.aggregate import aggregate, compare, summarise
from rdo.report.curves import finite, over_seeds, thin
from rdo.report.page import duration, write_report
from rdo.report.plots import draw_overview
from rdo.report.tables import number

EVIL = "<script>alert('x')</script> a|b $x$ `c` &amp;"


def estimate(value: float, half: float = 0.1) -> Estimate:
    return {"value": value, "low": value - half, "high": value + half, "count": 100}


def scorer(name: str, seed: int, world: str = "noisy", oracle: bool = True) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    truth = random.normal(size=200)
    forward = truth + random.normal(size=200)
    found = evaluate_scorer(forward, -forward, np.ones(200), truth if oracle else None, seed=seed)
    curve = {"loss": [[step, 1 / (step + 1)] for step in range(120)], "accuracy": [[0, 0.5], [10, math.nan]]}
    return {"world": world, "seed": seed, "name": name, "form": "pointwise", "evaluation": found, "curve": curve}


def policy(name: str, reward: float, seed: int = 0, rc: str = "none", **more: Any) -> dict[str, Any]:
    evaluation = {
        "prompts": 100,
        "rewards": {"oracle": estimate(reward)},
        "kl": estimate(0.5),
        "length": estimate(12.0),
        "against_base": {"oracle": {"win": estimate(0.6), "tie": estimate(0.1), "lose": estimate(0.3)}},
        "samples": [{"query": f"q {EVIL}", "response": f"r {EVIL}", "rewards": {"oracle": reward}}],
    }
    row = {"world": "noisy", "seed": seed, "name": name, "group": "dpo", "rc": rc, "evaluation": evaluation}
    return {**row, "alpha": None, "control": "none", "curve": {"loss": [[0, 0.7], [1, 0.6]]}, **more}


def full() -> dict[str, Any]:
    policies = [policy("dpo none", 2.0, seed) for seed in range(2)]
    policies += [policy(f"dpo {EVIL}", 2.5, seed, rc="reward", alpha=0.5) for seed in range(2)]
    policies += [policy("dpo shuffled", 1.9, seed, rc="reward", control="shuffle") for seed in range(2)]
    return {
        "title": f"Title {EVIL}",
        "created": "2025-01-01T00:00:00Z",
        "code_revision": "abc",
        "seconds": 75.0,
        "missing": [f"kto {EVIL}"],
        "commands": {f"row {EVIL}": f"python train.py {EVIL}"},
        "dataset": {"name": f"toy {EVIL}", "counts": {"train": 12288}, "truncation": {"cut": {"queries": 3}}},
        "scorers": [scorer(f"_reward {EVIL}", seed) for seed in range(2)] + [scorer("difference", 0)],
        "policies": policies,
    }


class Page(HTMLParser):
    """Collects tags, ids and every address that a browser would follow by itself or on a click."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_the_three_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    paths = write_report(full(), tmp_path / "report")
    assert {name: path.name for name, path in paths.items()} == {
        "html": "report.html",
        "markdown": "report.md",
        "json": "report.json",
    }
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.html", "report.json", "report.md"]


def test_nothing_from_the_data_becomes_markup_and_nothing_is_fetched(tmp_path: Path) -> None:
    text = write_report(full(), tmp_path)["html"].read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "&lt;script&gt;" in text
    assert page.tags.count("svg") == 5
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))  # several figures in one page do not share ids
    assert {address[1:] for address in page.addresses} <= set(page.ids)


def test_the_page_is_the_same_for_the_same_data(tmp_path: Path) -> None:
    first = write_report(full(), tmp_path / "a")["html"].read_bytes()
    assert first == write_report(full(), tmp_path / "b")["html"].read_bytes()


def test_json_holds_the_data_and_the_aggregates(tmp_path: Path) -> None:
    data = full()
    data["policies"][0]["coefficients"] = {"mean": np.float32(0.5), "negative_share": math.nan}
    found = json.loads(write_report(data, tmp_path)["json"].read_text(encoding="utf-8"))
    assert found["title"] == data["title"]
    assert found["policies"][0]["coefficients"] == {"mean": 0.5, "negative_share": None}
    assert found["scorers"][0]["curve"]["accuracy"][1] == [10, None]
    assert [row["name"] for row in found["aggregates"][0]["scorers"]] == [f"_reward {EVIL}", "difference"]


def test_markdown_tables_keep_their_columns(tmp_path: Path) -> None:
    text = write_report(full(), tmp_path)["markdown"].read_text(encoding="utf-8")
    assert "<script" not in re.sub(r"(`+).*?(?<!`)\1(?!`)", "", text)  # inside code it is only text
    tables = 0
    width = None
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        if cells is not None and width is not None:
            assert cells == width, line
        tables += cells is not None and width is None
        width = cells
    assert tables == 5  # scorers, policies, one sampled query, counts, commands


def test_a_summary_over_seeds_by_hand() -> None:
    found = summarise([estimate(1.0), estimate(2.0), estimate(3.0), None])
    assert found["mean"] == 2.0
    assert found["sd"] == 1.0
    assert found["seeds"] == 3
    assert found["high"] == pytest.approx(2 + 4.30265 / math.sqrt(3))
    assert summarise([estimate(1.0)]) == {"mean": 1.0, "sd": None, "low": 0.9, "high": 1.1, "seeds": 1}
    assert summarise([0.25]) == {"mean": 0.25, "sd": None, "low": None, "high": None, "seeds": 1}
    assert summarise([math.nan, None])["mean"] is None


def test_one_seed_differs_only_when_the_intervals_do_not_overlap() -> None:
    assert compare({0: estimate(1.0)}, {0: estimate(1.15)})["verdict"] == "indistinguishable"
    assert compare({0: estimate(1.0)}, {0: estimate(1.25)})["verdict"] == "lower"
    assert compare({0: estimate(1.5)}, {0: estimate(1.25)})["verdict"] == "higher"
    assert (
        compare({0: {"value": 1.0, "low": None, "high": None, "count": 1}}, {0: estimate(3.0)})["verdict"] == "unknown"
    )
    assert compare({0: estimate(1.0)}, {1: estimate(1.0)}) is None


def test_several_seeds_are_compared_seed_by_seed() -> None:
    # Far apart between seeds, but always 0.1 to 0.3 apart within one: mean 0.2, sd 0.1, half width 4.303 * 0.1 / 1.732
    first = {0: estimate(1.1), 1: estimate(5.2), 2: estimate(9.3), 3: estimate(100.0)}
    second = {0: estimate(1.0), 1: estimate(5.0), 2: estimate(9.0)}
    found = compare(first, second)
    assert found["value"] == pytest.approx(0.2)
    assert found["sd"] == pytest.approx(0.1)
    assert found["seeds"] == 3
    assert found["low"] == pytest.approx(0.2 - 4.30265 * 0.1 / math.sqrt(3))
    assert found["verdict"] == "indistinguishable"
    assert compare({0: estimate(2.0), 1: estimate(3.01)}, {0: estimate(1.0), 1: estimate(2.0)})["verdict"] == "higher"


def test_rows_are_compared_with_the_same_loss_without_a_coefficient() -> None:
    data = {
        "policies": [
            policy("sft", 1.0, group="base"),
            policy("dpo none", 2.0),
            policy("dpo reward", 2.5, rc="reward"),
            policy("dpo filter", 2.05, control="filter"),
            policy("kto reward", 3.0, rc="reward", group="kto"),
            policy("dpo oracle", 3.0, rc="oracle", compare_with="dpo filter"),
        ]
    }
    rows = {row["name"]: row for row in aggregate(data)[0]["policies"]}
    assert rows["dpo reward"]["compared_with"] == "dpo none"
    assert rows["dpo reward"]["difference"]["oracle"]["value"] == 0.5
    assert rows["dpo reward"]["difference"]["oracle"]["verdict"] == "higher"
    assert rows["dpo filter"]["control"] == "pairs with R < 0 dropped, no coefficient"
    assert rows["dpo filter"]["difference"]["oracle"]["verdict"] == "indistinguishable"
    assert rows["dpo oracle"]["compared_with"] == "dpo filter"
    for name in ("sft", "dpo none", "kto reward"):
        assert rows[name]["compared_with"] is None
        assert rows[name]["difference"] == {}
    # Two plain rows in a group: which one is meant is not guessed.
    data["policies"].append(policy("dpo none, high rate", 2.0))
    rows = {row["name"]: row for row in aggregate(data)[0]["policies"]}
    assert rows["dpo reward"]["compared_with"] is None


def test_the_same_row_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="one would hide the other"):
        aggregate({"policies": [policy("a", 1.0), policy("a", 2.0)]})


def test_the_sentences_say_what_the_numbers_say(tmp_path: Path) -> None:
    data = full()
    data["policies"][2]["name"] = data["policies"][3]["name"] = "dpo reward"
    text = write_report(data, tmp_path)["markdown"].read_text(encoding="utf-8")
    assert "2 scorers and 3 policies over 2 seeds" in text
    assert "by the judge “oracle”: 1 higher, 0 lower, 0 indistinguishable." in text
    assert "Higher: “dpo reward” (+0.50, KL indistinguishable)." in text
    assert "Controls, lower: “dpo shuffled” (−0.10, KL indistinguishable)." in text
    assert "| 1 | dpo none | 2 | 2.00 ± 0.00 | – |" in text
    assert "(control: R shuffled over pairs)" in text
    assert "Duration: 1 min 15 s" in text


def test_without_an_oracle_its_columns_vanish(tmp_path: Path) -> None:
    rows = [policy("dpo none", 2.0), policy("dpo reward", 2.05, rc="reward")]
    for row in rows:
        row["evaluation"]["rewards"] = {"held-out": row["evaluation"]["rewards"]["oracle"]}
        del row["evaluation"]["against_base"], row["evaluation"]["samples"]
    data = {"scorers": [scorer("reward", 0, oracle=False), scorer("diff", 1, oracle=False)], "policies": rows}
    paths = write_report(data, tmp_path)
    for kind in ("html", "markdown"):
        text = paths[kind].read_text(encoding="utf-8")
        assert "racle" not in re.sub(r"(?s)<style>.*?</style>", "", text).replace("diamond the true reward", "")
        assert "Label accuracy, random order" in text
        assert "held-out" in text
    assert "0 higher, 0 lower, 1 indistinguishable" in paths["markdown"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"title": None, "dataset": None, "scorers": [], "policies": None, "commands": None},
        {"scorers": [{"name": "reward"}], "policies": [{"name": "sft", "evaluation": None, "curve": None}]},
        {"scorers": [{"name": "r", "evaluation": evaluate_scorer([], [], [])}], "missing": ["dpo"]},
    ],
)
def test_little_or_nothing_is_still_a_report(data: dict[str, Any], tmp_path: Path) -> None:
    paths = write_report(data, tmp_path)
    assert "<h1>" in paths["html"].read_text(encoding="utf-8")
    json.loads(paths["json"].read_text(encoding="utf-8"))


def test_a_section_for_every_world(tmp_path: Path) -> None:
    data = {"scorers": [scorer("reward", 0, "noisy"), scorer("reward", 0, "flipped")]}
    text = write_report(data, tmp_path)["html"].read_text(encoding="utf-8")
    assert '<section id="world-1">' in text
    assert '<section id="world-2">' in text
    assert "in 2 worlds (noisy, flipped)" in text


def test_overview_picture(tmp_path: Path) -> None:
    assert draw_overview(full(), tmp_path / "overview.png")
    content = (tmp_path / "overview.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 1200
    assert int.from_bytes(content[20:24], "big") == 500
    assert [path.name for path in tmp_path.iterdir()] == ["overview.png"]
    assert not draw_overview({"scorers": [scorer("reward", 0)]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_numbers_and_durations_are_written_for_people() -> None:
    assert number(-0.001) == "0.00"
    assert number(-1.5, 1, signed=True) == "−1.5"
    assert number(0.25, signed=True) == "+0.25"
    assert number(None) == "–"
    assert [duration(seconds) for seconds in (4.6, 61, 7260)] == ["5 s", "1 min 1 s", "2 h 1 min"]


def test_curves_are_averaged_over_seeds_and_then_over_stretches() -> None:
    assert finite([[0, 1.0], [1, None], [2, math.inf], [3, 2]]) == [(0.0, 1.0), (3.0, 2.0)]
    assert over_seeds([[(0.0, 1.0), (1.0, 2.0), (2.0, 9.0)], [(0.0, 3.0), (1.0, 4.0)]]) == [(0.0, 2.0), (1.0, 3.0)]
    assert thin([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)], limit=2) == [(0.5, 2.0), (2.0, 5.0)]
    assert thin([(0.0, 1.0)], limit=2) == [(0.0, 1.0)]
    assert thin([]) == []
