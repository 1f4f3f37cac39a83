"""Decision Transformer: learn from logs alone. It imitates the episodes that had the return you ask for.

A transformer learns to predict each action of the logs from the return that followed, the state, and the steps before.
To act, ask it for a high return. There are no values and no discount; training is that of a language model.

    [1] return-to-go: R_t = r_t + r_{t+1} + ... + r_n, to the end n of the episode in the logs                     DT
    [2] sequence:     R_1, s_1, a_1, R_2, s_2, a_2, ..., only the newest K steps                                   DT
    [3] policy:       pi(a_t | R_1, s_1, a_1, ..., R_t, s_t), the output at s_t, blind to later tokens             DT
    [4] loss:         minimise E[-log pi(a_t|...)], or E[(a_t - pi(...))^2] for a Box                              DT
    [5] acting:       R_1 is the return that you ask for; R_{t+1} = R_t - r_t, with the reward received            DT

What it does badly. It rarely joins good pieces of several episodes (stitching); iql.py does. And it takes luck for
skill: on the default logs it repeats what earned a lot by chance (Paster et al. 2022, arXiv:2205.15967).

Paper: Chen et al. 2021, arXiv:2106.01345, "Decision Transformer: Reinforcement Learning via Sequence Modeling".

Differs from the paper:
- No dropout (authors' code: 0.1), GELU (MuJoCo: ReLU), smaller networks, and PyTorch's initialisation but for time.
- Returns-to-go are divided by their largest absolute value in the data, not by a constant for each environment.
- Contexts are padded to the longest of a batch, not to K. Evaluations take the likeliest action (Atari: a drawn one).

    python algorithms/decision_transformer.py
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2", "mujoco>=3.11,<3.12",
#     "numpy>=2", "opencv-python-headless>=4.10", "torch>=2.13", "tqdm>=4.66", "tyro>=1", "wandb>=0.31",
# ]
# ///

import contextlib
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

DATA = Path(__file__).parent.parent / "benchmark" / "offline" / "frozenlake"  # the default data set
ARRAYS = "observations", "actions", "rewards", "terminations", "truncations", "next_observations"


@dataclass
class Args:
    # Run
    env_id: str = "FrozenLake-v1"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # seed of environments, networks and sampling
    total_timesteps: int = 1_000  # gradient steps; authors' code: 100,000
    device: str = "auto"  # cpu, cuda, cuda:N or mps; auto: cpu
    threads: int | None = None  # CPU threads of PyTorch; None: 1; for layers of 256 try 2
    checkpoint_frequency: int | None = None  # steps between checkpoints; None: a tenth of the run
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # go on with the run in --run-dir; a larger --total-timesteps makes it longer
    # Evaluation
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    eval_episodes: int = 100  # episodes of an evaluation
    eval_max_steps: int = 27_000  # steps after which an episode of an evaluation is cut: Atari's half an hour
    capture_video: bool = False  # film the first episode of each evaluation
    evaluate: bool = False  # only evaluate the model in --run-dir
    # Algorithm
    dataset: str = str(DATA)  # folder with data.npz, .npz, Minari id or folder; default: benchmark/offline/frozenlake
    target_return: float | None = None  # [5] the return that evaluations ask for; None: that of the best whole episode
    draw_actions: bool = False  # evaluations draw discrete actions, not the likeliest; Box: no effect; Atari: True
    condition: bool = True  # on returns; False: it sees 0 for each of them, and clones the behaviour in the data
    context_length: int = 10  # [2] K; paper: 20 (MuJoCo)
    num_layers: int = 2  # of the transformer; paper: 3, and 6 for Atari
    hidden_size: int = 64  # numbers in a token; paper: 128
    max_timestep: int = 1_000  # later steps of an episode have the embedding of this one
    learning_rate: float = 1e-3  # paper: 1e-4 (MuJoCo)
    warmup: int = 100  # gradient steps in which the learning rate rises to its full size; authors' code: 10,000
    max_grad_norm: float = 0.25  # longer gradients are shortened to this
    batch_size: int = 64  # contexts in a gradient step
    norm_obs: bool = False  # normalise observations; authors' Gym code: True

    num_envs = 1  # no flag: environments are for evaluation only

    def __post_init__(self) -> None:
        check_ranges(self, target_return=(-math.inf, math.inf))


class Normalizer(nn.Module):
    """(observation - mean) / std, from the data. Part of the model; nothing changes it after fit."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def fit(self, obs: Tensor) -> None:  # (T, obs_dim)
        self.mean[:], self.std[:] = obs.mean(0), obs.std(0, unbiased=False) + 1e-3  # a std can be 0

    def forward(self, obs: Tensor) -> Tensor:
        assert obs.shape[-1:] == self.mean.shape  # else a last dimension of 1 would be broadcast
        return (obs - self.mean) / self.std


