"""Reward model: learn how good a reply is from pairs of replies, of which people prefer one.

The model is a language model that reads prompt and reply, with a linear head in place of the layer that predicts the
next token. It gives one number, at the end, where it has read everything. The difference of two rewards is the log-odds
that the one reply is preferred to the other [1], and the model is fitted to that by maximum likelihood. x is a prompt,
y a reply; y_w was preferred to y_l. The default task: short reviews, labels drawn from a known reward.

    [1] P(y_w is preferred to y_l) = sigmoid(r(x, y_w) - r(x, y_l))        Christiano et al., Eq. 1 (Bradley-Terry)
    [2] r(x, y) = w . h, with h the last layer's state at the end of y     Stiennon et al.
    [3] L = -log P                                                         Ouyang et al., Eq. 1 with K = 2

Paper: Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155. Before it: Christiano et al. 2017, arXiv:1706.03741, and
Stiennon et al. 2020, arXiv:2009.01325.

Differs from the papers:
- A new head starts at 0, not at random: at first no reply is preferred. Rewards are not shifted to a mean of 0.
- Pairs form batches of similar length; Ouyang et al. keep all pairs of a prompt in one batch, against overfitting.
- Adam's beta2 is 0.98 (0.95); its rate first rises, falls linearly to 0 (cosine to a tenth). bfloat16 autocast on CUDA.
- Left out of Christiano et al., who judge behaviour: sums over a clip's steps, an ensemble, ties, 10 % random choices.

    python algorithms/reward_model.py
    python algorithms/reward_model.py --model-name Qwen/Qwen3-0.6B --dataset Anthropic/hh-rlhf --learning-rate 1e-5
    torchrun --nproc-per-node 8 algorithms/reward_model.py ...    or    accelerate launch algorithms/reward_model.py ...
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.15", "datasets>=5.2", "numpy>=2", "peft>=0.21", "torch>=2.13", "tqdm>=4.66",
#     "transformers>=5.24,<6", "tyro>=1", "wandb>=0.31",
# ]
# ///

import contextlib
import copy
import functools
import glob
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.peft_utils import find_adapter_config_file

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by accelerate, torchrun
REVIEWS = Path(__file__).parent.parent / "benchmark" / "reviews"  # the default task
Text = str | list[dict]  # a text, or a chat: messages with role and content
Tokenizer = transformers.PreTrainedTokenizerBase


@dataclass
class Args:
    # Run
    model_name: str = f"{REVIEWS}/model"  # a causal language model, reward model or LoRA adapter: hub id or folder
    dataset: str = f"{REVIEWS}/preferences.parquet"  # pairs: a hub id, a folder or files, as the library datasets reads
    dataset_config: str | None = None  # its configuration, where it has several
    dataset_split: str | None = None  # None: train, or the only one
    prompt_column: str | None = None  # None: prompt, question, ...; if there is none, what both replies begin with
    chosen_column: str | None = None  # None: chosen, ...
    rejected_column: str | None = None  # None: rejected, ...
    convert: str | None = None  # FILE.py:function (list of rows) -> list of rows, used first; --eval-dataset's too
    chat: bool = False  # write texts with the chat template: prompts as the user's, replies as the assistant's
    labels: str | None = None  # FILE.py:function (prompt, reply_1, reply_2) -> is reply_1 better; replaces the labels
    max_length: int = 1024  # tokens of prompt and reply together; longer pairs are left out
    seed: int = 1  # all randomness follows from it
    total_timesteps: int = 40_000  # pairs to learn from, summed over all epochs; a step is a pair
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    threads: int | None = None  # of PyTorch on a CPU; None: all, but 1 below 10M weights; there 2 can be faster
    checkpoint_frequency: int | None = None  # steps between checkpoints; None: a tenth of the run
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # go on with the run in --run-dir; a larger --total-timesteps makes it longer
    # Evaluation
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    eval_dataset: str | None = None  # pairs for evaluation, all of them; None: pairs of --dataset are held out
    eval_split: str | None = None  # split of --eval-dataset; if there is none, of --dataset
    eval_pairs: int = 1000  # pairs held out, at most a tenth of all
    reward: str | None = None  # FILE.py:function (prompt, reply) -> number, or a reward model's folder, to compare with
    evaluate: bool = False  # only evaluate the model in --run-dir, on its data, read as it did, or on another --dataset
    replies: str | None = None  # with --evaluate: a file with the columns prompt and reply, printed with their rewards
    # Algorithm
    learning_rate: float = 1e-3  # of AdamW; paper: 9e-6, which suits large models; with LoRA rather 1e-4
    warmup: float = 0.1  # the learning rate falls to 0 over the whole run; in this first share it also rises from 0
    batch_size: int = 32  # pairs of an update, summed over all processes; paper: all pairs of 64 prompts
    micro_batch_size: int | None = None  # pairs of one pass of a process; lower it if memory runs out; None: its share
    max_grad_norm: float = 1.0  # gradients with a larger norm (losses/grad_norm) are scaled down to it; 0: never
    weight_decay: float = 0.0  # of AdamW
    lora_rank: int = 0  # train low-rank matrices beside each linear layer (LoRA, alpha = 2 rank); 0: train all weights
    load_in_4bit: bool = False  # with LoRA, on CUDA: 4 bits for each frozen weight; needs the package bitsandbytes
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.replies and not self.evaluate:
            raise UsageError("--replies belongs to --evaluate")


class Pair(NamedTuple):
    """Token ids, of the replies with their end tokens; and the prompt as the data has it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    prompt_text: Text


def pair_rewards(model: nn.Module, pairs: list[Pair], pad_id: int) -> tuple[Tensor, Tensor]:
    """[2] of the chosen and the rejected replies, (B,) each. No mask: causal attention reads no padding behind."""
    ids = pad([p.prompt + p.chosen for p in pairs] + [p.prompt + p.rejected for p in pairs], pad_id)  # (2B, T)
    return model(input_ids=ids.to(model.device), use_cache=False).logits.squeeze(-1).chunk(2)  # [2], of (2B, 1)


