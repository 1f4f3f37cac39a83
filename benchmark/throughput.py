"""Times each script beside its peer: the same work, on the same machine, in the same run.

    python benchmark/throughput.py                             # everything
    python benchmark/throughput.py --only ppo --repeats 3      # one script
    python benchmark/throughput.py --only start                # how soon a script learns
    python benchmark/throughput.py --only solve                # how soon ppo has learned LunarLander
    python benchmark/throughput.py --only memory               # what a million steps of Atari take
    python benchmark/throughput.py --only dqn --cores 2        # both sides on two cores

Every measurement is a process of its own, pinned to one core, with --cores to more, and only the steps after a warm-up
count: no imports, no evaluation. Script and peer take turns, so that a machine that grows slower or faster does it to
both. The result is the median over the repeats of the ratio of two neighbours, with the smallest and the largest.

SBX, whose gradient step is one program of JAX, and our --compile take time before they are fast. What a start takes is
the time to the end of the warm-up, less what its steps take at the later speed; imports are not in it. The faster side
pays after as many steps as make up for its longer start.

Beside it stand two limits: the environment stepped with random actions and nothing else, and the steps for which the
matrix products alone would leave time, at the float32 rate that a big product reaches on this machine in this run.

Learning from preferences has no environment: a step is a pair of replies, and in place of the environment alone stands
the model alone, forward and backward over the same pairs. Our clock starts before the reference's log-probabilities.

The start of a script is a whole run of one learning step, from the command to its exit; the limit is a Python that
imports the libraries it needs and does nothing.

LunarLander is solved when three evaluations in a row reach 200, each over 20 episodes, 16,384 steps apart. The clock
runs from the command: with imports and evaluations. Our script has its defaults, SB3 the settings of RL Zoo; should SB3
need more than two million steps, the time of these counts.

The memory is that of dqn's replay buffer for a million steps of Atari once it is full; SB3's follows from its arrays.

What throughput.json holds of other measurements stays there: each row has the commit and the versions that it is from.

Exit codes: 0 measured, 1 a measurement failed, 2 a mistake in what was asked.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import distributions
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

from command_line import parse, refuse

ROOT = Path(__file__).resolve().parent.parent
WIDE = "td3", "sac"  # their networks have 256 units: with --cores they get as many threads
PACKAGES = "torch", "gymnasium", "numpy", "stable-baselines3", "sbx-rl", "jax", "trl"
ONE_CORE = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
ONE_CORE |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}


@dataclass
class Args:
    only: tuple[str, ...] = ()  # scripts, environments, names as in the table, start, solve, memory; none: all
    repeats: int = 5  # measurements of each side
    steps: int = 50_000  # environment steps of a measurement, after a warm-up of a tenth of them
    cores: int = 1  # what both sides are pinned to, on Linux; JAX, td3, sac and their peers use all, others one
    output: Path = ROOT / "benchmark" / "results"  # folder for throughput.json and throughput.md


@dataclass
class Work:
    """A script and a peer that do the same."""

    script: str
    env_id: str
    settings: dict[str, int | float | bool | str]  # our flags; the peer's arguments are made from them
    peer: str
    peer_arguments: Callable[[dict], dict]  # settings -> what the peer is called with
    time_peer: Callable[[str, dict, int, int], tuple]  # env_id, settings, warm-up, steps -> steps a second, start in s
    multiple: int  # steps come in multiples of it
    flop_per_step: float  # of the matrix products; 0: there are none worth the name
    note: str = ""  # what tells it from the others of this script and environment
    share_of_steps: float = 1.0  # of --steps: less for what takes long
    make_data: Callable[[str, int], dict] | None = None  # folder, steps -> flags; None: it acts in an environment
    time_alone: Callable[[str, int], float] | None = None  # env_id, steps -> steps a second; None: of the environment

    @property
    def name(self) -> str:
        return f"{self.script}/{self.env_id}"

    @property
    def full_name(self) -> str:  # as the table has it
        return f"{self.name} {self.note}".strip()


# ---- Peers: each runs in a fresh process ----


def sb3_ppo_arguments(ours: dict) -> dict:
    """The arguments of SB3's PPO that say the same as ours."""
    names = {
        "learning_rate": "learning_rate", "n_steps": "num_steps", "n_epochs": "update_epochs", "gamma": "gamma",
        "gae_lambda": "gae_lambda", "clip_range": "clip_coef", "ent_coef": "ent_coef", "vf_coef": "vf_coef",
        "max_grad_norm": "max_grad_norm", "normalize_advantage": "norm_adv",
    }  # fmt: skip
    batch_size = ours["num_envs"] * ours["num_steps"] // ours["num_minibatches"]
    return {theirs: ours[name] for theirs, name in names.items()} | {"batch_size": batch_size, "device": "cpu"}


def time_learning(model: object, warm_up: int, steps: int) -> tuple[float, float]:
    """Steps a second of a model of SB3 or SBX after the warm-up, and the seconds that its start takes."""
    began = time.perf_counter()
    model.learn(warm_up)
    started = time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - started
    return steps / seconds, started - began - warm_up * seconds / steps


def sb3_ppo(
    env_id: str, settings: dict, warm_up: int, steps: int, library: str = "stable_baselines3"
) -> tuple[float, float]:
    import torch
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    envs = make_vec_env(env_id, settings["num_envs"])  # with its Monitor: both sides record every episode's return
    # Two layers of 64 with tanh, as ours
    model = import_module(library).PPO("MlpPolicy", envs, seed=1, **sb3_ppo_arguments(settings))
    return time_learning(model, warm_up, steps)


