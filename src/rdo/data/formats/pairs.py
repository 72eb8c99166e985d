"""Formats of two responses, or of one that is good or bad."""

from __future__ import annotations

from typing import Any

from rdo.data.formats.checks import (
    UnusableRow,
    choice,
    describe,
    flag,
    listed,
    number,
    query_text,
    response,
    strength,
    text,
    typed,
)
from rdo.data.formats.conversations import Conversation, asking, continued, conversation, is_text, parted, shared_length
from rdo.data.formats.verdicts import with_input
from rdo.data.records import Message, Preference, Record
from rdo.data.templates import ASSISTANT, text_of
from rdo.errors import DataError

Row = dict[str, Any]
PAIR = ("chosen", "rejected")
# Where a row of chosen and rejected may have its query: the first of these columns.
PROMPTS = ("prompt", "question", "query", "instruction", "input", "conversations")

# Of chatbot arena's votes: the preference, given that the responses are those of model a and model b.
VOTES = {
    "model_a": Preference(0, 1),
    "model_b": Preference(1, 0),
    "tie": Preference(0, 1, tie=True),
    "tie (bothbad)": Preference(0, 1, tie=True),
}


def _pair(row: Row, query: str, replies: tuple[str, str], place: str, messages: Conversation = ()) -> list[Record]:
    chosen, rejected = (response(reply, place, name) for reply, name in zip(replies, PAIR, strict=True))
    names = ("score_chosen", "score_rejected")
    scores = None
    if any(row.get(name) is not None for name in names):
        scores = tuple(number(row.get(name), place, name) for name in names)
    return [Record("", query, (chosen, rejected), (Preference(0, 1),), scores, messages=messages)]


def read_hh(row: Row, place: str) -> list[Record]:
    """Anthropic HH: two whole dialogues; the query is `chosen` up to and including its last "\\n\\nAssistant:"."""
    chosen, rejected = (text(row.get(name), place, name) for name in PAIR)
    end = chosen.rfind(ASSISTANT)
    if end < 0:
        problem = r"no '\n\nAssistant:' in it; rows of prompt, chosen and rejected are format 'trl'"
        raise DataError(describe(place, "chosen", problem))
    query = chosen[: end + len(ASSISTANT)]
    if not rejected.startswith(query):
        problem = r"does not start with the query, which is 'chosen' up to its last '\n\nAssistant:'; delete the row"
        raise UnusableRow(describe(place, "rejected", problem), "different_queries")
    return _pair({}, query, (chosen[len(query) :], rejected[len(query) :]), place)


def prompt_column(row: Row) -> str:
    """The column that holds the query of a row of chosen and rejected."""
    return next((name for name in PROMPTS if name in row), PROMPTS[0])


def read_trl(row: Row, place: str) -> list[Record]:
    """TRL's explicit-prompt rows, and what others have made of them: Dahoas/rm-static,
    HuggingFaceH4/ultrafeedback_binarized, Intel/orca_dpo_pairs, LLaMA-Factory's two formats.

    prompt, or another of `PROMPTS`: text or messages; instruction is joined by input. system: a system's text, which
    goes before. history: [[the user's text, the reply], ...], earlier turns. chosen, rejected: the reply's text, one
    message or several (the reply alone, as a rule), or the whole conversation. score_chosen, score_rejected: the
    scores, if they are there.
    """
    name = prompt_column(row)
    prompt = with_input(row, place) if name == "instruction" else row.get(name)
    before = _earlier(row, place)
    replies = [[value] if isinstance(value := row.get(field), dict) else value for field in PAIR]
    named = ((name, prompt), *zip(PAIR, replies, strict=True))
    if not before and all(is_text(value, place, field) for field, value in named):
        asked = query_text(prompt, place, name)
        chosen, rejected = (text(row.get(field), place, field) for field in PAIR)
        if asked.rstrip().endswith(ASSISTANT) and chosen.startswith(asked) and rejected.startswith(asked):
            problem = "repeats the prompt: these are whole dialogues, set dataset.format=hh"
            raise DataError(describe(place, "chosen", problem))
        return _pair(row, asked, (chosen, rejected), place)
    first, second = (
        _behind(before, continued(prompt, value, place, field, name), place)
        for field, value in zip(PAIR, replies, strict=True)
    )
    messages, texts = parted(first, second, place, PAIR)
    return _pair(row, text_of(messages), texts, place, messages)


def _earlier(row: Row, place: str) -> Conversation:
    """What was said before the prompt, as columns of their own have it."""
    before: list[Message] = []
    if row.get("system") is not None and text(row["system"], place, "system").strip():
        before.append(Message("system", row["system"]))
    # Of other data, `history` is a text of their own: then it is not read, and listed as such.
    turns = row["history"] if isinstance(dict(row).get("history"), list) else []
    for index, turn in enumerate(turns):
        said = listed(turn, place, f"history[{index}]")
        if len(said) != 2:
            problem = "must be [the user's text, the reply]; correct it or delete the row"
            raise DataError(describe(place, f"history[{index}]", problem))
        before.append(Message("user", query_text(said[0], place, f"history[{index}][0]")))
        before.append(Message("assistant", text(said[1], place, f"history[{index}][1]")))
    return tuple(before)


def _behind(before: Conversation, messages: Conversation, place: str) -> Conversation:
    """The messages with those before them; the system may speak once."""
    if before and messages[0].role == "system":
        if before[0].role == "system" and before[0] != messages[0]:
            problem = "stands beside another system's message; keep one of the two"
            raise DataError(describe(place, "system", problem))
        return (messages[0], *(message for message in before if message.role != "system"), *messages[1:])
    return (*before, *messages)


