"""Twin delayed deep deterministic policy gradient (TD3): an actor, and two critics that judge its actions.

The critics learn Q(s, a): the return to expect after action a in state s. The actor, the policy mu(s), follows the
gradient of Q with respect to its action, so that Q becomes larger. This is DDPG. It fails where Q is overestimated:
the actor goes there, and the error spreads to the values of earlier states. TD3 adds three ideas against this.

    [1] clipped double Q: y = r + gamma min_i Q'_i(s', a'), or y = r where s' is terminal               TD3, Section 4.2
    [2] delayed policy: the actor and all targets move in every d-th gradient step only                 TD3, Section 5.2
    [3] target smoothing: a' = mu'(s') + epsilon  with  epsilon ~ clip(N(0, sigma^2), -c, c)            TD3, Section 5.3
    [4] critics: minimise sum_i E[(Q_i(s, a) - y)^2]                                                    TD3, Algorithm 1
    [5] actor:   maximise E[Q_1(s, mu(s))]                                                              TD3, Algorithm 1
    [6] targets: theta' <- tau theta + (1 - tau) theta'                                                 TD3, Algorithm 1

[1] to [3] are the three ideas. y is the critics' target, gamma the discount. A prime marks the next step, or a target
network: a slow copy of a network, with weights theta'.

Paper: Fujimoto, van Hoof & Meger 2018, arXiv:1802.09477, where mu is called pi.
DDPG's rules (Lillicrap et al., arXiv:1509.02971): --num-critics 1 --policy-frequency 1 --policy-noise 0 --tau 0.001

Differs from the paper:
- As in the authors' present code: two hidden layers of 256 units, not of 400 and 300; batches of 256, not of 100;
  sigma, c and --exploration-noise are in units of half the range of an action; a' of [3] is clipped to the range.
- tau is 0.01, not 0.005. As in the authors' code, a time limit is not a terminal state: the value of the last
  observation stands for the rest of the episode.
- Random actions for a tenth of the run, at most 10,000 steps (paper: 1,000 or 10,000); learning starts after them.

    python algorithms/td3.py --env-id HalfCheetah-v5
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2", "mujoco>=3.11,<3.12",
#     "numpy>=2", "opencv-python-headless>=4.10", "torch>=2.13", "tqdm>=4.66", "tyro>=1", "wandb>=0.31",
# ]
# ///

import contextlib
import copy
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
from tqdm import tqdm


@dataclass
class Args:
    # Run
    env_id: str = "HalfCheetah-v5"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # seed of environments, networks and sampling
    total_timesteps: int = 100_000  # environment steps, summed over all environments
    num_envs: int = 1  # environments stepped together
    device: str = "auto"  # cpu, cuda, cuda:N or mps; auto: cpu
    threads: int | None = None  # CPU threads of PyTorch; None: 1; for layers of 256 try 2
    checkpoint_frequency: int | None = None  # steps between checkpoints; None: a tenth of the run
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # go on with the run in --run-dir; a larger --total-timesteps makes it longer
    # Evaluation
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    eval_episodes: int = 10  # episodes of an evaluation
    eval_max_steps: int = 27_000  # steps after which an episode of an evaluation is cut: Atari's half an hour
    capture_video: bool = False  # film the first episode of each evaluation
    evaluate: bool = False  # only evaluate the model in --run-dir
    # Algorithm
    policy_lr: float = 1e-3  # learning rate of the actor
    q_lr: float = 1e-3  # learning rate of the critics
    gamma: float = 0.99  # discount
    tau: float = 0.01  # [6] share of the new weights in an update of the targets; paper: 0.005
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 256  # transitions in a gradient step; paper: 100
    learning_starts: int | None = None  # steps of uniform random actions, without learning; None: min(run / 10, 10,000)
    utd: float = 1.0  # gradient steps per environment step: the update-to-data ratio
    num_critics: int = 2  # [1] number of critics
    policy_frequency: int = 2  # [2] d: the actor and all targets move in every d-th gradient step
    policy_noise: float = 0.2  # [3] sigma, for actions in [-1, 1]
    noise_clip: float = 0.5  # [3] c, for actions in [-1, 1]
    exploration_noise: float = 0.1  # standard deviation of the noise in training, for actions in [-1, 1]

    def __post_init__(self) -> None:
        check_ranges(self, tau=(0, 1), learning_starts=(0, math.inf), buffer_size=(self.num_envs, math.inf))
        if self.learning_starts is None:
            self.learning_starts = min(self.total_timesteps // 10, 10_000)


def network(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, out_dim))


class TD3(nn.Module):
    """The networks. They see actions in [-1, 1]; to_env maps these to the environment's Box, from low to high."""

    def __init__(self, args: Args, obs_shape: tuple[int, ...], space: gym.spaces.Box):  # space: of the actions
        super().__init__()
        self.obs_shape, self.action_space = obs_shape, space
        self.center, self.scale = (space.high + space.low) / 2, (space.high - space.low) / 2
        obs_dim, action_dim = obs_shape[0], space.low.size
        self.actor = nn.Sequential(network(obs_dim, action_dim), nn.Tanh())
        self.critics = nn.ModuleList([network(obs_dim + action_dim, 1) for _ in range(args.num_critics)])
        self.target_actor, self.target_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)

    def to_env(self, actions: Tensor) -> np.ndarray:  # (..., action_dim) -> (..., *action shape)
        space, actions, batch_shape = self.action_space, actions.cpu().numpy(), actions.shape[:-1]
        actions = self.center + self.scale * actions.reshape((*batch_shape, *space.shape))
        return np.clip(actions, space.low, space.high).astype(space.dtype)  # rounding can lead beyond the bounds

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The action without noise for an observation, (obs_dim,), or for each of a batch, (B, obs_dim)."""
        obs = torch.as_tensor(np.asarray(obs), dtype=torch.float32, device=next(self.parameters()).device)
        return self.to_env(self.actor(obs))


def q_values(critics: nn.ModuleList, obs: Tensor, actions: Tensor) -> Tensor:
    """Q_i(s, a) of each of n critics. (B, obs_dim), (B, action_dim) -> (n, B)"""
    inputs = torch.cat([obs, actions], -1)
    return torch.stack([critic(inputs).squeeze(-1) for critic in critics])


class ReplayBuffer:
    """The last transitions. A row holds a step of each of N environments; a new row takes the place of the oldest."""

    def __init__(self, buffer_size: int, num_envs: int, obs_dim: int, action_dim: int):
        needed = 4e-9 * buffer_size * (2 * obs_dim + action_dim + 2)  # GB: a float32 has four bytes
        memory = 1e-9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        if needed > 0.9 * memory:
            raise UsageError(f"--buffer-size {buffer_size} needs {needed:.1f} GB; this machine has {memory:.1f} GB")
        self.num_envs, self.size, self.added = num_envs, buffer_size // num_envs, 0  # size, added: in rows
        shapes = {"obs": (obs_dim,), "actions": (action_dim,), "rewards": (), "terminated": (), "next_obs": (obs_dim,)}
        self.arrays = {name: np.zeros((self.size, num_envs, *shape), np.float32) for name, shape in shapes.items()}

    def add(self, **new: np.ndarray) -> None:
        """A step of all environments: obs, actions, rewards, terminated and next_obs, (N, ...) each."""
        for name, rows in new.items():
            self.arrays[name][self.added % self.size] = rows
        self.added += 1

    def sample(self, batch_size: int) -> list[Tensor]:
        """obs, actions, rewards, terminated, next_obs: (B, obs_dim), (B, action_dim), (B,), (B,), (B, obs_dim)"""
        rows = torch.randint(min(self.added, self.size), (batch_size,)).numpy()
        envs = torch.randint(self.num_envs, (batch_size,)).numpy()
        return [torch.from_numpy(array[rows, envs]) for array in self.arrays.values()]

    def state_dict(self) -> dict:
        filled = {name: torch.from_numpy(array[: self.added]) for name, array in self.arrays.items()}
        return filled | {"added": self.added}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for name, array in self.arrays.items():
            array[: self.added] = state[name].numpy()


def td_target(rewards: Tensor, terminated: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """The target y, one for all critics, (B,). rewards, terminated: (B,); next_values: by each target critic, (n, B)"""
    assert rewards.shape == terminated.shape == next_values.shape[1:]
    return rewards + gamma * (1 - terminated) * next_values.amin(0)  # [1]; a terminal state is worth nothing


def smooth(actions: Tensor, policy_noise: float, noise_clip: float) -> Tensor:
    """The actions with clipped noise, still in [-1, 1]. (B, action_dim) -> (B, action_dim)"""
    noise = (policy_noise * torch.randn_like(actions)).clamp(-noise_clip, noise_clip)
    return (actions + noise).clamp(-1, 1)  # [3], and no action beyond the box


@torch.no_grad()
def soft_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    for theta_target, theta in zip(target.parameters(), online.parameters(), strict=True):
        theta_target.lerp_(theta, tau)  # [6]: the share tau of the way from theta' to theta


def update(agent: TD3, optimizers: dict, batch: list[Tensor], number: int, args: Args) -> dict[str, Tensor]:
    """A gradient step with a batch of the buffer; its number starts at 1. Returns metrics to log."""
    obs, actions, rewards, terminated, next_obs = batch
    with torch.no_grad():
        next_actions = smooth(agent.target_actor(next_obs), args.policy_noise, args.noise_clip)  # [3]
        next_values = q_values(agent.target_critics, next_obs, next_actions)  # (n, B)
        targets = td_target(rewards, terminated, next_values, args.gamma)  # [1]
    values = q_values(agent.critics, obs, actions)  # (n, B)
    critic_losses = (values - targets).square().mean(-1)  # [4]; (n, B) - (B,) -> (n,)
    optimizers["critic_optimizer"].zero_grad()
    critic_losses.sum().backward()
    optimizers["critic_optimizer"].step()
    metrics = {f"losses/qf{i}_loss": loss for i, loss in enumerate(critic_losses.detach(), 1)}
    metrics["losses/q_values"] = values.detach().mean()

    if number % args.policy_frequency == 0:  # [2]
        actor_loss = -q_values(agent.critics[:1], obs, agent.actor(obs)).mean()  # [5]; minus: it is minimised
        optimizers["actor_optimizer"].zero_grad()
        actor_loss.backward(inputs=list(agent.actor.parameters()))  # computes no gradient of the critics' weights
        optimizers["actor_optimizer"].step()
        soft_update(agent.target_actor, agent.actor, args.tau)
        soft_update(agent.target_critics, agent.critics, args.tau)
        metrics["losses/actor_loss"] = actor_loss.detach()
    return metrics


def make_agent(args: Args, obs_shape: tuple[int, ...], action_space: gym.Space) -> TD3:
    floats = isinstance(action_space, gym.spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    if not floats or np.abs([action_space.low, action_space.high]).max() >= 1e6:
        raise UsageError(f"--env-id {args.env_id} acts in {action_space}, no Box of floats below 1e6: see ppo.py")
    return TD3(args, obs_shape, action_space)


def train(args: Args) -> dict[str, float]:
    """Trains an agent, returns its last evaluation. run.step acts; run.goes_on evaluates and saves; run.log writes."""
    with contextlib.closing(Run(args)) as run:  # closes the environments, also after an error
        agent = make_agent(args, run.obs_shape, run.action_space).to(run.device)
        optimizers = {
            "actor_optimizer": torch.optim.Adam(agent.actor.parameters(), args.policy_lr, fused=True),
            "critic_optimizer": torch.optim.Adam(agent.critics.parameters(), args.q_lr, fused=True),
        }
        action_dim, buffer_size = run.action_space.low.size, min(args.buffer_size, args.total_timesteps)
        buffer = ReplayBuffer(buffer_size, args.num_envs, *run.obs_shape, action_dim)
        run.start(model=agent, buffer=buffer, **optimizers)  # what a checkpoint holds
        while run.goes_on():  # False at the end
            # 1. Act: one step in each of N environments
            obs, first_step = run.obs, run.global_step  # before run.step, which changes both
            with torch.no_grad():
                if first_step < args.learning_starts:
                    actions = torch.empty(args.num_envs, action_dim).uniform_(-1, 1)
                else:
                    actions = agent.actor(torch.from_numpy(obs).to(run.device))
                    actions = (actions + args.exploration_noise * torch.randn_like(actions)).clamp(-1, 1)
            next_obs, rewards, terminated, _, _ = run.step(agent.to_env(actions))  # [1] ignores time limits (truncated)
            buffer.add(obs=obs, actions=actions.cpu(), rewards=rewards, terminated=terminated, next_obs=next_obs)

            # 2. Learn: utd gradient steps for each of the N environment steps of this pass
            made = int(args.utd * max(0, first_step - args.learning_starts))  # gradient steps so far
            due = int(args.utd * max(0, run.global_step - args.learning_starts))
            for number in range(made + 1, due + 1):
                batch = [part.to(run.device) for part in buffer.sample(args.batch_size)]
                metrics = update(agent, optimizers, batch, number, args)
                if number % (50 * args.policy_frequency) == 0:  # 3. Log every 50th step of the actor
                    run.log(metrics | {"charts/learning_rate": args.policy_lr})
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
