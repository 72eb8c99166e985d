"""What a data set holds, in numbers: labels, duplicates, lengths, and what truncation would cut."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from rdo.data.records import Record, content_id, query_key

# Two responses are near-identical when so large a share of their words is the same, in the same order.
NEARLY = 0.95
QUANTILES = (0.05, 0.5, 0.95, 0.99)
BLOCKS = " ▏▎▍▌▋▊▉█"


def near_identical(one: str, other: str) -> bool:
    """Whether two texts differ in case, punctuation and white space only, or in at most one word of twenty."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (one, other))
    if a == b:
        return True
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    # From cheap to dear: each is an upper bound of the next.
    return all(ratio() >= NEARLY for ratio in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio))


def label_statistics(records: Iterable[Record]) -> dict[str, Any]:
    """Counts over records: preferences, ties, strengths, what labels and scores agree on, duplicates, contradictions.

    near_identical: preferences whose two responses are `near_identical`. chosen_longer: the share of preferences
    without a tie whose chosen response has more characters (0.5: no bias). scores_agree: the share of them, where both
    responses are scored and differ, whose chosen one has the higher score; scores_contradict: how many of them have the
    lower one. repeated_texts: records whose query and responses an earlier record has, in any order. contradictions:
    pairs of texts that two records label in opposite ways.
    """
    counts: Counter[str] = Counter()
    responses: Counter[int] = Counter()
    strengths: Counter[float] = Counter()
    texts: set[str] = set()
    labels: dict[str, set[bool]] = {}
    examples: dict[str, str] = {}
    for record in records:
        counts["records"] += 1
        responses[len(record.responses)] += 1
        counts["scored"] += record.scores is not None
        counts["conversations"] += bool(record.messages)
        if record.desirable is not None:
            counts["desirable"] += sum(record.desirable)
            counts["undesirable"] += len(record.desirable) - sum(record.desirable)
        key = content_id(query_key(record.query), sorted(record.responses))
        if key in texts:
            counts["repeated_texts"] += 1
            examples.setdefault("repeated_texts", record.place or record.id)
        texts.add(key)
        for preference in record.preferences:
            chosen, rejected = record.responses[preference.chosen], record.responses[preference.rejected]
            counts["preferences"] += 1
            counts["ties"] += preference.tie
            if preference.strength is not None:
                strengths[preference.strength] += 1
            if near_identical(chosen, rejected):
                counts["near_identical"] += 1
                examples.setdefault("near_identical", record.place or record.id)
            if preference.tie:
                continue
            counts["chosen_longer"] += len(chosen) > len(rejected)
            counts["same_length"] += len(chosen) == len(rejected)
            if record.scores is not None:
                gain = record.scores[preference.chosen] - record.scores[preference.rejected]
                counts["scores_differ"] += gain != 0
                counts["scores_agree"] += gain > 0
                counts["scores_contradict"] += gain < 0
                if gain < 0:
                    examples.setdefault("scores_contradict", record.place or record.id)
            pair = content_id(query_key(record.query), sorted((chosen, rejected)))
            seen = labels.setdefault(pair, set())
            if (chosen > rejected) not in seen and seen:
                counts["contradictions"] += 1
                examples.setdefault("contradictions", record.place or record.id)
            seen.add(chosen > rejected)
    return {
        **{name: counts[name] for name in COUNTED},
        "chosen_longer": share(
            counts["chosen_longer"] + counts["same_length"] / 2, counts["preferences"] - counts["ties"]
        ),
        "scores_agree": share(counts["scores_agree"], counts["scores_differ"]),
        "responses": dict(sorted(responses.items())),
        "strengths": dict(sorted(strengths.items())),
        "examples": examples,
    }


COUNTED = (
    "records", "conversations", "scored", "preferences", "ties", "desirable", "undesirable", "near_identical",
    "repeated_texts", "contradictions", "scores_contradict",
)  # fmt: skip


def share(part: float, whole: float) -> float | None:
    """part / whole, None where there is no whole."""
    return part / whole if whole else None


def summary(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Smallest, mean and largest value, and quantiles, of at least one."""
    array = np.asarray(values)
    quantiles = {f"{100 * q:g}%": float(np.quantile(array, q)) for q in QUANTILES}
    return {"min": int(array.min()), "mean": float(array.mean()), **quantiles, "max": int(array.max())}


def cut_at(lengths: np.ndarray, max_length: int) -> float:
    """Share of the records that are longer than so many tokens."""
    return float((lengths > max_length).mean())


def histogram(values: np.ndarray, bins: int = 16, width: int = 48, mark: int | None = None) -> list[str]:
    """Lines of a bar chart for the terminal; `mark` is a value whose bin is pointed at. The last bin takes the rest."""
    top = max(1, int(np.quantile(values, 0.99)), mark or 0)
    step = -(-top // bins)
    edges = step * np.arange(bins + 1)
    counts = np.bincount(np.minimum(values // step, bins), minlength=bins + 1)
    lines = []
    for edge, count in zip(edges.tolist(), counts.tolist(), strict=True):
        eighths = round(8 * width * count / max(1, counts.max()))
        bar = BLOCKS[-1] * (eighths // 8) + BLOCKS[eighths % 8].strip()
        if count and not bar:
            bar = BLOCKS[1]
        label = f"{edge:>6} +" if edge == step * bins else f"{edge:>6} –{edge + step - 1:>6}"
        pointed = "  ← max_length" if mark is not None and edge <= mark < edge + step else ""
        lines.append(f"{label:<15} {count:>8}  {bar}{pointed}")
    while len(lines) > 1 and lines[-1].split()[-1] == "0":
        lines.pop()
    return lines
