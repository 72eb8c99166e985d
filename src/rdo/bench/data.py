"""Records to measure with: made up, of HH-like lengths, or the first ones of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, islice
from statistics import NormalDist

import numpy as np

from rdo.data.encoding import EncodedRecord

# Ids of made-up records: the padding of others' collators, and the end of a sequence; all other ids are words.
PAD, END, WORDS = 0, 1, 2
# Tokens of a query and a response on HH (RDO's cost argument), the standard deviation of their logarithms as counted on
# HH's helpful-base test split, and the longest query + response.
QUERY, RESPONSE = 164, 145
QUERY_SPREAD, RESPONSE_SPREAD = 1.1, 1.0
LONGEST = 512


def made_records(
    count: int, responses: int, vocabulary: int, seed: int = 0, query: int | None = None
) -> list[EncodedRecord]:
    """Records of random words, whose lengths are log-normal with HH's means, cut to LONGEST tokens; or all alike, with
    a query of so many tokens."""
    generator = np.random.default_rng(seed)
    lengths = drawn(generator, count, responses) if query is None else fixed(count, responses, query)
    records = []
    for n, (first, *others) in enumerate(lengths):
        prompt, *answers = (tuple(generator.integers(WORDS, vocabulary, size).tolist()) for size in (first, *others))
        records.append(EncodedRecord(f"{n:06d}", prompt, tuple((*answer[:-1], END) for answer in answers)))
    return records


def fixed(count: int, responses: int, query: int) -> list[list[int]]:
    """Lengths of query and responses, all records alike."""
    return [[query, *[RESPONSE] * responses]] * count


def drawn(generator: np.random.Generator, count: int, responses: int) -> list[list[int]]:
    """Lengths of query and responses: evenly spaced quantiles of the distributions, in random order, so that a few
    records are as long and as uneven as many would be; the query of a record alone has the mean length, for the median
    of a skewed distribution is far below. The cut takes from the mean, which the scales give back."""
    queries = generator.permutation(quantiles(count))
    answers = generator.permutation(quantiles(count * responses)).reshape(count, responses)
    query_scale, response_scale = scales()
    lengths = []
    for z, others in zip(queries, answers, strict=True):
        query = clipped(query_scale * math.exp(QUERY_SPREAD * z), LONGEST - RESPONSE) if count > 1 else QUERY
        rest = [clipped(response_scale * math.exp(RESPONSE_SPREAD * other), LONGEST - query) for other in others]
        lengths.append([query, *rest])
    return lengths


def quantiles(count: int) -> np.ndarray:
    """So many quantiles [count] of the normal distribution, evenly spaced."""
    return np.array([NormalDist().inv_cdf((n + 0.5) / count) for n in range(count)])


def clipped(length: float, longest: int) -> int:
    """A whole number of tokens, at least two (of a response: a word and its end)."""
    return int(min(max(round(length), 2), longest))


@cache
def scales() -> tuple[float, float]:
    """Medians of query and response lengths whose means, after the cut, are QUERY and RESPONSE."""
    normal = quantiles(300)

    def query_lengths(scale: float) -> np.ndarray:
        return np.clip(scale * np.exp(QUERY_SPREAD * normal), 2, LONGEST - RESPONSE)

    query_scale = bisect(lambda scale: float(query_lengths(scale).mean()), QUERY)
    room = LONGEST - query_lengths(query_scale)[:, None]  # any query may come with any response

    def response_mean(scale: float) -> float:
        return float(np.clip(scale * np.exp(RESPONSE_SPREAD * normal), 2, room).mean())

    return query_scale, bisect(response_mean, RESPONSE)


def bisect(mean: Callable[[float], float], wanted: float) -> float:
    """The scale at which an increasing function is `wanted`."""
    low, high = 1.0, 4096.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean(middle) < wanted else (low, middle)
    return low


def with_responses(records: Sequence[EncodedRecord], count: int) -> list[EncodedRecord]:
    """The records with so many responses each: their own first, then those of the next records, which is as much work
    as own ones would be."""
    made = []
    for n, record in enumerate(records):
        from_here = (answer for other in cycle([*records[n:], *records[:n]]) for answer in other.responses)
        made.append(EncodedRecord(record.id, record.prompt, tuple(islice(from_here, count))))
    return made