METRICS = "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Of rewards, (B,): the loss of each pair, (B,), and the metrics, (5, B), a row for each name in METRICS."""
    assert chosen.shape == rejected.shape
    margins = chosen - rejected
    losses = -nn.functional.logsigmoid(margins)  # [1], [3]
    accuracies = (margins.sign() + 1) / 2  # a tie counts 1/2 (TRL: 0): at the first step, all are ties
    return losses, torch.stack((losses, chosen, rejected, accuracies, margins)).detach()


def update(run: "Run", batch: list[Pair], args: Args) -> dict[str, float]:
    """One update. Each process takes its share of the batch, in micro-batches. Returns means over the batch."""
    mine, size, history = batch[RANK::PROCESSES], run.micro_batch_size, []
    for i in range(0, len(mine), size):
        with run.accelerator.accumulate(run.model):  # averages the gradients; after the last micro-batch, an update
            rewards = pair_rewards(run.model, mine[i : i + size], run.tokenizer.pad_token_id)
            losses, metrics = bradley_terry_loss(*rewards)
            grad_norm = run.step(losses.mean())
        history.append(metrics)
    means = run.accelerator.reduce(torch.cat(history, 1).mean(1), "mean")
    return dict(zip(METRICS, means.tolist(), strict=True)) | {"losses/grad_norm": grad_norm}


def calibration_error(margins: Tensor) -> float:
    """Expected calibration error (arXiv:1706.04599): mean |accuracy - confidence| of ten bins, weighted by size."""
    confidence = margins.abs().sigmoid()  # [1] of the reply that the model prefers: from 0.5 to 1
    bins = (20 * (confidence - 0.5)).long().clamp(max=9)
    gaps = margins.new_zeros(10).index_add(0, bins, (margins.sign() + 1) / 2 - confidence)
    return gaps.abs().sum().item() / len(margins)


def evaluate(run: "Run", pairs: list[Pair]) -> dict[str, float]:
    """Loss, accuracy, margin and calibration on held-out pairs, and how often --reward prefers the chosen reply."""
    pairs, tokenizer = by_length(pairs), run.tokenizer
    rewards = run.share(lambda batch: torch.stack(pair_rewards(run.model, batch, tokenizer.pad_token_id), 1), pairs)
    margins = (rewards[:, 0] - rewards[:, 1]).cpu().double()
    result = {
        "eval/loss": -nn.functional.logsigmoid(margins).mean().item(),  # [3]
        "eval/accuracy": (margins.sign() + 1).mean().item() / 2,  # a tie counts 1/2: a head at 0 guesses
        "eval/margin": margins.mean().item(),
        "eval/calibration_error": calibration_error(margins),
    }
    if run.judge:  # where it drew the labels, no model can expect to be right more often
        texts = (tokenizer.batch_decode([pair[i] for pair in pairs], skip_special_tokens=True) for i in (1, 2))
        chosen, rejected = (torch.tensor(run.judge([pair.prompt_text for pair in pairs], replies)) for replies in texts)
        result["eval/reward_accuracy"] = ((chosen - rejected).sign() + 1).mean().item() / 2
    return result


def train(args: Args) -> dict[str, float]:
    """Trains a reward model, returns its last evaluation. run.goes_on evaluates and saves."""
    with contextlib.closing(Run(args)) as run:
        model = load(run, args.model_name, args)
        pairs, held_out = training_and_held_out(run.tokenizer, model, args)
        set_padding(run.tokenizer, model, pairs + held_out, args)
        model = make_trainable(model, "SEQ_CLS", args)
        # The layers below a head of 0 get no gradient at first, then growing ones: 0.98 forgets sooner than 0.999
        options = {"betas": (0.9, 0.98), "weight_decay": args.weight_decay, "fused": True}
        run.start(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options))
        batches = batches_from(run.global_step, pairs, args)
        while run.goes_on(lambda: evaluate(run, held_out)):
            # 1. Take the next batch, of an epoch's random order
            batch = next(batches)

            # 2. Learn, at a rate that rises over the warm-up, and falls over the whole run
            rise = min(1, (run.global_step + len(batch)) / max(args.warmup * args.total_timesteps, 1))
            rate = args.learning_rate * rise * (1 - run.global_step / args.total_timesteps)
            run.optimizer.param_groups[0]["lr"] = rate
            metrics = update(run, batch, args)
            run.global_step += len(batch)

            # 3. Log
            run.log(metrics | {"charts/learning_rate": rate})
        return run.result


def load(run: "Run", name: str, args: Args) -> nn.Module:
    run.tokenizer = load_tokenizer(name)
    run.judge = load_reward(args.reward, args, run.accelerator.device) if args.reward else None
    return load_model(name, AutoModelForSequenceClassification, args)


def set_padding(tokenizer: Tokenizer, model: nn.Module, pairs: list[Pair], args: Args) -> None:
    """[2] is read at the last token that is not padding, wherever the model is loaded: no reply may end in padding."""
    ends = tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id, *{ids[-1] for pair in pairs for ids in pair[1:3]}])
    special = tokenizer.convert_ids_to_tokens(sorted(turn_ends(tokenizer) - {tokenizer.bos_token_id}))
    names = [tokenizer.pad_token, tokenizer.unk_token, *special, "<|padding|>"]
    tokenizer.add_special_tokens({"pad_token": next(name for name in names if name not in (None, *ends))})
    tokenizer.padding_side = "right"
    largest = max([tokenizer.pad_token_id, *(max(map(max, pair[:3])) for pair in pairs)])
    if largest >= model.get_input_embeddings().num_embeddings:  # that of the padding, or another one, is new
        if args.lora_rank:
            raise UsageError(f"{args.model_name} lacks an embedding: of a token of the data, or that could be padding")
        model.resize_token_embeddings(len(tokenizer))
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


