"""Formats of two responses and a verdict on them: a class for each layout of columns."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import AliasChoices, BeforeValidator, Field

from rdo.data.chat import Asked, Conversation, Query, parted
from rdo.data.columns import Choice, Columns, Finite, Flag, QueryText, Response, Row, RowError, Text, not_blank
from rdo.data.records import Message, Preference, Record

FIRST, SECOND, TIE = Preference(0, 1), Preference(1, 0), Preference(0, 1, tie=True)


def by_sign(lead: float) -> Preference:
    """The second response is better where its lead is positive; the strength is how large the lead is."""
    return Preference(int(lead > 0), int(lead <= 0), tie=lead == 0, strength=abs(lead))


def with_input(instruction: str, given: str | None) -> Query:
    """Alpaca's query: the instruction, and on lines behind it the input, if there is one."""
    return Query(f"{instruction}\n{given}" if given and given.strip() else instruction)


class Post(Columns):
    post: QueryText
    title: Text
    subreddit: Text


class Summary(Columns):
    text: Response


class Judgement(Columns):
    confidence: Annotated[int, Field(ge=1, le=9)] | None = None


def _no_article(info: object) -> object:
    if isinstance(info, dict) and info.get("post") is None and info.get("article") is not None:
        raise RowError("", "compares news summaries: only those of Reddit posts (info.post) can be read", "articles")
    return info


class OpenAI(Row, format="openai"):
    """OpenAI's TL;DR comparisons: a Reddit post, two summaries, a choice, and how sure the worker was.

    The confidence runs from 1 (the first is much better) over 5 (a tie) to 9 (the second is much better), so the
    strength is its distance from 5. Some batches carry none. News articles, in the same files, are another task.
    """

    info: Annotated[Post, BeforeValidator(_no_article)]
    summaries: Annotated[list[Summary], Field(min_length=2, max_length=2)]
    choice: Choice
    extra: Judgement | None = None

    def records(self) -> list[Record]:
        # The batches of edited summaries write "r/name" where all others write "name".
        subreddit = self.info.subreddit.removeprefix("r/")
        query = Query(f"SUBREDDIT: r/{subreddit}\n\nTITLE: {self.info.title}\n\nPOST: {self.info.post}")
        sure = self.extra.confidence if self.extra else None
        if sure is not None and sure != 5 and self.choice != int(sure > 5):
            problem = f"{sure} contradicts choice {self.choice}: 1..4 say the first is better, 6..9 the second"
            raise RowError("extra.confidence", problem, "contradicting_confidences")
        strength = None if sure is None else float(abs(sure - 5))
        preference = Preference(self.choice, 1 - self.choice, sure == 5, strength)
        return [query.record([summary.text for summary in self.summaries], preference)]


class SHP(Row, format="shp"):
    """Stanford Human Preferences: a post, two comments, labels 1 where A is the better one."""

    history: QueryText
    human_ref_A: Response
    human_ref_B: Response
    labels: Choice
    score_ratio: Finite | None = Field(None, ge=0)

    def records(self) -> list[Record]:
        preference = Preference(1 - self.labels, self.labels, strength=self.score_ratio)
        return [Query(self.history).record((self.human_ref_A, self.human_ref_B), preference)]


class Arena(Row, format="arena"):
    """LMSYS chatbot arena. After the first turn each model answers in its own conversation, so votes on longer ones
    compare no two responses to one query; such rows are left out."""

    conversation_a: Conversation
    conversation_b: Conversation
    winner: Literal["model_a", "model_b", "tie", "tie (bothbad)"]

    def records(self) -> list[Record]:
        both, names = (self.conversation_a, self.conversation_b), ("conversation_a", "conversation_b")
        query, replies = parted(*both, names, "separate_conversations")
        return [query.pair(replies, {"model_a": FIRST, "model_b": SECOND}.get(self.winner, TIE), names)]


def _turns(value: object) -> object:
    """The texts of a conversation's turns, which tables hold as JSON."""
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


