"""REINFORCE: play whole episodes, then make each action more likely in proportion to the return that followed it.

The gradient of the expected return is itself an expectation over the policy's own episodes. So an average over episodes
estimates it, with no model, and with no bias but for the simplifications below, though with much noise. A baseline, a
number that does not depend on the action, is subtracted from the return: it leaves the expectation as it is and takes
noise away. How much it takes is measured in every batch, under three baselines at once (losses/gradient_variance_...),
whichever --baseline learns with.

    [1] G_t    = r_t + gamma G_{t+1}                                                  S&B, Eq. 3.9 (R_{t+1} is r_t here)
    [2] grad J = E[sum_t (G_t - b_t) grad log pi(a_t|s_t)]                            Williams, Th. 2; S&B, Eq. 13.11
    [3] b_t    = 0, or the mean of the other episodes' G_t at the same t, or V(s_t)   --baseline none, mean, value
    [4] L      = E[(V(s_t) - G_t)^2]                                                  S&B, Section 13.4
    [5] var    = trace of the covariance of the K episodes' estimates of [2], divided by K: that of their mean

Here gamma is the discount. Williams 1992, doi:10.1007/BF00992696, for one reward at the end. S&B: Sutton & Barto 2018,
incompleteideas.net/book/the-book-2nd.html. What else can stand in the place of G_t - b_t, up to the advantage estimator
of ppo.py: Schulman et al. 2016, arXiv:1506.02438.

Differs from S&B: gamma^t, which would multiply the t-th term of [2], is left out, as everywhere today; a batch holds
several episodes; the optimizer is Adam, the policy's rate annealed; V is fitted in several passes over a batch, not in
a step for each t. The mean over a batch's K episodes has a bias of the order of 1 / K, because K depends on how long
they last. With --baseline value, and for V itself always, a time limit does not count as a terminal state: V of the
last observation stands for the rest of the episode. With none and mean, nothing can stand for it, and G_t ends there.
The last batch, which the end of the run cuts off, is not learned from. Evaluation takes the most likely actions.

Box actions are rescaled to [-1, 1], where the policy is Gaussian. The environment gets the sample clipped to its box;
the log-probability is that of the unclipped sample.

    python algorithms/reinforce.py --env-id CartPole-v1
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "filelock>=3.20", "gymnasium[atari,box2d,classic-control,mujoco,toy-text]>=1.4,<2", "moviepy>=2.2",
#     "mujoco>=3.11,<3.12", "numpy>=2", "opencv-python-headless>=4.10", "torch>=2.13", "tqdm>=4.66", "tyro>=1",
#     "wandb>=0.31",
# ]
# ///

import json
import math
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import filelock
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # a Gymnasium environment, or module:id if a module registers it
    seed: int = 1  # all randomness follows from it
    total_timesteps: int = 200_000  # environment steps, summed over all environments
    num_envs: int = 8  # environments stepped together
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    eval_episodes: int = 20  # episodes of an evaluation
    checkpoint_frequency: int | None = None  # steps between checkpoints; None: a tenth of the run
    capture_video: bool = False  # film the first episode of each evaluation
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # continue the run in --run-dir with its own arguments
    evaluate: bool = False  # only evaluate the model in --run-dir

    num_steps: int = 128  # a batch: the episodes that each environment begins in so many steps, played to their ends
    learning_rate: float = 5e-3  # of the policy's Adam
    anneal_lr: bool = True  # anneal it linearly to 0
    value_learning_rate: float = 1e-2  # of the value network's Adam
    value_epochs: int = 5  # its passes over a batch; the policy makes one step
    gamma: float = 0.99  # discount
    baseline: Literal["none", "mean", "value"] = "value"  # [3]

    def __post_init__(self) -> None:
        check_and_complete(self)


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

    def __init__(self, obs_dim: int, space: gym.spaces.Discrete | gym.spaces.Box):
        super().__init__()
        self.space, self.discrete = space, isinstance(space, gym.spaces.Discrete)
        num_outputs = int(space.n) if self.discrete else int(np.prod(space.shape))
        self.actor = mlp(obs_dim, num_outputs, gain=0.01)  # 0.01: at first all actions are alike
        self.critic = mlp(obs_dim, 1, gain=1.0)
        if not self.discrete:
            self.actor.log_std = nn.Parameter(torch.zeros(num_outputs))  # in the actor, so that its optimizer has it
            bounded = np.isfinite(space.low) & np.isfinite(space.high)  # a component without bounds is not rescaled
            low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
            self.center, self.scale = (high + low) / 2, (high - low) / 2

    def policy(self, obs: Tensor) -> Distribution:  # (B, obs_dim) -> over (B,) or (B, D) actions
        outputs = self.actor(obs)
        if self.discrete:
            return Categorical(logits=outputs, validate_args=False)
        return Independent(Normal(outputs, self.actor.log_std.exp(), validate_args=False), 1, validate_args=False)

    def value(self, obs: Tensor) -> Tensor:  # (B, obs_dim) -> (B,)
        return self.critic(obs).squeeze(-1)

    def to_env(self, actions: Tensor) -> np.ndarray:  # (B,) or (B, D) -> (B, *action shape)
        actions = actions.cpu().numpy()
        if self.discrete:
            return actions + self.space.start  # the environment counts from start, the network from 0
        actions = self.center + self.scale * actions.reshape(-1, *self.space.shape)
        return np.clip(actions, self.space.low, self.space.high)

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The most likely actions: deterministic, for evaluation. (B, obs_dim) -> (B, *action shape)"""
        return self.to_env(self.policy(torch.from_numpy(obs).to(next(self.parameters()).device)).mode)


