"""Formats of a chosen and a rejected response, or of one that is good or bad: a class for each layout of columns."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from rdo.data.chat import Asked, Chat, Query, Reply, Said, asking, continued, parted, shared_length
from rdo.data.columns import Finite, Flag, Row, RowError, Text, not_blank
from rdo.data.records import Message, Record
from rdo.data.templates import ASSISTANT
from rdo.data.verdicts import FIRST, with_input

PAIR = ("chosen", "rejected")
# Where a row of chosen and rejected may have its query: the first of these columns.
PROMPTS = ("prompt", "question", "query", "instruction", "input", "conversations")

Exchange = Annotated[list[Text], Field(min_length=2, max_length=2)]


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
        return [Query(query).pair((chosen, self.rejected[len(query) :]), FIRST, PAIR)]


class Scored(Row):
    """A chosen and a rejected response, possibly with scores of their own."""

    score_chosen: Finite | None = None
    score_rejected: Finite | None = None

    def pair(self, query: Query, replies: tuple[str, str]) -> list[Record]:
        scores = (self.score_chosen, self.score_rejected)
        if scores.count(None) == 1:
            raise RowError(f"score_{PAIR[scores.index(None)]}", "missing, and the other score is there")
        return [query.pair(replies, FIRST, PAIR, scores=None if None in scores else scores)]


def _earlier(history: object) -> object:
    return history if isinstance(history, list) else []


class TRL(Scored, format="trl"):
    """TRL's explicit-prompt rows, and what others have made of them: Dahoas/rm-static,
    HuggingFaceH4/ultrafeedback_binarized, Intel/orca_dpo_pairs, LLaMA-Factory's two formats.

    prompt: an instruction is joined by its input. system, history ([[the user's text, the reply], ...]; a text of this
    name is not read): what goes before. chosen, rejected: the reply's text, one message or several (the reply alone, as
    a rule), or the whole conversation.
    """

    prompt: Asked = Field(validation_alias=AliasChoices(*PROMPTS))
    system: Text | None = None
    history: Annotated[list[Exchange], BeforeValidator(_earlier)] = Field([])
    chosen: Reply
    rejected: Reply

    @model_validator(mode="before")
    @classmethod
    def _join_input(cls, row: dict[str, Any]) -> dict[str, Any]:
        asked, given = row.get("instruction"), row.get("input")
        if given is None or not isinstance(asked, str) or row.keys() & {"prompt", "question", "query"}:
            return row
        if not isinstance(given, str):
            raise RowError("input", "beside 'instruction' it must be text")
        return {**row, "instruction": with_input(asked, given).text}

    def records(self) -> list[Record]:
        query, chosen, rejected = self.prompt, self.chosen, self.rejected
        system = [Message("system", self.system)] if self.system and self.system.strip() else []
        turns = (m for asked, reply in self.history for m in (Message("user", asked), Message("assistant", reply)))
        before = (*system, *turns)
        if not before and not query.messages and isinstance(chosen, str) and isinstance(rejected, str):
            asked = query.text
            if asked.rstrip().endswith(ASSISTANT) and chosen.startswith(asked) and rejected.startswith(asked):
                raise RowError("chosen", "repeats the prompt: these are whole dialogues, set dataset.format=hh")
            return self.pair(query, (chosen, rejected))
        first = _behind(before, continued(query, chosen, "chosen"))
        second = _behind(before, continued(query, rejected, "rejected"))
        return self.pair(*parted(first, second, PAIR))


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
        if not isinstance(chosen, str) and not isinstance(rejected, str):
            return self.pair(*parted(chosen, rejected, PAIR))
        if not (isinstance(chosen, str) and isinstance(rejected, str)):
            raise RowError("rejected", "must be of the form of 'chosen': both texts, or both conversations")
        if chosen == rejected:
            raise RowError("rejected", "is the same as 'chosen'; delete the row", "identical_responses")
        asked = chosen[: shared_length(chosen, rejected)].removesuffix(" ")
        if not asked.strip():
            problem = "has no beginning in common with 'chosen', so there is no query; give it in a column 'prompt'"
            raise RowError("rejected", problem)
        return self.pair(Query(asked), (chosen[len(asked) :], rejected[len(asked) :]))


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
            query, reply = asking(tuple(messages), "completion"), last.content
        return [query.record([not_blank(reply, "completion")], desirable=(self.label,))]
