"""Reinforcement learning from human feedback with PPO: fine-tune a language model by what a reward says of its replies.

The state is a prompt and what is written of the reply, an action is the next token, an episode is a reply. The policy
writes replies to a batch of prompts. A reward model, or a function, scores each at its end; each token costs beta times
its log-ratio to the reference, the model at the start [1]. Without this KL penalty the policy soon exploits the errors
of the reward model. PPO then learns as in ppo.py: a value network V predicts what is still to come, GAE gives the
advantages [2], the ratio is clipped [3]. The best policy is known [4]; DPO starts there. x is a prompt, y its reply of
tokens y_1 ... y_T, the last an end token unless the reply was cut off; s_t is x and y_1 ... y_{t-1}, all V(s_t) sees.

    [1] r_t = -beta (log pi_old(y_t|s_t) - log pi_ref(y_t|s_t)), and + score(x, y) at t = T     InstructGPT, Sec. 3.5
    [2] delta_t = r_t + gamma V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma lambda A_{t+1}        PPO, Eq. 11 and 12
    [3] ratio_t = pi(y_t|s_t) / pi_old(y_t|s_t), where pi_old wrote y; E: mean over tokens      PPO, Sec. 3
        L_clip  = E[min(ratio_t A_t, clip(ratio_t, 1 - epsilon, 1 + epsilon) A_t)]              PPO, Eq. 7
        L_value = E[(V(s_t) - R_t)^2]  with  R_t = A_t + V_old(s_t)                             PPO, Eq. 9
    [4] E[score] - beta KL(pi, pi_ref) is largest for pi* proportional to pi_ref exp(score / beta)      DPO, Eq. 3, 4
    [5] beta <- beta (1 + 0.1 clip(KL / target - 1, -0.2, 0.2)), KL: the batch's, per reply     Ziegler et al., Sec. 2

Paper: Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155. Its Eq. 2 is [4] and a term for pretraining data. Ziegler et
al. 2019, arXiv:1909.08593. Huang et al. 2024, arXiv:2403.17031. PPO: arXiv:1707.06347. DPO: arXiv:2305.18290.

Differs from the papers:
- Left out: InstructGPT's pretraining data (PPO-ptx), moving average of the weights, and scores shifted to mean 0.
- AdamW; learning rates fall to 0. If --reward is a function or reads other tokens, V starts as the policy, giving 0.
- A reply cut off at --max-new-tokens is scored as if it ended, less --missing-eos-penalty; Huang et al. score it -1.

    python algorithms/ppo_rlhf.py [--model-name MODEL --dataset PROMPTS --reward REWARD_MODEL --beta 0.05]
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
    reward: str | None = None  # scores a reply: FILE.py:function (prompt, reply) -> number, or a reward model's folder
    max_length: int = 1024  # tokens of prompt and reply together; prompts that leave too little room are left out
    max_new_tokens: int = 48  # of a reply, at most; drawn at temperature 1, in Huang et al. at 0.7
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
    learning_rate: float = 5e-4  # of AdamW, the policy's; large models need 1e-6 to 1e-5
    critic_learning_rate: float = 3e-3  # the value network's; paper: 9e-6
    warmup: float = 0.1  # the rates fall to 0 over the run, and rise in this first share; paper: 10 batches, no fall
    batch_size: int = 512  # replies of a batch, summed over all processes; paper: 512
    num_minibatches: int = 8  # minibatches in a batch, one gradient step each in each epoch; paper: 8
    update_epochs: int = 2  # passes over the batch; paper: 1; Huang et al.: 4
    micro_batch_size: int | None = None  # replies in one forward pass of one process; None: a power of 2 up to 64
    write_batch_size: int = 512  # replies that one process writes at the same time
    gamma: float = 1.0  # [2] discount
    gae_lambda: float = 1.0  # [2] lambda; with gamma 1 too, A_t is the return less V(s_t); Huang et al.: 0.95
    beta: float = 1.0  # [1], [4] coefficient of the KL penalty; paper: 0.02
    adaptive_kl: float | None = None  # [5] target of the KL per reply; --beta is the start; None: beta is fixed
    missing_eos_penalty: float = 0.0  # taken off the score of a reply that has not ended after --max-new-tokens
    clip_coef: float = 0.2  # [3] epsilon
    clip_coef_vf: float | None = None  # value loss: clip V to V_old +- this; Huang et al.: 0.2; None: no clipping
    vf_coef: float = 0.5  # weight of L_value [3]; AdamW cancels it, V having its own weights; --max-grad-norm does not
    norm_adv: bool = True  # normalise the advantages of each batch; ppo.py: of each minibatch
    max_grad_norm: float = 1.0  # gradients with a larger norm (losses/grad_norm) are scaled down to it; 0: never
    weight_decay: float = 0.0  # of AdamW
    lora_rank: int = 0  # train low-rank matrices beside each linear layer (LoRA, alpha = 2 rank); 0: train all weights
    load_in_4bit: bool = False  # with LoRA, on CUDA: 4 bits for each frozen weight; needs the package bitsandbytes
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them

    def __post_init__(self) -> None:
        check_ranges(self, gae_lambda=(0, 1), gamma=(0, 1))
        if self.adaptive_kl is not None and self.adaptive_kl * self.beta == 0:
            raise UsageError("--adaptive-kl and its --beta must be above 0: KL 0 is never reached, beta 0 stays 0")
        if self.reward is None:
            raise UsageError("--reward must say what a reply is worth: FILE.py:function, or a reward model's folder")


class Prompt(NamedTuple):
    """Token ids, and the prompt as the data has it."""

    ids: list[int]
    text: Text


class Episode(NamedTuple):
    """A prompt and its reply y_1 ... y_T, with T numbers each; the score is the whole reply's."""

    prompt: list[int]
    reply: list[int]
    old_log_prob: list[float]  # log pi_old(y_t|s_t), of the policy that wrote it
    ref_log_prob: list[float]  # log pi_ref(y_t|s_t)
    values: list[float]  # V_old(s_t)
    score: float


