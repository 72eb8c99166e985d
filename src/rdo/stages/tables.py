"""What stages compute record by record: a table keyed by record, made once, in parts that outlive an interruption.

score, reference and generate are this function, each with another body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import transformers
from tqdm import tqdm

from rdo.runtime.errors import UserError
from rdo.runtime.parts import Shards
from rdo.runtime.store import Artifact
from rdo.sequences.forward import Reads
from rdo.stages.run import Run


@dataclass(frozen=True)
class Body:
    """What a table is made of.

    items: plain data of each item, such as its record's id. rows(part, bar): the rows of a range of items, which begin
    with the record's id; it moves the bar on by an item each. size: items a part.
    """

    title: str
    items: Sequence[Any]
    rows: Callable[[range, tqdm], list[tuple[Any, ...]]]
    size: int


def table(
    run: Run,
    stage: str,
    label: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    schema: pa.Schema,
    begin: Callable[[], Body],
) -> Artifact:
    """The artifact whose STAGE.parquet holds the rows; `begin` loads what they take only when they are to be made.

    settings: `Run.settings` of the split that the rows are of. Raises as `produce` and `Shards.make` do.
    """

    def make(folder: Path) -> dict[str, Any]:
        body = begin()
        if not len(body.items):
            raise UserError(f"{stage}: there is no record; see min_responses and max_records of align")
        shards = Shards(folder, schema, body.items, body.size)
        with run.locating(settings["data"]["split"]):
            shards.make(body.title, body.rows)
        shards.join(folder / f"{stage}.parquet")
        return {"records": len(body.items)}

    return run.produce(stage, label, settings, inputs, make)


def reading(
    run: Run,
    model: transformers.PreTrainedModel,
    title: str,
    items: Sequence[Any],
    listed: Callable[[range], Iterable[tuple[Reads, Sequence[tuple[Any, ...]]]]],
) -> Body:
    """The body of a table of what a model reads. listed: of each item of a range its reads, and for each value of them
    what stands before it in its row."""
    read = run.reader(model)

    def rows(part: range, bar: tqdm) -> list[tuple[Any, ...]]:
        reads, keys = zip(*listed(part), strict=True)
        values = chain.from_iterable(read(bar, reads))
        return [(*key, value) for key, value in zip(chain.from_iterable(keys), values, strict=True)]

    return Body(title, items, rows, run.config.engine.records_per_shard)


def read_table(artifact: Artifact) -> dict[str, list[Any]]:
    """The columns of an artifact's table. Raises UserError where it is not what was written."""
    path = artifact.folder / f"{artifact.manifest()['stage']}.parquet"
    try:
        return pq.read_table(path, page_checksum_verification=True).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}); delete {artifact.folder}, and run again") from error
