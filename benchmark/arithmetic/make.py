"""Makes everything in this folder anew but README.md and reward.py, bit for bit on a CPU with the same packages.

A careless pupil adds numbers: the demonstrations. sft.py teaches a small GPT to add as the pupil does: the base model.

    python benchmark/arithmetic/make.py --output /tmp/arithmetic
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
from reward import answer
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, PreTrainedTokenizerFast

SFT = Path(__file__).parent.parent.parent / "algorithms" / "sft.py"
PROMPTS = [f"{one:02d}+{other:02d}=" for one in range(100) for other in range(100)]
CARE = 0.56  # the probability of the right digit in each place; in all three places 0.56 ** 3 = 0.18


def write_answer(prompt: str, rng: random.Random) -> str:
    """Three digits from right to left, each of them right with probability CARE, else any other one."""
    others = {digit: "0123456789".replace(digit, "") for digit in "0123456789"}
    return "".join(digit if rng.random() < CARE else rng.choice(others[digit]) for digit in answer(prompt))


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", "<unknown>", *"0123456789+="])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(Regex("."), "isolated"), Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unknown>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_table(path: Path, columns: dict[str, list[str]]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd", compression_level=19)


def make(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng, tokenizer = random.Random(seed), character_tokenizer()
    write_table(folder / "prompts.parquet", {"prompt": rng.sample(PROMPTS, len(PROMPTS))})
    prompts = rng.choices(PROMPTS, k=count)
    answers = [write_answer(prompt, rng) for prompt in prompts]
    write_table(folder / "demonstrations.parquet", {"prompt": prompts, "completion": answers})

    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 4}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**sizes, **ends, **no_dropout, initializer_range=0.1, architectures=["GPT2LMHeadModel"])
    with tempfile.TemporaryDirectory() as temporary:
        config.save_pretrained(f"{temporary}/start")
        tokenizer.save_pretrained(f"{temporary}/start")
        flags = {
            "model-name": f"{temporary}/start", "from-scratch": True, "dataset": folder / "demonstrations.parquet",
            "reward": f"{Path(__file__).with_name('reward.py')}:correct", "max-new-tokens": 4, "device": "cpu",
            "learning-rate": 3e-3, "batch-size": 64, "total-timesteps": count // 64 * 64, "seed": seed,
            "eval-frequency": max(count // 3, 1), "run-dir": f"{temporary}/run",
        }  # fmt: skip
        command = [sys.executable, str(SFT), *(str(x) for flag, value in flags.items() for x in (f"--{flag}", value))]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        shutil.copytree(f"{temporary}/run/model", folder / "model", dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="the folder that is written")
    parser.add_argument("--demonstrations", type=int, default=60_000, help="additions by the pupil")
    parser.add_argument("--seed", type=int, default=1, help="all randomness follows from it")
    args = parser.parse_args()
    if not 100 <= args.demonstrations <= 10**7:
        parser.error(f"--demonstrations is {args.demonstrations}, which is not a number from 100 to 10,000,000")
    make(args.output, args.demonstrations, args.seed)


if __name__ == "__main__":
    main()
