"""Composes a config, checks it, and runs its stage: see `python train.py --help`."""

import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))

import hydra
from omegaconf import DictConfig

from rdo.settings import register

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    from rdo.main import run_stage  # which --help does without

    return run_stage(config)


if __name__ == "__main__":
    gc.disable()  # until a stage runs: what imports and configs make stays, and would be looked through over and over
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra's errors come here, and are shown as one line
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        os.environ["RDO_DEBUG"] = "1"
    # Options may stand behind settings, where hydra does not take them.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda text: "=" in text and not text.startswith("-"))
    try:
        main()
    except Exception as error:
        from rdo.main import refuse

        refuse(error)