BASELINES = ("none", "mean", "value")


@dataclass
class Episode:
    """T steps, from a reset to the end."""

    observations: list[np.ndarray]  # T + 1 of them: no action follows the last
    actions: list[Tensor]
    rewards: list[float]
    terminated: bool = False  # if not, it was truncated


def reward_to_go(rewards: list[float], last_value: float, gamma: float) -> Tensor:
    """The reward-to-go G_t of an episode's T steps, (T,). last_value: what its last observation is worth."""
    returns, following = np.empty(len(rewards), np.float32), last_value
    for t in reversed(range(len(rewards))):
        returns[t] = following = rewards[t] + gamma * following  # [1]
    return torch.from_numpy(returns)


def subtract_baselines(episodes: list[Episode], values: list[Tensor], gamma: float) -> list[Tensor]:
    """G_t - b_t under each of the three baselines: (3, T) for each episode. values: V of its T + 1 observations.

    Where V is the baseline, and only there, V of a truncated episode's last observation stands for what is missing.
    """
    returns = [reward_to_go(episode.rewards, 0.0, gamma) for episode in episodes]
    padded = nn.utils.rnn.pad_sequence(returns, batch_first=True)  # (K, longest T): after its end an episode earns 0
    means = (padded.sum(0) - padded) / max(len(episodes) - 1, 1)  # of the others: its own return depends on the actions
    advantages = []  # of each episode (3, T), in the order of BASELINES
    for episode, plain, mean, value in zip(episodes, returns, means, values, strict=True):
        bootstrapped = reward_to_go(episode.rewards, 0.0 if episode.terminated else value[-1].item(), gamma)
        # r_t + gamma V(s_{t+1}) in the place of G_t would make it the one-step actor-critic, S&B, Section 13.5
        advantages.append(torch.stack([plain, plain - mean[: len(plain)], bootstrapped - value[:-1]]))  # [3]
    return advantages