class History:
    """One episode so far. Call earn(reward) after each step. With a seed, discrete actions are drawn."""

    def __init__(self, target_return: float, seed: int | None = None):
        self.return_to_go, self.steps, self.length = float(target_return), [], 0  # steps: the newest K of length
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def earn(self, reward: float) -> None:
        self.return_to_go -= np.asarray(reward).item()  # [5]


def collate(contexts: list[dict[str, Tensor]], device: str | torch.device) -> dict[str, Tensor]:
    """Contexts of k steps, (k, ...), left-padded to the longest: (B, K, ...), K = max k. mask: False for padding."""
    contexts = [context | {"mask": torch.ones(len(context["timesteps"]), dtype=torch.bool)} for context in contexts]
    columns = {name: [context[name] for context in contexts] for name in contexts[0]}
    return {name: pad_sequence(c, batch_first=True, padding_side="left").to(device) for name, c in columns.items()}


class DecisionTransformer(nn.Module):
    """Box actions are in [-1, 1] here, discrete ones count from 0; to_env gives the environment's."""

    def __init__(self, args: Args, obs_shape: tuple[int, ...], space: gym.Space):  # space: of the actions
        super().__init__()
        self.obs_shape, self.action_space, self.discrete = obs_shape, space, isinstance(space, gym.spaces.Discrete)
        (obs_dim,), self.action_dim = obs_shape, int(space.n) if self.discrete else math.prod(space.shape)
        self.context_length, self.condition, size = args.context_length, args.condition, args.hidden_size
        self.normalize = Normalizer(obs_dim)
        self.register_buffer("return_scale", torch.ones(()))  # the largest absolute return-to-go of the data
        self.register_buffer("target_return", torch.zeros(()))  # what act asks for without a history
        self.embed = nn.ModuleList([nn.Linear(dim, size) for dim in (1, obs_dim, self.action_dim)])  # of R, s, a
        self.embed_time = nn.Embedding(args.max_timestep + 1, size)
        nn.init.normal_(self.embed_time.weight, std=0.02)  # authors' Gym code: PyTorch's 1, large beside the rest
        self.norm = nn.LayerNorm(size)
        kind = {"dropout": 0.0, "activation": "gelu", "norm_first": True, "batch_first": True}
        layers = [nn.TransformerEncoderLayer(size, 1, 4 * size, **kind) for _ in range(args.num_layers)]  # 1 head
        self.layers = nn.ModuleList(layers)
        self.predict_action = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, self.action_dim))

    def forward(self, context: dict[str, Tensor]) -> Tensor:
        """The policy at each step, (B, K, action_dim): logits, or actions in [-1, 1].

        returns_to_go, timesteps, mask: (B, K). observations: (B, K, obs_dim). actions: (B, K), or (B, K, action_dim).
        """
        actions, mask = context["actions"], context["mask"].repeat_interleave(3, 1)  # (B, L) with L = 3 K
        actions = nn.functional.one_hot(actions, self.action_dim).float() if self.discrete else actions
        returns_to_go = context["returns_to_go"][..., None] / self.return_scale * self.condition
        parts = returns_to_go, self.normalize(context["observations"]), actions  # (B, K, ...)
        time = self.embed_time(context["timesteps"].clamp(max=self.embed_time.num_embeddings - 1))  # (B, K, H)
        tokens = [embed(part) + time for embed, part in zip(self.embed, parts, strict=True)]
        x = self.norm(torch.stack(tokens, 2).flatten(1, 2))  # [2] R_1, s_1, a_1, R_2, ...: (B, L, H)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()  # [3] (L, L)
        visible = causal & mask[:, None] | torch.eye(len(causal), dtype=torch.bool, device=x.device)  # (B, L, L)
        for layer in self.layers:
            x = layer(x, src_mask=~visible)  # a token of padding sees itself, else its softmax were NaN
        output = self.predict_action(x[:, 1::3])  # [3] at s_1, s_2, ...
        return output if self.discrete else output.tanh()

    def to_env(self, actions: Tensor) -> np.ndarray:  # (..., action_dim) -> (..., *action shape), or (...,) -> (...,)
        space, actions = self.action_space, actions.cpu().numpy()
        if self.discrete:
            return actions.astype(space.dtype) + space.start  # the environment counts from start
        low, high, actions = space.low, space.high, actions.reshape((*actions.shape[:-1], *space.shape))
        return np.clip((high + low) / 2 + (high - low) / 2 * actions, low, high).astype(space.dtype)

    @torch.no_grad()
    def act(self, obs: np.ndarray, histories: History | list[History] | None = None) -> np.ndarray:
        """The action for an observation, (obs_dim,), or for each of a batch, (B, obs_dim), each with its history.

        Without histories these are first steps of episodes, and the return asked for is that of the training.
        """
        obs = torch.tensor(np.asarray(obs), dtype=torch.float32)  # a copy, to remember
        if obs.ndim == 1:
            return self.act(obs[None], None if histories is None else [histories])[0]
        histories = [History(self.target_return.item()) for _ in obs] if histories is None else histories
        unknown = torch.tensor(0) if self.discrete else torch.zeros(self.action_dim)  # in a_t's place, unseen by s_t
        for row, history in zip(obs, histories, strict=True):
            step = {"returns_to_go": torch.tensor(history.return_to_go), "timesteps": torch.tensor(history.length)}
            history.steps.append(step | {"observations": row, "actions": unknown})
            history.steps, history.length = history.steps[-self.context_length :], history.length + 1
        contexts = [{k: torch.stack([step[k] for step in h.steps]) for k in h.steps[0]} for h in histories]
        output = self(collate(contexts, self.return_scale.device))[:, -1].cpu()  # (B, action_dim): the last step
        for history, action in zip(histories, output, strict=True):
            if self.discrete:
                draw = history.generator  # None: take the likeliest
                action = torch.multinomial(action.softmax(-1), 1, generator=draw)[0] if draw else action.argmax()
            history.steps[-1]["actions"] = action
        return self.to_env(torch.stack([history.steps[-1]["actions"] for history in histories]))