class ActorCritic(nn.Module):
    """The policy and V: a causal language model, and a model with one output in place of the next token's logits."""

    def __init__(self, actor: nn.Module, critic: nn.Module, head: nn.Linear, beta: float):
        super().__init__()
        self.actor, self.critic, self.critic_head = actor, critic, head
        self.register_buffer("beta", torch.tensor(beta))  # a checkpoint holds it: [5] changes it

    def values(self, ids: Tensor, targets: Tensor) -> Tensor:  # -> (N,), V(s_t), read at the token before y_t
        states = self.critic(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, -targets.shape[1] :]
        with torch.autocast(ids.device.type, enabled=False):  # near 5, bfloat16 has steps of 1/32
            return self.critic_head(states.float()).squeeze(-1)[targets != -100]

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # -> log pi(y_t|s_t); V(s_t); (N,) both
        return token_log_probs(self.actor, ids, targets), self.values(ids, targets)

    def save_pretrained(self, folder: Path, state_dict: dict[str, Tensor]) -> None:
        """The policy alone, as any program loads it."""
        weights = {name[len("actor.") :]: value for name, value in state_dict.items() if name.startswith("actor.")}
        self.actor.save_pretrained(folder, state_dict=weights)


def token_rewards(old_log_prob: Tensor, ref_log_prob: Tensor, scores: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """[1] (B, T), (B, T), (B,), (B,) -> (B, T). Log-probabilities behind the end are 0."""
    rewards = -beta * (old_log_prob - ref_log_prob)
    rewards[torch.arange(len(rewards)), lengths - 1] += scores  # at the last token, not at the padding behind it
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation of (B, T), padded with 0: V after the last token is 0, even if it is no end."""
    next_values = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), 1)
    deltas = rewards + gamma * next_values - values  # [2]
    advantages, advantage = torch.empty_like(deltas), 0.0
    for t in reversed(range(deltas.shape[1])):
        advantages[:, t] = advantage = deltas[:, t] + gamma * gae_lambda * advantage  # [2]
    return advantages


def whitened(x: Tensor, is_token: Tensor) -> Tensor:
    """Shifted and scaled to mean 0 and standard deviation 1 of all tokens; what is padding does not count."""
    return (x - x[is_token].mean()) / (x[is_token].std(correction=0) + 1e-8)


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """[5] Beta rises while the KL divergence is above its target, and falls while it is below."""
    return beta * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


def ppo_loss(log_prob, values, old_log_prob, old_values, advantages, returns, args: Args) -> tuple[Tensor, dict]:
    """Loss and metrics of (N,) tensors, one entry per reply token: two from the current networks, four fixed."""
    assert log_prob.shape == values.shape == old_log_prob.shape == old_values.shape == advantages.shape == returns.shape
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()  # [3]; minus: it is minimised
    value_losses = (values - returns).square()  # [3]
    if args.clip_coef_vf is not None:
        clipped_values = old_values + (values - old_values).clamp(-args.clip_coef_vf, args.clip_coef_vf)
        value_losses = torch.max(value_losses, (clipped_values - returns).square())
    value_loss = value_losses.mean()
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss}
    metrics["approx_kl"] = (ratio - 1 - log_ratio).mean()  # KL(pi_old, pi) by k3, joschu.net/blog/kl-approx.html: >= 0
    metrics["clipfrac"] = (ratio != clipped_ratio).float().mean()  # share of ratios outside of 1 +- epsilon
    return policy_loss + args.vf_coef * value_loss, {f"losses/{k}": v.detach() for k, v in metrics.items()}


def update(run: "Run", rows: Iterator[tuple[Episode, list, list]], args: Args) -> dict[str, float]:
    """Gradient steps with episodes, their advantages and returns. Returns the means of all minibatches' metrics."""
    size, minibatch_size, history = run.micro_batch_size, args.batch_size // args.num_minibatches, []
    batch = [(e.prompt, e.reply, e.old_log_prob, e.values, *rest) for e, *rest in rows]  # the last four are ppo_loss's
    for epoch in range(args.update_epochs):
        random.Random(f"{args.seed} {run.global_step} {epoch}").shuffle(batch)
        for i in range(0, args.batch_size, minibatch_size):
            # Each process takes its share. Sorted by length, so that a micro-batch needs little padding
            minibatch = sorted(batch[i : i + minibatch_size], key=lambda row: len(row[0] + row[1]))
            num_tokens, mine, parts = sum(len(row[1]) for row in minibatch), minibatch[RANK::PROCESSES], []
            for k in range(0, len(mine), size):
                prompts, replies, *numbers = zip(*mine[k : k + size], strict=True)
                ids, targets = as_tensors(prompts, replies, run.accelerator.device)
                numbers = [torch.tensor([*itertools.chain(*rows)], device=ids.device) for rows in numbers]  # (N,) each
                with run.accelerator.accumulate(run.model):  # after the last micro-batch, an update with all gradients
                    loss, metrics = ppo_loss(*run.model(ids, targets), *numbers, args)
                    # accelerate averages over micro-batches; this weight makes it the mean over the minibatch's tokens
                    weight = len(numbers[0]) / (num_tokens * size / minibatch_size)
                    grad_norm = run.step(loss * weight)
                parts.append({name: value * weight for name, value in metrics.items()})
            history.append({name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]})
            history[-1]["losses/grad_norm"] = torch.tensor(grad_norm, device=ids.device)
    means = {name: torch.stack([step[name] for step in history]).mean() for name in history[0]}
    return {name: value.item() for name, value in run.accelerator.reduce(means, "mean").items()}