def policy_gradient(log_prob: Tensor, advantages: Tensor, parameters: list[Tensor]) -> Tensor:
    """One episode's estimates of the gradient, [2]. log_prob (T,), advantages (3, T) -> (3, number of parameters)"""
    assert log_prob.shape == advantages.shape[1:]
    # [2] for each baseline b: the sum over t of advantages[b, t] * grad log_prob[t], as three calls of backward would
    gradients = torch.autograd.grad(log_prob, parameters, advantages, is_grads_batched=True)
    return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)


def variance_of_mean(gradients: Tensor) -> Tensor:
    """For each baseline, as if the K episodes' estimates were independent. (K, 3, number of parameters) -> (3,)"""
    return gradients.var(0).sum(-1) / len(gradients)  # [5]


def update(
    agent: PolicyAndValue, optimizer: torch.optim.Optimizer, value_optimizer: torch.optim.Optimizer,
    episodes: list[Episode], args: Args,
) -> dict[str, float]:  # fmt: skip
    """One step of the policy, then value_epochs passes of the value network, over K episodes. Returns what to log."""
    observations = [torch.from_numpy(np.stack(episode.observations)).to(args.device) for episode in episodes]
    with torch.no_grad():  # before V learns from this batch: a baseline that had seen it would depend on the actions
        values = [agent.value(obs).cpu() for obs in observations]  # (T + 1,) each
    advantages = subtract_baselines(episodes, values, args.gamma)

    parameters, gradients, entropy = list(agent.actor.parameters()), [], 0.0
    for episode, obs, advantage in zip(episodes, observations, advantages, strict=True):
        policy = agent.policy(obs[:-1])
        log_prob = policy.log_prob(torch.stack(episode.actions))
        gradients.append(policy_gradient(log_prob, advantage.to(args.device), parameters))
        entropy += policy.entropy().mean().item() / len(episodes)
    gradients = torch.stack(gradients)  # (K, 3, number of parameters)
    gradient = gradients[:, BASELINES.index(args.baseline)].mean(0)  # [2], E
    # As backward() of the loss -(log_prob * advantage).sum() / K would leave it, but for the sign: Adam maximises
    for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    optimizer.step()

    obs = torch.cat([obs[:-1] for obs in observations])  # (B, obs_dim)
    values = torch.cat([value[:-1] for value in values]).to(args.device)  # (B,)
    # (B,), bootstrapped; 2 is the index of "value"
    returns = torch.cat([advantage[2] for advantage in advantages]).to(args.device) + values
    value_losses = []
    for _ in range(args.value_epochs):
        for rows in torch.randperm(len(obs), device=args.device).split(256):
            value_loss = (agent.value(obs[rows]) - returns[rows]).square().mean()  # [4]
            value_losses.append(value_loss.detach())
            value_optimizer.zero_grad()
            value_loss.backward()
            value_optimizer.step()
    explained_variance = 1 - (returns - values).var(correction=0).item() / (returns.var(correction=0).item() + 1e-8)
    metrics = {
        "losses/entropy": entropy,
        "losses/value_loss": torch.stack(value_losses).mean().item(),
        "losses/explained_variance": explained_variance,
    }
    if len(episodes) > 1:  # one estimate has no variance
        for name, variance in zip(BASELINES, variance_of_mean(gradients).tolist(), strict=True):
            metrics[f"losses/gradient_variance_{name}"] = variance
    return metrics


def make_agent(args: Args, env: gym.Env) -> PolicyAndValue:
    space, floats = env.action_space, np.issubdtype(env.action_space.dtype, np.floating)
    if not isinstance(space, gym.spaces.Discrete) and not (isinstance(space, gym.spaces.Box) and floats):
        refuse(f"--env-id {args.env_id} acts in {space}; reinforce.py knows Discrete and Box of floats: see ppo.py")
    if len(env.observation_space.shape) == 3:
        refuse(f"--env-id {args.env_id} observes images; reinforce.py knows vectors only: see ppo.py")
    return PolicyAndValue(*env.observation_space.shape, space)