def open_dataset(dataset: str, env: gym.Env) -> tuple[dict[str, np.ndarray], gym.envs.registration.EnvSpec]:
    """The arrays of a data set, (T, ...) each, and the id and options of its environment: env's if they are unknown."""
    path = Path(dataset)
    file = path / "data.npz" if path.is_dir() else path
    try:
        if file.suffix == ".npz" and (file.exists() or not path.is_dir()):
            with np.load(file) as stored:  # data only: it executes no code
                arrays = {name: stored[name] for name in ARRAYS}
            about = json.loads(file.with_name("data.json").read_text()) if file.with_name("data.json").exists() else {}
            return arrays, gym.envs.registration.EnvSpec(about.get("env_id", env.spec.id))
        import minari

        folder = path / "data" if (path / "data").is_dir() else path
        stored = minari.MinariDataset(folder) if path.is_dir() else minari.load_dataset(dataset)
        episodes = list(stored.iterate_episodes())  # an episode of n steps has n + 1 observations
        parts = {name: [getattr(episode, name) for episode in episodes] for name in ARRAYS[1:5]}  # not observations
        seen, keys = [e.observations for e in episodes], getattr(env.env.observation_space, "spaces", None)
        seen = [np.hstack([obs[k] for k in keys or obs]) if isinstance(obs, dict) else obs for obs in seen]  # mazes
        parts |= {"observations": [obs[:-1] for obs in seen], "next_observations": [obs[1:] for obs in seen]}
        parts["truncations"] = [np.append(e.truncations[:-1], e.terminations[-1:] == 0) for e in episodes]  # all end
        return {name: np.concatenate(parts[name]) for name in ARRAYS}, stored.env_spec or env.spec
    except ImportError:
        raise UsageError(f"no .npz file at --dataset {dataset}; Minari's need pip install 'minari[hdf5]'") from None
    except Exception as error:  # missing or damaged files raise many kinds
        raise UsageError(f"--dataset {dataset} can't be read: {type(error).__name__}: {error!s:.200}") from None