def evaluate_saved(args: Args) -> dict[str, float]:
    """Evaluates the model in --run-dir on held-out pairs, or prints the replies of a file with their rewards."""
    with contextlib.closing(Run(args)) as run:
        model = load(run, f"{args.run_dir}/model", args)
        if args.replies:  # each is a pair with itself
            rows = read_rows("--replies", args.replies)
            if not {"prompt", "reply"} <= rows[0].keys():
                raise UsageError(f"--replies needs the columns prompt and reply, not {', '.join(rows[0])}")
            names = {"prompt": "prompt", "chosen": "reply", "rejected": "reply", "input": None}
            names["system"] = "system" if "system" in rows[0] else None
            texts = [prompt_and_replies(row, names, args) for row in rows]
            pairs = [Pair(*encode(run.tokenizer, prompt, replies), prompt) for prompt, *replies in texts]
        else:
            _, pairs = training_and_held_out(run.tokenizer, model, args)
        set_padding(run.tokenizer, model, pairs, args)
        run.model = run.accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)  # as in training
        if not args.replies:
            return evaluate(run, pairs)
        rewards = run.share(lambda batch: pair_rewards(run.model, batch, run.tokenizer.pad_token_id)[0], pairs)
        for row, reward in zip(rows, rewards.tolist(), strict=True):
            run.accelerator.print(json.dumps(row | {"reward": reward}, default=str))
        return {}


USUAL = {  # names of columns
    "prompt": ["prompt", "question", "instruction", "query", "problem", "context", "input", "history", "conversations"],
    "chosen": ["chosen", "chosen_response"], "rejected": ["rejected", "rejected_response"],
    "input": ["input"], "system": ["system", "system_prompt"], "tools": ["tools"],
}  # fmt: skip


def prompt_and_replies(row: dict, names: dict[str, str | None], args: Args) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected: texts, or a chat and what goes on with it."""
    prompt, chosen, rejected = (as_text(row[names[k]]) if names[k] else None for k in ("prompt", "chosen", "rejected"))
    if type(chosen) is not type(rejected):
        raise UsageError("chosen and rejected must both be texts, or both chats")
    if isinstance(prompt, str) and common_length((prompt, chosen, rejected)) == len(prompt) and len(prompt.split()) > 2:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # both repeat it: no "Hi" that is returned
    if prompt is None or (isinstance(chosen, list) and chosen[0]["role"] != "assistant"):  # both begin with it
        given, start = prompt, max(min(common_length((chosen, rejected)), len(chosen) - 1, len(rejected) - 1), 0)
        if isinstance(chosen, str):  # HH-RLHF: it ends where the last answer begins; others: at a space
            others = [name for name, text in row.items() if isinstance(text, str) and name not in names.values()]
            begin = re.match(r"(?s).*\n\nAssistant:", chosen[:start])
            start = (begin or re.match(r"(?s).*\s|", "" if others else chosen[:start])).end()  # it may be in others
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
        asked = [given] if isinstance(given, str) else [str(message.get("content")) for message in given or []]
        if not prompt or any(not any(text.strip() in str(x.get("content")) for x in prompt) for text in asked):
            raise UsageError("chosen and rejected don't begin with the prompt: name its column with --prompt-column")
    if isinstance(chosen, list) and len(chosen + rejected) > 2:
        raise UsageError("the chats differ before the last turn, so that a user's turn would be part of a reply")
    if isinstance(prompt, str) and row.get(names["input"]) and names["input"] != names["prompt"]:
        prompt = f"{prompt}\n\n{row[names['input']]}"  # Alpaca's instruction, and what it is about
    if isinstance(prompt, str) and (isinstance(chosen, list) or names["system"] or args.chat):
        prompt = [{"role": "user", "content": prompt}]
    if names["system"] and row[names["system"]] and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": row[names["system"]]}, *prompt]
    return prompt, chosen, rejected


def read_pairs(source: str, split: str | None, tokenizer: Tokenizer, limit: int, args: Args) -> list:
    """The pairs of a data set, but for those that are equal or have too many tokens."""
    rows, pairs = read_rows("the data set", source, args.dataset_config, split), []
    of = "rows", "a list of dicts, at least one", lambda rows: isinstance(rows, list) and {*map(type, rows)} == {dict}
    rows = load_function("--convert", args.convert, *of)(rows) if args.convert else rows
    of = "prompt, reply_1, reply_2", "True or False", lambda is_first: is_first in (True, False)
    prefers = load_function("--labels", args.labels, *of) if args.labels else None
    columns = dict.fromkeys(itertools.chain(*rows))  # of all rows: --convert may have given them unlike keys
    given = {"prompt": args.prompt_column, "chosen": args.chosen_column, "rejected": args.rejected_column}
    names = {kind: given.get(kind) or next((x for x in usual if x in columns), None) for kind, usual in USUAL.items()}
    if None in (names["chosen"], names["rejected"]) or {*names.values()} - {None, *columns}:
        flags = "--prompt-column, --chosen-column, --rejected-column, or make other rows of them with --convert"
        raise UsageError(f"{source} has the columns {', '.join(columns)}: name the right ones with {flags}")
    for number, row in enumerate(rows, 1):
        try:
            prompt, *replies = prompt_and_replies(columns | row, names, args)
            if prefers:
                replies.sort(key=str)  # the order says nothing about which was chosen
                replies = replies if prefers(*copy.deepcopy([prompt, *replies])) else replies[::-1]
            pairs.append(Pair(*encode(tokenizer, prompt, replies, row.get(names["tools"])), prompt))
        except UsageError as error:
            raise UsageError(f"{source}, row {number}: {error}; --convert can change or drop rows") from None
    unequal = [pair for pair in pairs if pair.chosen != pair.rejected]
    fitting = [pair for pair in unequal if len(pair.prompt + max(pair.chosen, pair.rejected, key=len)) <= limit]
    equal, long = len(pairs) - len(unequal), len(unequal) - len(fitting)
    news = f"{source}: {len(fitting)} pairs. Left out: {equal} with equal replies, {long} of over {limit} tokens"
    if not fitting:
        raise UsageError(f"{news}. Replies are also equal where the chat template drops what they differ in")
    if RANK == 0:
        print(f"{news}; not used: columns {', '.join({*columns} - {*names.values()}) or 'none'}")
    return fitting


def training_and_held_out(tokenizer: Tokenizer, model: nn.Module, args: Args) -> tuple[list[Pair], list[Pair]]:
    of_run = saved_args(args.run_dir) if args.evaluate else args  # with its data, --evaluate takes what it held out
    data = [(os.path.realpath(x.dataset), x.dataset_config, x.dataset_split or "train") for x in (args, of_run)]
    flags = args if data[0] != data[1] or args.eval_dataset or args.eval_split else of_run  # what it held out, they say
    limit = min(flags.max_length, getattr(model.config.get_text_config(), "max_position_embeddings", flags.max_length))
    read = functools.partial(read_pairs, tokenizer=tokenizer, limit=limit, args=flags)
    if data[0] != data[1]:
        return [], read(args.dataset, args.dataset_split)  # other data: all of it
    if args.eval_dataset or args.eval_split:
        held_out = read(args.eval_dataset or args.dataset, args.eval_split)
        pairs = [] if args.evaluate else read(args.dataset, args.dataset_split)
    else:
        pairs, held_out = hold_out(read(args.dataset, args.dataset_split), of_run)
    if len(pairs) < args.batch_size and not args.evaluate:
        raise UsageError(f"{len(pairs)} pairs to learn from are fewer than --batch-size {args.batch_size}")
    return pairs, held_out


def hold_out(pairs: list[Pair], args: Args) -> tuple[list[Pair], list[Pair]]:
    """Pairs for training and for evaluation, with different prompts unless each prompt has more than size pairs."""
    size, groups, held_out = min(args.eval_pairs, math.ceil(len(pairs) / 10)), {}, []
    random.Random(args.seed).shuffle(pairs)
    for pair in pairs:
        groups.setdefault(str(pair.prompt_text), []).append(pair)
    for group in groups.values():
        held_out += group if len(held_out) + len(group) <= size else []
    if not held_out:  # each prompt has more than size pairs, as in the default task
        return pairs[size:], pairs[:size]
    prompts = {str(pair.prompt_text) for pair in held_out}
    return [pair for pair in pairs if str(pair.prompt_text) not in prompts], held_out


def by_length(pairs: list[Pair]) -> list[Pair]:
    """In the order of their longer sequence's length, so that neighbours need little padding."""
    return sorted(pairs, key=lambda pair: len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))