Turns = Annotated[list[Text], BeforeValidator(_turns)]


class ArenaVotes(Row, format="arena_votes"):
    """LMSYS arena-55k: lists of the turns' texts, and three columns of 0 and 1; otherwise as `Arena`."""

    prompt: Turns
    response_a: Turns
    response_b: Turns
    winner_model_a: Flag
    winner_model_b: Flag
    winner_tie: Flag

    def records(self) -> list[Record]:
        turns = (self.prompt, self.response_a, self.response_b)
        if any(len(texts) != 1 for texts in turns):
            problem = "several turns: each model answered in a conversation of its own; delete the row"
            raise RowError("prompt", problem, "separate_conversations")
        asked, first, second = (texts[0] for texts in turns)
        query = Query(not_blank(asked, "prompt", "query"), (Message("user", asked),))
        won = [self.winner_model_a, self.winner_model_b, self.winner_tie]
        if sum(won) != 1:
            raise RowError("winner_tie", "one of winner_model_a, winner_model_b, winner_tie must be 1, and one alone")
        return [query.pair((first, second), (FIRST, SECOND, TIE)[won.index(True)], ("response_a", "response_b"))]


class AlpacaFarm(Row, format="alpaca"):
    """AlpacaFarm. preference: the better output's number, or 1.5 for a tie."""

    instruction: QueryText
    input: Text | None = None
    output_1: Response
    output_2: Response
    preference: Finite

    def records(self) -> list[Record]:
        verdict = {1.0: FIRST, 2.0: SECOND, 1.5: TIE}.get(self.preference)
        if verdict is None:
            raise RowError("preference", f"must be 1, 2 or 1.5, found {self.preference}")
        return [with_input(self.instruction, self.input).record((self.output_1, self.output_2), verdict)]


class Alpaca(Row, format="alpaca"):
    """LLaMA-Factory's older pairs. output: [chosen, rejected]."""

    instruction: QueryText
    input: Text | None = None
    output: Annotated[list[Response], Field(min_length=2, max_length=2)]

    def records(self) -> list[Record]:
        return [with_input(self.instruction, self.input).record(self.output, FIRST)]


class SafeRLHF(Row, format="safe_rlhf"):
    """PKU-SafeRLHF; which response is safer is another question, and is not read."""

    prompt: QueryText
    response_0: Response
    response_1: Response
    better_response_id: Choice

    def records(self) -> list[Record]:
        better = (FIRST, SECOND)[self.better_response_id]
        return [Query(self.prompt).record((self.response_0, self.response_1), better)]


class HelpSteer(Row, format="helpsteer"):
    """HelpSteer2-preference, or HelpSteer3; from -3 (the first is much better) over 0 (a tie) to 3."""

    prompt: Asked = Field(validation_alias=AliasChoices("prompt", "context"))
    response_1: Response = Field(validation_alias=AliasChoices("response_1", "response1"))
    response_2: Response = Field(validation_alias=AliasChoices("response_2", "response2"))
    strength: Finite = Field(validation_alias=AliasChoices("preference_strength", "overall_preference"))

    def records(self) -> list[Record]:
        return [self.prompt.record((self.response_1, self.response_2), by_sign(self.strength))]


class Question(Columns):
    full_text: QueryText


class WebGPT(Row, format="webgpt"):
    """OpenAI's WebGPT comparisons: two answers and their scores, from -1 to 1."""

    question: Question
    answer_0: Response
    answer_1: Response
    score_0: Finite
    score_1: Finite

    def records(self) -> list[Record]:
        query, scores = Query(self.question.full_text), (self.score_0, self.score_1)
        return [query.record((self.answer_0, self.answer_1), by_sign(self.score_1 - self.score_0), scores=scores)]


class StackPaired(Row, format="stack_paired"):
    """lvwerra/stack-exchange-paired: response_j has more votes than response_k."""

    question: QueryText
    response_j: Response
    response_k: Response

    def records(self) -> list[Record]:
        return [Query(self.question).record((self.response_j, self.response_k), FIRST)]