def read_dataset(args: Args, env: gym.Env) -> dict[str, Tensor]:
    """All T transitions, compared with the environment. In order: a forgotten truncation would join two episodes.

    observations, next_observations: (T, obs_dim). actions: (T,) from 0, or (T, action_dim) in [-1, 1]. rewards: (T,).
    terminations, truncations: (T,) of 0 and 1. Only a termination means that nothing can be earned any more.
    """
    arrays, spec = open_dataset(args.dataset, env)
    observes, acts, num_rows = env.env.observation_space, env.action_space, len(np.atleast_1d(arrays["rewards"]))

    def check(condition: bool, message: str) -> None:
        if not condition:
            raise UsageError(f"--dataset {args.dataset}: {message}")

    def vectors(name: str) -> np.ndarray:  # (T, D)
        array, space = arrays[name], acts if name == "actions" else observes
        if isinstance(space, gym.spaces.Discrete) and array.size == num_rows:  # numbers of states or actions: one-hot
            inside = np.isin(array, space.start + np.arange(space.n))
            check(inside.all(), f"{name} from {array.min()} to {array.max()}, but {args.env_id} has {space}")
            return np.eye(space.n, dtype=np.float32)[array.astype(np.int64).flatten() - space.start]
        array = array.reshape(num_rows, -1).astype(np.float32)
        check(array.shape[1] == gym.spaces.flatdim(space), f"{name} {array.shape}, but {args.env_id} has {space}")
        return array

    check(f":{args.env_id}".endswith(f":{spec.id}"), f"made in {spec.id}, not {args.env_id}: name that --env-id")
    if options := {k: v for k, v in spec.kwargs.items() if k != "render_mode" and v != env.spec.kwargs.get(k)}:
        tqdm.write(f"--dataset {args.dataset} was made in {spec.id} with {options}; evaluations are without these")
    needed = 8e-9 * num_rows * gym.spaces.flatdim(observes)  # GB of both observations: a float32 has four bytes
    memory = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    check(needed < 0.9 * memory, f"its observations need {needed:.1f} GB; this machine has {memory:.1f} GB")
    data, single = {}, ("rewards", "terminations", "truncations")  # one number a row
    for name, array in arrays.items():
        fits = num_rows and array.shape[:1] == (num_rows,) and (array.ndim == 1 or name not in single)
        check(fits, f"{name} {array.shape} beside {num_rows} rewards")
        check(array.dtype.kind in "biuf" and np.isfinite(np.float32(array)).all(), f"words, NaN or infinity in {name}")
        data[name] = array.astype(np.float32) if name in single else vectors(name)
    ends = np.stack([data["terminations"], data["truncations"]])
    check(np.isin(ends, (0, 1)).all(), "terminations and truncations must be 0 or 1")
    moved = (data["next_observations"][:-1] != data["observations"][1:]).any(-1) & ~ends.any(0)[:-1]
    check(not moved.any(), f"row {moved.nonzero()[0][:1]} does not lead to the next row, but no episode ends there")
    if isinstance(acts, gym.spaces.Discrete):
        data["actions"] = data["actions"].argmax(-1)
    else:
        low, high, actions = acts.low.flatten(), acts.high.flatten(), data["actions"]
        check((abs(2 * actions - low - high) <= 1.001 * (high - low)).all(), f"actions beyond {acts}: clip these first")
        data["actions"] = (2 * (actions - low) / np.maximum(high - low, 1e-9) - 1).clip(-1, 1)
    return {name: torch.from_numpy(array) for name, array in data.items()}