def batches_from(step: int, pairs: list[Pair], args: Args) -> Iterator[list[Pair]]:
    """Batches of similar length, without end. An epoch has each pair at most once: an incomplete batch is dropped."""
    size, batches = args.batch_size, []
    for number in itertools.count(step // size):
        epoch, position = divmod(number, len(pairs) // size)
        if position == 0 or not batches:
            rng = random.Random(f"{args.seed} {epoch}")
            order = rng.sample(pairs, len(pairs) // size * size)
            # Sorted in pools of 50 batches, not all at once: else the batches of all epochs would be nearly the same
            pools = [by_length(order[i : i + 50 * size]) for i in range(0, len(order), 50 * size)]
            batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
            rng.shuffle(batches)
        yield batches[position]


# ---- Below this line: what does not depend on the algorithm; the other text scripts have the same functions ----
# What a library offers is left to it: datasets reads files, the tokenizer's chat template writes chats, peft adds LoRA,
# accelerate knows about GPUs and other processes.


class UsageError(Exception):
    """A mistake of the user: main prints it as one line, which says what to do, and ends with exit code 2."""


def check_ranges(args: Args, **ranges: tuple[float, float]) -> None:
    """Refuses integers below 1, floats below 0 (or see ranges), NumPy's numbers and unknown words. Sets defaults."""
    ranges = {"seed": (0, 2**63 - 1), "warmup": (0, 1), "lora_rank": (0, math.inf), "threads": (1, 1024)} | ranges
    for (name, value), kind in zip(vars(args).items(), Args.__annotations__.values(), strict=True):
        low, high = ranges.get(name, (0 if "float" in str(kind) else 1, math.inf))
        if hasattr(value, "dtype") or (type(value) in (int, float) and not low <= value <= min(high, 1e308)):  # not inf
            raise UsageError(f"--{name.replace('_', '-')} is {value!r}, which is not a number from {low} to {high}")
        words = getattr(kind, "__args__", [str])  # "a" and "b" of Literal["a", "b"]
        if isinstance(value, str) and value not in words and str not in words:
            raise UsageError(f"--{name.replace('_', '-')} is {value}, which is none of {words}")
    if args.load_in_4bit and not args.lora_rank:
        raise UsageError("--load-in-4bit is for weights that don't change: it needs --lora-rank")
    if args.reward is None and args.dataset == Args.dataset:  # the default task has a true reward
        args.reward = f"{REVIEWS}/reward.py:true_reward"
    args.eval_frequency = args.eval_frequency or math.ceil(args.total_timesteps / 20)
    args.checkpoint_frequency = args.checkpoint_frequency or math.ceil(args.total_timesteps / 10)


def saved_args(run_dir: str | Path, **changes: object) -> Args:
    """The arguments of a run, with changes. train(saved_args("runs/...", resume=True)) goes on with it."""
    try:
        config = json.loads(Path(run_dir, "config.json").read_text())
        assert config["script"] == Path(__file__).stem, f"it is a run of {config['script']}.py"
        return Args(**config["args"] | {"run_dir": str(run_dir)} | changes)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UsageError(f"--run-dir must be a sound run of {Path(__file__).name}, not {run_dir}: {error!r}") from None


def parse_args() -> Args:
    """The command line. With --resume or --evaluate, flags that are not given are those of the run."""
    if {"-h", "--help"} & {*sys.argv}:
        flags = inspect.getsource(Args).split("\n\n")[0].split("class Args:\n")[1].replace("    # ", "\n")
        flags = re.sub(r"    (\w+): ", lambda field: f"  --{field[1].replace('_', '-')}: ", flags)
        sys.exit(print(__doc__.split("\n\n    [1]")[0], *re.findall("\nPaper.*(?:\n.+)*", __doc__), flags, sep="\n"))
    run_dirs = re.findall("--run[-_]dir[\n=](.*)", "\n".join(sys.argv)) or [""]
    default = {"default": saved_args(run_dirs[-1])} if {"--resume", "--evaluate"} & {*sys.argv} else {}
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            return tyro.cli(Args, **default)
        except SystemExit:  # tyro draws a box around its message
            raise UsageError(re.sub("[^ -~]+", " ", printed.getvalue())) from None


def load_function(flag: str, value: str, arguments: str, results: str, accepts: Callable) -> Callable:
    try:
        path, name = value.rsplit(":", 1)
        function = runpy.run_path(path)[name]
        inspect.signature(function).bind(*arguments.split(", "))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UsageError(f"{flag} {value} must be FILE.py:function ({arguments}): {error!r}") from None

    def checked(*given: object) -> object:
        if not accepts(result := function(*given)):
            raise UsageError(f"{flag} {value} must return {results}, not {result!r:.80}")
        return result

    return checked


def read_rows(flag: str, source: str, config: str | None = None, split: str | None = None) -> list[dict]:
    """All that datasets reads: a hub id, files ("pairs-*.json.gz"), their folder, or a folder of save_to_disk."""
    import datasets  # slow to import

    datasets.disable_progress_bars()
    found = [source] if os.path.isfile(source) else glob.glob(source)  # a name may have brackets
    files = sorted(glob.escape(os.path.abspath(path)) for path in found if os.path.isfile(path))
    try:
        if os.path.exists(f"{source}/state.json") or os.path.exists(f"{source}/dataset_dict.json"):
            data = saved if isinstance(saved := datasets.load_from_disk(source), dict) else {"train": saved}
        elif files:
            data = datasets.load_dataset(os.path.dirname(os.path.abspath(found[0])), data_files=files, split=split)
        else:
            assert not re.search(r"\.(jsonl?|csv|parquet)(\.|$)", source), "there is no such file"
            data = datasets.load_dataset(source, config, split=split)
        if isinstance(data, dict):  # of splits
            split = split or ("train" if len(data) > 1 else next(iter(data)))
            assert split in data, f"choose with --dataset-split one of {', '.join(data)}"
            data = data[split]
        assert len(data), "it is empty"
        return data.to_list()
    except Exception as error:  # unknown, unreachable, damaged, another split: its message says which
        cause = error.__cause__ or error
        raise UsageError(f"{flag} {source} can't be read: {type(cause).__name__}: {cause}") from None


def without_none(value: object) -> object:
    """datasets gives all objects of a column the same keys: those that an object did not have are None, and go."""
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return {k: without_none(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def as_text(value: object) -> Text:
    """A text, or the messages of a chat, of which each has a role. ShareGPT's from and value are role and content."""
    message, messages = value, []
    json_chat = r"""(?s)\s*\[\s*\{(?=.*['"](role|from)['"]\s*:).*['"](content|value)['"]\s*:"""  # as CSV has it
    if isinstance(value, str) and not re.match(json_chat, value):
        return value
    try:
        chat = without_none(json.loads(value) if isinstance(value, str) else value)
        for message in chat if isinstance(chat, list) and chat else [chat]:
            turn = {{"from": "role", "value": "content"}.get(key, key): x for key, x in message.items()}
            if isinstance(turn.get("content"), list):
                turn["content"] = "".join(part["text"] for part in turn["content"])  # KeyError: it is no text
            assert isinstance(turn.get("content"), str) or turn["tool_calls"]
            role, roles = turn["role"].lower(), {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
            messages.append(turn | {"role": roles.get(role, role)})
        return messages
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):  # ValueError: no JSON
        raise UsageError(f"{message!r:.80} is neither a text alone nor a message with role and content") from None


def common_length(sequences: list) -> int:
    """How many items at their beginning all sequences have in common."""
    return len([*itertools.takewhile(lambda x: x.count(x[0]) == len(x), zip(*sequences, strict=False))])


def encode(tokenizer: Tokenizer, prompt: Text, replies: list[Text], tools: list | str | None = None) -> list:
    """Token ids of the prompt, then of each reply with its end token, which is added if there is none."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if isinstance(prompt, str):
        # Prompt and reply together, as the model reads them: alone, the reply's first token could be another one
        texts = tokenizer([prompt, *(prompt + reply for reply in replies)]).input_ids
        texts = [ids[1:] if ids[:2] == [bos, bos] else ids for ids in texts]  # the text had its own BOS: drop one
    else:
        turns = [[{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply for reply in replies]
        try:
            tools = json.loads(tools or "null") if isinstance(tools, str) else without_none(tools)
            write = functools.partial(tokenizer.apply_chat_template, tools=tools, return_dict=False)
            texts = [write(prompt, add_generation_prompt=True), *(write(prompt + turn) for turn in turns)]
            assert common_length(texts) >= len(write(prompt)) - 2, "it writes the prompt otherwise if a reply follows"
        except Exception as error:  # there is none, or it refuses a system turn, or the order of turns
            raise UsageError(f"the tokenizer's chat template can't write it: {error!r}") from None
    start = common_length(texts)  # the prompt's tokens; fewer if its last one merges with the reply's first
    if start == 0:  # the first token that is predicted must follow something
        start, texts = 1, [[eos if bos is None else bos, *ids] for ids in texts]
    encoded, ends = [texts[0][:start]], turn_ends(tokenizer)
    for ids in texts[1:]:
        length = len(ids)  # without the line break that some templates write behind the end token
        while length > start and ids[length - 1] not in ends and not tokenizer.decode(ids[length - 1]).strip():
            length -= 1
        encoded.append(ids[start:length] if length > start and ids[length - 1] in ends else [*ids[start:], eos])
    return encoded


@functools.cache
def turn_ends(tokenizer: Tokenizer) -> set[int]:
    """The special tokens: a turn's text ends in one of them, such as <|im_end|>, <|eot_id|>, <end_of_turn>, </s>."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}


def pad(rows: list[list[int]], value: int, side: str = "right") -> Tensor:  # -> (B, T)
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value, side)


def load_tokenizer(name: str) -> Tokenizer:
    if name.startswith(str(REVIEWS)) and not REVIEWS.exists():
        raise UsageError("the default task is not beside this script: give it --model-name and --dataset")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        assert tokenizer.eos_token_id is not None, "it has no eos_token: set one in its tokenizer_config.json"
        return tokenizer
    except Exception as error:  # unknown, unreachable, damaged: its message says which
        raise UsageError(f"{name} has no tokenizer that can be used (an adapter needs its base's): {error}") from None


def load_model(name: str, kind: type, args: Args) -> nn.Module:
    """A model from the hub or a folder, in eval mode: without dropout, each pass over a text gives the same value."""
    # On CUDA, LoRA's frozen weights are bfloat16. Trained weights are float32: bfloat16 would round small updates away
    half = args.lora_rank and args.device != "cpu" and torch.cuda.is_available()
    options = {"dtype": torch.bfloat16 if half else torch.float32, "output_loading_info": True}
    options |= {"num_labels": 1, "ignore_mismatched_sizes": True} if kind is AutoModelForSequenceClassification else {}
    if args.load_in_4bit:
        quantised = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        options["quantization_config"] = quantised
    try:
        if adapter := find_adapter_config_file(name):  # what LoRA learned before becomes part of the weights
            import peft

            assert "num_labels" in options or "SEQ_CLS" not in Path(adapter).read_text(), "it is a reward model"
            model = load_model(json.loads(Path(adapter).read_text())["base_model_name_or_path"], kind, args)
            model = model if args.load_in_4bit else model.float()  # a sum in bfloat16 would round LoRA's steps away
            model = peft.PeftModel.from_pretrained(model, name).merge_and_unload().requires_grad_(True)
            model.config.get_text_config().pad_token_id = load_tokenizer(name).pad_token_id  # LoRA saves no config
            model.name_or_path = os.path.abspath(name) if os.path.exists(name) else name  # a new adapter names its base
            return model
        model, info = kind.from_pretrained(name, **options)
        if "score.weight" in info["missing_keys"]:  # the head that gives rewards is new
            nn.init.zeros_(model.score.weight)
        missing = sorted({*info["missing_keys"]} - {"score.weight"})
        assert not missing, f"it has no weights for {', '.join(missing[:3])}"
        assert not (wrong := [*info["mismatched_keys"]]), f"{wrong[0][0]} has {wrong[0][1][0]} outputs, 1 is needed"
        assert "score.weight" not in info["unexpected_keys"], "it is a reward model"
        ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]], device=model.device)  # if causal, the third state is the same
        states = model.eval().base_model(input_ids=ids).last_hidden_state[:, 2]
        assert torch.allclose(*states, atol=1e-4), "it is no causal language model: its attention looks ahead"
        if kind is AutoModelForSequenceClassification:  # float32, even in autocast: near 5, bfloat16 has steps of 1/32
            head = model.score.float()
            head.register_forward_pre_hook(lambda _, x: (x[0].float(),))
            head.register_forward_hook(lambda h, x, y: y if y.dtype == x[0].dtype else (x[0] * h.weight).sum(-1, True))
    except Exception as error:
        raise UsageError(f"{name} can't be loaded as {kind.__name__}: {error}") from None
    torch.set_num_threads(args.threads or (1 if model.num_parameters() < 10_000_000 else Run.all_threads))
    return model


def make_trainable(model: nn.Module, task: str, args: Args) -> nn.Module:
    try:
        if args.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            for layer in model.modules():  # only these are in training mode, as checkpointing needs; none drops out
                layer.training = isinstance(layer, GradientCheckpointingLayer)
                vars(layer).update({name: 0.0 for name in vars(layer) if name.endswith("dropout")})
        if args.lora_rank:
            import peft  # slow to import

            config = peft.LoraConfig(task, r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
            model = peft.get_peft_model(model, config)  # its matrices are float32, as the head is
        return model
    except ValueError as error:
        raise UsageError(f"not possible with this model: {error} Leave the flag out") from None


def load_reward(name: str, args: Args, device: torch.device) -> Callable[[list[Text], list[str]], list[float]]:
    """What --reward names, a function or a reward model's folder, for lists of prompts and replies."""
    if re.search(r"\.py(:|$)", name):
        of = "prompt, reply", "a number", lambda reward: hasattr(reward, "__float__") and math.isfinite(reward)
        function = load_function("--reward", name, *of)
        return lambda prompts, replies: [*map(float, map(function, map(copy.deepcopy, prompts), replies))]  # of copies
    tokenizer, model = load_tokenizer(name), load_model(name, AutoModelForSequenceClassification, args).to(device)
    if not model.score.weight.any():
        raise UsageError(f"--reward {name} has no head that gives rewards (score.weight)")
    pad_id = model.config.get_text_config().pad_token_id  # it reads the reward at the last token that is not padding

    @torch.no_grad()
    def rewards_of(prompts: list[Text], replies: list[str]) -> list[float]:
        encoded = (encode(tokenizer, prompt, [reply]) for prompt, reply in zip(prompts, replies, strict=True))
        rows, rewards = [prompt + reply for prompt, reply in encoded], []
        for i in range(0, len(rows), size := 1 if pad_id is None else 64):  # without a padding token: one by one
            ids = pad(rows[i : i + size], pad_id or 0).to(device)  # (B, T)
            rewards += model(input_ids=ids, use_cache=False).logits.squeeze(-1).tolist()
        return rewards

    return rewards_of


class Run:
    """A run: its processes and their devices (accelerator), its folder, its log."""

    stop_signal, all_threads = 0, torch.get_num_threads()  # main sets the first, at a signal; PyTorch chose the second

    def __init__(self, args: Args):
        name = f"{re.sub('[^A-Za-z0-9.-]+', '-', Path(args.dataset).stem)}__{Path(__file__).stem}__{args.seed}"
        self.args, self.dir = args, Path(args.run_dir or f"runs/{name}__{datetime.now():%Y%m%d-%H%M%S-%f}")
        self.command = shlex.join([sys.executable, __file__, "--run-dir", str(self.dir)])
        self.global_step, self.last_step, self.started, self.result = 0, 0, time.time(), {}
        self.opened, self.wandb = contextlib.ExitStack(), None  # what close will close
        self.micro_batch_size = args.micro_batch_size or math.ceil(args.batch_size / PROCESSES)
        if args.batch_size % (self.micro_batch_size * PROCESSES) or args.total_timesteps % args.batch_size:
            raise UsageError(f"--total-timesteps must be n x --batch-size, that m x {PROCESSES} x --micro-batch-size")
        try:
            torch.zeros(1, device=args.device.replace("auto", "cpu"))
        except (AssertionError, RuntimeError) as error:
            raise UsageError(f"--device {args.device} can't be used, --device cpu can ({error!s:.99})") from None
        if args.device != "auto":
            os.environ["ACCELERATE_TORCH_DEVICE"] = args.device
        precision = "bf16" if torch.cuda.is_available() and args.device != "cpu" else "no"
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", precision)  # accelerate launch has set it
        self.accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=precision)
        self.accelerator.gradient_accumulation_steps = args.batch_size // self.micro_batch_size // PROCESSES
        if self.accelerator.distributed_type == "DEEPSPEED":
            raise UsageError("what DeepSpeed keeps of the optimizer is not in checkpoint.pt: take FSDP instead")
        torch.manual_seed(args.seed)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Opens the folder. A new run begins at global_step 0, a resumed one where its last checkpoint was."""
        args, path, checkpoint = self.args, self.dir / "config.json", self.dir / "checkpoint.pt"
        if args.resume:
            config = json.loads(path.read_text())
            changed = {name for name, value in config["args"].items() if value != getattr(args, name)}
            changed -= {"run_dir", "resume", "device", "threads", "micro_batch_size"}
            if changed - {"total_timesteps"} or args.total_timesteps < config["args"]["total_timesteps"]:
                raise UsageError(f"--resume can only raise --total-timesteps; unlike the run's: {', '.join(changed)}")
        elif any((self.dir / name).exists() for name in ("config.json", "checkpoint.pt", "model", "metrics.jsonl")):
            raise UsageError(f"--run-dir {self.dir} holds a run: go on with --resume, or name another folder")
        else:
            git = f"git -C {shlex.quote(os.path.dirname(__file__))} describe --always --abbrev=40 --dirty --exclude='*'"
            config = {"script": Path(__file__).stem, "args": asdict(args), "command": sys.argv}
            config |= {"commit": subprocess.getoutput(f"{git} 2>&-") or None, "wandb_id": os.urandom(8).hex()}
            config["versions"] = {d.name: d.version for d in distributions()} | {"python": sys.version}
            config["hardware"] = subprocess.getoutput("uname -a; lscpu | grep 'Model name'; nvidia-smi -L 2>&-")
        config["args"]["total_timesteps"] = args.total_timesteps  # a resumed run may be longer
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.bare = self.accelerator.unwrap_model(self.model)  # generates, and can be saved
        state = {"step": 0, "last_step": 0, "seconds": 0.0, "bytes": 0, "result": {}}
        try:
            if args.resume and (checkpoint.exists() or (self.dir / "model").exists()):  # save writes this one later
                state = torch.load(checkpoint, map_location="cpu", weights_only=True)  # data, never code
                weights, of_optimizer = {"model_state_dict": state["model"]}, {"optim_state_dict": state["optimizer"]}
                options = StateDictOptions(full_state_dict=True, strict=False)
                set_state_dict(self.model, self.optimizer.optimizer, **weights, **of_optimizer, options=options)
            self.global_step, self.last_step, self.result = state["step"], state["last_step"], state["result"]
            self.started, size = self.started - state["seconds"], state["bytes"]
        except Exception as error:  # a damaged file can raise anything
            raise UsageError(f"{checkpoint} is missing, damaged or of another kind ({type(error).__name__})") from None
        if RANK > 0:
            return
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if args.track:
                import wandb

                names = {"project": args.wandb_project_name, "name": self.dir.name, "id": config["wandb_id"]}
                self.wandb = wandb.init(dir=self.dir.resolve(), config=config["args"], resume="allow", **names)
                self.opened.callback(self.wandb.finish)
                self.wandb.define_metric("*", step_metric="global_step")
            Path(f"{path}.tmp").write_text(json.dumps(config, indent=1, default=str))  # default: run_dir may be a Path
            os.replace(f"{path}.tmp", path)
            self.metrics = self.opened.enter_context(open(self.dir / "metrics.jsonl", "ab"))
        except Exception as error:  # W&B's have many kinds: no key, no network
            hint = "--run-dir must be writable" if isinstance(error, OSError) else "WANDB_MODE=offline needs no account"
            raise UsageError(f"{error}: {hint}") from None
        if self.metrics.tell() < size:
            raise UsageError(f"{self.metrics.name} lacks rows that were there when {checkpoint} was written")
        self.metrics.seek(self.metrics.truncate(size))  # later rows will be written again
        self.bar = tqdm(total=args.total_timesteps, initial=self.global_step, unit=" steps", disable=None)
        self.opened.callback(self.bar.close)
        print(f"{PROCESSES} x {self.accelerator.device}, run folder {self.dir}, from step {self.global_step}")

    def goes_on(self, evaluate: Callable[[], dict[str, float]]) -> bool:
        """Evaluates and saves where that is due. False at the end of the run."""
        args, step, last = self.args, self.global_step, self.last_step
        stop = self.accelerator.gather(torch.tensor([Run.stop_signal], device=self.accelerator.device)).max().item()
        end, self.last_step = step == args.total_timesteps, step
        if step // args.eval_frequency > last // args.eval_frequency or (end and step > last):
            self.result = {name: float(value) for name, value in evaluate().items()}
            self.log(self.result)
        if step and (step // args.checkpoint_frequency > last // args.checkpoint_frequency or end or stop):
            self.save()
        if stop:
            self.accelerator.print(f"Stopped at step {step}. To go on:\n    {self.command} --resume")
            raise SystemExit(128 + stop)
        if end:
            self.accelerator.print(f"Done: {self.dir}/model. To evaluate it again:\n    {self.command} --evaluate")
        return not end

    def step(self, loss: Tensor) -> float:
        """Adds the loss's gradient and, after the last micro-batch, updates. Returns the norm before clipping."""
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm or math.inf)
        self.optimizer.step()  # accelerate's: before the last micro-batch, this and the next line do nothing
        self.optimizer.zero_grad()
        return float(norm) if self.accelerator.sync_gradients else 0.0

    def share(self, function: Callable[[list], Tensor], items: list) -> Tensor:
        """function of all items, (len(items), ...). The processes share the work, in micro-batches."""
        size, length = self.micro_batch_size, math.ceil(len(items) / PROCESSES)
        mine = (items + items[-1:] * PROCESSES)[RANK * length : (RANK + 1) * length]  # all have as many, some again
        with torch.no_grad():
            values = torch.cat([function(mine[i : i + size]) for i in range(0, len(mine), size)])
        return self.accelerator.gather(values)[: len(items)]

    def log(self, row: dict[str, float]) -> None:
        """Writes a row of metrics.jsonl, and sends it to W&B. NaN or infinity ends the run."""
        if broken := [name for name, value in row.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"NaN or infinity at step {self.global_step} in {', '.join(broken)}")
        if RANK > 0:
            return
        seconds = time.time() - self.started
        row = {"global_step": self.global_step, "time": round(seconds, 3)} | {k: float(v) for k, v in row.items()}
        if "charts/learning_rate" in row:
            row["charts/SPS"] = self.global_step / seconds  # since the run began, evaluations included
        self.metrics.write(json.dumps(row).encode() + b"\n")
        self.metrics.flush()
        if self.wandb:
            with contextlib.suppress(Exception):  # W&B's troubles must not end the run
                self.wandb.log(row)
        if evaluation := [f"{name[5:]} {value:.4g}" for name, value in row.items() if name.startswith("eval/")]:
            tqdm.write(f"step {self.global_step:>10,}: {', '.join(evaluation)}")
        self.bar.update(self.global_step - self.bar.n)

    def save(self) -> None:
        """Writes checkpoint.pt and model/. A kill leaves one checkpoint.pt to --resume from, perhaps without model/."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights, of_optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=options)
        if RANK > 0:
            return
        if not all(math.isfinite(values.sum()) for values in weights.values()):
            raise FloatingPointError(f"NaN or infinity at step {self.global_step} in the parameters")
        state = {"model": weights, "optimizer": of_optimizer, "step": self.global_step, "last_step": self.last_step}
        state |= {"seconds": time.time() - self.started, "bytes": self.metrics.tell(), "result": self.result}
        torch.save(state, self.dir / "checkpoint.pt.tmp")
        os.replace(self.dir / "checkpoint.pt.tmp", self.dir / "checkpoint.pt")
        folder, temporary = self.dir / "model", self.dir / "model.tmp"
        self.bare.save_pretrained(temporary, state_dict={**weights})  # a copy, for it empties what it is given
        self.tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)

    def close(self) -> None:
        self.opened.close()
        self.model = None
        self.accelerator.free_memory()  # frees what averages gradients: gloo can hang where that outlives its group
        self.accelerator.end_training()  # ends the other processes' group


def main() -> None:
    """Exit codes: 0 done, 2 a mistake of the user, 130 or 143 stopped by a signal, 1 everything else."""

    def stop(number: int, _: object) -> None:
        Run.stop_signal = number
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nStopping after this batch or evaluation; a second Ctrl-C goes back to the last checkpoint.\n")

    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # each line at once, also into a file
    warnings.simplefilter("ignore")  # warnings of libraries would stand around our one line
    logging.disable()
    transformers.utils.logging.disable_progress_bar()
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, stop)
    try:
        args = parse_args()
        if args.evaluate:
            result = evaluate_saved(args)
            if RANK == 0:
                print(*(f"{name} {value:.4g}" for name, value in result.items()), sep=", ")
        else:
            train(args)
    except (UsageError, FloatingPointError) as error:
        if RANK == 0:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