def play(run: "Run", prompts: list[Prompt], seed: str, args: Args) -> list[Episode]:
    """An episode for each prompt. Processes share the work, then each has all."""
    episodes = {}
    for rows, ids, replies, log_prob, tensors in written_replies(run, prompts, seed, args):
        with reference_policy(run) as reference:
            ref_log_prob = token_log_probs(reference, *tensors)
            values = run.agent.values(*tensors) if run.agent else ref_log_prob  # --evaluate: there is no V, nor a need
        rows_of = [[row.tolist() for row in x.cpu().split([*map(len, replies)])] for x in (ref_log_prob, values)]
        texts = run.tokenizer.batch_decode(replies, skip_special_tokens=True)
        scores = run.judges[0]([prompts[row].text for row in rows], texts)
        scores = [s - args.missing_eos_penalty * (y[-1] not in run.ends) for s, y in zip(scores, replies, strict=True)]
        episodes |= zip(rows, map(Episode, ids, replies, log_prob, *rows_of, scores), strict=True)
    episodes = dict(gather_object([*episodes.items()]))
    return [episodes[row] for row in range(len(prompts))]


def evaluate(run: "Run", prompts: list[Prompt], args: Args) -> dict[str, float]:
    """Mean score (less a penalty for a missing end), KL divergence from the reference and length of sampled replies."""
    asked = [*itertools.islice(itertools.cycle(prompts), args.eval_replies)]
    episodes, n = play(run, asked, f"{args.seed} evaluation", args), args.eval_replies
    kl = sum(sum(e.old_log_prob) - sum(e.ref_log_prob) for e in episodes) / n
    reward, length = sum(e.score for e in episodes) / n, sum(len(e.reply) for e in episodes) / n
    beta = run.agent.beta.item() if run.agent else args.beta
    return {"eval/reward": reward, "eval/kl": kl, "eval/rlhf_reward": reward - beta * kl, "eval/length": length}