def split_episodes(data: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The episodes of the logs. One of n steps has returns_to_go, timesteps, observations, actions: (n, ...)."""
    ended = data["terminations"] + data["truncations"] > 0
    ended[-1] = True
    stops, episodes = (ended.nonzero().flatten() + 1).tolist(), []
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        returns_to_go = data["rewards"][start:stop].flip(0).cumsum(0).flip(0)  # [1]
        episode = {"returns_to_go": returns_to_go, "timesteps": torch.arange(stop - start)}
        episodes.append(episode | {name: data[name][start:stop] for name in ("observations", "actions")})
    return episodes


def sample(episodes: list[dict[str, Tensor]], lengths: Tensor, args: Args, device: str) -> dict[str, Tensor]:
    """Contexts, each from an equally likely step of the data on: K steps, or fewer at the end of its episode."""
    contexts = []
    for i in torch.multinomial(lengths, args.batch_size, replacement=True).tolist():
        start = torch.randint(int(lengths[i]), ())
        contexts.append({name: array[start : start + args.context_length] for name, array in episodes[i].items()})
    return collate(contexts, device)


def imitation_loss(predicted: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
    """The mean over all but padding. predicted: (B, K, action_dim); actions: (B, K), or the same; mask: (B, K)"""
    loss = nn.functional.cross_entropy if actions.ndim == 2 else nn.functional.mse_loss
    return loss(predicted[mask], actions[mask])  # [4]


def make_agent(args: Args, obs_shape: tuple[int, ...], action_space: gym.Space) -> DecisionTransformer:
    floats = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    bounded = floats and np.abs([action_space.low, action_space.high]).max() < 1e6
    if not bounded and not isinstance(action_space, gym.spaces.Discrete):
        raise UsageError(f"--env-id {args.env_id} acts in {action_space}, not Discrete or a Box of floats below 1e6")
    return DecisionTransformer(args, obs_shape, action_space)


def train(args: Args) -> dict[str, float]:
    """Trains an agent, returns its last evaluation. run.goes_on evaluates and saves; run.log writes."""
    with contextlib.closing(Run(args)) as run:  # closes the environments, also after an error
        agent = make_agent(args, run.obs_shape, run.action_space).to(run.device)
        data = read_dataset(args, run.envs[0])
        if args.norm_obs:
            agent.normalize.fit(data["observations"])
        episodes = split_episodes(data)
        lengths = torch.tensor([len(episode["timesteps"]) for episode in episodes], dtype=torch.float32)
        agent.return_scale.fill_(max(episode["returns_to_go"].abs().max().item() for episode in episodes) or 1.0)
        last_is_whole = data["terminations"][-1] or lengths[-1] == lengths.max()  # else the data may cut it
        best = max(e["returns_to_go"][0].item() for e in (episodes if last_is_whole else episodes[:-1] or episodes))
        agent.target_return.fill_(best if args.target_return is None else args.target_return)
        optimizer = torch.optim.AdamW(agent.parameters(), args.learning_rate, weight_decay=1e-4, fused=True)
        run.actions = []  # training plays no episodes, so a checkpoint has none to play again
        run.start(model=agent, optimizer=optimizer)  # what a checkpoint holds
        while run.goes_on():  # False at the end
            # 1. Draw contexts
            batch = sample(episodes, lengths, args, run.device)
            # 2. Learn
            optimizer.param_groups[0]["lr"] = rate = args.learning_rate * min(1, (run.global_step + 1) / args.warmup)
            loss = imitation_loss(agent(batch), batch["actions"], batch["mask"])
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            run.global_step += 1
            if run.global_step % 100 == 0:  # 3. Log
                run.log({"losses/action_loss": loss, "losses/grad_norm": grad_norm, "charts/learning_rate": rate})
        return run.result


# ---- Below this line nothing learns: command line, environments, evaluation, run folder, as in all scripts ----
# What matters for learning: make_env (what is observed), Run.step (what follows an end). train needs Run and make_env.


class UsageError(Exception):
    """A mistake of the user: main prints it as one line, which says what to do, and ends with exit code 2."""


def check_ranges(args: Args, **ranges: tuple[float, float]) -> None:
    """Refuses integers below 1, floats below 0 (or see ranges), NumPy's numbers and unknown words. Sets frequencies."""
    ranges = {"seed": (0, 2**63 - 1), "gamma": (0, 1), "threads": (1, 1024), "max_grad_norm": (1e-9, math.inf)} | ranges
    for (name, value), kind in zip(vars(args).items(), Args.__annotations__.values(), strict=True):
        low, high = ranges.get(name, (0 if "float" in str(kind) else 1, math.inf))
        if hasattr(value, "dtype") or (type(value) in (int, float) and not low <= value <= min(high, 1e308)):  # not inf
            raise UsageError(f"--{name.replace('_', '-')} is {value!r}, which is not a number from {low} to {high}")
        words = getattr(kind, "__args__", [str])  # "a" and "b" of Literal["a", "b"]
        if isinstance(value, str) and value not in words and str not in words:
            raise UsageError(f"--{name.replace('_', '-')} is {value}, which is none of {words}")
    if args.total_timesteps % getattr(args, "num_envs", 1):
        raise UsageError(f"--total-timesteps {args.total_timesteps} must be a multiple of --num-envs {args.num_envs}")
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
    """The command line. --help prints Args. With --resume or --evaluate, flags not given are those of the run."""
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


def make_env(args: Args, film: Path | None = None) -> gym.Env:
    """An environment that observes vectors, (D,) float32."""
    env, known = None, Exception if film else (gym.error.Error, ImportError, TypeError, NotImplementedError, UsageError)
    try:
        env = gym.make(args.env_id, **({"render_mode": "rgb_array"} if film else {}))
        if not env.observation_space.is_np_flattenable or gym.spaces.flatdim(env.observation_space) > 3000:
            raise UsageError(f"observations are no vector, but {env.observation_space}: see ppo.py, dqn.py")
        if film:
            env.reset()
            assert getattr(x := env.render(), "dtype", 0) == np.uint8 and x.shape[2:] == (3,), "render() gives no RGB"
            options = {"episode_trigger": lambda _: True, "video_length": 3000}  # frames wait in memory
            env = gym.wrappers.RecordVideo(env, str(film.parent), name_prefix=film.name, **options)
    except known as error:  # another one comes from within the environment: its traceback helps most
        if env is not None:
            env.close()
        hint = "; --capture-video needs render_mode rgb_array, and MuJoCo perhaps MUJOCO_GL=egl" if film else ""
        raise UsageError(f"--env-id {args.env_id}: {str(error) or env.observation_space}{hint}") from None
    if isinstance(env.observation_space, gym.spaces.Box) and env.observation_space.dtype.kind != "f":
        env = gym.wrappers.DtypeObservation(env, np.float32)  # FlattenObservation would cast to integers
    return gym.wrappers.FlattenObservation(env)  # Discrete: one-hot


def evaluate(agent: nn.Module, args: Args, film: Path) -> dict[str, float]:
    """Plays eval_episodes episodes, from the same seeds every time, each in its own environment. Films the first."""
    seeds = np.random.SeedSequence([args.seed, 1]).generate_state(args.eval_episodes).tolist()  # 1: training has 0
    returns, lengths, playing = np.zeros(len(seeds)), np.zeros(len(seeds)), {}
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())  # some environments draw from these three
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        random.seed(args.seed)
        np.random.seed(seeds)
        torch.default_generator.manual_seed(args.seed)
        films = [film if args.capture_video else None] + [None] * (len(seeds) - 1)
        envs = [stack.enter_context(contextlib.closing(make_env(args, film))) for film in films]
        here, there = (envs[0].observation_space.shape, envs[0].action_space), (agent.obs_shape, agent.action_space)
        if here != there:
            raise UsageError(f"--env-id {args.env_id} observes and acts in {here}, the trained agent in {there}")
        playing = {i: env.reset(seed=seed)[0] for i, (env, seed) in enumerate(zip(envs, seeds, strict=True))}
        target = agent.target_return.item() if args.target_return is None else args.target_return
        histories = [History(target, seed if args.draw_actions else None) for seed in seeds]
        while playing and not Run.stop_signal:
            actions = agent.act(np.stack([*playing.values()]), [histories[i] for i in playing])
            for i, action in zip(list(playing), actions, strict=True):
                playing[i], reward, terminated, truncated, _ = envs[i].step(action)
                returns[i : i + 1] += reward  # some environments return an array of one element
                histories[i].earn(reward)
                lengths[i] += 1
                if terminated or truncated or lengths[i] == args.eval_max_steps:
                    del playing[i]
    if lengths.max() == args.eval_max_steps:
        tqdm.write(f"--eval-max-steps {args.eval_max_steps} was reached: perhaps an episode was cut")
    result = {"eval/episodic_return": returns.mean(), "eval/return_std": returns.std()}
    return {} if playing else result | {"eval/episodic_length": lengths.mean()}