def sb3_dqn_arguments(ours: dict) -> dict:
    """The arguments of SB3's DQN that say the same as ours. It counts in steps of all environments together."""
    names = (
        "learning_rate", "buffer_size", "learning_starts", "batch_size", "tau", "gamma", "exploration_fraction",
        "max_grad_norm",  # SBX has none
    )  # fmt: skip
    every = math.lcm(ours["num_envs"], ours["train_frequency"])  # environment steps from one learning to the next
    return {name: ours[name] for name in names if name in ours} | {
        "train_freq": every // ours["num_envs"], "gradient_steps": every // ours["train_frequency"],
        "target_update_interval": ours["target_network_frequency"] * ours["train_frequency"],
        "exploration_initial_eps": ours["start_e"], "exploration_final_eps": ours["end_e"],
        "policy_kwargs": {"net_arch": [128, 128]}, "device": "cpu",
    }  # fmt: skip


def sb3_dqn(
    env_id: str, settings: dict, warm_up: int, steps: int, library: str = "stable_baselines3"
) -> tuple[float, float]:
    import torch
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    envs = make_vec_env(env_id, settings["num_envs"])
    model = import_module(library).DQN("MlpPolicy", envs, seed=1, **sb3_dqn_arguments(settings))
    return time_learning(model, warm_up, steps)


def sb3_td3_arguments(ours: dict) -> dict:
    """The arguments of SB3's TD3 that say the same as ours, without the noise on the actions."""
    names = {
        "learning_rate": "q_lr", "buffer_size": "buffer_size", "learning_starts": "learning_starts",
        "batch_size": "batch_size", "tau": "tau", "gamma": "gamma", "policy_delay": "policy_frequency",
        "target_policy_noise": "policy_noise", "target_noise_clip": "noise_clip",
    }  # fmt: skip
    arguments = {theirs: ours[name] for theirs, name in names.items()}
    return arguments | {"policy_kwargs": {"net_arch": [256, 256]}, "device": "cpu"}


def sb3_sac_arguments(ours: dict) -> dict:
    """The arguments of SB3's SAC that say the same as ours; its networks have two layers of 256 by themselves."""
    names = "buffer_size", "learning_starts", "batch_size", "tau", "gamma"
    arguments = {"learning_rate": ours["q_lr"], "ent_coef": f"auto_{ours['alpha']}", "device": "cpu"}
    return arguments | {name: ours[name] for name in names}


def sb3_actor_critic(
    env_id: str, settings: dict, warm_up: int, steps: int, library: str = "stable_baselines3"
) -> tuple[float, float]:
    """SAC where the settings have a temperature, else TD3."""
    import numpy as np
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(settings.get("threads", 1))
    env, peers = make_vec_env(env_id, 1), import_module(library)
    if "alpha" in settings:
        model = peers.SAC("MlpPolicy", env, seed=1, **sb3_sac_arguments(settings))
    else:
        sigma = np.full(env.action_space.shape, settings["exploration_noise"])
        noise = NormalActionNoise(np.zeros_like(sigma), sigma)
        model = peers.TD3("MlpPolicy", env, seed=1, action_noise=noise, **sb3_td3_arguments(settings))
    return time_learning(model, warm_up, steps)


def numpy_q_learning(env_id: str, settings: dict, warm_up: int, steps: int) -> tuple[float, float]:
    """Q-learning as a textbook has it: a table, a loop, nothing logged."""
    import gymnasium as gym
    import numpy as np

    env, rng = gym.make(env_id), np.random.default_rng(1)
    q = np.zeros((env.observation_space.n, env.action_space.n))
    alpha, gamma, epsilon = (settings[name] for name in ("learning_rate", "gamma", "end_e"))
    state, _ = env.reset(seed=1)
    for step in range(warm_up + steps):
        if step == warm_up:
            started = time.perf_counter()
        action = rng.integers(env.action_space.n) if rng.random() < epsilon else np.argmax(q[state])
        next_state, reward, terminated, truncated, _ = env.step(action)
        target = reward + gamma * np.max(q[next_state]) * (not terminated)
        q[state, action] += alpha * (target - q[state, action])
        state = env.reset()[0] if terminated or truncated else next_state
    return steps / (time.perf_counter() - started), 0.0


def solved_after(returns: list[float]) -> int:
    """How many evaluations it took until three in a row reached 200; 0: they have not yet."""
    return next((n for n in range(3, len(returns) + 1) if min(returns[n - 3 : n]) >= 200), 0)


def sb3_solve(seed: int) -> float:
    """Steps until LunarLander is solved, with the settings that RL Zoo has for SB3's PPO."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)
    envs, eval_env, returns = make_vec_env("LunarLander-v3", 16, seed), make_vec_env("LunarLander-v3", 1), []
    model = PPO("MlpPolicy", envs, n_steps=1024, batch_size=64, n_epochs=4, gamma=0.999, gae_lambda=0.98,
                ent_coef=0.01, seed=seed, device="cpu")  # fmt: skip
    while not solved_after(returns) and model.num_timesteps < 2_000_000:
        model.learn(SOLVE_FREQUENCY, reset_num_timesteps=False)  # one batch
        eval_env.seed(seed)
        returns.append(evaluate_policy(model, eval_env, SOLVE_EPISODES)[0])
    return model.num_timesteps if solved_after(returns) else math.inf


def sb3_replay_bytes(steps: int) -> int:
    """What SB3's replay buffer takes for so many steps of Atari: that of a small one, scaled."""
    import gymnasium as gym
    import numpy as np
    from stable_baselines3.common.buffers import ReplayBuffer

    buffer = ReplayBuffer(1000, gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(4), device="cpu")
    return sum(array.nbytes for array in vars(buffer).values() if isinstance(array, np.ndarray)) * steps // 1000


def environment_alone(env_id: str, settings: dict, warm_up: int, steps: int) -> tuple[float, float]:
    """Where there is no peer: 1 minus the ratio is the share of the time that the script spends on all else."""
    return time_env(env_id, steps), 0.0


