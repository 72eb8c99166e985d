"""Formats of K responses to a query, with preferences, scores, ratings or ranks: a class for each layout of columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field

from rdo.data.chat import Asked, Query
from rdo.data.columns import Columns, Finite, Flag, Id, QueryText, Response, Row, RowError, Text, checked, not_blank
from rdo.data.records import Message, Preference, Record
from rdo.data.templates import text_of


def by_rank(ranks: Sequence[float]) -> list[Preference]:
    """All pairs, the lower rank first; equal ranks are ties."""
    pairs = (sorted(pair, key=lambda k: ranks[k]) for pair in combinations(range(len(ranks)), 2))
    return [Preference(better, worse, tie=ranks[better] == ranks[worse]) for better, worse in pairs]


def by_score(query: Query, texts: Sequence[str], scores: Sequence[float]) -> list[Record]:
    """A record of all pairs, the higher score first, their difference as strength; equal scores are ties."""
    ranked = by_rank([-score for score in scores])
    leads = (replace(p, strength=scores[p.chosen] - scores[p.rejected]) for p in ranked)
    return [query.record(texts, *leads, scores=tuple(scores))]


def one_each(values: Sequence[Any] | None, texts: Sequence[str], field: str) -> tuple[Any, ...] | None:
    """The values, if there are any. Raises RowError unless there is one for each of the responses."""
    if values is None:
        return None
    if len(values) != len(texts):
        raise RowError(field, f"{len(values)} {field} for {len(texts)} responses; give one for each")
    return tuple(values)


def _as_object(value: object) -> object:
    return {"chosen": value[0], "rejected": value[1]} if isinstance(value, list) and len(value) == 2 else value


class Comparison(Columns):
    """[chosen, rejected], or an object."""

    model_config = ConfigDict(extra="forbid")
    chosen: int
    rejected: int
    tie: bool | None = None
    strength: Finite | None = Field(None, ge=0)

    def preference(self, count: int, field: str) -> Preference:
        """The same of so many responses."""
        for name, index in (("chosen", self.chosen), ("rejected", self.rejected)):
            if not 0 <= index < count:
                raise RowError(f"{field}.{name}", f"must be an index from 0 to {count - 1}, found {index}")
        if self.chosen == self.rejected:
            raise RowError(field, "prefers a response over itself; name two responses")
        return Preference(self.chosen, self.rejected, bool(self.tie), self.strength)


class Own(Row, format="records"):
    """The project's own rows. An empty id or split is none.

    preferences: indices into responses. desirable: of unpaired data, whether each response is a good one; one response
    is enough then.
    """

    query: Asked = Field(validation_alias=AliasChoices("messages", "query"))
    split: Literal["demonstrations", "train", "validation", "test", ""] | None = None
    responses: list[Response]
    scores: list[Finite] | None = None
    desirable: list[Flag] | None = None
    preferences: list[Annotated[Comparison, BeforeValidator(_as_object)]] | None = None
    id: Id = ""

    def records(self) -> list[Record]:
        count, fewest = len(self.responses), 1 if self.split == "demonstrations" or self.desirable is not None else 2
        if count < fewest:
            raise RowError("responses", f"needs at least {fewest}, found {count}; delete the row")
        scores = one_each(self.scores, self.responses, "scores")
        desirable = one_each(self.desirable, self.responses, "desirable")
        others = {"id": self.id, "split": self.split or None, "scores": scores, "desirable": desirable}
        preferences = [p.preference(count, f"preferences[{n}]") for n, p in enumerate(self.preferences or [])]
        return [self.query.record(self.responses, *preferences, **others)]


class RRHF(Own, format="rrhf"):
    """The same with scores, as RRHF and HH+ have them."""

    scores: list[Finite]


class Ranking(Row):
    prompt: Asked = Field(validation_alias=AliasChoices("prompt", "query"))


class BestFirst(Ranking, format="ranked"):
    ranked_responses: list[Response] = Field(min_length=2)

    def records(self) -> list[Record]:
        return [self.prompt.record(self.ranked_responses, *by_rank(range(len(self.ranked_responses))))]


class Ranks(Ranking, format="ranked"):
    """The lowest rank is best, equal ones are ties."""

    responses: list[Response] = Field(min_length=2)
    ranks: list[Finite]

    def records(self) -> list[Record]:
        one_each(self.ranks, self.responses, "ranks")
        return [self.prompt.record(self.responses, *by_rank(self.ranks))]


class ScoredResponses(Row, format="ranked"):
    """The highest score, or rating, is best."""

    prompt: Asked
    responses: list[Response] = Field(min_length=2)
    scores: list[Finite] = Field(validation_alias=AliasChoices("scores", "ratings"))

    def records(self) -> list[Record]:
        one_each(self.scores, self.responses, "scores")
        return by_score(self.prompt, self.responses, self.scores)


class RankedAnswer(Columns):
    answer: Response
    rank: Finite


class Nectar(Ranking, format="ranked"):
    """berkeley-nest/Nectar."""

    answers: list[RankedAnswer] = Field(min_length=2)

    def records(self) -> list[Record]:
        return [self.prompt.record([a.answer for a in self.answers], *by_rank([a.rank for a in self.answers]))]


class VotedAnswer(Columns):
    text: Response
    pm_score: Finite


class StackExchange(Row, format="ranked"):
    """HuggingFaceH4/stack-exchange-preferences: the highest score is best."""

    question: Asked
    answers: list[VotedAnswer] = Field(min_length=2)

    def records(self) -> list[Record]:
        texts, scores = [a.text for a in self.answers], [a.pm_score for a in self.answers]
        return by_score(self.question, texts, scores)


class Completion(Columns):
    response: Response
    overall_score: Finite | None = None
    fine_grained_score: Finite | None = Field(None, validation_alias="fine-grained_score")


class UltraFeedback(Row, format="ultrafeedback"):
    """openbmb/UltraFeedback: scores are overall_score, or fine-grained_score where a completion has no other."""

    instruction: QueryText
    completions: list[Completion] = Field(min_length=2)

    def records(self) -> list[Record]:
        scores: list[Any] = [completion.overall_score for completion in self.completions]
        if None in scores:
            scores = [completion.fine_grained_score for completion in self.completions]
        if None in scores:
            field = f"completions[{scores.index(None)}].overall_score"
            raise RowError(field, "missing, and fine-grained_score, too; delete the row")
        return by_score(Query(self.instruction), [completion.response for completion in self.completions], scores)


class Rated(Row, format="ultrafeedback"):
    """The same in flat columns: one rating a response."""

    instruction: QueryText
    responses: list[Response] = Field(min_length=2)
    ratings: list[Finite]

    def records(self) -> list[Record]:
        one_each(self.ratings, self.responses, "ratings")
        return by_score(Query(self.instruction), self.responses, self.ratings)


class QAFeedback(Row, format="qa_feedback"):
    """Fine-Grained RLHF's questions: question, passages, "prediction 1" to "prediction K", and preference.

    preference: for the pairs in the order 12, 13, ..., 1K, 23, ...: 0 for a tie, 1 or 2 for the better one.
    passages: [[title, sentence, ...], ...]. The query is laid out as "CONTEXT: title\\nsentences", passages parted by
    empty lines, and last "QUESTION: question": what is too long loses its beginning, and so never the question.
    """

    model_config = ConfigDict(extra="allow")
    reads: ClassVar[re.Pattern[str]] = re.compile(r"prediction ([1-9]\d?)")
    question: QueryText
    passages: list[Annotated[list[Text], Field(min_length=1)]]
    preference: list[Literal[0, 1, 2]]

    def records(self) -> list[Record]:
        query = Query("\n\n".join([*(_passage(*passage) for passage in self.passages), f"QUESTION: {self.question}"]))
        given = self.model_extra or {}
        numbers = (int(match[1]) for name in given if (match := self.reads.fullmatch(name)))
        names = [f"prediction {k}" for k in range(1, max([2, *numbers]) + 1)]
        texts = list(checked(dict[str, Response], {name: given.get(name) for name in names}).values())
        pairs = list(combinations(range(len(texts)), 2))
        if len(self.preference) != len(pairs):
            counts = f"{len(self.preference)} for {len(texts)} predictions, which make {len(pairs)} pairs"
            raise RowError("preference", f"{counts}; give one for each")
        verdicts = zip(pairs, self.preference, strict=True)
        preferences = (Preference(j, i) if v == 2 else Preference(i, j, v == 0) for (i, j), v in verdicts)
        return [query.record(texts, *preferences)]


def _passage(title: str, *sentences: str) -> str:
    # An article's first sentence has the title in front of it.
    plain = (" ".join(sentence.removeprefix(f"{title}\n\n").split()) for sentence in sentences)
    return f"CONTEXT: {title}\n{' '.join(plain)}"


def _kept(node: object) -> object:
    """A message of a tree; none where it was deleted or did not pass the review."""
    removed = isinstance(node, dict) and (node.get("deleted") is True or node.get("review_result") is False)
    return None if removed else node


class Node(Columns):
    text: Text
    role: Literal["prompter", "assistant"]
    message_id: Id = ""
    rank: Finite | None = None
    replies: list[Annotated[Node | None, BeforeValidator(_kept)]] | None = None


class OASST(Row, format="oasst"):
    """OpenAssistant's trees: each of the prompter's messages with at least two ranked replies is a record.

    The messages up to it are the query, the replies the responses, best (rank 0) first; its message_id is the id.
    Messages that were deleted or did not pass the review are left out with all that follows them. A tree without ranked
    replies is unusable; published files hold many.
    """

    message_tree_id: Id
    prompt: Annotated[Node | None, BeforeValidator(_kept)]

    def records(self) -> list[Record]:
        records = self._below(self.prompt, "prompt", ()) if self.prompt else []
        if not records:
            raise RowError("prompt", "the tree has no two ranked replies to a message", "unranked")
        return records

    def _below(self, node: Node, field: str, before: tuple[Message, ...]) -> list[Record]:
        """The records of a message and of all that follows it."""
        asks = len(before) % 2 == 0
        if (node.role == "prompter") != asks:
            raise RowError(f"{field}.role", "prompter and assistant must take turns; correct it or delete the row")
        text = not_blank(node.text, f"{field}.text", "query") if asks else node.text
        messages = (*before, Message("user" if asks else "assistant", text))
        replies = [(reply, f"{field}.replies[{n}]") for n, reply in enumerate(node.replies or []) if reply]
        ranked = sorted(((r.rank, r.text, path) for r, path in replies if r.rank is not None), key=lambda r: r[0])
        records = []
        if asks and len(ranked) > 1:
            texts = [not_blank(text, f"{path}.text") for _, text, path in ranked]
            own_id = node.message_id or ("" if before else self.message_tree_id)
            query = Query(text_of(messages), messages)
            records.append(query.record(texts, *by_rank([rank for rank, _, _ in ranked]), id=own_id))
        return [*records, *(record for reply, path in replies for record in self._below(reply, path, messages))]