def train(args: Args) -> None:
    env = make_env(args.env_id, film=args.capture_video)  # for its spaces, and to find out now if it can't be filmed
    args.device = choose_device(args.device, small=True)
    torch.manual_seed(args.seed)
    agent = make_agent(args, env).to(args.device)
    optimizer = torch.optim.Adam(agent.actor.parameters(), args.learning_rate, maximize=True, fused=True)
    value_optimizer = torch.optim.Adam(agent.critic.parameters(), args.value_learning_rate, fused=True)
    run = Run(args, args.env_id, model=agent, optimizer=optimizer, value_optimizer=value_optimizer)
    global_step = run.restore()  # 0 in a new run

    while True:
        # 1. Evaluate and save where it is due, and at the end
        if run.evaluation_is_due(global_step):
            run.log(global_step, evaluate(agent.act, args, f"step-{global_step}", run.stopped))
        if run.checkpoint_is_due(global_step):
            run.save(global_step)
        if global_step == args.total_timesteps:
            break

        # 2. At the start and after each checkpoint, make the environments anew and reseed, also in a run that nothing
        #    interrupts: then one that is killed, and resumed from a checkpoint, gives the same results
        if global_step == run.checkpoint_step:
            envs, obs = make_envs(args, global_step)
            current = [Episode([first], [], []) for first in obs]

        # 3. Act: an episode counts if it begins within num_steps steps of its environment, however long it lasts; if
        #    the episodes that end first counted instead, too many would be short. So each environment plays on to an
        #    end, then waits for the others: they are stepped one by one
        first_step, start_time = global_step, time.perf_counter()
        episodes, playing, steps = [], list(range(args.num_envs)), [0] * args.num_envs
        while playing and global_step < args.total_timesteps:
            latest = np.stack([current[i].observations[-1] for i in playing])
            with torch.inference_mode():
                actions = agent.policy(torch.from_numpy(latest).to(args.device)).sample()
            for i, action, env_action in zip(playing.copy(), actions, agent.to_env(actions), strict=True):
                if global_step == args.total_timesteps:
                    break
                episode = current[i]
                next_obs, reward, episode.terminated, truncated, _ = envs.envs[i].step(env_action)
                global_step += 1
                episode.observations.append(next_obs)
                episode.actions.append(action)
                episode.rewards.append(reward)
                if episode.terminated or truncated:
                    length = len(episode.rewards)
                    ended = {"charts/episodic_return": sum(episode.rewards), "charts/episodic_length": length}
                    run.log(global_step, ended)
                    episodes.append(episode)
                    current[i] = Episode([envs.envs[i].reset()[0]], [], [])
                    steps[i] += length
                    if steps[i] >= args.num_steps:
                        playing.remove(i)
        if playing:  # the run ends here; this batch, in which long episodes are missing, is not learned from
            continue

        # 4. Learn
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - first_step / args.total_timesteps)
        metrics = update(agent, optimizer, value_optimizer, episodes, args)

        # 5. Log
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = (global_step - first_step) / (time.perf_counter() - start_time)
        run.log(global_step, metrics)
    run.finish("Done. To watch it:", "--evaluate --capture-video")


# ---- Below this line every script is the same: command line, environments, evaluation, run folder ----


