"""Conversation trees: every ranked turn of a tree is a record."""

from __future__ import annotations

from typing import Any

from rdo.data.formats.candidates import by_rank
from rdo.data.formats.checks import UnusableRow, describe, identifier, listed, number, response, text, typed
from rdo.data.records import Message, Record
from rdo.data.templates import text_of
from rdo.errors import DataError

Row = dict[str, Any]

SPEAKERS = {"prompter": "user", "assistant": "assistant"}


def read_oasst(row: Row, place: str) -> list[Record]:
    """OpenAssistant's trees: message_tree_id and prompt: {message_id, text, role, replies: [{..., rank}, ...]}.

    Each of the prompter's messages with at least two ranked replies is a record: the messages up to it are the query,
    the replies the responses, best (rank 0) first, all pairs preferences; its message_id is the id. Messages that were
    deleted or did not pass the review are left out with all that follows them. A tree without ranked replies is
    unusable; published files hold many.
    """
    tree = identifier(row.get("message_tree_id"), place, "message_tree_id")
    records = []
    # Depth first, in the order of the file: nodes with the path to them in the row and the messages before them.
    waiting: list[tuple[object, str, tuple[Message, ...]]] = [(row.get("prompt"), "prompt", ())]
    while waiting:
        value, field, before = waiting.pop()
        node = typed(value, dict, place, field)
        if node.get("deleted") is True or node.get("review_result") is False:
            continue
        messages = (*before, _spoken(node, before, place, field))
        replies = [] if node.get("replies") is None else listed(node.get("replies"), place, f"{field}.replies")
        named = [(reply, f"{field}.replies[{index}]") for index, reply in enumerate(replies)]
        waiting += [(reply, path, messages) for reply, path in reversed(named)]
        if messages[-1].role == "user":
            ranked = _ranked(named, place)
            if len(ranked) > 1:
                texts = tuple(response(reply.get("text"), place, f"{path}.text") for _, reply, path in ranked)
                own_id = identifier(node.get("message_id"), place, f"{field}.message_id") or ("" if before else tree)
                preferences = by_rank([rank for rank, _, _ in ranked])
                records.append(Record(own_id, text_of(messages), texts, preferences, messages=messages))
    if not records:
        raise UnusableRow(describe(place, "prompt", "the tree has no two ranked replies to a message"), "unranked")
    return records


def _spoken(node: Row, before: tuple[Message, ...], place: str, field: str) -> Message:
    """The node's message, checked to be the turn of the one who speaks."""
    expected = "assistant" if len(before) % 2 else "prompter"
    if text(node.get("role"), place, f"{field}.role") != expected:
        problem = f"must be {expected}: prompter and assistant take turns; correct it or delete the row"
        raise DataError(describe(place, f"{field}.role", problem))
    content = text(node.get("text"), place, f"{field}.text")
    if expected == "prompter" and not content.strip():
        raise DataError(describe(place, f"{field}.text", "the prompter's message is empty; delete the row"))
    return Message(SPEAKERS[expected], content)


def _ranked(named: list[tuple[object, str]], place: str) -> list[tuple[float, Row, str]]:
    """Rank, node and path of the replies that have a rank, best first."""
    nodes = [(typed(reply, dict, place, path), path) for reply, path in named]
    ranked = [
        (number(node["rank"], place, f"{path}.rank"), node, path)
        for node, path in nodes
        if node.get("rank") is not None and node.get("deleted") is not True and node.get("review_result") is not False
    ]
    return sorted(ranked, key=lambda entry: entry[0])