def train(args: Args) -> dict[str, float]:
    """Trains a policy, returns its last evaluation. run.goes_on evaluates and saves; run.bare: both networks."""
    with contextlib.closing(Run(args)) as run:
        agent, optimizer = make_agent(run, args)
        prompts, held_out = training_and_held_out_prompts(run, agent.actor, args)
        run.start(agent, optimizer)
        run.agent, run.actor = run.bare, run.bare.actor
        batches = prompts_from(run.global_step, prompts, args)
        while run.goes_on(lambda: evaluate(run, held_out, args)):
            # 1. Act: a reply to each prompt of the batch
            episodes = play(run, next(batches), f"{args.seed} {run.global_step}", args)

            # 2. Advantages and returns, before the networks change
            _, replies, *lists, scores = zip(*episodes, strict=True)  # as Episode names them
            old_log_prob, ref_log_prob, values = (pad(x, 0.0) for x in lists)  # (B, T)
            lengths, scores, beta = torch.tensor([*map(len, replies)]), torch.tensor(scores), run.bare.beta.item()
            rewards = token_rewards(old_log_prob, ref_log_prob, scores, lengths, beta)
            advantages = gae(rewards, values, args.gamma, args.gae_lambda)
            returns = advantages + values  # [3]
            is_token = torch.arange(values.shape[1]) < lengths[:, None]  # (B, T); False: padding
            explained = 1 - (returns - values)[is_token].var() / (returns[is_token].var() + 1e-8)
            if args.norm_adv:
                advantages = whitened(advantages, is_token)

            # 3. Learn, at rates that rise over the warm-up, and fall over the whole run
            rise = min(1, (run.global_step + args.batch_size) / max(args.warmup * args.total_timesteps, 1))
            factor = rise * (1 - run.global_step / args.total_timesteps)
            actor_group, critic_group = run.optimizer.param_groups
            actor_group["lr"], critic_group["lr"] = args.learning_rate * factor, args.critic_learning_rate * factor
            unpadded = ([row[:n] for row, n in zip(x.tolist(), lengths, strict=True)] for x in (advantages, returns))
            metrics = update(run, zip(episodes, *unpadded, strict=True), args)
            run.global_step += args.batch_size
            kl, entropy = (x.sum(1).mean().item() for x in (old_log_prob - ref_log_prob, -old_log_prob))  # of replies
            if args.adaptive_kl is not None:
                run.bare.beta.fill_(adapted_beta(beta, kl, args.adaptive_kl))

            # 4. Log; explained_variance: 1 if V foresaw the returns, 0 if a constant would do as well
            metrics |= {"losses/explained_variance": explained.item(), "objective/kl": kl, "objective/beta": beta}
            metrics |= {"objective/scores": scores.mean().item(), "objective/rlhf_reward": rewards.sum(1).mean().item()}
            run.log(metrics | {"objective/entropy": entropy, "charts/learning_rate": actor_group["lr"]})
        show(run, held_out, args)
        return run.result