def read_trl_implicit(row: Row, place: str) -> list[Record]:
    """TRL's implicit-prompt rows: chosen and rejected hold the query, too; optional scores as in `read_trl`.

    Both are conversations, which may differ in their last message alone, or both are texts. Of texts the query is what
    their beginnings have in common, which may end within a word; a space at its end goes to the responses, as in TRL.
    """
    if not is_text(row.get("chosen"), place, "chosen"):
        first, second = (conversation(row.get(name), place, name) for name in PAIR)
        messages, replies = parted(first, second, place, PAIR)
        return _pair(row, text_of(messages), replies, place, messages)
    chosen, rejected = (text(row.get(name), place, name) for name in PAIR)
    if chosen == rejected:
        problem = "is the same as 'chosen', so there is no preference; delete the row"
        raise UnusableRow(describe(place, "rejected", problem), "identical_responses")
    query = chosen[: shared_length(chosen, rejected)].removesuffix(" ")
    if not query.strip():
        problem = "has no beginning in common with 'chosen', so there is no query; give it in a column 'prompt'"
        raise DataError(describe(place, "rejected", problem))
    return _pair(row, query, (chosen[len(query) :], rejected[len(query) :]), place)


def read_trl_unpaired(row: Row, place: str) -> list[Record]:
    """TRL's rows for KTO: a prompt and a completion, text or messages, and a label: whether it is a good one."""
    label = (flag(row.get("label"), place, "label"),)
    prompt, completion = row.get("prompt"), row.get("completion")
    if is_text(prompt, place, "prompt") and is_text(completion, place, "completion"):
        query = query_text(prompt, place, "prompt")
        return [Record("", query, (response(completion, place, "completion"),), desirable=label)]
    *messages, reply = continued(prompt, completion, place, "completion")
    if reply.role != "assistant":
        raise DataError(describe(place, "completion", "must end with the assistant's message; delete the row"))
    asked = asking(tuple(messages), place, "completion")
    replies = (response(reply.content, place, "completion"),)
    return [Record("", text_of(asked), replies, messages=asked, desirable=label)]


def read_openai(row: Row, place: str) -> list[Record]:
    """OpenAI's TL;DR comparisons: a Reddit post, two summaries, a choice, and how sure the worker was.

    The confidence runs from 1 (the first is much better) over 5 (a tie) to 9 (the second is much better), so the
    strength is its distance from 5: 4 is strongest. Some batches carry none. The responses keep the data's order.
    Comparisons of news articles, which the same published files hold, are another task and are left out.
    """
    info = typed(row.get("info"), dict, place, "info")
    if info.get("post") is None and info.get("article") is not None:
        problem = "a comparison of news summaries: only those of Reddit posts (info.post) can be read"
        raise UnusableRow(describe(place, "info.article", problem), "articles")
    post = query_text(info.get("post"), place, "info.post")
    title, subreddit = (text(info.get(name), place, f"info.{name}") for name in ("title", "subreddit"))
    # The batches of edited summaries write "r/name" where all others write "name".
    query = f"SUBREDDIT: r/{subreddit.removeprefix('r/')}\n\nTITLE: {title}\n\nPOST: {post}"

    summaries = typed(row.get("summaries"), list, place, "summaries")
    if len(summaries) != 2 or not all(isinstance(summary, dict) for summary in summaries):
        raise DataError(describe(place, "summaries", 'must be two objects {"text": ...}; delete the row'))
    texts = tuple(response(entry.get("text"), place, f"summaries[{n}].text") for n, entry in enumerate(summaries))
    preferred = choice(row.get("choice"), (0, 1), place, "choice")

    extra = {} if row.get("extra") is None else typed(row.get("extra"), dict, place, "extra")
    if extra.get("confidence") is None:
        return [Record("", query, texts, (Preference(preferred, 1 - preferred),))]
    confidence = typed(extra.get("confidence"), int, place, "extra.confidence")
    if not 1 <= confidence <= 9:
        raise DataError(describe(place, "extra.confidence", "must be from 1 to 9; correct it or delete the row"))
    if confidence != 5 and preferred != int(confidence > 5):
        problem = f"{confidence} contradicts choice {preferred}: 1..4 say the first is better, 6..9 the second"
        raise UnusableRow(describe(place, "extra.confidence", problem), "contradicting_confidences")
    distance = float(abs(confidence - 5))
    return [Record("", query, texts, (Preference(preferred, 1 - preferred, confidence == 5, distance),))]


def read_shp(row: Row, place: str) -> list[Record]:
    """Stanford Human Preferences: a post, two comments, labels 1 where A is the better one; strength is score_ratio."""
    query = query_text(row.get("history"), place, "history")
    texts = tuple(response(row.get(name), place, name) for name in ("human_ref_A", "human_ref_B"))
    label = choice(row.get("labels"), (0, 1), place, "labels")
    ratio = strength(row.get("score_ratio"), place, "score_ratio")
    return [Record("", query, texts, (Preference(1 - label, label, strength=ratio),))]


def read_arena(row: Row, place: str) -> list[Record]:
    """LMSYS chatbot arena: two conversations and a vote, winner: model_a, model_b, tie, tie (bothbad).

    After the first turn each model answers in its own conversation, so votes on longer ones compare no two responses to
    one query; such rows are left out.
    """
    names = ("conversation_a", "conversation_b")
    first, second = (conversation(row.get(name), place, name) for name in names)
    winner = text(row.get("winner"), place, "winner")
    if winner not in VOTES:
        raise DataError(describe(place, "winner", f"must be one of {', '.join(VOTES)}; correct it or delete the row"))
    messages, replies = parted(first, second, place, names, reason="separate_conversations")
    texts = tuple(response(reply, place, name) for reply, name in zip(replies, names, strict=True))
    return [Record("", text_of(messages), texts, (VOTES[winner],), messages=messages)]