def load_file(path: Path, **parts: nn.Module | torch.optim.Optimizer) -> dict:
    """Reads model.pt or checkpoint.pt, data and never code, into the parts of the same names."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert {"model", "bytes" if path.name == "checkpoint.pt" else "action_space"} <= state.keys()
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state
    except Exception as error:  # a damaged file can raise anything
        raise UsageError(f"{path} is missing, damaged or of another script ({type(error).__name__})") from None


SPACES = {"Discrete": ("n", "start"), "MultiDiscrete": ("nvec", "start"), "Box": ("low", "high", "shape")}  # in files


def load(run_dir: str) -> nn.Module:
    """The trained agent of a run, without its environment: load("runs/...").act(observation) is an action."""
    state = load_file(Path(run_dir, "model.pt"))
    kind, dtype, values = state["action_space"]
    values = {name: value.numpy()[()] for name, value in values.items()}  # [()]: a 0-d array becomes a number
    space = getattr(gym.spaces, kind)(**values, dtype=np.dtype(dtype).type)
    agent = make_agent(saved_args(run_dir), tuple(state["obs_shape"]), space)
    load_file(Path(run_dir, "model.pt"), model=agent)
    return agent


class Run:
    """A run: environments, folder, log. obs, (N, ...): what is now seen; actions: each present episode's."""

    stop_signal, all_threads = 0, torch.get_num_threads()  # main sets the first, at a signal; PyTorch chose the second

    def __init__(self, args: Args):
        name = f"{re.sub('[:/]', '-', args.env_id)}__{Path(__file__).stem}__{args.seed}"
        self.args, self.dir = args, Path(args.run_dir or f"runs/{name}__{datetime.now():%Y%m%d-%H%M%S-%f}")
        self.command = shlex.join([sys.executable, __file__, "--run-dir", str(self.dir)])
        self.global_step, self.last_step, self.started, self.result, self.wandb = 0, 0, time.time(), {}, None
        try:
            torch.zeros(1, device=args.device.replace("auto", "cpu"))
        except (AssertionError, RuntimeError) as error:
            raise UsageError(f"--device {args.device} can't be used, --device cpu can ({error!s:.99})") from None
        if args.capture_video:
            make_env(args, film=self.dir / "videos" / "trial").close()  # finds out now whether it can be filmed
        random.seed(args.seed)
        np.random.seed(np.random.SeedSequence(args.seed).generate_state(4))  # the seed itself gives PyTorch's numbers
        torch.manual_seed(args.seed)
        with contextlib.ExitStack() as stack:
            self.envs = [stack.enter_context(contextlib.closing(make_env(args))) for _ in range(args.num_envs)]
            self.opened = stack.pop_all()  # what close will close; start adds to it
        self.obs_shape, self.action_space = self.envs[0].observation_space.shape, self.envs[0].action_space
        small = len(self.obs_shape) == 1  # networks for vectors are too small for a GPU to help
        self.obs = np.zeros((args.num_envs, *self.obs_shape), np.float32 if small else np.uint8)
        self.returns, self.actions = np.zeros(args.num_envs), [[] for _ in range(args.num_envs)]  # of present episodes
        self.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() and not small else "cpu")
        torch.set_num_threads(args.threads or (1 if small else Run.all_threads))

    def start(self, **parts: nn.Module | torch.optim.Optimizer) -> None:
        """Opens the folder. parts: all that changes in training, with a state_dict; the one named model acts."""
        args, path, checkpoint, self.parts = self.args, self.dir / "config.json", self.dir / "checkpoint.pt", parts
        if args.resume:
            saved, config = asdict(saved_args(self.dir)), json.loads(path.read_text())
            changed = {k for k, v in vars(args).items() if v != saved[k]} - {"run_dir", "resume", "device", "threads"}
            if changed - {"total_timesteps", "capture_video"} or args.total_timesteps < saved["total_timesteps"]:
                raise UsageError(f"--resume can only raise --total-timesteps; unlike the run's: {', '.join(changed)}")
        elif any((self.dir / name).exists() for name in ("config.json", "checkpoint.pt", "model.pt", "metrics.jsonl")):
            raise UsageError(f"--run-dir {self.dir} holds a run: go on with --resume, or name another folder")
        else:
            git = f"git -C {shlex.quote(os.path.dirname(__file__))} describe --always --abbrev=40 --dirty --exclude='*'"
            config = {"script": Path(__file__).stem, "args": asdict(args), "command": sys.argv}
            config |= {"commit": subprocess.getoutput(f"{git} 2>&-") or None, "wandb_id": os.urandom(8).hex()}
            config["versions"] = {d.name: d.version for d in distributions()} | {"python": sys.version}
            config["hardware"] = subprocess.getoutput("uname -a; lscpu | grep 'Model name'; nvidia-smi -L 2>&-")
        config["args"]["total_timesteps"] = args.total_timesteps  # a resumed run may be longer
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
        state = {"step": 0, "last_step": 0, "seconds": 0.0, "bytes": 0, "actions": self.actions, "streams": []}
        if args.resume and (checkpoint.exists() or Path(self.dir, "model.pt").exists()):  # save writes this one later
            state |= load_file(checkpoint, **parts)
        if self.metrics.tell() < state["bytes"]:
            raise UsageError(f"{self.metrics.name} lacks rows that were there when {checkpoint} was written")
        self.metrics.seek(self.metrics.truncate(state["bytes"]))  # later rows will be written again
        self.global_step, self.last_step, self.result = state["step"], state["last_step"], state.get("result", {})
        self.started -= state["seconds"]
        for i, actions in enumerate(state["actions"]):
            whole = self.begin_episode(i, np.array(actions))
            if not whole or ("obs" in state and (self.obs[i] != state["obs"][i].numpy()).any()):
                tqdm.write(f"{args.env_id} can't be replayed exactly: the present episode of environment {i} ends here")
                self.begin_episode(i)
        setters = random.setstate, np.random.set_state, torch.set_rng_state, torch.cuda.set_rng_state_all
        for setter, stream in zip(setters, state["streams"], strict=False):
            setter(stream)
        self.bar = tqdm(total=args.total_timesteps, initial=self.global_step, unit=" steps", disable=None)
        self.opened.callback(self.bar.close)
        kind = "vectors" if len(self.obs_shape) == 1 else "images"
        print(f"{args.env_id}: observes {kind} {self.obs_shape}, run folder {self.dir}, from step {self.global_step}")

    def begin_episode(self, i: int, actions: np.ndarray | tuple = ()) -> bool:
        """Resets environment i. After --resume it replays the episode's actions so far; False if that ended it."""
        began = self.global_step - len(self.envs) * len(actions)  # each episode has a seed of its own
        seed = np.random.SeedSequence([self.args.seed, 0, i, began]).generate_state(1).item()
        obs, _ = self.envs[i].reset(seed=seed)
        self.returns[i], self.actions[i] = 0.0, list(actions)
        for action in actions:
            obs, reward, terminated, truncated, _ = self.envs[i].step(action.copy())  # step may change it
            self.returns[i : i + 1] += reward
            if terminated or truncated:
                return False
        if np.shape(obs) != self.obs[i].shape or not np.isfinite(obs).all():
            raise FloatingPointError(f"NaN, infinity or another shape than its space's from {self.args.env_id}: {obs}")
        self.obs[i] = obs
        return True

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[dict]]:
        """Steps all environments: (N, *action shape) -> next_obs, rewards, terminated, truncated, infos, N of each.

        Where an episode has ended, next_obs is its last observation, and self.obs the first one of the next episode.
        """
        next_obs, rewards, infos = np.empty_like(self.obs), np.zeros(len(self.envs)), []
        terminated, truncated = np.zeros(len(self.envs), bool), np.zeros(len(self.envs), bool)
        for i, (env, action) in enumerate(zip(self.envs, actions.copy(), strict=True)):  # step may change actions
            self.actions[i].append(action)
            next_obs[i], rewards[i : i + 1], terminated[i], truncated[i], info = env.step(actions[i])
            infos.append(info)
        if not math.isfinite(next_obs.sum(dtype=float) + rewards.sum()):
            raise FloatingPointError(f"NaN or infinity from {self.args.env_id}: rewards {rewards}, {next_obs}")
        self.obs = next_obs.copy()
        self.global_step += len(self.envs)
        self.returns += rewards
        for i in np.flatnonzero(terminated | truncated):
            self.log({"charts/episodic_return": self.returns[i], "charts/episodic_length": len(self.actions[i])})
            self.begin_episode(i)
        return next_obs, rewards, terminated, truncated, infos

    def goes_on(self) -> bool:
        """Evaluates and saves where that is due. False at the end of the run."""
        args, step, last = self.args, self.global_step, self.last_step
        end, self.last_step = step == args.total_timesteps, step
        if step // args.eval_frequency > last // args.eval_frequency or (end and step > last):
            if result := evaluate(self.parts["model"], args, self.dir / "videos" / f"step-{step}"):
                self.log(result)
                self.result = {name: float(value) for name, value in result.items()}
            else:  # a signal has stopped it: after --resume it is due again
                self.last_step = last
        if step // args.checkpoint_frequency > last // args.checkpoint_frequency or end or Run.stop_signal:
            self.save()
        if Run.stop_signal:
            print(f"Stopped at step {step}. To go on:\n    {self.command} --resume")
            raise SystemExit(128 + Run.stop_signal)
        if end:
            print(f"Done: {self.dir}/model.pt. To watch it:\n    {self.command} --evaluate --capture-video")
        return not end

    def log(self, row: dict[str, float]) -> None:
        """Writes a row of metrics.jsonl, and sends it to W&B. NaN or infinity ends the run."""
        seconds = time.time() - self.started
        row = {"global_step": self.global_step, "time": round(seconds, 3)} | {k: float(v) for k, v in row.items()}
        if "charts/learning_rate" in row:
            row["charts/SPS"] = self.global_step / seconds  # since the run began, evaluations included
        if broken := [name for name, value in row.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"NaN or infinity at step {self.global_step} in {', '.join(broken)}")
        self.metrics.write(json.dumps(row).encode() + b"\n")
        self.metrics.flush()
        if self.wandb:
            with contextlib.suppress(Exception):  # W&B's troubles must not end the run
                self.wandb.log(row)
        if evaluation := [f"{name[5:]} {value:.4g}" for name, value in row.items() if name.startswith("eval/")]:
            tqdm.write(f"step {self.global_step:>10,}: {', '.join(evaluation)}")
        self.bar.update(self.global_step - self.bar.n)

    def save(self) -> None:
        """Writes checkpoint.pt, then model.pt. A kill at any moment leaves each whole, the old or the new one."""
        space, (_, keys, *rest) = self.action_space, np.random.get_state()
        kind = next(kind for kind in SPACES if isinstance(space, getattr(gym.spaces, kind)))  # or a subclass
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(math.isfinite(values.sum()) for values in state["model"].values()):
            raise FloatingPointError(f"NaN or infinity at step {self.global_step} in the parameters")
        values = {name: torch.as_tensor(getattr(space, name)) for name in SPACES[kind]}
        model = {"model": state["model"], "obs_shape": self.obs_shape, "action_space": (kind, str(space.dtype), values)}
        state |= {"step": self.global_step, "last_step": self.last_step, "seconds": time.time() - self.started}
        state |= {"bytes": self.metrics.tell(), "obs": torch.from_numpy(self.obs), "result": self.result}
        state["actions"] = [torch.from_numpy(np.array(actions)) for actions in self.actions]
        streams = random.getstate(), ("MT19937", keys.tolist(), *rest), torch.get_rng_state()
        state["streams"] = *streams, torch.cuda.get_rng_state_all() if "cuda" in self.device else []
        for name, content in {"checkpoint.pt": state, "model.pt": model}.items():
            torch.save(content, self.dir / f"{name}.tmp")
            os.replace(self.dir / f"{name}.tmp", self.dir / name)

    def close(self) -> None:
        self.opened.close()
        if self.last_step and isinstance(sys.exc_info()[1], Exception) and not Run.stop_signal:
            print(f"Fix the cause first: {self.command} --resume repeats the steps that led to it", file=sys.stderr)


def main() -> None:
    """Exit codes: 0 done, 2 a mistake of the user, 130 or 143 stopped by a signal, 1 everything else."""

    def stop(number: int, _: object) -> None:
        Run.stop_signal = number
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nStopping after this batch or evaluation; a second Ctrl-C goes back to the last checkpoint.\n")

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # each line at once, also into a file
    sys.path.insert(1, os.getcwd())  # for environments in modules of the current folder
    gym.logger.min_level = gym.logger.ERROR  # warnings of libraries would stand around our one line
    warnings.simplefilter("ignore")
    try:
        args = parse_args()
        if args.evaluate:
            film = Path(args.run_dir, "videos", f"evaluation-{datetime.now():%Y%m%d-%H%M%S-%f}")
            result = evaluate(load(args.run_dir), args, film)
            if Run.stop_signal:
                sys.exit(128 + Run.stop_signal)
            print(*(f"{name} {value:.4g}," for name, value in result.items()), args.eval_episodes, "episodes")
            print(*(f"{path}\n" for path in film.parent.glob(f"{film.name}*.mp4")), sep="", end="")
        else:
            train(args)
    except (UsageError, FloatingPointError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
