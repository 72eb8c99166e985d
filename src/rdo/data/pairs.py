"""Formats of two responses, or of one that is good or bad: a class for each layout of columns."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from rdo.data.chat import Asked, Asking, Chat, Conversation, Query, Reply, Said, continued, parted, shared_length
from rdo.data.columns import Columns, Finite, Flag, QueryText, Response, Row, RowError, Strength, Text, Whole
from rdo.data.columns import checked, shown, wrong
from rdo.data.records import Message, Preference, Record
from rdo.data.templates import ASSISTANT

FIRST, SECOND, TIE = Preference(0, 1), Preference(1, 0), Preference(0, 1, tie=True)
PAIR = ("chosen", "rejected")
# Where a row of chosen and rejected may have its query: the first of these columns.
PROMPTS = ("prompt", "question", "query", "instruction", "input", "conversations")


def answered(query: Query, first: object, second: object, preference: Preference, names: tuple[str, str]) -> Record:
    """A record of two responses, which stand in the columns of these names."""
    return query.record((checked(Response, first, names[0]), checked(Response, second, names[1])), preference)


def by_sign(lead: float) -> Preference:
    """The second response is better where its lead is positive; the strength is how large the lead is."""
    return Preference(int(lead > 0), int(lead <= 0), tie=lead == 0, strength=checked(Finite, abs(lead), "score_1"))


def with_input(instruction: str, given: str | None) -> Query:
    """Alpaca's query: the instruction, and on lines behind it the input, if there is one."""
    return Query(f"{instruction}\n{given}" if given and given.strip() else instruction)


class HH(Row, format="hh"):
    """Anthropic HH: two whole dialogues; the query is `chosen` up to and including its last "\\n\\nAssistant:"."""

    chosen: Text
    rejected: Text

    def records(self) -> list[Record]:
        end = self.chosen.rfind(ASSISTANT)
        if end < 0:
            raise RowError("chosen", r"must hold '\n\nAssistant:'; rows of prompt, chosen, rejected are format 'trl'")
        query, chosen = self.chosen[: end + len(ASSISTANT)], self.chosen[end + len(ASSISTANT) :]
        if not self.rejected.startswith(query):
            problem = r"must start with the query, which is 'chosen' up to its last '\n\nAssistant:'; delete the row"
            raise RowError("rejected", problem, "different_queries")
        return [answered(Query(query), chosen, self.rejected[len(query) :], FIRST, PAIR)]


class Scored(Row):
    """A chosen and a rejected response, possibly with scores of their own."""

    score_chosen: Finite | None = None
    score_rejected: Finite | None = None

    def pair(self, query: Query, *replies: str) -> list[Record]:
        scores = self.score_chosen, self.score_rejected
        if scores != (None, None) and None in scores:
            raise RowError(f"score_{PAIR[scores.index(None)]}", "missing, and the other score is there")
        record = answered(query, *replies, FIRST, PAIR)
        return [record if None in scores else replace(record, scores=scores)]


class TRL(Scored, format="trl"):
    """TRL's explicit-prompt rows, and what others have made of them: Dahoas/rm-static,
    HuggingFaceH4/ultrafeedback_binarized, Intel/orca_dpo_pairs, LLaMA-Factory's two formats.

    prompt: an instruction is joined by its input. system, history ([[the user's text, the reply], ...]; a text of this
    name is not read): what goes before. chosen, rejected: the reply's text, one message or several (the reply alone, as
    a rule), or the whole conversation.
    """

    prompt: Asked = Field(validation_alias=AliasChoices(*PROMPTS))
    input: Any = None
    system: Text | None = None
    history: Annotated[
        list[Annotated[list[Text], Field(min_length=2, max_length=2)]],
        BeforeValidator(lambda value: value if isinstance(value, list) else []),
    ] = []
    chosen: Reply
    rejected: Reply

    @model_validator(mode="before")
    @classmethod
    def _join_input(cls, row: dict[str, Any]) -> dict[str, Any]:
        asked, given = row.get("instruction"), row.get("input")
        joined = next((name for name in PROMPTS if name in row), "") == "instruction" and isinstance(asked, str)
        return {**row, "instruction": with_input(asked, given).text} if joined and isinstance(given, str) else row

    def records(self) -> list[Record]:
        query, chosen, rejected = self.prompt, self.chosen, self.rejected
        system = [Message("system", self.system)] if self.system and self.system.strip() else []
        before = (*system, *(m for asked, reply in self.history for m in (Message("user", asked), Message("assistant", reply))))
        if not before and not query.messages and isinstance(chosen, str) and isinstance(rejected, str):
            asked = query.text
            if asked.rstrip().endswith(ASSISTANT) and chosen.startswith(asked) and rejected.startswith(asked):
                raise RowError("chosen", "repeats the prompt: these are whole dialogues, set dataset.format=hh")
            return self.pair(query, chosen, rejected)
        whole = [
            _behind(before, continued(query, value, name)) for name, value in zip(PAIR, (chosen, rejected), strict=True)
        ]
        query, replies = parted(*whole, PAIR)
        return self.pair(query, *replies)


def _behind(before: Chat, messages: Chat) -> Chat:
    """The messages with those before them; the system may speak once."""
    if before and messages[0].role == "system":
        if before[0].role == "system" and before[0] != messages[0]:
            raise RowError("system", "stands beside another system's message; keep one of the two")
        return (messages[0], *(message for message in before if message.role != "system"), *messages[1:])
    return (*before, *messages)


