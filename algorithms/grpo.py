"""Group-relative policy optimisation (GRPO): reinforcement learning of a language model without a value network.

The policy writes a group of n replies y_i to each prompt x. A reward model, or a function that checks the answer, gives
each a score s_i. A reply's advantage is how much better it is than its group [1]. Good replies get likelier, bad ones
less likely, until the ratio to the policy that wrote them leaves a band, as in PPO [2]. A KL penalty [3] keeps the
policy near the reference, the model at the start: r_i = s_i - beta k1 of y_i (--kl reward), or it is part of the loss.

    [1] A_i = (r_i - mean(r)) / (std(r) + 0.0001)    --advantage grpo                      GRPO, Sec. 4.1.2
        A_i = r_i - mean(r)                          --advantage dr-grpo                   Dr. GRPO, Sec. 3.2
        A_i = r_i - mean(the others' r)              --advantage rloo                      RLOO, Sec. 2
    [2] L_i = -min(ratio A_i, clip(ratio, 1 - low, 1 + high) A_i), ratio = pi / pi_old     PPO, Eq. 7; DAPO: high > low
        one for each token. grpo: their mean. dr-grpo: their sum / --max-new-tokens. rloo: one ratio, of the whole y_i
    [3] d = log pi - log pi_ref:   k1 = d,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d          Schulman 2020; GRPO, Eq. 4
        in the reward: k1 of the whole reply; in the loss: one for each token (rloo: for the whole reply)
    [4] maximise E[s] - beta KL(pi, pi_ref): pi* is proportional to pi_ref exp(s / beta)   DPO, Eq. 3, 4

Which settings follow the gradient of [4], on average and at pi = pi_old? rloo with k1 in the reward (the default) or k2
in the loss; dr-grpo with k1 in the reward, on a smaller scale. Not grpo: its std gives prompts, its mean over tokens
gives replies unequal weights; but with k1 in the reward all advantages are 0 at pi*. Not k2 of single tokens: it leaves
out what later tokens will cost. As values, k1 and k3 are unbiased. As losses, k1's gradient is 0 on average, and k3's
is that of KL(pi_ref, pi), at each token (rloo: of replies), so GRPO's paper has another optimum than pi*.

Paper: Shao et al. 2024, arXiv:2402.03300. Dr. GRPO: arXiv:2503.20783. RLOO: arXiv:2402.14740. DAPO: arXiv:2503.14476.
DPO: arXiv:2305.18290. Differs from them: AdamW, warm-up and decay of its rate; a fixed reference; std + 0.0001, with
n - 1; rloo takes several clipped steps with a batch (RLOO: one, without a ratio); no scores for parts of a reply; a
cut-off reply is scored as if it ended; of DAPO no dynamic sampling, no mean over a group's tokens, no overlong penalty.

    python algorithms/grpo.py  # RLOO; the reader's guide has the flags of GRPO's paper, of Dr. GRPO and of DAPO
    python algorithms/grpo.py --model-name runs/SFT/model --dataset FILE.jsonl --reward FILE.py:function --kl none
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
from typing import Literal, NamedTuple

import torch
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.peft_utils import find_adapter_config_file

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by accelerate, torchrun
REVIEWS = Path(__file__).parent.parent / "benchmark" / "reviews"  # the default task
Text = str | list[dict]  # a text, or a chat: messages with role and content
Tokenizer = transformers.PreTrainedTokenizerBase


@dataclass
class Args:
    # Run
    model_name: str = f"{REVIEWS}/model"  # a causal language model or LoRA adapter: hub id or folder
    dataset: str = f"{REVIEWS}/prompts.parquet"  # prompts: a hub id, a folder or files, as the library datasets reads
    dataset_config: str | None = None  # its configuration, where it has several
    dataset_split: str | None = None  # None: train, or the only one
    prompt_column: str | None = None  # None: prompt, question, ...
    chat: bool = False  # write prompts with the chat template, as the user's
    reward: list[str] | None = None  # one or more: FILE.py:function (prompt, reply) -> number, or reward model's folder
    reward_weights: list[float] | None = None  # of several rewards, which are added up; None: 1 each
    max_length: int = 1024  # tokens of prompt and reply together; prompts that leave too little room are left out
    max_new_tokens: int = 48  # of a reply, at most; drawn at temperature 1
    seed: int = 1  # all randomness follows from it
    total_timesteps: int = 51_200  # replies to learn from; a step is a reply
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    threads: int | None = None  # of PyTorch on a CPU; None: all, but 1 below 10M weights; there 2 can be faster
    checkpoint_frequency: int | None = None  # steps between checkpoints; None: a tenth of the run
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # go on with the run in --run-dir; a larger --total-timesteps makes it longer
    # Evaluation
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    eval_replies: int = 256  # replies that the policy writes in an evaluation, to prompts held out if there are many
    evaluate: bool = False  # only evaluate the model in --run-dir, on its data, read as it did, or on another --dataset
    # Algorithm
    learning_rate: float = 1e-3  # of AdamW; paper: 1e-6, which suits large models; with LoRA rather 1e-5
    warmup: float = 0.05  # the rate falls linearly to 0 over the run, and rises in this first share
    batch_size: int = 512  # replies of a batch, summed over all processes; paper: 1024
    group_size: int = 16  # n, replies to a prompt; paper: 64
    num_minibatches: int = 4  # minibatches in a batch, one gradient step each in each epoch; paper: 1
    update_epochs: int = 2  # passes over the batch; paper: 1; rloo with long replies: 1, and --num-minibatches 1
    micro_batch_size: int | None = None  # replies in one forward and backward pass of a process; None: the minibatch
    write_batch_size: int = 512  # replies that one process writes at the same time
    advantage: Literal["grpo", "dr-grpo", "rloo"] = "rloo"  # [1] and how [2] is averaged; the paper's is grpo
    clip_low: float = 0.2  # [2] low
    clip_high: float = 0.2  # [2] high; DAPO: 0.28
    kl: Literal["reward", "loss", "none"] = "reward"  # where the KL penalty is subtracted; paper: loss; DAPO: none
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # [3]; --kl reward needs k1, --kl loss k2 or k3; paper: k3
    beta: float = 1.0  # [4] coefficient of the KL penalty; paper: 0.04
    max_grad_norm: float = 1.0  # gradients with a larger norm (losses/grad_norm) are scaled down to it; 0: never
    weight_decay: float = 0.0  # of AdamW
    lora_rank: int = 0  # train low-rank matrices beside each linear layer (LoRA, alpha = 2 rank); 0: train all weights
    load_in_4bit: bool = False  # with LoRA, on CUDA: 4 bits for each frozen weight; needs the package bitsandbytes
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them

    def __post_init__(self) -> None:
        check_ranges(self, clip_low=(0, 1), group_size=(2, math.inf))
        if self.batch_size % (self.num_minibatches * (self.micro_batch_size or 1) * PROCESSES):
            sizes = f"times --micro-batch-size {self.micro_batch_size or 1} times {PROCESSES} processes"
            raise UsageError(f"--batch-size {self.batch_size} must be a multiple of --num-minibatches {sizes}")
        if self.batch_size % self.group_size:
            raise UsageError(f"--batch-size {self.batch_size} must be a multiple of --group-size {self.group_size}")
        if self.reward is None:
            raise UsageError("--reward must say what a reply is worth: FILE.py:function, or a reward model's folder")
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward
        self.reward_weights = self.reward_weights or [1.0] * len(self.reward)
        if len(self.reward_weights) != len(self.reward) or not all(map(math.isfinite, self.reward_weights)):
            raise UsageError(f"--reward-weights must be {len(self.reward)} numbers, one for each --reward")
        self.beta = 0.0 if self.kl == "none" else self.beta
        if self.kl != "none" and (self.kl == "reward") != (self.kl_estimator == "k1"):  # else a wrong gradient, or none
            raise UsageError("--kl reward needs --kl-estimator k1, --kl loss k2 or k3")


class Prompt(NamedTuple):
    """Token ids, and the prompt as the data has it."""

    ids: list[int]
    text: Text


class Reply(NamedTuple):
    """A prompt and a reply y_1 ... y_T to it, with T log-probabilities each."""

    prompt: list[int]
    reply: list[int]
    old_log_prob: list[float]  # log pi_old(y_t | x, y_<t), of the policy that wrote it
    ref_log_prob: list[float]  # log pi_ref(y_t | x, y_<t)
    scores: list[float]  # by each of --reward


def group_advantages(rewards: Tensor, kind: str) -> Tensor:
    """[1] (groups, n) -> (groups, n)"""
    centred = rewards - rewards.mean(1, keepdim=True)
    if kind == "rloo":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)  # r_i - (sum - r_i) / (n - 1) = n / (n - 1) centred
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if kind == "grpo" else centred


def kl_estimate(log_prob: Tensor, ref_log_prob: Tensor, kind: str) -> Tensor:
    """[3] of KL(pi, pi_ref), from samples of pi (in a later step of a batch, pi_old's: an approximation)."""
    d = log_prob - ref_log_prob
    return {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d}[kind]


def sum_of_each(values: Tensor, lengths: list[int]) -> Tensor:
    """The sum over each reply's tokens, (N,) -> (B,)"""
    return torch.stack([part.sum() for part in values.split(lengths)])


METRICS = "losses/policy_loss", "losses/kl", "losses/approx_kl", "losses/clipfrac"


def grpo_loss(
    log_prob: Tensor, old_log_prob: Tensor, ref_log_prob: Tensor,  # of the tokens of all replies, (N,) each
    lengths: list[int], advantages: Tensor, args: Args,  # of the replies, (B,)
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of each reply, (B,), and METRICS, (4, B): means over its tokens; of rloo, of the reply as a whole."""
    assert log_prob.shape == old_log_prob.shape == ref_log_prob.shape == (sum(lengths),)
    assert advantages.shape == (len(lengths),)
    if args.advantage == "rloo":  # a reply is one action
        log_prob, old_log_prob, ref_log_prob = (sum_of_each(x, lengths) for x in (log_prob, old_log_prob, ref_log_prob))
        lengths = [1] * len(lengths)
    sizes = torch.tensor(lengths, device=log_prob.device)  # (B,)
    advantages = advantages.repeat_interleave(sizes)  # (N,); of rloo (B,)
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    policy_losses = -torch.min(ratio * advantages, clipped * advantages)  # [2]; minus: it is minimised
    kl = kl_estimate(log_prob, ref_log_prob, args.kl_estimator)
    approx_kl = ratio - 1 - log_ratio  # k3 estimate of KL(pi_old, pi), since the replies are pi_old's: never negative
    parts = policy_losses, kl, approx_kl, (ratio != clipped).float()
    parts = [sum_of_each(part, lengths) for part in parts]  # (B,) each
    scale = args.max_new_tokens if args.advantage == "dr-grpo" else sizes
    losses = parts[0] + args.beta * parts[1] if args.kl == "loss" else parts[0]
    return losses / scale, torch.stack(parts).detach() / sizes


def update(run: "Run", batch: Iterator[tuple[Reply, float]], args: Args) -> dict[str, float]:
    """Gradient steps with replies and their advantages. Returns the means of all minibatches' metrics."""
    size, minibatch_size, history, batch = run.micro_batch_size, args.batch_size // args.num_minibatches, [], [*batch]
    for epoch in range(args.update_epochs):
        random.Random(f"{args.seed} {run.global_step} {epoch}").shuffle(batch)
        for i in range(0, args.batch_size, minibatch_size):
            # Each process takes its share. Sorted by length, so that a micro-batch needs little padding
            minibatch = sorted(batch[i : i + minibatch_size], key=lambda row: len(row[0].prompt + row[0].reply))
            mine, metrics = minibatch[RANK::PROCESSES], []
            for k in range(0, len(mine), size):
                replies, advantages = zip(*mine[k : k + size], strict=True)
                tensors = as_tensors([r.prompt for r in replies], [r.reply for r in replies], run.accelerator.device)
                lists = [r.old_log_prob for r in replies], [r.ref_log_prob for r in replies]
                old, ref = (torch.tensor([*itertools.chain(*x)], device=run.accelerator.device) for x in lists)  # (N,)
                advantages = torch.tensor(advantages, device=old.device)
                with run.accelerator.accumulate(run.model):  # after the last micro-batch, an update with all gradients
                    log_prob = token_log_probs(run.model, *tensors)
                    losses, values = grpo_loss(log_prob, old, ref, [len(r.reply) for r in replies], advantages, args)
                    grad_norm = run.step(losses.mean())  # all micro-batches have as many replies
                metrics.append(values)
            means = run.accelerator.reduce(torch.cat(metrics, 1).mean(1), "mean").tolist()
            history.append(dict(zip(METRICS, means, strict=True)) | {"losses/grad_norm": grad_norm})
    return {name: sum(step[name] for step in history) / len(history) for name in history[0]}


def play(run: "Run", prompts: list[Prompt], seed: str, args: Args) -> list[Reply]:
    """A reply to each prompt. Processes share the work, then each has all."""
    found = {}
    for rows, ids, replies, log_prob, tensors in written_replies(run, prompts, seed, args):
        with reference_policy(run) as reference:
            ref_log_prob = token_log_probs(reference, *tensors)
        ref_log_prob = [values.tolist() for values in ref_log_prob.cpu().split([len(reply) for reply in replies])]
        texts = run.tokenizer.batch_decode(replies, skip_special_tokens=True)
        scores = zip(*(judge([prompts[row].text for row in rows], texts) for judge in run.judges), strict=True)
        found |= zip(rows, map(Reply, ids, replies, log_prob, ref_log_prob, map(list, scores)), strict=True)
    found = dict(gather_object([*found.items()]))
    return [found[row] for row in range(len(prompts))]


def totals(replies: list[Reply], args: Args) -> tuple[Tensor, Tensor]:
    """The weighted sum of each reply's scores, and the estimate k1 of its KL divergence [3], (B,) each."""
    scores = torch.tensor([reply.scores for reply in replies]) @ torch.tensor(args.reward_weights)
    pairs = ((torch.tensor(reply.old_log_prob), torch.tensor(reply.ref_log_prob)) for reply in replies)
    return scores, torch.stack([kl_estimate(*pair, "k1").sum() for pair in pairs])


def names_of_scores(args: Args) -> list[str]:
    """For the names in the log: "/1-true_reward", ... of several rewards, [] of a single one."""
    names = [f"/{number}-{re.split('[:/]', name)[-1]}" for number, name in enumerate(args.reward, 1)]
    return names if len(names) > 1 else []


def evaluate(run: "Run", prompts: list[Prompt], args: Args) -> dict[str, float]:
    """Mean reward, estimated KL divergence from the reference and length of sampled replies."""
    asked = [*itertools.islice(itertools.cycle(prompts), args.eval_replies)]
    replies = play(run, asked, f"{args.seed} evaluation", args)
    reward, kl = (x.mean().item() for x in totals(replies, args))
    length = sum(len(r.reply) for r in replies) / len(replies)
    result = {"eval/reward": reward, "eval/kl": kl, "eval/rlhf_reward": reward - args.beta * kl, "eval/length": length}
    means = torch.tensor([r.scores for r in replies]).mean(0).tolist()
    return result | {f"eval/reward{name}": mean for name, mean in zip(names_of_scores(args), means, strict=False)}


def train(args: Args) -> dict[str, float]:
    """Trains a policy, returns its last evaluation. run.goes_on evaluates and saves; run.bare is the policy."""
    with contextlib.closing(Run(args)) as run:
        model = load(run, args.model_name, args)
        run.reference = None if args.lora_rank else copy.deepcopy(model).to(run.accelerator.device)
        prompts, held_out = training_and_held_out_prompts(run, model, args)
        model = make_trainable(model, "CAUSAL_LM", args)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        run.start(model, torch.optim.AdamW(trained, weight_decay=args.weight_decay, fused=True))
        run.actor = run.bare
        batches = prompts_from(run.global_step, prompts, args, args.group_size)
        while run.goes_on(lambda: evaluate(run, held_out, args)):
            # 1. Act: a group of replies to each prompt
            replies = play(run, next(batches), f"{args.seed} {run.global_step}", args)

            # 2. Compare each reply with its group. The KL penalty is part of the reward, or of the loss
            scores, kl = totals(replies, args)
            rewards = scores - args.beta * kl if args.kl == "reward" else scores
            advantages = group_advantages(rewards.view(-1, args.group_size), args.advantage).flatten()

            # 3. Learn, at a rate that rises over the warm-up, and falls over the whole run
            rise = min(1, (run.global_step + args.batch_size) / max(args.warmup * args.total_timesteps, 1))
            rate = args.learning_rate * rise * (1 - run.global_step / args.total_timesteps)
            run.optimizer.param_groups[0]["lr"] = rate
            metrics = update(run, zip(replies, advantages.tolist(), strict=True), args)
            run.global_step += args.batch_size

            # 4. Log
            entropy = -sum(sum(reply.old_log_prob) for reply in replies) / len(replies)  # of a whole reply
            metrics |= {"objective/scores": scores.mean().item(), "objective/kl": kl.mean().item()}
            metrics["objective/rlhf_reward"] = metrics["objective/scores"] - args.beta * metrics["objective/kl"]
            means = torch.tensor([reply.scores for reply in replies]).mean(0).tolist()
            metrics |= {f"objective/scores{n}": mean for n, mean in zip(names_of_scores(args), means, strict=False)}
            run.log(metrics | {"objective/entropy": entropy, "charts/learning_rate": rate})
        show(run, held_out, args)
        return run.result


def load(run: "Run", name: str, args: Args) -> nn.Module:
    share = args.batch_size // args.num_minibatches // PROCESSES  # of a minibatch, for this process
    run.micro_batch_size = args.micro_batch_size or share
    run.accelerator.gradient_accumulation_steps = share // run.micro_batch_size
    run.tokenizer = load_tokenizer(name)
    run.judges = [load_reward(reward, args, run.accelerator.device) for reward in args.reward]
    return load_model(name, AutoModelForCausalLM, args)


def evaluate_saved(args: Args) -> dict[str, float]:
    """Evaluates the model in --run-dir as the last evaluation of the run did, or on another --dataset."""
    with contextlib.closing(Run(args)) as run:
        run.actor = load(run, f"{args.run_dir}/model", args).to(run.accelerator.device)
        run.reference = load_model(args.model_name, AutoModelForCausalLM, args).to(run.accelerator.device)
        _, held_out = training_and_held_out_prompts(run, run.actor, args)
        show(run, held_out, args)
        return evaluate(run, held_out, args)


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


def training_and_held_out_prompts(run: "Run", model: nn.Module, args: Args) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that leave room for a reply, and those for evaluation: not learned from, if 10 or more differ."""
    rows = read_rows("--dataset", args.dataset, args.dataset_config, args.dataset_split)
    of_run = saved_args(args.run_dir) if args.evaluate else args  # with its data, --evaluate takes what it held out
    data = [(os.path.realpath(x.dataset), x.dataset_config, x.dataset_split or "train") for x in (args, of_run)]
    flags = of_run if data[0] == data[1] else args
    usual = ["prompt", "question", "instruction", "query", "problem", "context", "input", "history", "messages"]
    column = flags.prompt_column or next((name for name in usual if name in rows[0]), None)
    system = next((name for name in ("system", "system_prompt") if name in rows[0]), None)
    if column not in rows[0]:
        raise UsageError(f"{args.dataset} has the columns {', '.join(rows[0])}: name the prompts with --prompt-column")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    limit = min(flags.max_length - flags.max_new_tokens, room - max(args.max_new_tokens, flags.max_new_tokens))
    eos = run.tokenizer.eos_token_id
    prompts, ends, eos_is_added = [], {eos}, run.tokenizer("a").input_ids[-1] == eos
    for number, row in enumerate(rows, 1):
        try:
            text = as_text(row[column])
            text = text[:-1] if not isinstance(text, str) and text[-1]["role"] == "assistant" else text  # its answer
            if isinstance(text, str) and row.get("input") and column != "input":
                text = f"{text}\n\n{row['input']}"  # Alpaca's instruction, and what it is about
            text = [{"role": "user", "content": text}] if isinstance(text, str) and (flags.chat or system) else text
            if system and row[system] and text[0]["role"] != "system":
                text = [{"role": "system", "content": row[system]}, *text]
            (ids,), (_, reply) = (encode(run.tokenizer, text, replies, row.get("tools")) for replies in ([], ["a"]))
        except UsageError as error:
            raise UsageError(f"{args.dataset}, row {number}: {error}") from None
        prompts.append(Prompt(ids[:-1] if eos_is_added and isinstance(text, str) and len(ids) > 1 else ids, text))
        ends.add(reply[-1])  # any reply shows how a chat's turn ends
    run.ends, own = sorted(ends), model.generation_config.eos_token_id  # the saved folder will name all of them
    model.generation_config.eos_token_id = sorted({*ends, *(own if isinstance(own, list) else [own])} - {None})
    fitting = [prompt for prompt in prompts if len(prompt.ids) <= limit]
    news = f"{args.dataset}, {column}: {len(fitting)} prompts, {len(prompts) - len(fitting)} too long; not used: "
    run.accelerator.print(news + (", ".join({*rows[0]} - {column, "input", system, "tools"}) or "none"))
    distinct = [*{str(prompt.text): prompt for prompt in fitting}.values()]
    if not distinct:
        raise UsageError(f"{args.dataset} has no prompt of at most {limit} tokens, which would leave room for a reply")
    if len(distinct) < 10 or flags is not of_run:
        return fitting, distinct
    held_out = random.Random(of_run.seed).sample(distinct, min(of_run.eval_replies, len(distinct) // 10))
    texts = {str(prompt.text) for prompt in held_out}
    return [prompt for prompt in fitting if str(prompt.text) not in texts], held_out


def prompts_from(step: int, prompts: list[Prompt], args: Args, copies: int = 1) -> Iterator[list[Prompt]]:
    """Batches without end, each prompt so many times: epochs of all prompts, each in a random order."""
    size, first = len(prompts), step // copies
    orders = (random.Random(f"{args.seed} {epoch}").sample(prompts, size) for epoch in itertools.count(first // size))
    stream = itertools.islice(itertools.chain.from_iterable(orders), first % size, None)
    while True:
        yield [prompt for prompt in itertools.islice(stream, args.batch_size // copies) for _ in range(copies)]


def as_tensors(prompts: list[list[int]], replies: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids, (B, T), and what is to be predicted from the first reply's beginning on, (B, K); elsewhere -100."""
    first = min(map(len, prompts))
    ids = pad([prompt + reply for prompt, reply in zip(prompts, replies, strict=True)], 0)
    masked = [[-100] * len(prompt) + reply for prompt, reply in zip(prompts, replies, strict=True)]
    return ids.to(device), pad(masked, -100)[:, first:].to(device)


def token_log_probs(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """log pi of the tokens of all replies, one reply after the other, (N,); padding is gone."""
    # No mask: padding stands on the right, and causal attention never reads it
    logits = model(input_ids=ids[:, :-1], logits_to_keep=targets.shape[1], use_cache=False).logits  # (B, K, vocabulary)
    replies = targets != -100
    return -nn.functional.cross_entropy(logits[replies].float(), targets[replies], reduction="none")


@torch.no_grad()
def write(model: nn.Module, prompts: list[list[int]], ends: list[int], chances: Tensor) -> tuple[list, list]:
    """A reply to each prompt, up to one of ends, and the log-probability of each of its tokens. Temperature 1.

    chances: uniform random numbers, (B, most tokens of a reply). Each picks a token by the cumulative probabilities.
    """
    device, replies = model.device, [[] for _ in prompts]
    log_probs, going = [[] for _ in prompts], torch.arange(len(prompts), device=device)  # the replies without an end
    ids, mask = pad(prompts, ends[0], "left").to(device), pad([[1] * len(p) for p in prompts], 0, "left").to(device)
    chances, ends, cache = chances.to(device), torch.tensor(ends, device=device), None
    precise = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    for t in itertools.count():
        busy = len(going) > 0 and t < chances.shape[1]
        if not any(gather_object([busy])):  # of all processes
            break
        if not busy:  # with FSDP each has a part of the model: the others can't go on without this one
            model(input_ids=ends[None], use_cache=False)
            continue
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        seen = mask if not cache or any(hasattr(x, "keys") for x in cache.layers) else None  # Mamba's state: no padding
        inputs = {"input_ids": ids, "attention_mask": seen, "position_ids": positions, "cache": cache}
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        if "cache" not in output:
            raise UsageError(f"{model.config.model_type} models can't be used: they keep no cache of what they read")
        log_prob, cache = output.logits[:, -1].float().log_softmax(-1), output.cache  # (B', vocabulary)
        sums = log_prob.to(precise).exp().cumsum(-1)
        ids = torch.searchsorted(sums, chances[going, t, None] * sums[:, -1:], right=True)  # (B', 1)
        columns = going, ids[:, 0], log_prob.gather(1, ids)[:, 0]  # (B',) each
        for row, token, value in zip(*(column.tolist() for column in columns), strict=True):
            replies[row].append(token)
            log_probs[row].append(value)
        mask = torch.cat((mask, torch.ones_like(ids)), 1)
        rows = (~torch.isin(ids[:, 0], ends)).nonzero()[:, 0]
        if len(rows) < len(going):  # what has ended costs no more time
            going, ids, mask = going[rows], ids[rows], mask[rows]
            cache.reorder_cache(rows)  # recurrent layers have no batch_select_indices
    return replies, log_probs


@contextlib.contextmanager
def reference_policy(run: "Run") -> Iterator[nn.Module]:
    """The policy as it was at the start: a frozen copy of it, or the policy itself without its LoRA matrices."""
    without_lora = contextlib.nullcontext() if run.reference else run.actor.disable_adapter()
    with torch.no_grad(), run.accelerator.autocast(), without_lora:
        yield run.reference or run.actor


def written_replies(run: "Run", prompts: list[Prompt], seed: str, args: Args) -> Iterator[tuple]:
    """Micro-batches of this process's part: numbers and ids of prompts, replies, their log pi_old, as_tensors."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    chances = torch.rand(len(prompts), args.max_new_tokens, generator=generator)
    share, rows, written = math.ceil(len(prompts) / PROCESSES), [*range(len(prompts))], []
    mine = (rows + rows[-1:] * PROCESSES)[RANK * share : (RANK + 1) * share]  # all have as many, some one twice
    for i in range(0, share, args.write_batch_size):
        rows = mine[i : i + args.write_batch_size]
        ids = [prompts[row].ids for row in rows]
        with run.accelerator.autocast():
            written += zip(rows, ids, *write(run.actor, ids, run.ends, chances[rows]), strict=True)
    written.sort(key=lambda row: len(row[1]) + len(row[2]))  # neighbours need little padding
    for i in range(0, share, run.micro_batch_size):
        rows, ids, replies, log_probs = zip(*written[i : i + run.micro_batch_size], strict=True)
        tensors = as_tensors(ids, replies, run.accelerator.device)
        if run.accelerator.mixed_precision != "no":  # write rounds otherwise than update: no ratio would begin at 1
            with torch.no_grad(), run.accelerator.autocast():
                log_prob = token_log_probs(run.actor, *tensors)
            log_probs = [part.tolist() for part in log_prob.cpu().split([*map(len, replies)])]
        yield rows, ids, replies, log_probs, tensors


def show(run: "Run", prompts: list[Prompt], args: Args) -> None:
    """To three prompts the reply of the reference and of the policy, with their scores."""
    ids = [prompt.ids for prompt in prompts[:3]]
    chances = torch.rand(len(ids), args.max_new_tokens, generator=torch.Generator().manual_seed(args.seed))
    with reference_policy(run) as reference:
        before = run.tokenizer.batch_decode(write(reference, ids, run.ends, chances)[0], skip_special_tokens=True)
    with run.accelerator.autocast():
        after = run.tokenizer.batch_decode(write(run.actor, ids, run.ends, chances)[0], skip_special_tokens=True)
    for prompt, *replies in zip(prompts, before, after, strict=False):
        run.accelerator.print(f"{prompt.text!s:.200}")
        for word, reply in zip(("before", "after"), replies, strict=True):
            scores = " ".join(f"{judge([prompt.text], [reply])[0]:5.1f}" for judge in run.judges)
            run.accelerator.print(f"    {word:>6} {scores}  {reply}")


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
