"""Composes a config, checks it, and runs its stage: see `python train.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))

import hydra
from omegaconf import DictConfig

from rdo.main import check_command_line, run_stage


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    return run_stage(config)


if __name__ == "__main__":
    sys.argv[1:] = check_command_line(sys.argv[1:])
    main()