class TRLImplicit(Scored, format="trl_implicit"):
    """TRL's implicit-prompt rows: chosen and rejected hold the query, too.

    Both are conversations, which may differ in their last message alone, or both are texts. Of texts the query is what
    their beginnings have in common, which may end within a word; a space at its end goes to the responses, as in TRL.
    """

    chosen: Said
    rejected: Said

    def records(self) -> list[Record]:
        chosen, rejected = self.chosen, self.rejected
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise RowError("rejected", "must be of the form of 'chosen': both texts, or both conversations")
        if not isinstance(chosen, str):
            query, replies = parted(chosen, rejected, PAIR)
            return self.pair(query, *replies)
        if chosen == rejected:
            raise RowError("rejected", "is the same as 'chosen'; delete the row", "identical_responses")
        asked = chosen[: shared_length(chosen, rejected)].removesuffix(" ")
        if not asked.strip():
            problem = "has no beginning in common with 'chosen', so there is no query; give it in a column 'prompt'"
            raise RowError("rejected", problem)
        return self.pair(Query(asked), chosen[len(asked) :], rejected[len(asked) :])


class TRLUnpaired(Row, format="trl_unpaired"):
    """TRL's rows for KTO. label: whether the completion is a good one."""

    prompt: Asked
    completion: Said
    label: Flag

    def records(self) -> list[Record]:
        query, reply = self.prompt, self.completion
        if query.messages or not isinstance(reply, str):
            *messages, last = continued(query, reply, "completion")
            if last.role != "assistant":
                raise RowError("completion", "must end with the assistant's message; delete the row")
            query, reply = checked(Asking, tuple(messages), "completion"), last.content
        return [query.record([checked(Response, reply, "completion")], desirable=(self.label,))]


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
        raise wrong("compares news summaries: only those of Reddit posts (info.post) can be read", "articles")
    return info


class OpenAI(Row, format="openai"):
    """OpenAI's TL;DR comparisons: a Reddit post, two summaries, a choice, and how sure the worker was.

    The confidence runs from 1 (the first is much better) over 5 (a tie) to 9 (the second is much better), so the
    strength is its distance from 5. Some batches carry none. News articles, in the same files, are another task.
    """

    info: Annotated[Post, BeforeValidator(_no_article)]
    summaries: Annotated[list[Summary], Field(min_length=2, max_length=2)]
    choice: Annotated[Literal[0, 1], Whole]
    extra: Judgement | None = None

    def records(self) -> list[Record]:
        # The batches of edited summaries write "r/name" where all others write "name".
        subreddit = self.info.subreddit.removeprefix("r/")
        query = Query(f"SUBREDDIT: r/{subreddit}\n\nTITLE: {self.info.title}\n\nPOST: {self.info.post}")
        sure = self.extra.confidence if self.extra else None
        if sure not in (None, 5) and self.choice != int(sure > 5):
            problem = f"{sure} contradicts choice {self.choice}: 1..4 say the first is better, 6..9 the second"
            raise RowError("extra.confidence", problem, "contradicting_confidences")
        strength = None if sure is None else float(abs(sure - 5))
        preference = Preference(self.choice, 1 - self.choice, sure == 5, strength)
        return [query.record([summary.text for summary in self.summaries], preference)]


class SHP(Row, format="shp"):
    """Stanford Human Preferences: a post, two comments, labels 1 where A is the better one."""

    history: QueryText
    human_ref_A: Response  # noqa: N815
    human_ref_B: Response  # noqa: N815
    labels: Annotated[Literal[0, 1], Whole]
    score_ratio: Strength | None = None

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
        names = ("conversation_a", "conversation_b")
        query, replies = parted(self.conversation_a, self.conversation_b, names, "separate_conversations")
        return [answered(query, *replies, {"model_a": FIRST, "model_b": SECOND}.get(self.winner, TIE), names)]


def _turns(value: object) -> object:
    """The texts of a conversation's turns, of which a table has the JSON."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        parsed = None
    return [value] if isinstance(value, str) and not isinstance(parsed, list) else parsed


Turns = Annotated[list[Text], BeforeValidator(_turns)]


class ArenaVotes(Row, format="arena_votes"):
    """LMSYS arena-55k: the texts of the turns, or their JSON, and three columns of 0 and 1; otherwise as `Arena`."""

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
        asked, *replies = (texts[0] for texts in turns)
        query = Query(checked(QueryText, asked, "prompt"), (Message("user", asked),))
        won = [self.winner_model_a, self.winner_model_b, self.winner_tie]
        if sum(won) != 1:
            raise RowError("winner_tie", "one of winner_model_a, winner_model_b, winner_tie must be 1, and one alone")
        return [answered(query, *replies, (FIRST, SECOND, TIE)[won.index(True)], ("response_a", "response_b"))]


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
            raise RowError("preference", f"must be 1, 2 or 1.5, found {shown(self.preference)}")
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
    better_response_id: Annotated[Literal[0, 1], Whole]

    def records(self) -> list[Record]:
        better = (FIRST, SECOND)[self.better_response_id]
        return [Query(self.prompt).record((self.response_0, self.response_1), better)]


class HelpSteer2(Row, format="helpsteer"):
    """HelpSteer2-preference; from -3 (the first is much better) over 0 (a tie) to 3."""

    prompt: Asked
    response_1: Response
    response_2: Response
    preference_strength: Finite

    def records(self) -> list[Record]:
        return [self.prompt.record((self.response_1, self.response_2), by_sign(self.preference_strength))]


class HelpSteer3(Row, format="helpsteer"):
    """The same scale; the query is messages."""

    context: Asked
    response1: Response
    response2: Response
    overall_preference: Finite

    def records(self) -> list[Record]:
        return [self.context.record((self.response1, self.response2), by_sign(self.overall_preference))]


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
