"""REINFORCE: play whole episodes, then make each action more likely in proportion to the return that followed it.

The gradient of the expected return J is an average over the policy's own episodes. So a batch of episodes estimates
it, without a model of the environment, but with much noise. A baseline is a number that does not depend on the action.
Subtracted from the return, it changes nothing on average, and can take noise away. losses/gradient_variance_* measures
in each batch how much noise is left with each of three baselines, whichever of them is used.

    [1] G_t    = r_t + gamma G_{t+1}                                                  S&B, Eq. 3.9 (R_{t+1} is r_t here)
    [2] grad J = E[sum_t (G_t - b_t) grad log pi(a_t|s_t)]                            S&B, cf. Eq. 13.11
    [3] b_t    = 0, or the mean of the other episodes' G_t at the same t, or V(s_t)   --baseline none, mean, value
    [4] L      = E[(V(s_t) - G_t)^2], the loss of V, a network that predicts G_t      S&B, Section 13.4
    [5] var    = trace of the covariance of the K episodes' estimates of [2], over K: that of their mean, if independent

Papers: Williams 1992, doi:10.1007/BF00992696. S&B: Sutton & Barto 2018, incompleteideas.net/book/the-book-2nd.html.

Differs from S&B:
- The factor gamma^t of the t-th term of [2] is left out, as everywhere today: [2] is exact for gamma = 1 only.
- Batches of short episodes have a larger K, so each counts less there: a bias of order 1 / K towards long episodes.
- The optimizer is Adam, and the policy's learning rate falls to 0. V is fitted in several passes over a batch.
- For V and --baseline value, a time limit is not a terminal state: V of the last observation stands for the rest of
  the episode. With none and mean G_t ends there: where limits cut, [5] compares estimates of different gradients.

    python algorithms/reinforce.py --env-id CartPole-v1
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
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from tqdm import tqdm


@dataclass
class Args:
    # Run
    env_id: str = "CartPole-v1"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # seed of environments, networks and sampling
    total_timesteps: int = 200_000  # environment steps
    device: str = "auto"  # cpu, cuda, cuda:N or mps; auto: cpu
    threads: int | None = None  # CPU threads of PyTorch; None: 1; for layers of 256 try 2
    checkpoint_frequency: int | None = None  # steps between checkpoints; None: a tenth of the run
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # go on with the run in --run-dir; a larger --total-timesteps makes it longer
    # Evaluation
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    eval_episodes: int = 20  # episodes of an evaluation
    eval_max_steps: int = 27_000  # steps after which an episode of an evaluation is cut: Atari's half an hour
    capture_video: bool = False  # film the first episode of each evaluation
    evaluate: bool = False  # only evaluate the model in --run-dir
    # Algorithm
    num_steps: int = 1024  # a batch: all episodes begun within so many steps, played to their ends; none may be endless
    learning_rate: float = 5e-3  # of the policy's Adam
    anneal_lr: bool = True  # let the policy's learning rate fall linearly to 0
    value_learning_rate: float = 1e-2  # of the value network's Adam
    value_epochs: int = 5  # its passes over a batch; the policy makes one step
    gamma: float = 0.99  # discount
    baseline: Literal["none", "mean", "value"] = "value"  # [3]

    num_envs = 1  # no flag: several would have to wait for the one with the longest episode

    def __post_init__(self) -> None:
        check_ranges(self)


def orthogonal(layer: nn.Module, gain: float = math.sqrt(2)) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(obs_dim: int, num_outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(
        orthogonal(nn.Linear(obs_dim, 64)), nn.Tanh(),
        orthogonal(nn.Linear(64, 64)), nn.Tanh(),
        orthogonal(nn.Linear(64, num_outputs), gain),
    )  # fmt: skip


class PolicyAndValue(nn.Module):
    """Two networks that share nothing: the policy, a distribution over actions, and V, which only learning needs."""

    def __init__(self, obs_shape: tuple[int, ...], space: gym.Space):  # space: of the actions
        super().__init__()
        self.obs_shape, self.action_space, self.discrete = obs_shape, space, isinstance(space, gym.spaces.Discrete)
        num_outputs = int(space.n) if self.discrete else space.low.size
        # The gain of 0.01 makes all actions about equally likely at first, or their means about 0, in every state
        self.actor, self.critic = mlp(*obs_shape, num_outputs, gain=0.01), mlp(*obs_shape, 1, gain=1.0)
        if not self.discrete:  # D independent normals, with standard deviations that do not depend on the observation
            self.actor.log_std = nn.Parameter(torch.zeros(num_outputs))  # of the actor, whose optimizer learns it
            bounded = (abs(space.low) < 1e6) & (abs(space.high) < 1e6)  # other dimensions are not rescaled
            middle = np.clip(0, space.low, space.high)
            low, high = np.where(bounded, space.low, middle - 1), np.where(bounded, space.high, middle + 1)
            self.center, self.scale = (high + low) / 2, (high - low) / 2

    def policy(self, obs: Tensor) -> Distribution:  # (B, obs_dim) -> over (B,) or (B, D) actions
        outputs = self.actor(obs)
        if self.discrete:
            return Categorical(logits=outputs, validate_args=False)
        # Independent sums log_prob and entropy over the D dimensions
        return Independent(Normal(outputs, self.actor.log_std.exp(), validate_args=False), 1, validate_args=False)

    def to_env(self, actions: Tensor) -> np.ndarray:  # (B,) or (B, D) -> (B, *action shape)
        space, actions = self.action_space, actions.cpu().numpy().reshape(-1, *self.action_space.shape)
        if self.discrete:
            return (actions + space.start).astype(space.dtype)  # the network counts from 0
        # The policy sees the box as [-1, 1]. A sample beyond it is clipped here; its log_prob stays as it is
        return np.clip(self.center + self.scale * actions, space.low, space.high).astype(space.dtype)

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The most likely action for an observation, (*obs_shape,), or for each of a batch, (B, *obs_shape)."""
        obs = torch.as_tensor(np.asarray(obs), dtype=torch.float32, device=next(self.parameters()).device)
        batch = obs if obs.ndim > len(self.obs_shape) else obs[None]
        actions = self.to_env(self.policy(batch).mode)
        return actions if batch is obs else actions[0]