def refuse(message: object) -> NoReturn:
    """Ends the program for a user's mistake: one line that says what to do, and exit code 2."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def check_and_complete(args: Args, **ranges: tuple[float, float]) -> None:
    """Refuses numbers out of range, by default integers below 1, others below 0. Fills in frequencies that are None."""
    ranges = {"seed": (0, 2**63 - 1), "gamma": (0, 1)} | ranges
    for name, value in vars(args).items():
        low, high = ranges.get(name, (1 if type(value) is int else 0, math.inf))  # type(): a bool is no count
        if type(value) in (int, float) and not (math.isfinite(value) and low <= value <= high):
            refuse(f"--{name.replace('_', '-')} is {value}, which is not a number from {low} to {high}")
    num_envs = vars(args).get("num_envs", 1)
    if args.total_timesteps % num_envs:
        refuse(f"--total-timesteps {args.total_timesteps} must be a multiple of --num-envs {num_envs}")
    args.eval_frequency = args.eval_frequency or math.ceil(args.total_timesteps / 20)
    args.checkpoint_frequency = args.checkpoint_frequency or math.ceil(args.total_timesteps / 10)


def parse_args() -> Args:
    """The command line. With --resume or --evaluate, the arguments in the run's config.json are put in front of it."""
    args = tyro.cli(Args, description=__doc__)
    if not args.resume and not args.evaluate:
        return args
    if args.run_dir is None:
        refuse("--resume and --evaluate need --run-dir")
    path = Path(args.run_dir, "config.json")
    try:
        config = json.loads(path.read_text())
        script, saved = config["script"], dict(config["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"{path} is missing or damaged ({error!r})")
    if script != Path(__file__).stem:
        refuse(f"--run-dir {args.run_dir} holds a run of {script}.py")
    flags = [f"--{'no-' if value is False else ''}{name}" for name, value in saved.items() if isinstance(value, bool)]
    flags += [f"--{name}={value}" for name, value in saved.items() if not isinstance(value, bool)]
    merged = tyro.cli(Args, args=flags + sys.argv[1:])
    for name in saved.keys() - {"run_dir", "resume", "device"}:
        if args.resume and getattr(merged, name) != saved[name]:
            refuse(f"--resume goes on with the run's own arguments; leave out --{name.replace('_', '-')}")
    return merged


def choose_device(name: str, small: bool) -> str:
    """auto takes a GPU if there is one, but the CPU for small networks, which don't repay the transfers."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not small else "cpu"
    try:
        torch.zeros(1, device=name)
    except (AssertionError, RuntimeError) as error:
        refuse(f"--device {name} can't be used here; --device cpu can ({str(error).splitlines()[0]})")
    if small:
        torch.set_num_threads(1)  # small matrices: a second thread costs more than it gives
    return name


def make_env(env_id: str, film: bool = False) -> gym.Env:
    """One environment that observes images, (4, 84, 84) uint8, or vectors, (D,) float32."""
    if env_id.endswith("NoFrameskip-v4"):
        refuse(f"--env-id {env_id}: name the game ALE/Breakout-v5, ALE/Pong-v5 and so on; its frames are skipped here")
    atari = {"frameskip": 1} if env_id.startswith("ALE/") else {}  # AtariPreprocessing skips frames itself
    try:
        if atari:
            import ale_py  # registers the games

            ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        env = gym.make(env_id, render_mode="rgb_array" if film else None, **atari)
        if film:
            env.reset()
            if env.render() is None:
                raise ValueError("it gives no picture to film")
    except Exception as error:  # unknown, outdated, not installed, can't render here: its message says which
        refuse(f"--env-id {env_id}: {error}")
    space = env.observation_space
    if atari:
        return gym.wrappers.FrameStackObservation(gym.wrappers.AtariPreprocessing(env), 4)
    if space.dtype == np.uint8 and len(space.shape or ()) == 3 and space.shape[-1] == 3:
        env = gym.wrappers.ResizeObservation(gym.wrappers.GrayscaleObservation(env), (84, 84))
        return gym.wrappers.FrameStackObservation(env, 4)
    if not space.is_np_flattenable:
        refuse(f"--env-id {env_id} observes {space}, which can't be flattened into a vector")
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)  # Discrete: one-hot
    elif space.dtype == np.float32 and str(env.spec.entry_point).startswith("gymnasium."):
        return env
    # A copy: other environments say float32 and return float64 or lists, or one array that they keep overwriting
    vector = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
    return gym.wrappers.TransformObservation(env, lambda obs: np.array(obs, np.float32), vector)


def make_envs(args: Args, step: int) -> tuple[gym.vector.SyncVectorEnv, np.ndarray]:
    """New environments and their first observations, (N, *obs_shape). Reseeds everything random from (seed, step)."""
    seeds = np.random.SeedSequence(args.seed, spawn_key=(0, step))  # 0: training; evaluation has 1
    *env_seeds, seed = seeds.generate_state(args.num_envs + 1).tolist()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # SAME_STEP: the step that ends an episode returns the next one's first observation; its own last is in final_obs
    same_step = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([lambda: make_env(args.env_id)] * args.num_envs, autoreset_mode=same_step)
    return envs, envs.reset(seed=env_seeds)[0]


def evaluate(
    act: Callable[[np.ndarray], np.ndarray], args: Args, name: str, stopped: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Plays the same eval_episodes episodes every time, each in its own environment; films the first under this name.

    act: (B, *obs_shape) -> (B, *action shape). Ends early, with an empty result, once stopped() is true. The random
    streams of training stay as they are.
    """
    streams = random.getstate(), np.random.get_state()  # for environments that draw from these instead of their own
    seeds = np.random.SeedSequence(args.seed, spawn_key=(1,)).generate_state(args.eval_episodes).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[0])
    envs = [make_env(args.env_id, film=args.capture_video and i == 0) for i in range(args.eval_episodes)]
    if args.capture_video:
        film = {"name_prefix": name, "episode_trigger": lambda _: True, "video_length": 3000}  # frames wait in memory
        envs[0] = gym.wrappers.RecordVideo(envs[0], f"{args.run_dir}/videos", **film)
    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    returns, lengths = np.zeros((2, args.eval_episodes))
    playing = list(range(args.eval_episodes))
    while playing and not stopped():
        actions = act(np.stack([obs[i] for i in playing]))
        for i, action in zip(playing.copy(), actions, strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            lengths[i] += 1
            if terminated or truncated or lengths[i] == 27_000:  # Atari's limit, for environments without one
                envs[i].close()
                playing.remove(i)
    random.setstate(streams[0])
    np.random.set_state(streams[1])
    if playing:
        return {}
    result = {"eval/episodic_return": returns.mean(), "eval/return_std": returns.std()}
    return result | {"eval/episodic_length": lengths.mean()}


def evaluate_saved(args: Args) -> None:
    """Plays eval_episodes episodes with the model in run_dir and prints the result."""
    env = make_env(args.env_id)
    agent = make_agent(args, env).to(choose_device(args.device, small=len(env.observation_space.shape) == 1))
    load_file(Path(args.run_dir, MODEL), model=agent)
    result = evaluate(agent.act, args, "evaluation")
    print(*(f"{name} {value:.4g}" for name, value in result.items()), f"{args.eval_episodes} episodes", sep=", ")


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces the file atomically: a crash never leaves half of it."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind the latter
        temporary.unlink(missing_ok=True)
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


MODEL, CHECKPOINT = "model.pt", "checkpoint.pt"


def save_file(path: Path, state: dict) -> None:
    write_file(path, lambda file: torch.save(state, file))


def save_model(folder: Path, model: nn.Module) -> None:
    save_file(folder / MODEL, {"model": model.state_dict()})


def load_file(path: Path, **parts: nn.Module | torch.optim.Optimizer) -> dict:
    """Reads what save_file wrote, data and never code, into the parts of the same names."""
    if not path.exists():
        refuse(f"{path} is missing")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (PermissionError, MemoryError, torch.OutOfMemoryError):  # not the fault of what is in the file
        raise
    except Exception as error:  # a damaged file can raise anything
        refuse(f"{path} is damaged or of another script ({type(error).__name__})")
    return state


class Run:
    """A run's folder: config.json, metrics.jsonl, checkpoint, model, videos/. W&B, if tracking, gets the rows.

    Each of the parts has state_dict and load_state_dict. All go into the checkpoint; the one named model, which is what
    acts, also into a file of its own.
    """

    def __init__(self, args: Args, task: str, **parts: object):
        task = task.replace("/", "-").replace(":", "-")
        name = f"{task}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        args.run_dir = args.run_dir or f"runs/{name}"
        self.args, self.parts, self.dir = args, parts, Path(args.run_dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.dir / ".lock", timeout=0)  # ends with the process, however that ends
        try:
            self.lock.acquire()
        except filelock.Timeout:
            refuse(f"--run-dir {self.dir} is in use by another process")
        path = self.dir / "config.json"
        if not args.resume and (path.exists() or (self.dir / CHECKPOINT).exists()):
            refuse(f"--run-dir {self.dir} holds a run: continue it with --resume, or name another folder")
        config = json.loads(path.read_text()) if args.resume else self.describe()
        self.wandb = self.start_wandb(config) if args.track else None
        if not args.resume:
            write_file(path, lambda file: file.write(json.dumps(config, indent=1).encode()))
        self.metrics = open(self.dir / "metrics.jsonl", "ab")
        self.num_rows, self.evaluation_step, self.checkpoint_step = 0, 0, 0
        self.started, self.stop_signal = time.time(), None
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, self.ask_to_stop)
        print(f"{Path(__file__).name} on {task}, device {vars(args).get('device', 'cpu')}, run directory {self.dir}")

    def describe(self) -> dict:
        """What another person needs to know to repeat the run."""
        git = f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --abbrev=40 --exclude='*' --dirty"
        commit_status, commit = subprocess.getstatusoutput(git)
        cpu_status, cpu = subprocess.getstatusoutput("grep -m 1 'model name' /proc/cpuinfo")
        gpu_status, gpus = subprocess.getstatusoutput("nvidia-smi --query-gpu=name --format=csv,noheader")
        cpu = cpu.split(": ")[-1] if cpu_status == 0 else platform.machine()
        gpus = gpus if gpu_status == 0 else "none"
        packages = [distribution.metadata for distribution in distributions()]  # read once each
        return {
            "script": Path(__file__).stem,
            "args": asdict(self.args),
            "command": sys.argv,
            "commit": commit if commit_status == 0 else None,  # ends in -dirty if files differ from it
            "versions": {"python": platform.python_version()} | {m["Name"]: m["Version"] for m in packages},
            "hardware": f"{platform.platform()}, {os.cpu_count()} cores ({cpu}), GPUs: {gpus}",
            "wandb_id": os.urandom(8).hex(),
        }

    def start_wandb(self, config: dict) -> object:
        import wandb

        run = {"project": self.args.wandb_project_name, "name": self.dir.name, "id": config["wandb_id"]}
        try:
            run = wandb.init(dir=self.dir, config=config["args"], resume="allow", **run)
        except Exception as error:  # no key, no network, a wrong mode: it has many kinds
            refuse(f"--track: {error}; with WANDB_MODE=offline it needs neither account nor network")
        run.define_metric("*", step_metric="global_step")
        return run

    def ask_to_stop(self, number: int, _frame: object) -> None:
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the program at once

    def stopped(self) -> bool:
        return self.stop_signal is not None

    def restore(self) -> int:
        """Loads the last checkpoint, if any, and returns its step. Rows that were written after it are dropped."""
        state = {"step": 0, "evaluation_step": 0, "seconds": 0, "metrics_bytes": 0}
        if (self.dir / CHECKPOINT).exists():
            state = load_file(self.dir / CHECKPOINT, **self.parts)
        if self.metrics.tell() < state["metrics_bytes"]:
            refuse(f"{self.metrics.name} lacks rows that were there when {CHECKPOINT} was written")
        self.metrics.truncate(state["metrics_bytes"])
        self.num_rows = (self.dir / "metrics.jsonl").read_bytes().count(b"\n")
        self.checkpoint_step, self.evaluation_step = state["step"], state["evaluation_step"]
        self.started -= state["seconds"]
        self.bar = tqdm(total=self.args.total_timesteps, initial=self.checkpoint_step, unit=" steps", disable=None)
        return self.checkpoint_step

    def is_due(self, frequency: int, last: int, step: int) -> bool:
        """Whether a multiple of the frequency, or the end of the run, has been reached since the last time."""
        return step // frequency > last // frequency or step == self.args.total_timesteps > last

    def evaluation_is_due(self, step: int) -> bool:
        return self.is_due(self.args.eval_frequency, self.evaluation_step, step)

    def checkpoint_is_due(self, step: int) -> bool:
        return self.is_due(self.args.checkpoint_frequency, self.checkpoint_step, step) or self.stopped()

    def log(self, step: int, row: dict[str, float]) -> None:
        """Writes one row, unless it is empty. NaN or infinity becomes null in it, and ends the run."""
        if not row:
            return
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        row = {name: None if name in broken else float(value) for name, value in row.items()}
        row = {"global_step": step, "time": round(time.time() - self.started, 3)} | row
        self.metrics.write(json.dumps(row).encode() + b"\n")
        self.metrics.flush()
        try:
            if self.wandb and self.num_rows >= self.wandb.step:  # after --resume, rows recur that W&B has already
                self.wandb.log(row, step=self.num_rows, commit=True)
        except Exception as error:  # it must not end the run
            tqdm.write(f"W&B gets no more rows ({error!r}); metrics.jsonl gets all of them", file=sys.stderr)
            self.wandb = None
        self.num_rows += 1
        if broken:
            raise FloatingPointError(f"NaN or infinity at step {step} in {', '.join(broken)}")
        evaluation = [f"{name[5:]} {value:.4g}" for name, value in row.items() if name.startswith("eval/")]
        if evaluation:
            self.evaluation_step = step
            tqdm.write(f"step {step:>10,}: {', '.join(evaluation)}")
        if "charts/episodic_return" in row:
            self.bar.set_postfix_str(f"return {row['charts/episodic_return']:.1f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def save(self, step: int) -> None:
        """Writes checkpoint and model. Ends the program if a signal has asked for it."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(math.isfinite(values.sum()) for values in state["model"].values()):
            raise FloatingPointError(f"NaN or infinity at step {step} in the parameters")
        os.fsync(self.metrics.fileno())
        state |= {"step": step, "evaluation_step": self.evaluation_step}
        state |= {"seconds": time.time() - self.started, "metrics_bytes": self.metrics.tell()}
        save_model(self.dir, self.parts["model"])
        save_file(self.dir / CHECKPOINT, state)  # last: it completes the rest
        self.checkpoint_step = step
        if self.stopped():
            self.finish(f"Stopped at step {step}. To continue:", "--resume", 128 + self.stop_signal)
            raise SystemExit(128 + self.stop_signal)

    def finish(self, news: str, flags: str, exit_code: int = 0) -> None:
        self.bar.close()
        if self.wandb:
            self.wandb.finish(exit_code)
        self.lock.release()
        print(f"{news}\n    python {shlex.quote(sys.argv[0])} --run-dir {shlex.quote(str(self.dir))} {flags}")


def main() -> None:
    """Exit codes: 0 done, 2 user error, 130 or 143 stopped by a signal, 1 everything else."""
    sys.stdout.reconfigure(line_buffering=True)  # each line at once, into a pipe or a log file too
    args = parse_args()
    try:
        if args.evaluate:
            evaluate_saved(args)
        else:
            train(args)
    except KeyboardInterrupt:  # before or after training, where nothing has to be saved
        sys.exit(130)
    except (FloatingPointError, MemoryError, OSError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(1)  # not raise SystemExit: W&B listens to sys.exit


if __name__ == "__main__":
    main()
