"""One of several processes that train tiny models under every engine of DeepSpeed; see test_engines.py.

Started by torchrun: `engine_worker.py FOLDER ENGINE-TASK ENGINE-TASK ...`. The first process writes losses, gradient
norms and weights of each to FOLDER/ENGINE-TASK.pt.
"""

import sys
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent / "src"), str(TESTS), str(TESTS / "training")]
# ruff: noqa: E402

from test_loop import model_of

from made_tasks import encoded, make_task
from rdo.models.lora import choose_trained, trained_state
from rdo.models.scorers import FORMS
from rdo.runtime import processes
from rdo.runtime.files import read_json_lines
from rdo.settings import EngineConfig, LoraConfig, ModelConfig, ScorerConfig, TrackerConfig
from rdo.tracking import METRICS, Tracker
from rdo.training import zero
from rdo.training.loop import train

RECORDS, BATCH, EPOCHS = 10, 4, 2


def trained(name: str, engine: str, folder: Path) -> dict[str, Any]:
    """What training a task under an engine comes to: metrics of each step, and the final weights.

    TASK-lora trains an adapter of rank 8 (the paper's KTO), with activations computed again in the backward pass;
    ENGINE+PRECISION computes in another precision than float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapted, name = name.endswith("-lora"), name.removesuffix("-lora")
    task = make_task(name, encoded(RECORDS, 6 if name == "rrhf" else 2))
    model = model_of(name)
    if adapted:
        model.name_or_path = str(folder)  # as a saved model has it
        if name in FORMS:
            model.config.rdo_form = name
        choose_trained(model, ModelConfig(lora=LoraConfig(rank=8)), 0)
    config = ScorerConfig(learning_rate=1e-3, head_learning_rate=5e-3, batch_size=BATCH, epochs=EPOCHS)
    config.schedule, config.max_gradient_norm = "cosine", 0.5
    engine, _, precision = engine.partition("+")
    engine_config = EngineConfig(
        name=engine, precision=precision or "float32", tokens_per_micro_batch=60, gradient_checkpointing=adapted
    )
    start = {key: value.clone() for key, value in trained_state(model).items()}
    with Tracker(TrackerConfig(), folder, "test", {}) as tracker:
        state = train(task, model, config, engine_config, 0, folder, tracker, "test")
    if processes.world().rank:
        return {}
    lines = read_json_lines(folder / METRICS)
    kept = ("step", "loss", "gradient_norm", "learning_rate", "head_learning_rate", "tokens")
    metrics = [{key: line[key] for key in kept if key in line} for line in lines]
    weights = {key: value.clone() for key, value in (state or trained_state(model)).items()}
    return {"metrics": metrics, "weights": weights, "start": start}


def main() -> None:
    torch.set_num_threads(1)
    processes.start("cpu")
    zero.ZERO["stage3_param_persistence_threshold"] = 0  # else weights as small as these are not divided
    folder = Path(sys.argv[1])
    for work in sys.argv[2:]:
        engine, _, task = work.partition("-")
        found = trained(task, engine, folder / work)
        if processes.is_rank0():
            torch.save(found, folder / f"{work}.pt")


if __name__ == "__main__":
    main()