@dataclass
class Episode:  # T steps, from a reset to the end
    observations: Tensor  # (T + 1, obs_dim): no action follows the last one
    actions: Tensor  # (T,) or (T, D)
    rewards: list[float]
    terminated: bool  # if not, it was truncated


class Batch(list):
    """The steps since the last update: obs, action, reward, next_obs, terminated, ended, (1, ...) each."""

    def state_dict(self) -> dict:  # for a checkpoint within a batch
        return {"steps": [torch.from_numpy(np.concatenate(part)) for part in zip(*self, strict=True)]}

    def load_state_dict(self, state: dict) -> None:
        self[:] = zip(*(part.numpy()[:, None] for part in state["steps"]), strict=True)  # rows (1, ...), as train adds

    def episodes(self, device: str) -> list[Episode]:
        obs, actions, rewards, next_obs, terminated, ended = (part.to(device) for part in self.state_dict()["steps"])
        episodes, start = [], 0
        for end in (ended.nonzero().flatten() + 1).tolist():
            steps, last = slice(start, end), slice(end - 1, end)
            observations = torch.cat([obs[steps], next_obs[last]])
            episodes.append(Episode(observations, actions[steps], rewards[steps].tolist(), terminated[last].item()))
            start = end
        return episodes


def reward_to_go(rewards: list[float], last_value: float, gamma: float) -> Tensor:
    """G_t of an episode's T steps, (T,). last_value: what its last observation is worth."""
    returns, following = np.empty(len(rewards), np.float32), last_value
    for t in reversed(range(len(rewards))):
        returns[t] = following = rewards[t] + gamma * following  # [1]
    return torch.from_numpy(returns)


def subtract_baselines(episodes: list[Episode], values: list[Tensor], gamma: float) -> list[dict[str, Tensor]]:
    """G_t - b_t, (T,), of each episode under each of the three baselines. values: V of its T + 1 observations."""
    returns = [reward_to_go(episode.rewards, 0.0, gamma).to(values[0]) for episode in episodes]
    sums = nn.utils.rnn.pad_sequence(returns).sum(1)  # (longest T,): after its end an episode earns 0
    advantages = []
    for episode, g, value in zip(episodes, returns, values, strict=True):  # g: G_t
        # Of the other episodes: a baseline must not depend on the action, and the episode's own return does
        mean = (sums[: len(g)] - g) / max(len(episodes) - 1, 1)  # 0 for a lone episode
        bootstrapped = reward_to_go(episode.rewards, 0.0 if episode.terminated else value[-1].item(), gamma).to(value)
        # r_t + gamma V(s_{t+1}) in the place of G_t would make it the one-step actor-critic, S&B, Section 13.5
        advantages.append({"none": g, "mean": g - mean, "value": bootstrapped - value[:-1]})  # [3]
    return advantages


def objective(log_prob: Tensor, advantages: Tensor, num_episodes: int) -> Tensor:
    """Its gradient is the estimate of [2] from so many episodes; log_prob and advantages: of all their steps, (B,)."""
    assert log_prob.shape == advantages.shape
    return (log_prob * advantages).sum() / num_episodes  # [2]


def gradient_variances(agent: PolicyAndValue, episodes: list[Episode], advantages: list[dict]) -> dict[str, float]:
    """[5] under each baseline. mean's estimates share returns: for it, [5] is too small, by order |grad J|^2 / K^2."""
    estimates = {name: [] for name in advantages[0]}
    for episode, by_baseline in zip(episodes, advantages, strict=True):
        log_prob = agent.policy(episode.observations[:-1]).log_prob(episode.actions)  # (T,)
        for name, advantage in by_baseline.items():
            surrogate = objective(log_prob, advantage, num_episodes=1)
            gradients = torch.autograd.grad(surrogate, list(agent.actor.parameters()), retain_graph=True)
            estimates[name].append(torch.cat([gradient.flatten() for gradient in gradients]))
    return {name: (torch.stack(rows).var(0).sum() / len(rows)).item() for name, rows in estimates.items()}  # [5]