def make_agent(run: "Run", args: Args) -> tuple[ActorCritic, torch.optim.Optimizer]:
    if run.accelerator.distributed_type == "FSDP":  # it gathers the weights for forward alone, not for actor or values
        raise UsageError("FSDP can't share out two networks that are also used apart: start it with torchrun alone")
    actor = load(run, args.model_name, args)
    if args.batch_size % (args.num_minibatches * run.micro_batch_size * PROCESSES):
        sizes = f"times --micro-batch-size {run.micro_batch_size} times {PROCESSES} processes"
        raise UsageError(f"--batch-size {args.batch_size} must be a multiple of --num-minibatches {sizes}")
    run.reference = None if args.lora_rank else copy.deepcopy(actor).to(run.accelerator.device)
    start = args.model_name if ".py:" in args.reward else args.reward  # a reward model knows what makes a reply good
    if not run.tokenizer.get_vocab().items() <= load_tokenizer(start).get_vocab().items():
        start = args.model_name  # the reward model numbers tokens differently: as a value network it could not read ids
    critic = load_model(start, AutoModelForSequenceClassification, args)
    actor = make_trainable(actor, "CAUSAL_LM", args)
    critic, head = make_trainable(critic.base_model, "FEATURE_EXTRACTION", args), critic.score.float()
    agent, networks = ActorCritic(actor, critic, head, args.beta), (actor, nn.ModuleList([critic, head]))
    groups = [{"params": [weight for weight in net.parameters() if weight.requires_grad]} for net in networks]
    return agent, torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)  # train sets the learning rates


def load(run: "Run", name: str, args: Args) -> nn.Module:
    share = args.batch_size // args.num_minibatches // PROCESSES  # of a minibatch, for each process
    run.micro_batch_size = args.micro_batch_size or math.gcd(share or 1, 64)  # the largest power of 2 that divides both
    run.accelerator.gradient_accumulation_steps = share // run.micro_batch_size
    run.tokenizer, run.judges = load_tokenizer(name), [load_reward(args.reward, args, run.accelerator.device)]
    return load_model(name, AutoModelForCausalLM, args)


def evaluate_saved(args: Args) -> dict[str, float]:
    """Evaluates the model in --run-dir as the last evaluation of the run did, or on another --dataset."""
    with contextlib.closing(Run(args)) as run:
        run.agent, run.actor = None, load(run, f"{args.run_dir}/model", args).to(run.accelerator.device)
        run.reference = load_model(args.model_name, AutoModelForCausalLM, args).to(run.accelerator.device)
        _, held_out = training_and_held_out_prompts(run, run.actor, args)
        if args.adaptive_kl is not None:  # beta is as [5] left it
            try:
                args.beta = torch.load(run.dir / "checkpoint.pt", "cpu", weights_only=True)["model"]["beta"].item()
            except Exception as error:  # a damaged file can raise anything
                raise UsageError(f"checkpoint.pt in --run-dir, which has beta, can't be read: {error!r:.200}") from None
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