def make_pairs(folder: str, steps: int) -> dict:
    """A GPT-2 of a million random weights, and pairs of random words, with replies as unequal as people's are."""
    import random

    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

    words = [f"word{i}" for i in range(1000)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": len(vocabulary), "n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4}
    torch.manual_seed(1)
    config = GPT2Config(**sizes, **no_dropout, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    rng = random.Random(1)
    with open(f"{folder}/pairs.jsonl", "w") as file:
        for _ in range(steps + 1):  # one is held out
            prompt = " ".join(rng.choices(words, k=rng.randint(5, 30))) + " "
            replies = [" ".join(rng.choices(words, k=min(int(rng.lognormvariate(3.5, 0.6)), 150))) for _ in range(2)]
            file.write(json.dumps({"prompt": prompt, "chosen": replies[0], "rejected": replies[1]}) + "\n")
    return {"model_name": folder, "dataset": f"{folder}/pairs.jsonl", "eval_pairs": 1}


def trl_arguments(ours: dict) -> dict:
    """The arguments of TRL's DPOConfig or RewardConfig that say the same as ours."""
    names = {name: name for name in ("learning_rate", "max_grad_norm", "weight_decay", "beta") if name in ours}
    return {theirs: ours[name] for theirs, name in names.items()} | {
        "per_device_train_batch_size": ours["batch_size"], "warmup_steps": ours["warmup"],
        "lr_scheduler_type": "linear", "num_train_epochs": 1, "max_length": None, "gradient_checkpointing": False,
        "bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def trl_trainer(env_id: str, settings: dict, warm_up: int, steps: int) -> tuple[float, float]:
    """DPO where the settings have a beta, else a reward model."""
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, _args, state, _control, **_):
            if state.global_step == warm_up // settings["batch_size"]:
                self.started = time.perf_counter()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_pairs(folder, warm_up + steps)
        data = datasets.load_dataset("json", data_files=f"{folder}/pairs.jsonl", split="train", cache_dir=folder)
        data, clock = data.select(range(warm_up + steps)), Clock()
        rest = {"train_dataset": data, "callbacks": [clock]}
        if "beta" in settings:
            config = trl.DPOConfig(folder, **trl_arguments(settings))
            models = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(2)]
            trainer = trl.DPOTrainer(*models, args=config, **rest)
        else:
            data = data.map(lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")})
            config = trl.RewardConfig(folder, **trl_arguments(settings))
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
            trainer = trl.RewardTrainer(model, args=config, **rest | {"train_dataset": data.remove_columns("prompt")})
        trainer.train()
        return steps / (time.perf_counter() - clock.started), 0.0


def time_model(env_id: str, steps: int, scores: bool = False) -> float:
    """Pairs a second of the model alone, forward and backward, in batches of similar length.

    scores: with a head that gives a text one number, not each of its words a probability.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_pairs(folder, steps)
        if scores:
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        rows = [json.loads(line) for line in open(f"{folder}/pairs.jsonl")][:steps]
    texts = [[len((row["prompt"] + row[name]).split()) + 1 for name in ("chosen", "rejected")] for row in rows]
    texts, size = sorted(texts, key=max), PREFERENCE_SETTINGS["batch_size"]
    started = time.perf_counter()
    for i in range(0, steps, size):
        ids = torch.randint(2, 1000, (2 * len(texts[i : i + size]), max(texts[i : i + size][-1])))
        output = model(input_ids=ids, labels=None if scores else ids, use_cache=False)
        (output.logits.sum() if scores else output.loss).backward()
        model.zero_grad()
    return steps / (time.perf_counter() - started)


# ---- What is measured ----

PPO_SETTINGS = {  # SB3's defaults, but for four environments of 128 steps
    "num_envs": 4, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 3e-4,
    "anneal_lr": False, "gamma": 0.99, "gae_lambda": 0.95, "clip_coef": 0.2, "ent_coef": 0.0, "vf_coef": 0.5,
    "max_grad_norm": 0.5, "norm_adv": True, "norm_obs": False, "norm_reward": False,
}  # fmt: skip


def mlp_flop(*sizes: int) -> int:
    """Of one row through a fully connected network."""
    return 2 * sum(a * b for a, b in pairwise(sizes))


def ppo_work(env_id: str, observations: int, actions: int) -> Work:
    actor, critic = mlp_flop(observations, 64, 64, actions), mlp_flop(observations, 64, 64, 1)
    # acting, then both networks for all observations and all next ones, then in each epoch forward and, twice as much,
    # backward
    flop = actor + (actor + critic) * (2 + 3 * PPO_SETTINGS["update_epochs"])
    batch = PPO_SETTINGS["num_envs"] * PPO_SETTINGS["num_steps"]
    return Work("ppo", env_id, PPO_SETTINGS, "stable-baselines3 PPO", sb3_ppo_arguments, sb3_ppo, batch, flop)


DQN_SETTINGS = {  # CleanRL's schedule
    "train_frequency": 10, "batch_size": 128, "target_network_frequency": 50, "tau": 1.0, "learning_rate": 2.5e-4,
    "anneal_lr": False, "buffer_size": 10_000, "learning_starts": 1000, "gamma": 0.99, "start_e": 1.0, "end_e": 0.05,
    "exploration_fraction": 0.05, "max_grad_norm": 10.0, "norm_obs": False, "huber": True, "double_q": False,
}  # fmt: skip


def dqn_work(env_id: str, observations: int, actions: int, num_envs: int, settings: dict = DQN_SETTINGS) -> Work:
    settings = {"num_envs": num_envs} | settings
    every = settings["train_frequency"]
    forward = mlp_flop(observations, 128, 128, actions)
    flop = forward + settings["batch_size"] * 4 * forward / every  # a batch: forward and backward, and the target's
    multiple = math.lcm(num_envs, every)
    note = f"({num_envs} env{'s' if num_envs > 1 else ''}{', a gradient step a step' if every == 1 else ''})"
    share = 1.0 if every > 1 else 0.2
    peer = "stable-baselines3 DQN", sb3_dqn_arguments, sb3_dqn
    return Work("dqn", env_id, settings, *peer, multiple, flop, note, share_of_steps=share)


Q_SETTINGS = {
    "learning_rate": 0.1, "anneal_lr": False, "gamma": 0.99, "start_e": 0.1, "end_e": 0.1, "initial_value": 0.0,
}  # fmt: skip

REPLAY_SETTINGS = {  # both sides learn once in every step
    "policy_lr": 1e-3, "q_lr": 1e-3, "buffer_size": 1_000_000, "learning_starts": 100, "batch_size": 256,
    "tau": 0.005, "gamma": 0.99,
}  # fmt: skip
TD3_SETTINGS = REPLAY_SETTINGS | {
    "policy_frequency": 2, "policy_noise": 0.2, "noise_clip": 0.5, "exploration_noise": 0.1,
}  # fmt: skip
SAC_SETTINGS = REPLAY_SETTINGS | {"alpha": 0.2, "autotune": True}


def td3_work(env_id: str, observations: int, actions: int) -> Work:
    actor, critic = (mlp_flop(observations, 256, 256, actions), mlp_flop(observations + actions, 256, 256, 1))
    # Backward costs twice as much as forward where weights and inputs get gradients, once where only one of them does;
    # of an input's first layer it is the weights alone
    learn_actor, learn_critic = 3 * actor - 2 * observations * 256, 3 * critic - 2 * (observations + actions) * 256
    every_step = actor + 2 * critic + 2 * learn_critic  # the target, and both critics
    every_second = learn_actor + 2 * critic  # through the first critic
    flop = REPLAY_SETTINGS["batch_size"] * (every_step + every_second / 2)
    peer = "stable-baselines3 TD3", sb3_td3_arguments, sb3_actor_critic
    return Work("td3", env_id, TD3_SETTINGS, *peer, 1000, flop, share_of_steps=0.1)


def sac_work(env_id: str, observations: int, actions: int) -> Work:
    actor, critic = mlp_flop(observations, 256, 256, 2 * actions), mlp_flop(observations + actions, 256, 256, 1)
    learn_actor, learn_critic = 3 * actor - 2 * observations * 256, 3 * critic - 2 * (observations + actions) * 256
    flop = REPLAY_SETTINGS["batch_size"] * (actor + 2 * critic + 2 * learn_critic + learn_actor + 4 * critic)
    peer = "stable-baselines3 SAC", sb3_sac_arguments, sb3_actor_critic
    return Work("sac", env_id, SAC_SETTINGS, *peer, 1000, flop, share_of_steps=0.1)


MADDPG_SETTINGS = {  # the paper's schedule and sizes
    "num_envs": 25, "train_frequency": 100, "batch_size": 1024, "hidden_size": 64, "learning_rate": 0.01,
    "learning_starts": 1025, "buffer_size": 1_000_000,
}  # fmt: skip


def maddpg_work() -> Work:
    """simple_spread_v3: three agents with 18 observations and 5 actions, three critics of all of these."""
    settings = MADDPG_SETTINGS
    actors, critics = 3 * mlp_flop(18, 64, 64, 5), 3 * mlp_flop(3 * (18 + 5), 64, 64, 1)
    # targets: forward through both; [1]: critics forward and back; [2]: both, but not back to the critics' weights
    update = settings["batch_size"] * ((actors + critics) + 3 * critics + (3 * actors + 2 * critics))
    flop = actors + update / settings["train_frequency"]
    return Work(
        "maddpg", "simple_spread_v3", settings, "the environment alone", lambda _: {}, environment_alone, 100, flop
    )


PREFERENCE_SETTINGS = {
    "batch_size": 16, "learning_rate": 1e-4, "warmup": 0.1, "max_grad_norm": 1.0, "weight_decay": 0.0,
}  # fmt: skip


def preference_work(script: str, peer: str, settings: dict, passes: int) -> Work:
    """passes: forward passes for each pair, of which a backward pass counts for two."""
    tokens = 2 * (17.5 + 39 + 1)  # of a pair: the means of the prompt and of the reply, and the end token
    flop = passes * tokens * (4 * mlp_flop(128, 3 * 128) + 4 * mlp_flop(128, 128) + 4 * mlp_flop(128, 512, 128))
    flop += passes * tokens * mlp_flop(128, 1002) * (script == "dpo")
    common = {"multiple": settings["batch_size"], "flop_per_step": flop, "note": f"({tokens:.0f} tokens a pair)"}
    special = {"share_of_steps": 0.02, "make_data": make_pairs}
    special["time_alone"] = partial(time_model, scores=script == "reward_model")
    return Work(script, "pairs", settings, peer, trl_arguments, trl_trainer, **common, **special)


DQN_DEFAULTS = {  # of our script, but for what SBX lacks; it learns earlier, so that the warm-up compiles
    "train_frequency": 1, "batch_size": 128, "target_network_frequency": 1, "tau": 0.01, "learning_rate": 5e-4,
    "anneal_lr": False, "buffer_size": 100_000, "learning_starts": 100, "gamma": 0.99, "start_e": 1.0, "end_e": 0.05,
    "exploration_fraction": 0.2, "norm_obs": False, "huber": False, "double_q": False,
}  # fmt: skip


def compiled(work: Work) -> Work:
    return replace(work, settings=work.settings | {"compile": True}, note=f"{work.note} compiled".strip())


def beside_sbx(work: Work, **settings: bool) -> Work:
    """The same work, but with Stable Baselines in JAX as the peer.

    Its DQN has no Huber loss, never clips, and moves the target at most once in a step of all environments.
    """
    settings = work.settings | settings
    if work.script == "dqn":
        settings.pop("max_grad_norm", None)
    peer = work.peer.replace("stable-baselines3", "SBX")
    time_peer = partial(work.time_peer, library="sbx")
    return replace(work, peer=peer, time_peer=time_peer, note=f"{work.note} beside SBX".strip(), settings=settings)


WORKS = [
    preference_work("dpo", "TRL DPOTrainer", PREFERENCE_SETTINGS | {"beta": 0.1, "eval_replies": 1}, 4),
    preference_work("reward_model", "TRL RewardTrainer", PREFERENCE_SETTINGS, 3),
    Work("q_learning", "Taxi-v4", Q_SETTINGS, "a NumPy loop", dict, numpy_q_learning, 1000, 0),
    dqn_work("CartPole-v1", 4, 2, num_envs=1),
    dqn_work("CartPole-v1", 4, 2, num_envs=8),
    maddpg_work(),
    ppo_work("CartPole-v1", 4, 2),
    ppo_work("LunarLander-v3", 8, 4),
    compiled(ppo_work("LunarLander-v3", 8, 4)),
    td3_work("HalfCheetah-v5", 17, 6),
    sac_work("HalfCheetah-v5", 17, 6),
]
BESIDE_SBX = [
    beside_sbx(ppo_work("LunarLander-v3", 8, 4)),
    beside_sbx(compiled(ppo_work("LunarLander-v3", 8, 4))),
    beside_sbx(dqn_work("CartPole-v1", 4, 2, num_envs=1), huber=False),
    beside_sbx(dqn_work("CartPole-v1", 4, 2, num_envs=8, settings=DQN_DEFAULTS)),
    beside_sbx(compiled(dqn_work("CartPole-v1", 4, 2, num_envs=8, settings=DQN_DEFAULTS))),
    beside_sbx(td3_work("HalfCheetah-v5", 17, 6)),
    beside_sbx(sac_work("HalfCheetah-v5", 17, 6)),
]
WORKS += BESIDE_SBX

ACTING = "--eval-episodes 1 --eval-frequency 1000 --checkpoint-frequency 1000"
STARTS = {  # what a script can't do without, and the flags of a run of one learning step
    "q_learning": ("gymnasium, torch", f"--env-id FrozenLake-v1 --total-timesteps 1 {ACTING}"),
    "reinforce": ("gymnasium, torch", f"--env-id CartPole-v1 --num-steps 1 --total-timesteps 20 {ACTING}"),  # 1 episode
    "dqn": ("gymnasium, torch", f"--env-id CartPole-v1 --num-envs 1 --total-timesteps 2 --learning-starts 1 {ACTING}"),
    "ppo": ("gymnasium, torch", f"--env-id CartPole-v1 --num-envs 1 --num-steps 1 --num-minibatches 1 "
            f"--update-epochs 1 --total-timesteps 1 {ACTING}"),
    "td3": ("gymnasium, torch", f"--env-id Pendulum-v1 --num-envs 1 --total-timesteps 2 --learning-starts 1 {ACTING}"),
    "sac": ("gymnasium, torch", f"--env-id Pendulum-v1 --num-envs 1 --total-timesteps 2 --learning-starts 1 {ACTING}"),
    "her": ("gymnasium_robotics, torch", f"--num-envs 1 --total-timesteps 2 --learning-starts 1 {ACTING}"),
    "maddpg": ("mpe2.simple_spread_v3, torch", f"--num-envs 1 --total-timesteps 2 --learning-starts 2 "
               f"--train-frequency 1 {ACTING}"),
    "alphazero": ("gymnasium, pyspiel, torch", "--num-envs 1 --total-timesteps 9 --learning-starts 1 "  # a whole game
                  f"--train-frequency 9 --num-simulations 2 --eval-simulations 1 --eval-positions 1 {ACTING}"),
    "muzero": ("gymnasium, pyspiel, torch", "--env-id tic_tac_toe --num-envs 1 --total-timesteps 9 --random-moves 0 "
               "--learning-starts 1 --train-frequency 9 --num-simulations 2 --eval-simulations 1 --eval-positions 1 "
               f"{ACTING}"),
    "iql": ("gymnasium, torch", f"--total-timesteps 1 {ACTING}"),
    "cql": ("gymnasium, torch", f"--total-timesteps 1 {ACTING}"),
    "decision_transformer": ("gymnasium, torch", f"--total-timesteps 1 {ACTING}"),
    "reward_model": ("transformers.models.gpt2.modeling_gpt2, accelerate", "--total-timesteps 16 --batch-size 16"),
    "dpo": ("transformers.models.gpt2.modeling_gpt2, accelerate",
            "--total-timesteps 16 --batch-size 16 --eval-replies 1"),
    "sft": ("transformers.models.gpt2.modeling_gpt2, accelerate",
            "--total-timesteps 16 --batch-size 16 --eval-replies 1"),
    "ppo_rlhf": ("transformers.models.gpt2.modeling_gpt2, accelerate",
                 "--total-timesteps 16 --batch-size 16 --eval-replies 1"),
    "grpo": ("transformers.models.gpt2.modeling_gpt2, accelerate",
             "--total-timesteps 16 --batch-size 16 --eval-replies 1"),
}  # fmt: skip

SOLVE_FREQUENCY, SOLVE_EPISODES = 16_384, 20  # steps between evaluations, episodes of each


# ---- Measuring ----


def to_flag(name: str, value: object) -> str:
    name = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"


def time_command(command: list[str]) -> float:
    """Seconds from its start to its exit."""
    started = time.perf_counter()
    done = subprocess.run(command, env=os.environ | ONE_CORE, capture_output=True, text=True)
    if done.returncode:
        print(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        raise SystemExit(1)
    return time.perf_counter() - started


def time_script(work: Work, warm_up: int, steps: int) -> tuple[float, float, list[str]]:
    """Steps a second of our script, the seconds that its start takes, and its flags.

    The clock is metrics.jsonl's, from the row of the learning step that ends the warm-up to that of the last one: all
    that lies between is in it, logging too. The only evaluation and the only checkpoint come after the last row. Where
    there is no environment the clock is that of the whole run, which begins with the reference's log-probabilities.
    """
    total = warm_up + steps
    settings = work.settings | {"total_timesteps": total, "eval_frequency": total, "checkpoint_frequency": total}
    with tempfile.TemporaryDirectory() as folder:
        if work.make_data:
            settings |= work.make_data(folder, total)
        else:
            settings |= {"env_id": work.env_id, "eval_episodes": 1}
        flags = [to_flag(name, value) for name, value in settings.items()]
        command = [sys.executable, str(ROOT / "algorithms" / f"{work.script}.py"), *flags, f"--run-dir={folder}/run"]
        time_command(command)
        rows = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    learned = [(row["global_step"], row["time"]) for row in rows if "charts/SPS" in row]
    timed = [(0, 0.0), *learned] if work.make_data else [row for row in learned if row[0] >= warm_up]
    if len(timed) < 2:
        refuse(f"--steps: {work.name} learns too seldom in {steps} steps to be timed; give more")
    (first, started), (last, ended) = timed[0], timed[-1]
    sps = (last - first) / (ended - started)
    # The data are made and gone: in the record, FOLDER is where they were
    return sps, started - first / sps, [flag.replace(folder, "FOLDER") for flag in flags]


def in_new_process(function: Callable, *args: object) -> float | tuple[float, float]:
    os.environ.update(ONE_CORE)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:  # it was killed, as by a lack of memory
            print(f"error: the process of {getattr(function, '__name__', function)} died", file=sys.stderr)
            raise SystemExit(1) from None


def time_env(env_id: str, steps: int) -> float:
    """Steps a second of one environment with random actions, drawn beforehand."""
    import gymnasium as gym

    if env_id.startswith("simple_"):  # mpe2's, of several agents
        return time_parallel_env(env_id, steps)
    env = gym.make(env_id)
    env.action_space.seed(1)
    actions = [env.action_space.sample() for _ in range(steps)]
    env.reset(seed=1)
    started = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return steps / (time.perf_counter() - started)


def time_parallel_env(env_id: str, steps: int) -> float:
    """The same for one of mpe2, without what maddpg.py adds to it."""
    env = import_module(f"mpe2.{env_id}").parallel_env()
    for i, name in enumerate(env.possible_agents):
        env.action_space(name).seed(i)
    actions = [{name: env.action_space(name).sample() for name in env.possible_agents} for _ in range(steps)]
    env.reset(seed=1)
    started = time.perf_counter()
    for action in actions:
        env.step(action)
        if not env.agents:
            env.reset()
    return steps / (time.perf_counter() - started)


def time_matmul(threads: int = 1, size: int = 1024) -> float:
    """float32 operations a second in a big matrix product: the best of several."""
    import torch

    torch.set_num_threads(threads)
    a, best = torch.rand(size, size), 0.0
    for _ in range(20):
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def pays_after(speed: float, start: float, other_speed: float, other_start: float) -> float:
    """Steps after which the faster one has made up for its longer start; 0 if it is not longer."""
    return max(0.0, (start - other_start) / (1 / other_speed - 1 / speed)) if speed != other_speed else math.inf


def measure(work: Work, args: Args) -> dict:
    steps = args.steps * work.share_of_steps
    steps, warm_up = (math.ceil(n / work.multiple) * work.multiple for n in (steps, steps / 10))
    name = f"{work.full_name} ({args.cores} cores)" if args.cores > 1 else work.full_name
    if args.cores > 1 and work.script in WIDE:
        work = replace(work, settings=work.settings | {"threads": args.cores})
    row = {"name": name, "peer": work.peer, "steps": steps, "warm_up": warm_up}
    row |= {"settings": work.settings, "peer_arguments": work.peer_arguments(work.settings)}
    ours, theirs, env, our_starts, their_starts = [], [], [], [], []
    for i in range(args.repeats):
        sps, start, flags = time_script(work, warm_up, steps)
        ours.append(sps)
        our_starts.append(start)
        sps, start = in_new_process(work.time_peer, work.env_id, work.settings, warm_up, steps)
        theirs.append(sps)
        their_starts.append(start)
        env.append(in_new_process(work.time_alone or time_env, work.env_id, steps))
        print(f"{name} {i + 1}: {ours[-1]:,.0f} steps/s, {work.peer} {theirs[-1]:,.0f}", flush=True)
    flop_per_s = in_new_process(time_matmul, args.cores)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return row | {
        "command": ["python", f"algorithms/{work.script}.py", *flags], "ours": ours, "theirs": theirs,
        "ratios": ratios, "ratio": statistics.median(ratios), "env_only": env, "gflop_per_s": flop_per_s / 1e9,
        "matmul_limit": work.flop_per_step and flop_per_s / work.flop_per_step,
        "our_starts": our_starts, "their_starts": their_starts,
    }  # fmt: skip


def measure_start(script: str, args: Args) -> dict:
    imports, flags = STARTS[script]
    ours, limit = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = make_pairs(folder, 16) if script in ("dpo", "reward_model") else {}
        command = [f"algorithms/{script}.py", *flags.split(), *(to_flag(*flag) for flag in data.items())]
        for i in range(args.repeats + 1):  # the first ones read the libraries from the disk: they don't count
            run_dir = f"--run-dir={folder}/run{i}"
            ours.append(time_command([sys.executable, str(ROOT / command[0]), *command[1:], run_dir]))
            limit.append(time_command([sys.executable, "-c", f"import {imports}"]))
    ours, limit = ours[1:], limit[1:]
    words = [word.replace(folder, "FOLDER") for word in command]
    ratios = [a / b for a, b in zip(ours, limit, strict=True)]
    print(f"start/{script}: {statistics.median(ours):.1f} s, of which import {imports}: {statistics.median(limit):.1f}")
    return {
        "name": f"start/{script}", "command": ["python", *words], "ours": ours, "imports": imports, "limit": limit,
        "ratios": ratios, "ratio": statistics.median(ratios),
    }  # fmt: skip


def time_to_solve(seed: int) -> tuple[float, float]:
    """Seconds and steps of ppo.py, with its defaults, until LunarLander is solved."""
    flags = f"--env-id LunarLander-v3 --eval-frequency {SOLVE_FREQUENCY} --eval-episodes {SOLVE_EPISODES}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "algorithms" / "ppo.py"), *flags.split(), f"--seed={seed}"]
        command.append(f"--run-dir={folder}/run")
        started, ended, evaluations = time.perf_counter(), False, []
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(command, env=os.environ | ONE_CORE, stdout=log, stderr=log)
        while not solved_after([value for _, value in evaluations]) and not ended:
            time.sleep(0.05)
            ended = process.poll() is not None  # asked before reading: what it wrote last is read too
            path = Path(folder, "run", "metrics.jsonl")
            lines = [line for line in path.read_text().split("\n")[:-1] if "eval/" in line] if path.exists() else []
            evaluations = [(row["global_step"], row["eval/episodic_return"]) for row in map(json.loads, lines)]
        seconds = time.perf_counter() - started
        process.kill()
        if process.wait() and ended:  # else it was killed here
            print(f"error: {' '.join(command)} failed:\n{Path(folder, 'log').read_text()[-2000:]}", file=sys.stderr)
            raise SystemExit(1)
    needed = solved_after([value for _, value in evaluations])
    return (seconds, evaluations[needed - 1][0]) if needed else (math.inf, math.inf)


def measure_solve(script: str, args: Args) -> dict:
    row = {"name": f"solve/{script}", "ours": [], "our_steps": [], "theirs": [], "their_steps": []}
    for seed in range(1, args.repeats + 1):
        seconds, steps = time_to_solve(seed)
        started = time.perf_counter()
        their_steps = in_new_process(sb3_solve, seed)
        new = {"ours": seconds, "our_steps": steps, "theirs": time.perf_counter() - started, "their_steps": their_steps}
        for name, value in new.items():
            row[name].append(value)
        print(f"solve/{script} {seed}: {seconds:.0f} s, {steps:,} steps; SB3 {new['theirs']:.0f} s, {their_steps:,}")
    ratios = [theirs / ours for ours, theirs in zip(row["ours"], row["theirs"], strict=True)]
    return row | {"ratios": ratios, "ratio": statistics.median(ratios)}


def fill_replay(steps: int) -> int:
    """Bytes by which a process grows when dqn's replay buffer for so many steps is full, with 8 Atari environments."""
    import numpy as np

    sys.path.insert(0, str(ROOT))
    from algorithms import dqn

    def resident() -> int:  # bytes, on Linux
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    buffer = dqn.ImageReplayBuffer(dqn.Args(buffer_size=steps, num_envs=8), (4, 84, 84))
    others = {"actions": np.zeros(8, np.int64), "rewards": np.ones(8), "terminated": np.zeros(8, np.bool_)}
    for row in range(math.ceil(1.03 * steps / 8)):  # past its end
        if row % 500 == 0:  # episodes of 500 steps, each of another grey than the last: so it sees where one begins
            obs = np.full((8, 4, 84, 84), 1 + row // 500 % 255, np.uint8)
        buffer.add(obs=obs, next_obs=obs, **others)
    return resident() - before


def measure_memory(script: str, args: Args) -> dict:
    row = {"name": f"memory/{script}", "steps": 1_000_000, "frames": 1_000_000 * 84 * 84}
    row |= {"ours": in_new_process(fill_replay, row["steps"]), "theirs": in_new_process(sb3_replay_bytes, row["steps"])}
    print(f"{row['name']}: {row['ours'] / 1e9:.2f} GB; SB3 {row['theirs'] / 1e9:.2f} GB")
    return row


KINDS = {"rows": measure, "starts": measure_start, "solves": measure_solve, "memory": measure_memory}


def to_markdown(result: dict) -> str:
    tables = speeds(result["rows"]) + starts(result["starts"]) + solves(result["solves"]) + memory(result["memory"])
    return "\n".join(tables + provenance([row for kind in KINDS for row in result[kind]]))


def solves(rows: list[dict]) -> list[str]:
    lines = [
        "| script | LunarLander-v3 solved after, s | steps | SB3 PPO, RL Zoo's settings, s | steps | ratio (min-max) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        values = [f"{statistics.median(row[n]):,.0f}" for n in ("ours", "our_steps", "theirs", "their_steps")]
        ratio = f"**{row['ratio']:.1f}** ({min(row['ratios']):.1f}-{max(row['ratios']):.1f})"
        lines.append("| " + " | ".join([row["name"].removeprefix("solve/"), *values, ratio]) + " |")
    return [*lines, ""] if rows else []


def memory(rows: list[dict]) -> list[str]:
    lines = ["| script | a million steps of Atari, GB | SB3, GB | the frames alone, GB |", "| --- | --- | --- | --- |"]
    for row in rows:
        values = [f"{row[name] / 1e9:.2f}" for name in ("ours", "theirs", "frames")]
        lines.append("| " + " | ".join([row["name"].removeprefix("memory/"), *values]) + " |")
    return [*lines, ""] if rows else []


def starts(rows: list[dict]) -> list[str]:
    lines = ["| script | one learning step, s | its imports alone, s | ratio (min-max) |", "| --- | --- | --- | --- |"]
    for row in rows:
        ours, limit = statistics.median(row["ours"]), statistics.median(row["limit"])
        ratio = f"**{row['ratio']:.2f}** ({min(row['ratios']):.2f}-{max(row['ratios']):.2f})"
        lines.append(f"| {row['name'].removeprefix('start/')} | {ours:.1f} | {limit:.1f} | {ratio} |")
    return [*lines, ""] if rows else []


def provenance(rows: list[dict]) -> list[str]:
    """What each row ran on, with the rows that have it in common in one line."""
    names = {}
    for row in rows:
        where = f"{row['hardware']}, {row.get('pinned', 'one thread each')}; {row['versions']}; commit {row['commit']}"
        names.setdefault(where, []).append(row["name"])
    return [f"{', '.join(of)}: {where}." for where, of in names.items()]


def speeds(rows: list[dict]) -> list[str]:
    median = statistics.median
    lines = [
        "| script | steps/s | peer | steps/s | ratio (min-max) | environment or model alone | matrix products alone |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio = f"**{row['ratio']:.2f}** ({min(row['ratios']):.2f}-{max(row['ratios']):.2f})"
        limit = ""
        if row["matmul_limit"]:
            share = median(row["ours"]) / row["matmul_limit"]
            limit = f"{row['matmul_limit']:,.0f} ({row['gflop_per_s']:.0f} GFLOP/s), of which {share:.0%} are reached"
        limits = f"{median(row['env_only']):,.0f}", limit
        cells = [row["name"], f"{median(row['ours']):,.0f}", row["peer"], f"{median(row['theirs']):,.0f}", ratio]
        lines.append("| " + " | ".join([*cells, *limits]) + " |")
    for row in rows:
        if "SBX" in row["peer"] and "our_starts" in row:
            ours, start, theirs, their_start = (
                median(row[name]) for name in ("ours", "our_starts", "theirs", "their_starts")
            )
            faster = "the script" if ours > theirs else "SBX"
            after = pays_after(ours, start, theirs, their_start)
            text = f"{row['name']}: the script's start takes {start:.1f} s, SBX's {their_start:.1f} s"
            lines += ["", f"{text}; {faster} is ahead after {after:,.0f} steps."]
    settings = {" ".join(f"{k}={v}" for k, v in row["settings"].items()): row["name"] for row in rows}
    lines += ["", *(f"Settings of {name.split('/')[0]} and its peer: {text}." for text, name in settings.items()), ""]
    return lines if rows else []


def kept_rows(path: Path) -> dict[str, dict[str, dict]]:
    """What throughput.json holds: the rows of each kind, by name."""
    result = json.loads(path.read_text()) if path.exists() else {}
    return {kind: {row["name"]: row for row in result.get(kind, [])} for kind in KINDS}


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # in a file too, each line is there when it is measured
    args = parse(Args, __doc__)
    if args.repeats < 1 or args.steps < 1:
        refuse("--repeats and --steps must be at least 1")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not 1 <= args.cores <= (len(cores) or 1):
        refuse(f"--cores {args.cores}: there are {len(cores) or 'no'} to pin to")
    starting = {"start": [*STARTS]} | {f"start/{script}": [script] for script in STARTS}
    known = {name for work in WORKS for name in (work.script, work.env_id, work.name, work.full_name)}
    known |= starting.keys() | {"solve", "memory"}
    if unknown := [name for name in args.only if name not in known]:
        refuse(f"--only {unknown[0]}: there is {', '.join(sorted(known))}")
    works = [w for w in WORKS if not args.only or {w.script, w.env_id, w.name, w.full_name} & set(args.only)]
    if not find_spec("sbx") and any(work in BESIDE_SBX for work in works):
        print("the rows beside SBX are left out: pip install sbx-rl")
        works = [work for work in works if work not in BESIDE_SBX]
    scripts = [script for name in args.only or ["start"] for script in starting.get(name, [])]
    path = args.output / "throughput.json"
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").touch()  # else it would turn out after the first measurement
        path.with_suffix(".tmp").unlink()
        kept_rows(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"--output {args.output} can't be used: {error!r}")
    git = f"git -C '{ROOT}' describe --always --abbrev=40 --exclude='*' --dirty"
    git_status, commit = subprocess.getstatusoutput(git)
    cpu_status, cpu = subprocess.getstatusoutput("grep -m 1 'model name' /proc/cpuinfo")
    cpu = cpu.split(": ")[-1] if cpu_status == 0 else platform.machine()
    installed = {distribution.name: distribution.version for distribution in distributions()}
    where = {
        "commit": commit if git_status == 0 else "unknown",
        "hardware": f"{os.cpu_count()} cores ({cpu}), {platform.system()}",
        "versions": " ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed),
        "pinned": f"pinned to {args.cores} core{'s' if args.cores > 1 else ''}" if cores else "one thread each",
    }
    jobs = [("rows", work) for work in works] + [("starts", script) for script in scripts]
    for name, kind, script in ("solve", "solves", "ppo"), ("memory", "memory", "dqn"):
        if not args.only or name in args.only:
            jobs.append((kind, script))
    if not jobs:
        refuse("nothing is left to measure")
    if cores:
        os.sched_setaffinity(0, cores[-args.cores :])  # what is started from here is pinned too
    for kind, what in jobs:
        row = KINDS[kind](what, args) | where
        kept = kept_rows(path)  # read now: another measurement may have added to it
        kept[kind][row["name"]] = row
        result = {key: list(rows.values()) for key, rows in kept.items()}
        # After each, and whole: an hour's measurements are not lost
        path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".tmp").replace(path)
        path.with_suffix(".md").write_text(to_markdown(result))
    print(f"\n{to_markdown(result)}\nWritten to {args.output}: throughput.json, throughput.md")


if __name__ == "__main__":
    main()