def update(
    agent: PolicyAndValue, optimizer: torch.optim.Optimizer, value_optimizer: torch.optim.Optimizer,
    episodes: list[Episode], args: Args,
) -> dict[str, float]:  # fmt: skip
    """One step of the policy, then value_epochs passes of the value network, over K episodes. Returns what to log."""
    with torch.no_grad():  # before V learns from this batch: a baseline that had seen it would depend on the actions
        values = [agent.critic(episode.observations).squeeze(-1) for episode in episodes]  # (T + 1,) each
    advantages = subtract_baselines(episodes, values, args.gamma)
    variances = gradient_variances(agent, episodes, advantages) if len(episodes) > 1 else {}

    obs = torch.cat([episode.observations[:-1] for episode in episodes])  # (B, obs_dim): the steps of all episodes
    policy = agent.policy(obs)
    log_prob = policy.log_prob(torch.cat([episode.actions for episode in episodes]))  # (B,)
    advantage = torch.cat([by_baseline[args.baseline] for by_baseline in advantages])  # (B,)
    optimizer.zero_grad()
    (-objective(log_prob, advantage, len(episodes))).backward()  # minus: optimizers minimise
    optimizer.step()

    old_values = torch.cat([value[:-1] for value in values])  # (B,)
    value_targets = torch.cat([by_baseline["value"] for by_baseline in advantages]) + old_values  # (B,): their G_t
    value_losses = []
    for _ in range(args.value_epochs):
        for rows in torch.randperm(len(obs), device=obs.device).split(256):  # 256: fixed, no flag
            value_loss = (agent.critic(obs[rows]).squeeze(-1) - value_targets[rows]).square().mean()  # [4]
            value_optimizer.zero_grad()
            value_loss.backward()
            value_optimizer.step()
            value_losses.append(value_loss.item())
    explained_variance = 1 - (value_targets - old_values).var(correction=0) / (value_targets.var(correction=0) + 1e-8)
    metrics = {"losses/entropy": policy.entropy().mean().item(), "losses/value_loss": np.mean(value_losses)}
    metrics["losses/explained_variance"] = explained_variance.item()  # 1: V predicts G_t; 0: no better than a constant
    return metrics | {f"losses/gradient_variance_{name}": variance for name, variance in variances.items()}


def make_agent(args: Args, obs_shape: tuple[int, ...], action_space: gym.Space) -> PolicyAndValue:
    floats = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    if not floats and not isinstance(action_space, gym.spaces.Discrete):
        raise UsageError(f"--env-id {args.env_id} acts in {action_space}: not Discrete or Box of floats; see ppo.py")
    return PolicyAndValue(obs_shape, action_space)


def train(args: Args) -> dict[str, float]:
    """Trains an agent, returns its last evaluation. run.step acts; run.goes_on evaluates and saves; run.log writes."""
    with contextlib.closing(Run(args)) as run:  # closes the environments, also after an error
        agent, batch = make_agent(args, run.obs_shape, run.action_space).to(run.device), Batch()
        optimizer = torch.optim.Adam(agent.actor.parameters(), args.learning_rate, fused=True)
        value_optimizer = torch.optim.Adam(agent.critic.parameters(), args.value_learning_rate, fused=True)
        run.start(model=agent, optimizer=optimizer, value_optimizer=value_optimizer, batch=batch)  # for checkpoints
        if batch and not run.actions[0]:  # --resume could not replay the episode in progress: so it ended
            batch[-1][-1][:] = True  # ended, of the last step
        while run.goes_on():  # False at the end
            # 1. Act: all episodes that begin within num_steps steps, however long they last. If only those that end
            #    within so many steps counted, the rest would be wasted, and longer episodes would never be learned from
            obs = run.obs  # (1, obs_dim)
            with torch.inference_mode():
                action = agent.policy(torch.from_numpy(obs).to(run.device)).sample()
            next_obs, reward, terminated, truncated, _ = run.step(agent.to_env(action))
            ended = terminated | truncated
            batch.append((obs, action.cpu().numpy(), reward.astype(np.float32), next_obs, terminated, ended))
            if not ended or len(batch) < args.num_steps:
                continue

            # 2. Learn
            if args.anneal_lr:  # to 0 at the end of the run; a batch that is not full by then is not learned from
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - run.global_step / args.total_timesteps)
            metrics = update(agent, optimizer, value_optimizer, batch.episodes(run.device), args)
            batch.clear()
            metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            run.log(metrics)
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
        while playing and not Run.stop_signal:
            for i, action in zip(list(playing), agent.act(np.stack([*playing.values()])), strict=True):
                playing[i], reward, terminated, truncated, _ = envs[i].step(action)
                returns[i : i + 1] += reward  # some environments return an array of one element
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
