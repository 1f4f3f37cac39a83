"""Sums up runs: statistics over seeds, learning curves, tables beside published results, a gate against regressions.

    python benchmark/report.py runs                                  # every run in the folder
    python benchmark/report.py 'runs/LunarLander*' --threshold 200   # steps and seconds until a return of 200
    python benchmark/report.py --compare runs/ppo runs/dqn           # two sets of runs, side by side
    python benchmark/report.py 'benchmark/results/returns/*.json'    # what was kept of earlier runs, by --save-baseline
    python benchmark/report.py runs --baseline benchmark/results/returns/ppo.json    # exit code 1 if it got worse
    python benchmark/report.py 'benchmark/results/returns/*.json' --table long       # the rows of a page, in Markdown

A run's score is its last evaluation. Only runs that reached their last step count; the others are named, and without
them there is no headline. Runs of one script on one environment whose arguments differ are never averaged together.
SPS are the steps of a run divided by its seconds, evaluations included, as charts/SPS in its log.

Intervals are 95 % bootstrap intervals over seeds, for the aggregate within each environment, and start at three seeds.
A plain percentile interval is too narrow for a handful of seeds; its level is therefore raised as in Hesterberg 2015,
arXiv:1411.5279. No bootstrap looks beyond the sample: for three and four seeds the interval is their range, which
covers the true mean of symmetric scores in 75 and 87 % of cases; for five it is narrower (92 % of normal scores).
The probability of --compare has Wilson's interval instead, which also holds where all runs of a set beat the other's.

Exit codes: 0 all is well, 1 runs are missing, worse than the baseline or too few to be judged, 2 a mistake in what was
asked. With --allow-missing what is missing or can't be judged is only said, unless nothing at all was judged.
"""

import csv
import glob
import io
import json
import math
import os
import re
import shlex
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import numpy as np
import tyro
from command_line import parse, refuse
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import Console
from scipy import interpolate, stats

ROOT = Path(__file__).resolve().parent.parent
FRONTIER = Path(__file__).with_name("reviews") / "frontier.json"  # the exact optimum of preference learning

RETURN_KEYS = (  # score: the first that is there
    "eval/exact_return", "eval/episodic_return", "eval/true_reward", "eval/reward", "eval/accuracy",
)  # fmt: skip
FRONTIER_KEYS = "eval/kl", "eval/true_reward", "eval/optimal_reward", "eval/reference_reward"  # of preference learning
OF_EPISODES = "eval/return_std", "eval/episodic_length"  # beside the return, and not in the report
# Arguments that don't change what is learned
SAME_EXPERIMENT = {
    "seed", "env_id", "run_dir", "resume", "evaluate", "track", "wandb_project_name", "capture_video",
    "eval_frequency", "checkpoint_frequency",
}  # fmt: skip

# Scores are normalised so that 0 is a uniformly random policy and 1 the reference, a row of reference_returns.csv.
RANDOM_SOURCE = (
    "100 to 5,000 episodes measured with Gymnasium 1.4; Atari: as commonly quoted from Mnih et al. 2015, "
    "not checked against it; MPE: reference_returns.csv"
)
ZOO = "DLR-RM/rl-baselines3-zoo benchmark.md"
EXACT = "dynamic programming on Gymnasium's tables"
SPEAKER = "perfect communication, sum over agents"
REFERENCES = {  # environment: random, reference, who reached it, source
    "CartPole-v1": (22.1, 500.0, "PPO, 100k steps", ZOO),
    "Acrobot-v1": (-498.7, -73.506, "PPO, 1M steps", ZOO),
    "MountainCar-v0": (-200.0, -100.849, "DQN, 120k steps", ZOO),
    "MountainCarContinuous-v0": (-33.2, 94.679, "SAC, 50k steps", ZOO),
    "Pendulum-v1": (-1235.9, -151.855, "TD3, 20k steps", ZOO),
    "LunarLander-v3": (-182.1, 242.119, "PPO on v2, 1M steps", ZOO),
    "LunarLanderContinuous-v3": (-209.8, 270.863, "PPO on v2, 1M steps", ZOO),
    "BipedalWalker-v3": (-102.8, 297.668, "SAC, 500k steps", ZOO),
    "InvertedPendulum-v5": (5.1, 1000.0, "TD3 on v1, 1M steps", "sfujim/TD3 learning_curves"),
    "HalfCheetah-v5": (-277.9, 9535.45, "SAC on v3, 1M steps", ZOO),
    "Hopper-v5": (17.6, 3606.39, "TD3 on v3, 1M steps", ZOO),
    "Walker2d-v5": (1.8, 4717.82, "TD3 on v3, 1M steps", ZOO),
    "Ant-v5": (-67.5, 5813.27, "TD3 on v3, 1M steps", ZOO),
    "Humanoid-v5": (113.1, 6232.29, "SAC on v3, 2M steps", ZOO),
    "ALE/Pong-v5": (-20.7, 20.989, "PPO on NoFrameskip-v4, 10M steps", ZOO),
    "ALE/Breakout-v5": (1.7, 398.033, "PPO on NoFrameskip-v4, 10M steps", ZOO),
    "FrozenLake-v1": (0.015, 0.74016, "best stationary policy", EXACT),
    "FrozenLake8x8-v1": (0.002, 0.89357, "best stationary policy found", EXACT),
    "Taxi-v4": (-776.0, 7.93, "optimum", EXACT),
    "simple_spread_v3": (-79.508, -22.617, "scripted assignment, sum over agents", "results/by_hand.json"),
    "simple_speaker_listener_v4": (-79.47, -14.759, SPEAKER, "results/by_hand.json"),
    "simple_speaker_listener_v4, continuous": (-72.323, -11.614, SPEAKER, "results/by_hand.json"),
}

# One colour a script, in every picture. Scripts that act in the same environments are far from one another.
SCRIPT_COLORS = {
    "q_learning": "#946c00", "reinforce": "#d6409f", "dqn": "#e8710a", "ppo": "#2563eb", "td3": "#1a8f4a",
    "sac": "#8b3fd1", "her": "#d92d20", "maddpg": "#0e8a9c", "reward_model": "#7a5195", "dpo": "#c2255c",
    "sft": "#5c7a29", "ppo_rlhf": "#3b5bdb", "grpo": "#e07b00", "alphazero": "#111827",
    "iql": "#7f1d1d", "cql": "#0369a1", "decision_transformer": "#a16207",
    "muzero": "#be185d",
}  # fmt: skip
CLONING = "#15803d"  # iql with temperature 0, where it stands beside iql
SPARE_COLORS = "#3b82f6", "#b45309", "#22a06b", "#a371f7", "#e5484d", "#12a5b8", "#db61a2", "#6b7280"  # other scripts
LINES = "-", "--", ":", "-."  # of experiments of one script
INK, GREY = "#24292f", "#6e7781"
STYLE = {  # white and opaque: legible on any page
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 11,
    "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.2, "grid.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "legend.fontsize": 8, "legend.framealpha": 0.7, "legend.edgecolor": "none",
    "figure.constrained_layout.h_pad": 0.08, "lines.linewidth": 2, "font.size": 10, "savefig.dpi": 130,
    "svg.fonttype": "none", "svg.hashsalt": "report",  # text stays text; the same data, the same file
    "text.parse_math": False,  # a $ in a name is a $
}  # fmt: skip
FEW = 5  # up to so many seeds each one is drawn, beyond it their interval
METRICS = {  # the axis of a score
    "eval/exact_return": "exact return of the greedy policy", "eval/episodic_return": "evaluation return",
    "eval/true_reward": "true reward of the replies", "eval/reward": "reward of the replies",
    "eval/accuracy": "accuracy on held-out pairs",
}  # fmt: skip
UNITS = {"reward_model": "pairs", "dpo": "pairs", "sft": "examples", "ppo_rlhf": "replies", "grpo": "replies"}
FROM_LOGS = "iql", "cql", "decision_transformer", "d3rlpy_iql", "d3rlpy_cql", "d3rlpy_bc"
UNITS |= dict.fromkeys(FROM_LOGS, "gradient steps")

# ---- What tables of published results name: the sources, shortened, in the order of preference; None: left out
SOURCES = (
    ("openai/spinningup", "Spinning Up"), ("sfujim/TD3", "the authors"), ("DLR-RM/rl-baselines3-zoo", "RL Zoo, tuned"),
    ("thu-ml/tianshou", "Tianshou, maximum"), ("derived: (R_EPyMARL", "EPyMARL, maximum, converted"),
    ("kengz/SLM-Lab", "SLM Lab, training return"), ("vwxyzjn/cleanrl", "CleanRL, training return"),
)  # fmt: skip
HEADLINES = {  # of a short table, which has one row a script: the environment; else its first
    "q_learning": "Taxi-v4", "reinforce": "InvertedPendulum-v5", "dqn": "LunarLander-v3", "ppo": "LunarLander-v3",
    "td3": "HalfCheetah-v5", "sac": "HalfCheetah-v5", "maddpg": "simple_spread_v3",
}  # fmt: skip
BESIDE = {  # what the last evaluations found that a row of a table should say
    "eval/reward_accuracy": "the true reward itself {}", "eval/optimal_reward": "the optimum at this divergence {}",
    "eval/reference_reward": "where it began {}", "eval/network_optimal": "the network alone {}",
}  # fmt: skip
ALSO_LOCKED = "python", "ale-py", "box2d", "pygame", "torchvision"  # physics and games that gymnasium brings along


@dataclass
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # run folders, folders that hold some, or globs
    output: Path | None = None  # folder of the report; None: "report" beside the runs
    compare: tuple[str, str] | None = None  # two sets of runs (folders or globs) instead: is the first better?
    threshold: float | None = None  # also report the steps and seconds until this return
    in_a_row: int = 1  # evaluations in a row that must reach the threshold
    seeds: tuple[int, ...] = ()  # the seeds that every experiment must have; a launcher's ledger.json is always heeded
    allow_missing: bool = False  # show the headline, and exit with 0, though runs are missing
    baseline: Path | None = None  # a file of --save-baseline; exit with 1 if returns or speed are worse than in it
    save_baseline: Path | None = None  # write these runs' results to this file
    save_versions: Path | None = None  # write the versions that the runs were made with to this file, for pip
    pictures: bool = True  # draw them; without, it takes a tenth of the time
    only: tuple[str, ...] = ()  # leave out the experiments whose label and environment do not hold all these words
    # Only print a table in Markdown; short: one row a script; frontier: policies beside the optimum at their divergence
    table: Literal["short", "long", "frontier"] | None = None


@dataclass
class Run:
    folder: Path
    group: str  # the set that it belongs to: its script's name, or what --compare calls it
    env_id: str
    seed: int
    config: dict = field(default_factory=dict)
    curve: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))  # (evaluations, 3): step, seconds, return
    last: dict[str, float] = field(default_factory=dict)  # all that the last evaluation found, eval/...
    # Where a reward model taught and the truth is known, (evaluations, 4): step, KL divergence, true reward, its score
    along: np.ndarray = field(default_factory=lambda: np.empty((0, 4)))
    trouble: str = ""  # why the run does not count

    @property
    def sps(self) -> float | None:
        """Steps a second since the run began, evaluations included: the log's charts/SPS."""
        return speed(self.curve)

    @property
    def on_frontier(self) -> list[float]:
        """Divergence, true reward, the best one at that divergence, the reference's; NaN is unknown."""
        of_a_model = str(self.config.get("args", {}).get("reward")).startswith("model")  # then its score is no truth
        reward = math.nan if of_a_model else self.last.get("eval/reward", math.nan)
        found = {"eval/true_reward": self.last.get(truth_among(self.last), reward)} | self.last
        return [found.get(key, math.nan) for key in FRONTIER_KEYS]


@dataclass
class Experiment:
    """The runs that differ in their seed alone."""

    label: str
    group: str
    env_id: str
    done: list[Run]  # by seed
    missing: dict[int, str]  # seed: why

    @property
    def script(self) -> str:
        return self.done[0].config["script"]

    @property
    def unit(self) -> str:
        """What a step is."""
        return UNITS.get(self.script, "environment steps")

    @property
    def metric(self) -> str:
        result = re.sub(r"reward/\d+-", "", self.done[0].config.get("result") or RETURN_KEYS[1])
        name = METRICS.get(result, result.split("/")[-1].replace("_", " "))
        return f"{name}, sum over agents" if self.script == "maddpg" else name

    @property
    def budget(self) -> int:
        return int(max(run.curve[-1, 0] for run in self.done))

    def name(self, steps: bool = False) -> str:
        """The label as one would say it: ppo total_timesteps=100000 -> ppo, or ppo, 100k steps."""
        words = self.label.removeprefix(self.group).split()  # a group's name may hold spaces
        others = [word for word in words if not word.startswith("total_timesteps=")]
        steps = steps and len(others) < len(words)
        others = [word.replace("=", " ").replace("_", " ") for word in others if word.split("=")[-1] != self.script]
        budget = [f"{short(self.budget)} {self.unit.split(' ')[-1]}"] * steps
        return ", ".join([self.group, *others, *budget])

    @property
    def on_frontier(self) -> list[Run]:
        """The runs that learned from the truth itself, or from people's choices."""
        return [run for run in self.done if np.isfinite(run.on_frontier[:2]).all() and not len(run.along)]

    @property
    def along(self) -> np.ndarray:  # (evaluations that all seeds have, seeds, 4)
        steps = [set(run.along[:, 0]) for run in self.done]
        common = sorted(set.intersection(*steps))
        return np.stack([run.along[np.isin(run.along[:, 0], common)] for run in self.done], 1)

    @property
    def data(self) -> dict:
        """Of the logs that it learned from, where they are known: behaviour, transitions, mean_return."""
        of_runs = [run.config.get("data") or {} for run in self.done]
        return of_runs[0] | {"mean_return": np.mean([data["mean_return"] for data in of_runs])} if all(of_runs) else {}

    @property
    def beta(self) -> float | None:
        return self.done[0].config["args"].get("beta")

    @property
    def scores(self) -> np.ndarray:  # (seeds,)
        return np.array([run.curve[-1, 2] for run in self.done])


def base_name(env_id: str) -> str:
    """What the versions of an environment have in common: HalfCheetah-v5 -> halfcheetah."""
    return re.sub(r"^ale[/ ]|noframeskip|[-_]v\d.*|[ (].*", "", env_id.lower())


def name_env(env_id: str | None, result: str | None, continuous: bool = False) -> str:
    """An environment without the module that registers it; of preferences, which have none, what is measured.

    With actions in a box where it has discrete ones too, it is another environment.
    """
    if env_id:
        return env_id.split(":")[-1] + ", continuous" * continuous
    return "preferences" + (f", {re.sub('.*/|[0-9]+-', '', result).replace('_', ' ')}" if result else "")


# ---- Statistics: what is given to interval takes samples, (..., seeds) each, and an axis, always the last ----


def iqm(*scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean of all scores: the mean without the highest and the lowest quarter.

    scores: of each environment, (..., seeds). All environments weigh the same, also one with fewer seeds.
    """
    sizes = [sample.shape[-1] for sample in scores]
    values = np.concatenate(scores, axis)
    if len({*sizes}) == 1:
        return stats.trim_mean(values, 0.25, axis)
    # In whole numbers, so that nothing is rounded: as if each score were there so often that all sizes are equal
    size = math.lcm(*sizes)
    weights, order = np.repeat([size // n for n in sizes], sizes), values.argsort(axis)
    values, ends = np.take_along_axis(values, order, axis), weights[order].cumsum(axis)
    quarter = size * len(sizes) // 4
    kept = np.diff(ends.clip(quarter, size * len(sizes) - quarter), axis=axis, prepend=quarter)
    return (values * kept).sum(axis) / kept.sum(axis)


def difference(new: np.ndarray, old: np.ndarray, axis: int = -1) -> np.ndarray:
    return new.mean(axis) - old.mean(axis)


def improvement(*scores: np.ndarray) -> tuple[float, tuple | None]:
    """Probability that a run of A beats one of B, a tie counting half, averaged over environments; its 95 % interval.

    scores: of A and of B on the first environment, of A and of B on the second, and so on; (seeds,) each.
    The interval is Wilson's, as of a share of independent pairs, one for each seed of the smaller set. The probability
    varies no more than that share, because it is a mean over all ways to pair the seeds up. None under three seeds.
    It errs on the wide side: with 3, 5 and 10 seeds a side it held the true value in 100, 98 and 98 % of simulations
    where that was 0.5, in 96, 98 and 98 % at 0.86, and in all at 1 (4,000 of each, with normal scores; where one set
    spreads five times as wide, in 89 % or more).
    """
    pairs = [*zip(scores[::2], scores[1::2], strict=True)]
    p = np.mean([np.heaviside(a[:, None] - b, 0.5).mean() for a, b in pairs])
    sizes = [min(len(a), len(b)) for a, b in pairs]
    if min(sizes) < 3:
        return p, None
    n, z = len(pairs) / np.mean(1 / np.array(sizes)), stats.norm.ppf(0.975)
    centre, reach = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + side * reach) / (1 + z**2 / n) for side in (-1, 1))
    return p, (max(low, 0.0), min(high, 1.0))


def interval(statistic: Callable, *samples: np.ndarray, resamples: int = 10_000) -> tuple | None:
    """95 % bootstrap interval, (low, high); each sample is resampled on its own. None under three seeds."""
    sizes = np.array([sample.shape[-1] for sample in samples])
    if min(sizes) < 3:
        return None
    # Resampling finds variances that are too small by (n - 1) / n, and takes a normal quantile where Student's belongs.
    # Samples of other sizes and variances count as in Welch's test
    variances = np.array([sample.var(-1, ddof=1).mean() for sample in samples]) / sizes
    variances = variances / variances.sum() if variances.sum() else 1 / sizes
    freedom = variances.sum() ** 2 / (variances**2 / (sizes - 1)).sum()
    too_small = (variances * (sizes - 1) / sizes).sum() / variances.sum()
    tail = stats.norm.cdf(stats.t.ppf(0.025, freedom) / math.sqrt(too_small))
    rng = np.random.default_rng(0)
    options = {"axis": -1, "vectorized": True, "method": "percentile", "n_resamples": resamples, "rng": rng}
    result = stats.bootstrap(samples, statistic, confidence_level=1 - 2 * tail, **options)
    return tuple(bound[()] for bound in result.confidence_interval)


def speed(curve: np.ndarray) -> float | None:
    """Steps a second until the last evaluation of a curve, (evaluations, 3)."""
    step, seconds, _ = curve[-1] if len(curve) else (0, 0.0, 0.0)
    return float(step / seconds) if seconds and math.isfinite(seconds) else None


def steps_to(threshold: float, in_a_row: int, curve: np.ndarray) -> tuple[float, float]:
    """Step and seconds at the last of the first evaluations in a row that reach the threshold; infinity if none do."""
    count = 0
    for step, seconds, value in curve:
        count = count + 1 if value >= threshold else 0
        if count == in_a_row:
            return step, seconds
    return math.inf, math.inf


def on_one_grid(curves: list[np.ndarray], seconds: bool) -> tuple[np.ndarray, np.ndarray]:
    """Puts curves, (evaluations, 3), on the part of the axis that all of them cover: (G,) and (G, seeds)."""
    axes = [curve[:, int(seconds)] for curve in curves]
    start, end = max(x[0] for x in axes), min(x[-1] for x in axes)
    grid = np.linspace(start, end, 100) if seconds else np.unique(np.concatenate(axes))
    grid = grid[(start <= grid) & (grid <= end)]
    return grid, np.stack([np.interp(grid, x, curve[:, 2]) for x, curve in zip(axes, curves, strict=True)], -1)


# ---- Reading runs ----


def read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text())
        return data if isinstance(data, dict) else refuse(f"{path} holds no JSON object")
    except (OSError, ValueError) as error:
        refuse(f"{path} can't be read ({error})")


def read_rows(path: Path) -> list[dict]:
    """The rows of metrics.jsonl without a half-written last one, and without those that a resume has repeated."""
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    rows, smallest = [], math.inf
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            int(row["global_step"] + 0)  # a finite number
            rows.append(row)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if number < len(lines):
                refuse(f"{path}, line {number} is damaged ({error!r}); remove the line or leave out the run")
    kept = []
    for row in reversed(rows):  # a later row with a smaller step: the run went back to there
        if row["global_step"] <= smallest:
            smallest = row["global_step"]
            kept.append(row)
    return kept[::-1]


def series(rows: list[dict], key: str) -> np.ndarray:
    """(k, 3): step, seconds, value; null becomes NaN, and of two rows at one step the later counts."""
    rows = [row for row in rows if isinstance(row.get(key, ""), int | float | None)]
    points = {row["global_step"]: (row["global_step"], row.get("time"), row[key]) for row in rows}
    return np.array(list(points.values()), dtype=float).reshape(-1, 3)


def truth_among(names: Iterable[str]) -> str | None:
    """Of several rewards by which replies were judged, such as eval/reward/2-true_reward, the known truth."""
    return next((name for name in names if re.fullmatch(r"eval/reward/\d+-true_reward", name)), None)


def local(text: str) -> str:
    """A path without the folder of the repository. A file in benchmark/ is the same in another copy of it."""
    text = text.removeprefix(f"{ROOT}/")
    inside = re.sub(r".*/(?=benchmark/)", "", text)
    return inside if os.path.exists(ROOT / inside) else text


def name_rewards(args: dict, folder: Path) -> str:
    """What taught a policy: true_reward, model_of_1000_pairs. Rewards that are only measured have the weight 0."""
    rewards, names = args["reward"] if isinstance(args["reward"], list) else [args["reward"]], []
    for reward, weight in zip(rewards, args.get("reward_weights") or [1.0] * len(rewards), strict=True):
        path, _, function = reward.rpartition(":")
        if path.endswith(".py"):
            name = function if local(path) == "benchmark/reviews/reward.py" else f"{local(path)}:{function}"
        else:  # a reward model's folder; if runs were moved, it lies beside this run
            places = [Path(reward).parent, folder.parent / Path(reward).parent.name]
            made = [read_json(p / "config.json") for p in places if (p / "config.json").exists()]
            split = re.fullmatch(r"\w+\[:(\d+)\]", str(made[0].get("args", {}).get("dataset_split")) if made else "")
            name = f"model_of_{split[1]}_pairs" if split else f"model_{local(str(Path(reward))).removesuffix('/model')}"
        names += [name] * (weight != 0)
    return "+".join(names)


def describe_data(dataset: str) -> dict:
    """Of logs that record.py made: whose they are, how many transitions, their mean return. Of others nothing."""
    try:
        about = json.loads((Path(dataset) / "data.json").read_text())
        return {"behaviour": about["behaviour"], **{key: float(about[key]) for key in ("transitions", "mean_return")}}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_run(folder: Path, group: str, result: str | None = None) -> Run:
    """The run in a folder, finished or not. result: the metric that is its score; None: the first of RETURN_KEYS."""
    try:
        return make_run(folder, group, result)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        refuse(f"{folder} can't be read as a run ({error!r}); mend it or leave it out")


def make_run(folder: Path, group: str, result: str | None) -> Run:
    config = read_json(folder / "config.json")
    if not isinstance(config.get("args"), dict) or not isinstance(config.get("script"), str):
        refuse(f"{folder}/config.json must have script and args")
    args = config["args"]
    seed, total = args.get("seed", 0), args.get("total_timesteps", 0)
    if type(seed) is not int or type(total) not in (int, float):
        raise TypeError(f"seed {seed!r}, total_timesteps {total!r}")
    command_of(config), versions_of(config)  # what they can't use is found here
    if args.get("reward") and not args.get("env_id"):  # it learns from text
        args["reward"] = name_rewards(args, folder)
    if args.get("dataset"):
        config["data"] = describe_data(args["dataset"])
    args |= {k: local(v) for k, v in args.items() if isinstance(v, str)}
    rows = read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    truth = truth_among(dict.fromkeys(key for row in rows for key in row))
    curves = {key: series(rows, key) for key in ([result] if result else [*[truth] * bool(truth), *RETURN_KEYS])}
    key = next((key for key, curve in curves.items() if len(curve)), result)
    curve = curves.get(key, np.empty((0, 3)))
    config["result"] = key
    env_id = name_env(args.get("env_id"), key, args.get("continuous_actions", False))
    run = Run(folder, group or config["script"], env_id, seed, config)
    run.curve = curve[np.isfinite(curve[:, 2])]
    newest = {key: value for row in rows for key, value in row.items() if key.startswith("eval/")}
    run.last = {key: v for key, v in newest.items() if isinstance(v, int | float) and math.isfinite(v)}
    if truth and str(args.get("reward")).startswith("model"):
        columns = [series(rows, key) for key in ("eval/kl", truth, "eval/reward")]
        run.along = np.column_stack([columns[0][:, 0], *(column[:, 2] for column in columns)])
    last = rows[-1]["global_step"] if rows else 0
    if not len(curve):
        run.trouble = f"no evaluation, stopped at step {last:,}"
    elif curve[-1, 0] < total:
        run.trouble = f"stopped at step {last:,} of {total:,}"
    elif not math.isfinite(curve[-1, 2]):
        run.trouble = "its last evaluation is not a number"
    return run


def without(words: list[str], names: Iterable[str]) -> list[str]:
    """The words of a command without these flags, named as arguments are, and without their values."""
    kept, is_value = [], False
    for word in words:
        is_value = is_value and not word.startswith("--")
        dropped = word.startswith("--") and word[2:].split("=")[0].removeprefix("no-").replace("-", "_") in names
        if not dropped and not is_value:
            kept.append(word)
        is_value = dropped and "=" not in word
    return kept


def read_flags(words: list[str]) -> dict:
    """The arguments that flags stand for: --gamma=0.9 or --gamma 0.9, --anneal-lr, --no-anneal-lr."""
    args = {}
    for word, after in pairwise([*words, "--"]):
        name, equals, value = word.partition("=")
        name, value = name[2:].replace("-", "_"), value if equals else after
        if not word.startswith("--"):
            continue  # the value of the flag before it
        if not equals and after.startswith("--"):
            args[name.removeprefix("no_")] = not name.startswith("no_")
        else:
            try:
                args[name] = json.loads(value)
            except ValueError:  # a word
                args[name] = value
    return args


def kind_of(row: dict) -> tuple:
    """What the runs of one experiment share in a ledger: script, environment, flags."""
    flags = without(row.get("flags") or [], SAME_EXPERIMENT)
    return row.get("script") or Path(row["launch"][-1]).stem, row["env_id"], tuple(flags)


def still_wanted(rows: list[dict], asked: list[str]) -> list[dict]:
    """The runs that a launcher's last call asked for, and what earlier calls have left.

    Of the latter not what a newer script has replaced, not what never began, and nothing of a kind of which no run is
    done: a mistyped environment. A note says what was left out so.
    """
    rows = sorted(rows, key=lambda row: row["name"] in asked)  # of two that say the same, the last one counts
    newest = {kind_of(row): row.get("script_hash") for row in rows}
    rows = [row for row in rows if row.get("script_hash") == newest[kind_of(row)]]
    rows = {(kind_of(row), row["seed"]): row for row in rows}.values()
    done, kept = {kind_of(row) for row in rows if row["status"] == "done"}, []
    for row in rows:
        began = row["status"] != "pending" or row.get("attempts")  # one that failed, and waits to begin again
        if row["name"] in asked or (began and kind_of(row) in done):
            kept.append(row)
        elif began:
            print(f"note: {row['name']} ({row['status']}) and all runs like it failed: left out", file=sys.stderr)
    return kept


def read_ledger(path: Path, group: str) -> list[Run]:
    """The runs that a launcher was asked for, also those without a folder."""
    ledger, found, absent, configs = read_json(path), [], [], {}
    try:
        rows = list(ledger["runs"].values() if isinstance(ledger["runs"], dict) else ledger["runs"])
        for row in still_wanted(rows, ledger["asked"]) if "asked" in ledger else rows:
            folder, kind, status = Path(row.get("run_dir") or row["name"]), kind_of(row), row["status"]
            seed = row["seed"] + 0  # a number
            # beside the ledger, also after a move, or the folder as it is written
            places = path.parent / folder, path.parent / folder.name, folder
            there = next((place.resolve() for place in places if (place / "config.json").exists()), None)
            if there:
                run = read_run(there, group, row.get("result"))
                if run.trouble or status != "done":
                    run.trouble = f"{status}, {run.trouble or 'though it has its last evaluation'}"
                configs[kind] = run.config
            else:
                script, env_id, _ = kind
                config = {"script": script, "args": read_flags(row.get("flags") or [])}
                name = name_env(env_id, row.get("result"), config["args"].get("continuous_actions", False))
                run = Run(places[0], group or script, name, seed, config, trouble=f"{status}, no config.json")
                absent.append((kind, run))
            found.append(run)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        refuse(f"{path}: every run needs script, env_id, seed, run_dir and status ({error!r})")
    for kind, run in absent:  # it would have had the arguments of the others of its kind
        run.config = configs.get(kind, run.config)
    return found


def read_baseline(path: Path, group: str) -> list[Run]:
    """The runs that --save-baseline kept, with their curves."""
    found = []
    try:
        for i, entry in enumerate(read_json(path)["experiments"]):
            for seed, kept in entry["runs"].items():
                # There is none: a name for messages, and no other run's
                name = f"{path.stem}, {i}: {entry['label']}, {entry['env_id']}, {seed}".replace("/", "-")
                run = Run(path.resolve().with_name(name), group or entry["group"], entry["env_id"], int(seed), entry)
                run.curve = np.array(kept["curve"], dtype=float)  # null becomes NaN
                run.curve[-1, 2] = kept["return"]  # in full
                run.last = {key: float(value) for key, value in kept["last"].items()}
                run.along = np.array(kept.get("along") or np.empty((0, 4)), dtype=float)
                arguments_of(run), command_of(entry), versions_of(entry)  # what they can't use is found here
                found.append(run)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        refuse(f"{path} is not what --save-baseline writes ({error!r})")
    return found


def find_runs(pattern: str, group: str) -> list[Run]:
    """The runs in a folder or glob, finished or not. Beside a launcher's ledger.json, the runs in it and no others."""
    folders, ledgers, runs, seen, files = {}, set(), [], set(), set()  # folders: where they are, how they were reached
    for path in map(Path, [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))):
        if path.suffix == ".json" and path.name != "ledger.json":
            runs += read_baseline(path, group)
        elif path.name == "ledger.json":
            ledgers.add(path.parent.resolve() / path.name)
        files.add(path)
        for name, inside, names in os.walk(path.resolve(), onerror=refuse, followlinks=True) if path.is_dir() else ():
            folder, place = Path(name), Path(name).resolve()
            if place in seen:  # a link may lead back
                inside.clear()
                continue
            seen.add(place)
            files |= {folder / name for name in names}
            ledgers |= {folder / "ledger.json"} if "ledger.json" in names else set()
            if "metrics.jsonl" in names or ("config.json" in names and is_of_a_run(folder / "config.json")):
                folders[place] = folder
    for file in sorted(files):
        if os.path.islink(file) and not os.path.exists(file):
            print(f"note: {file} is a link to nothing: left out", file=sys.stderr)
    for ledger in sorted(ledgers):
        runs += read_ledger(ledger, group)
        beside = {place for place, folder in folders.items() if folder.is_relative_to(ledger.parent)}
        if others := len(beside - {run.folder for run in runs}):
            print(
                f"note: {others} folders beside {ledger} are of older scripts, failed or trials: left out",
                file=sys.stderr,
            )
        folders = {place: folder for place, folder in folders.items() if place not in beside}
    runs += [read_run(folder, group) for folder in sorted(folders)]
    return runs or refuse(f"{pattern} holds no run, which is a folder with config.json and metrics.jsonl")


def is_of_a_run(config: Path) -> bool:
    """A folder of Hugging Face weights holds a config.json, too."""
    try:
        return b'"script"' in config.read_bytes()
    except OSError as error:
        refuse(error)


def name_own_files(runs: list[Run]) -> None:
    """Logs and reward models whose names hold the seed of their only run get one name, so that it is one experiment.

    Such as data/logs-1 and data/logs-2, or the folders that run.py makes, default__reward_model__1__0a1b2c3d.
    """
    for name, start in ("dataset", ""), ("reward", "model_"):  # another reward is no file
        users = defaultdict(set)
        for run in runs:
            users[str(run.config.get("args", {}).get(name))].add(run.seed)
        for run in runs:
            file = run.config.get("args", {}).get(name)
            if isinstance(file, str) and file.startswith(start) and len(users[file]) == 1:
                run.config["args"][name] = re.sub(rf"(?<=-){run.seed}(?=\+|$)|(?<=__){run.seed}(?=__)", "SEED", file)


def arguments_of(run: Run) -> dict:
    """All that must agree in the runs of an experiment: script, arguments, and what the score measures."""
    result = run.config.get("result")
    score = {"result": re.sub(r"reward/\d+-", "", result)} if result else {}
    return {"script": run.config["script"], **run.config["args"], **score} if run.config else {}


def sort_out(runs: list[Run], seeds: tuple[int, ...]) -> list[Experiment]:
    """Experiments: runs whose arguments agree. Their label names the arguments that tell them from one another."""
    together = defaultdict(list)
    for run in {run.folder: run for run in runs}.values():
        together[run.group, run.env_id].append(run)
    experiments = []
    for (group, env_id), members in sorted(together.items()):
        name_own_files(members)
        arguments = [arguments_of(run) for run in members]
        whole = [args for run, args in zip(members, arguments, strict=True) if "commit" in run.config]
        names = sorted({name for args in arguments for name in args} - SAME_EXPERIMENT)
        # What only some runs have tells them apart as well, unless all that is known of the others are their flags
        names = [
            name for name in names
            if len({json.dumps(args[name]) for args in arguments if name in args}) > 1
            or len({json.dumps(args.get(name)) for args in whole}) > 1
        ]  # fmt: skip
        by_values = defaultdict(list)
        for run, args in zip(members, arguments, strict=True):
            values = {name: args[name] for name in names if name in args}
            by_values[label_of(group, values, str), label_of(group, values, json.dumps)].append(run)
        labels = Counter(label for label, _ in by_values)
        for (label, exact), same in by_values.items():
            label = exact if labels[label] > 1 else label  # 1 and "1" read alike, and so may names with spaces
            done = sorted((run for run in same if not run.trouble), key=lambda run: run.seed)
            for one, other in pairwise(done):
                if one.seed == other.seed:
                    twice = f"{one.folder} and {other.folder}"
                    refuse(f"seed {one.seed} of {label} on {env_id} is there twice; leave one out: {twice}")
            missing = dict.fromkeys(seeds, "no such run")
            missing |= {run.seed: f"{run.trouble} ({run.folder})" for run in same if run.trouble}
            there = {run.seed for run in done}
            missing = {seed: why for seed, why in sorted(missing.items()) if seed not in there}
            experiments.append(Experiment(label, group, env_id, done, missing))
    return experiments


def label_of(group: str, values: dict, form: Callable) -> str:
    """A group and the arguments that tell it from others, as words without spaces. form: how a value is written."""
    space = r"\u0020" if form is json.dumps else ""
    return legible(" ".join([group, *(f"{name}={form(v)}".replace(" ", space) for name, v in values.items())]))


def legible(text: str) -> str:
    """What can be written: the name of a file may hold bytes that are no text."""
    return text.encode(errors="backslashreplace").decode()


# ---- Summing up: each function returns rows, {column: value}, for the table and for report.json ----


def summarise(experiment: Experiment) -> dict:
    scores, done = experiment.scores, experiment.done
    row = {"script": experiment.label, "environment": experiment.env_id}
    row |= {"n": len(done), "of": len(done) + len(experiment.missing)}
    if not done:
        return row
    return row | {
        "steps": experiment.budget,
        "mean": scores.mean(),
        "mean 95 %": interval(np.mean, scores),
        "deviation": scores.std(ddof=1) if len(scores) > 1 else None,
        "worst": scores.min(),
        "worst seed": done[scores.argmin()].seed,
        "IQM": iqm(scores),
        "IQM 95 %": interval(iqm, scores),
        "SPS": np.median(speeds) if (speeds := [run.sps for run in done if run.sps]) else None,
        "minutes": minutes if math.isfinite(minutes := np.median([run.curve[-1, 1] for run in done]) / 60) else None,
        "seeds": [run.seed for run in done],
        "returns": scores.tolist(),
    }


def beside(experiment: Experiment) -> list[dict]:
    """What the last evaluations found beside the score: such as the optimum, the divergence, the calibration."""
    keys = list(dict.fromkeys(key for run in experiment.done for key in run.last))
    where = {"script": experiment.label, "environment": experiment.env_id}
    rows = []
    for key in keys:
        values = [run.last.get(key, math.nan) for run in experiment.done]
        if key not in (*OF_EPISODES, experiment.done[0].config.get("result")) and np.isfinite(values).all():
            rows.append(where | {"of": key.removeprefix("eval/"), "mean": np.mean(values), "by seed": values})
    return rows


def command_of(config: dict) -> list[str]:
    """The words of a run's command without its seed and without the folders of the machine that it ran on."""
    path, *words = [str(word).replace(f"{ROOT}/", "") for word in config.get("command") or [""]]
    folder = "benchmark" if Path(path).name == "peer.py" else "algorithms"
    return [f"{folder}/{Path(path).name}"] * bool(path) + without(words, ("seed", "run_dir"))


def reproduce(experiment: Experiment) -> dict:
    """The command of a run, and what it ran on."""
    config = experiment.done[0].config
    command = shlex.join(command_of(config))
    versions = versions_of(config)
    names = "python", "torch", "gymnasium", "numpy"
    return {
        "script": experiment.label,
        "environment": experiment.env_id,
        "command, and --seed": f"`python {command}`" if command else None,
        "seeds": ", ".join(str(run.seed) for run in experiment.done),
        "commit": commit_of(config),
        "versions": " ".join(f"{name} {versions[name]}" for name in names if name in versions),
        "hardware": config.get("hardware"),
    }


def commit_of(config: dict) -> str:
    return str(config.get("commit"))[:10] + " changed" * str(config.get("commit")).endswith("-dirty")


def versions_of(config: dict) -> dict[str, str]:
    """Of all the packages that were there."""
    versions = sorted((config.get("versions") or {}).items())
    return {plain(name): version.split()[0] for name, version in versions}


def aggregate(experiments: list[Experiment]) -> list[dict]:
    """For each label the interquartile mean of the normalised scores over all environments that have a reference."""
    by_label = defaultdict(dict)
    for experiment in experiments:
        if experiment.env_id in REFERENCES:
            random, reference, *_ = REFERENCES[experiment.env_id]
            by_label[experiment.label][experiment.env_id] = (experiment.scores - random) / (reference - random)
    rows = []
    for label, scores in by_label.items():
        row = {"script": label, "IQM": iqm(*scores.values()), "95 %": interval(iqm, *scores.values())}
        rows.append(row | {"environments": len(scores), "which": list(scores)})
    return rows


def pair_up(experiments: list[Experiment], sets: list[str]) -> dict[str, list[Experiment]]:
    """By environment: the first set's experiment and the second's. Of unequal length they can't be compared."""
    by_env = defaultdict(dict)
    for e in experiments:
        if e.group in by_env[e.env_id]:
            refuse(f"--compare: {e.group} mixes experiments on {e.env_id}, such as {e.label}; name fewer of its runs")
        by_env[e.env_id][e.group] = e
    pairs = {env_id: [found[name] for name in sets] for env_id, found in by_env.items() if len(found) == 2}
    if not pairs:
        refuse(f"--compare: {sets[0]} and {sets[1]} have finished runs on no environment in common")
    for env_id, (a, b) in pairs.items():
        if a.metric != b.metric:
            refuse(f"--compare: on {env_id} {a.group} has the {a.metric}, {b.group} the {b.metric}")
        budgets = sorted(run.curve[-1, 0] for e in (a, b) for run in e.done)
        if budgets[-1] > 1.01 * budgets[0]:  # the last batch of another program may be a little longer
            runs = " and ".join(f"{e.budget:,} in {e.group}" for e in (a, b))
            refuse(f"--compare: on {env_id} the runs have unequal steps ({runs}); compare runs of one length")
    return pairs


def unequal(pairs: dict[str, list[Experiment]], experiments: list[Experiment]) -> list[str]:
    """What else makes the comparison less than fair; its first lines say it."""
    alone, found = defaultdict(list), defaultdict(list)
    for e in experiments:
        if e.env_id not in pairs:
            alone[e.group].append(e.env_id)
    for env_id, pair in pairs.items():
        both = [[how_made(run) for run in e.done] for e in pair]
        for what in both[0][0]:
            # Of several that occur in a set, each once
            values = [", ".join(dict.fromkeys(str(made[what]) for made in of)) for of in both]
            if values[0] != values[1]:
                unlike = " and ".join(f"{value} in {e.group}" for value, e in zip(values, pair, strict=True))
                found[what, unlike].append(env_id)
    lines = [f"Only {group} has {', '.join(env_ids)}: left out of the comparison." for group, env_ids in alone.items()]
    return lines + [f"Unequal {what} on {', '.join(on)}: {unlike}." for (what, unlike), on in found.items()]


def how_made(run: Run) -> dict[str, object]:
    """What should be equal in a comparison, but for the script and its arguments."""
    args, versions = run.config["args"], versions_of(run.config)
    made = {"seeds": run.seed, "evaluation episodes": args.get("eval_episodes")}
    made |= {"eval_max_steps": args.get("eval_max_steps"), "commit": commit_of(run.config)}
    made["hardware"] = " ".join(str(run.config.get("hardware")).split())
    return made | {f"{name} version": versions.get(name) for name in ("torch", "numpy", "gymnasium")}


def compare(pairs: dict[str, list[Experiment]]) -> list[dict]:
    """Probability that a run of the first set beats one of the second: per environment, and over all of them."""
    scores = {env_id: [e.scores for e in pair] for env_id, pair in pairs.items()}
    if len(scores) > 1:
        scores["all"] = [sample for pair in scores.values() for sample in pair]
    rows = []
    for env_id, samples in scores.items():
        p, bounds = improvement(*samples)
        rows.append({"environment": env_id, "P": p, "95 %": bounds})
    return rows


def until(experiment: Experiment, threshold: float, in_a_row: int) -> dict:
    """Steps and seconds to a return. In the medians a seed that never reaches it counts as infinity."""
    reached = np.array([steps_to(threshold, in_a_row, run.curve) for run in experiment.done])  # (seeds, 2)
    medians, of = np.median(reached, axis=0), len(experiment.done) + len(experiment.missing)
    row = {"script": experiment.label, "environment": experiment.env_id, "of": of}
    row |= {"reached": int(np.isfinite(reached[:, 0]).sum())}
    values = [[value if math.isfinite(value) else None for value in column] for column in (medians, *reached.T)]
    return row | {"median steps": values[0][0], "median s": values[0][1], "steps": values[1], "seconds": values[2]}


def of_importance(config: dict) -> dict[str, str]:
    """Of all the packages that were there, those that requirements.txt names, and Python."""
    wanted = set(ALSO_LOCKED)
    for file in ROOT / "requirements.txt", ROOT / "benchmark" / "requirements.txt":
        wanted |= {plain(found[0]) for line in file.read_text().splitlines() if (found := re.match(r"[\w.-]+", line))}
    return {name: version for name, version in versions_of(config).items() if name in wanted}


def plain(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lock(experiments: list[Experiment]) -> str:
    """The versions that the rows were made with, as a requirements file. Where rows differ, the most frequent one."""
    found = defaultdict(lambda: defaultdict(list))
    for e in experiments:
        for name, version in of_importance(e.done[0].config).items():
            found[name][version.split("+")[0]].append(f"{e.name(steps=True)} on {e.env_id}")
    if not found:
        refuse("--save-versions: the runs' config.json and the kept files name no versions")
    lines = [f"# The versions behind {len(experiments)} rows of results; for pip install -r"]
    for name, rows in sorted(found.items(), key=lambda item: (item[0] != "python", item[0])):
        version, *others = sorted(rows, key=lambda version: len(rows[version]), reverse=True)
        known = sum(map(len, rows.values()))
        notes = [f"{other} in {', '.join(rows[other])}" for other in others]
        notes += [f"named by {known} of the {len(experiments)} rows"] * (known < len(experiments))
        line = f"# Python {version}" if name == "python" else f"{name}=={version}"
        lines.append(line + f"  # {'; '.join(notes)}" * bool(notes))
    return "\n".join(lines) + "\n"


def baseline_entry(experiment: Experiment) -> dict:
    """What a later set of runs is held against."""
    config = experiment.done[0].config
    runs = {}
    for run in experiment.done:
        curve = [[int(step), *(float(f"{value:.5g}") for value in values)] for step, *values in run.curve]
        runs[str(run.seed)] = {"return": run.curve[-1, 2], "SPS": run.sps, "curve": curve, "last": run.last}
        if len(run.along):
            runs[str(run.seed)]["along"] = [[float(f"{value:.5g}") for value in row] for row in run.along]
    return {
        "label": experiment.label,
        "group": experiment.group,
        "env_id": experiment.env_id,
        "script": config["script"],
        "result": config.get("result"),
        "command": command_of(config),
        "runs": runs,
        "args": {name: value for name, value in config["args"].items() if name not in SAME_EXPERIMENT},
        **({"data": experiment.data} if experiment.data else {}),
        "versions": of_importance(config),
        "commit": config.get("commit"),
        "hardware": config.get("hardware"),
    }


def gate(experiments: list[Experiment], path: Path) -> list[dict]:
    """Worse: the whole interval of the difference to the baseline lies below 0. Returns and speed are judged apart.

    Each experiment is held against the one of the baseline whose arguments are nearest to its own.
    """
    rows, found = [], {}
    try:
        olds = read_json(path)["experiments"]
        for new in map(baseline_entry, experiments):
            same = [i for i, old in enumerate(olds) if (old["group"], old["env_id"]) == (new["group"], new["env_id"])]
            apart = {i: len(differences(new["args"], olds[i]["args"])) for i in same}
            nearest = min(same, key=apart.get, default=None)
            if nearest is not None and apart[nearest] < found.get(nearest, (math.inf,))[0]:
                found[nearest] = apart[nearest], new
        for i, old in enumerate(olds):
            new = found[i][1] if i in found else old | {"runs": {}}
            known = new["versions"].keys() & old["versions"].keys()
            differ = [{"hardware": e["hardware"], **{name: e["versions"][name] for name in known}} for e in (new, old)]
            differ = differences(*({**where, **e["args"]} for where, e in zip(differ, (new, old), strict=True)))
            unlike = [] if i in found else ["no such runs"]
            ends = [run["curve"][-1][0] for entry in (new, old) for run in entry["runs"].values()]
            unlike += ["unequal steps"] * (max(ends) > 1.01 * min(ends))
            unlike += ["another score"] * (new.get("result") != old.get("result"))
            for what in "return", "SPS":
                of_run = {"return": lambda run: run["return"], "SPS": lambda run: speed(run["curve"])}[what]
                values = [[of_run(run) for run in entry["runs"].values()] for entry in (new, old)]
                now, before = (np.array([v for v in sample if v is not None], dtype=float) for sample in values)
                if len(before):
                    bounds = interval(difference, now, before)
                    row = {"script": old["label"], "environment": old["env_id"], "of": what, "before": before.mean()}
                    row |= {"now": now.mean() if len(now) else None, "difference 95 %": bounds, "differs in": differ}
                    rows.append(row | {"verdict": judge(row, len(before), unlike)})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        refuse(f"--baseline {path} is not what --save-baseline writes ({error!r})")
    return rows


def differences(a: dict, b: dict) -> list[str]:
    """The names whose values differ."""
    return [name for name in sorted(a | b) if a.get(name) != b.get(name)]


def judge(row: dict, seeds_before: int, unlike: list[str]) -> str:
    """A verdict of the gate."""
    if unlike:
        return f"not judged: {unlike[0]}"
    if seeds_before < 3:
        return "not judged: the baseline has under three seeds"
    if row["difference 95 %"] is None:
        return "not judged: under three seeds"
    return "worse" if row["difference 95 %"][1] < -1e-9 * abs(row["before"]) else "ok"  # less is rounding


def published(experiment: Experiment) -> list[dict]:
    """This result, then the rows of reference_returns.csv of the same algorithm on any version of the environment.

    Of a source's several budgets the nearest one.
    """
    own = summarise(experiment)
    config = experiment.done[0].config
    episodes, commit = config["args"].get("eval_episodes"), str(config.get("commit"))[:10]
    over = f"{episodes} episodes a seed" if episodes else "held-out data"  # of language models
    over = "exact" if config.get("result") == "eval/exact_return" else over
    protocol = f"evaluation at the last step, {over}; mean over seeds [95 %]"
    ours = {"who": f"**{own['script']}**", "environment": own["environment"], "steps": own["steps"]}
    ours |= {"return": f"**{show(own['mean'])}** {show(own['mean 95 %'])}", "seeds": own["n"], "protocol": protocol}
    algorithm = re.compile(rf"\b({config['script'].replace('_', '.')}|optimal|scripted|random)\b", re.IGNORECASE)
    nearest = {}
    with open(Path(__file__).with_name("reference_returns.csv"), newline="") as file:
        for row in csv.DictReader(file):
            wanted = row["domain"] not in ("throughput", "moonshot", "survey-claim") and algorithm.search(row["algo"])
            if wanted and row["mean"] and base_name(row["env_id"]) == base_name(experiment.env_id):
                steps = int(row["steps"]) if row["steps"].isdigit() else 0
                distance = abs(math.log(max(steps, 1) / max(own["steps"], 1)))
                theirs = {"who": row["algo"], "environment": row["env_id"], "steps": steps or None}
                theirs |= {"return": row["mean"] + (f" ± {row['std_or_ci']}" if row["std_or_ci"] else "")}
                theirs |= {"seeds": row["n_seeds"], "protocol": "; ".join(filter(None, (row["metric"], row["notes"])))}
                key = row["env_id"], row["algo"], row["metric"], row["source"]
                if key not in nearest or distance < nearest[key][0]:
                    nearest[key] = distance, theirs | {"source": row["source"]}
    return [ours | {"source": f"this report, commit {commit}"}, *(row for _, row in nearest.values())]


# ---- Showing ----


def show(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, list):
        return ", ".join(map(show, value)) or "-"
    if isinstance(value, float):
        return f"{value:,.{0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3}f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/").replace("\n", " ")


def table(rows: list[dict], aligned: bool = True) -> str:
    """Markdown. Aligned, its columns also line up as plain text; else a new row changes no other line."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    cells = [header, *[[show(row.get(name)) for name in header] for row in rows]]
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, " | ".join("-" * max(width, 3) for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def short(number: float) -> str:
    """100000 -> 100k"""
    return EngFormatter(sep="")(number)


def digits(value: float) -> str:
    """As show has it, but without commas, which stand between the ends of an interval."""
    return show(float(value)).replace(",", "")


def seeds_of(experiment: Experiment) -> str:
    """11-20, or, where some between are missing, all of them"""
    seeds = sorted(run.seed for run in experiment.done)
    if seeds == [*range(seeds[0], seeds[-1] + 1)] and len(seeds) > 1:
        return f"{seeds[0]}-{seeds[-1]}"
    return ", ".join(map(str, seeds))


def rows_of(experiments: list[Experiment], brief: bool) -> list[dict]:
    """The rows of a page: each experiment's, or one a script."""
    rows, order = [], [*SCRIPT_COLORS]
    experiments = sorted(experiments, key=lambda e: order.index(e.script) if e.script in order else len(order))
    if brief:
        by_script = defaultdict(list)
        for e in experiments:
            by_script[e.script].append(e)
        experiments = []
        for script, same in by_script.items():
            named = [e for e in same if e.env_id == HEADLINES.get(script)] or same
            experiments.append(max(named, key=lambda e: (min(len(e.done), FEW), e.budget)))
    for e in experiments:
        bounds, notes = interval(np.mean, e.scores), e.name().removeprefix(e.group).split(", ")[1:]
        row = {"script": e.script, "environment": ", ".join([e.env_id, *notes])}
        row["steps"] = short(e.budget) + f" {e.unit}" * (e.script in UNITS)
        row["seeds"] = seeds_of(e)
        row["return"] = f"**{digits(e.scores.mean())}**"
        row["return"] += f" [{', '.join(map(digits, bounds))}]" if bounds else ""
        rows.append(row | {"lowest": digits(e.scores.min())})
        rows[-1]["compare with"] = "; ".join([*truths(e), *nearest_published(e)])
    return rows


def truths(experiment: Experiment) -> list[str]:
    """What can be reached, where it can be computed."""
    found = []
    _, reference, who, source = REFERENCES.get(experiment.env_id, (None,) * 4)
    if source and source.rpartition("/")[0] in ("", "results"):  # not a repository
        found.append(f"{digits(reference)} ({who})")
    if reference is None:
        exact = [
            row
            for row in published(experiment)[1:]
            if (row["who"], row["environment"]) == ("optimal", experiment.env_id)
        ]
        found += [f"{row['return'].split(' ')[0]} (optimum)" for row in exact]
    for key, text in BESIDE.items():
        values = [run.last[key] for run in experiment.done if key in run.last]
        if len(values) == len(experiment.done):
            found.append(text.format(digits(np.mean(values))))
    return found


def nearest_published(experiment: Experiment) -> list[str]:
    """At most three results of the same algorithm by others: of each source the best one with the nearest budget."""
    found, budget = {}, max(experiment.budget, 1)
    if experiment.done[0].config["args"].get("algorithm") not in (None, experiment.script):
        return []  # the baseline that a script has beside its own algorithm
    for row in published(experiment)[1:]:
        name = next((name for start, name in SOURCES if row["source"].startswith(start)), None)
        plain_name = row["who"].split(" (")[0].lower().replace("-", "_").split(" ")[0] == experiment.script
        if name and plain_name and not re.search("jax|train batch", f"{row['who']} {row['protocol']}"):
            if (name == "the authors" and "MAX over" in row["protocol"]) or row["return"].startswith("~"):
                continue  # there is the return at that very step beside it; a value that was read off a picture
            steps = row["steps"] or budget
            value = float(row["return"].split(" ± ")[0])
            text = digits(value)
            text += f" at {short(steps)}" * (abs(math.log(steps / budget)) > 0.05)
            other = re.sub(r".*[-_](v\d+).*", r"\1", row["environment"])
            theirs = f" ({name}" + f", on {other}" * (other not in experiment.env_id and other[0] == "v") + ")"
            found.setdefault(name, []).append((abs(math.log(steps / budget)), -value, text + theirs))
    order = [name for _, name in SOURCES if name in found]
    best = sorted((min(found[name])[0], order.index(name)) for name in order)
    return [min(found[order[i]])[-1] for _, i in best[:3]]


def looks_of(experiments: list[Experiment]) -> list[dict]:
    """How each curve of a panel is drawn: the colour says the script, the line which of its experiments."""
    drawn = defaultdict(int)
    looks = [{}] * len(experiments)
    for i in sorted(range(len(experiments)), key=lambda i: -experiments[i].budget):  # the longest is solid
        # A script of the reader's own gets a colour when it is drawn first, and keeps it in all other pictures
        color = SCRIPT_COLORS.setdefault(experiments[i].script, SPARE_COLORS[len(SCRIPT_COLORS) % len(SPARE_COLORS)])
        looks[i] = {"color": color, "linestyle": LINES[drawn[color] % len(LINES)]}
        drawn[color] += 1
    return looks


def floor(values: np.ndarray, random: float | None) -> float:
    """Where an axis begins: at the lowest value, but not below the random policy, nor for the sake of a few points.

    Some first evaluations lie so low that all others would look like one straight line.
    """
    lowest = bottom = values.min()
    high = values.max()
    if random is not None and random < high:
        bottom = max(bottom, random)
    most = np.quantile(values, 0.1)  # nine tenths of the points are above
    if high - most < (high - bottom) / 4:
        bottom = max(bottom, 2 * most - high)
    return bottom if high - lowest > 1.2 * (high - bottom) else lowest  # less is not worth a cut


def plot_curves(experiments: list[Experiment], seconds: bool, threshold: float | None) -> Figure:
    """One panel for each environment: the mean over seeds, and each seed, or where they are many an interval."""
    env_ids = list(dict.fromkeys(e.env_id for e in experiments))
    columns = 2 if len(env_ids) == 4 else min(3, len(env_ids))
    rows = math.ceil(len(env_ids) / columns)
    figure = Figure(figsize=(4.4 * columns + 0.6, 3.3 * rows), layout="constrained")
    for i, env_id in enumerate(env_ids):
        axes, same = figure.add_subplot(rows, columns, i + 1), [e for e in experiments if e.env_id == env_id]
        same.sort(key=lambda e: (e.script, -e.budget))
        for e, look in zip(same, looks_of(same), strict=True):
            grid, values = on_one_grid([run.curve for run in e.done], seconds)  # (G,), (G, seeds)
            name = e.name(steps=len({other.budget for other in same if other.script == e.script}) > 1)
            dot = "o" if len(grid) == 1 else None
            seeds = f"{len(e.done)} seeds" if len(e.done) > 1 else "one seed"
            axes.plot(grid, values.mean(-1), **look, marker=dot, label=f"{name} ({seeds})", zorder=3)
            if 1 < len(e.done) <= FEW:
                for run in e.done:
                    axes.plot(run.curve[:, int(seconds)], run.curve[:, 2], color=look["color"], lw=0.8, alpha=0.4)
            elif len(grid) and (band := interval(np.mean, values, resamples=2_000)):
                axes.fill_between(grid, *band, color=look["color"], alpha=0.2, linewidth=0)
        random, reference, who, _ = REFERENCES.get(env_id, (None,) * 4)
        values = np.concatenate([run.curve[:, 2] for e in same for run in e.done])
        bottom, top, lines = floor(values, random), values.max(), []
        if random is not None:  # where nearly all is at the optimum, its last digits are no picture
            bottom = min(bottom, top - (top - random) / 40)
        room = top - bottom
        if reference is not None and bottom < reference <= top + room / 3:
            lines.append((reference, (0, (1, 2)), f"reference: {who}"))
        if threshold is not None:
            lines.append((threshold, "--", f"threshold: {threshold:g}"))
        ends = [np.median([run.curve[-1, int(seconds)] for run in e.done]) for e in same]  # one seed may stall
        along = np.linspace(0, 1.03 * max(ends), 50)  # of many points, so that the legend keeps away
        for height, line, name in lines:
            axes.plot(along, np.full(50, height), color=GREY, linewidth=1, linestyle=line, label=name, zorder=1)
        bottom, top = min([bottom, *(line[0] for line in lines)]), max([top, *(line[0] for line in lines)])
        if top > bottom:
            axes.set_ylim(bottom - (top - bottom) / 20, top + (top - bottom) / 20)
        unit, below = " or ".join(dict.fromkeys(e.unit for e in same)), (values < bottom).sum()
        cut = f"\nevaluations below the axis: {below}, the lowest {show(float(values.min()))}" * bool(below)
        axes.set_title(env_id)
        axes.set_xlabel(("seconds" if seconds else unit) + cut)
        axes.set_ylabel(" or ".join(dict.fromkeys(e.metric for e in same)))
        axes.set_xlim(0, along[-1])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        many = len(same) + len(lines) > 4  # too many to find room among the curves
        place = (
            {"loc": "upper center", "bbox_to_anchor": (0.5, -0.32 if cut else -0.22), "ncols": 2}
            if many
            else {"loc": "best"}
        )
        axes.legend(**place)
    return figure


def plot_aggregate(experiments: list[Experiment], rows: list[dict]) -> Figure:
    names = [", ".join(row["which"]) if len(row["which"]) <= 5 else f"{len(row['which'])} environments" for row in rows]
    by_label = {e.label: e for e in experiments}
    scripts = [by_label[row["script"]].name(steps=True) for row in rows]
    labels = [textwrap.fill(f"{script}: {name}", 48) for script, name in zip(scripts, names, strict=True)]
    looks = looks_of([by_label[row["script"]] for row in rows])
    figure = Figure(figsize=(8, 1.0 + sum(0.3 + 0.16 * label.count("\n") for label in labels)), layout="constrained")
    axes = figure.add_subplot()
    for i, (row, look) in enumerate(zip(rows, looks, strict=True)):
        if row["95 %"]:
            axes.plot(row["95 %"], [i, i], color=look["color"], linewidth=9, alpha=0.35, solid_capstyle="butt")
        axes.plot(row["IQM"], i, "o", color=look["color"], markersize=7)
    axes.axvline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("normalised return, interquartile mean")
    return figure


def steps_of(who: str) -> float | None:
    """TD3 on v3, 1M steps -> 1e6"""
    found = re.search(r"([\d.]+)([kM]) steps", who)
    return float(found[1]) * {"k": 1e3, "M": 1e6}[found[2]] if found else None


def plot_overview(experiments: list[Experiment]) -> Figure:
    """A line for each experiment: its seeds, their mean, the interval of the mean; at the right what 1 stands for."""
    figure = Figure(figsize=(10, 0.9 + 0.27 * len(experiments)), layout="constrained")
    axes = figure.add_subplot()
    for i, (e, look) in enumerate(zip(experiments, looks_of(experiments), strict=True)):
        random, reference, who, _ = REFERENCES[e.env_id]
        scores, color = (e.scores - random) / (reference - random), look["color"]
        longer = (steps_of(who) or e.budget) > 1.5 * e.budget  # than ours: no fair comparison
        if bounds := interval(np.mean, scores):
            axes.plot(bounds, [i, i], color=color, linewidth=8, alpha=0.35, solid_capstyle="butt")
        axes.plot(scores, [i] * len(scores), "|", color=color, markersize=9)
        axes.plot(scores.mean(), i, "o", color=color, markersize=6, markerfacecolor="white" if longer else color)
    axes.axvline(1, color=GREY, linewidth=1, linestyle="--")
    names = [f"{e.name()}:  {e.env_id}, {short(e.budget)}" for e in experiments]
    axes.set_yticks(range(len(experiments)), names)
    axes.set_ylim(len(experiments) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("normalised return: 0 is a random policy, 1 the reference at the right")
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    references = [REFERENCES[e.env_id] for e in experiments]
    right.set_yticks(range(len(experiments)), [f"{show(best)}: {who}" for _, best, who, _ in references], fontsize=8)
    right.tick_params(length=0, colors=GREY)
    right.grid(visible=False)
    return figure


def read_frontier(runs: list[Run]) -> tuple[Callable, np.ndarray, float] | None:
    """The best reward as a function of the divergence, where it is known; best-of-n; and where that function ends.

    None where the file is not there, or where the runs did not start from the reference model that it is about.
    """
    if not FRONTIER.exists():
        return None
    try:
        content = read_json(FRONTIER)
        rows = [(row["kl"], row["reward"]) for row in content["optimum"]]
        kls, rewards = np.array(sorted(rows), dtype=float).T  # the first at 0: the reference
        best_of_n = np.array([(row["kl"], row["reward"], row["n"]) for row in content.get("best_of_n", [])]).T
        references = [run.on_frontier[3] for run in runs]
        if not all("reviews/" in json.dumps(run.config["args"]) for run in runs) and not np.allclose(
            references, rewards[0], atol=0.01
        ):
            return None
        # Near 0 the reward rises as the square root of the divergence. Behind the last row nothing more can be gained
        best = interpolate.PchipInterpolator(np.sqrt(kls), rewards)
        return lambda kl: best(np.sqrt(np.clip(kl, 0, kls[-1]))), best_of_n, kls[-1]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        refuse(f"{FRONTIER} is damaged ({error!r})")


def optimum(runs: list[Run], furthest: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The best reward at each divergence, (200,) and (200,), densely from 0 to a little beyond the furthest run."""
    if found := read_frontier(runs):
        best, _, end = found
        kls = np.linspace(0, math.sqrt(np.clip(1.2 * furthest, 1e-3, end)), 200) ** 2  # an estimate may be below 0
        return kls, best(kls)
    return None


def against_the_optimum(experiments: list[Experiment]) -> list[dict]:
    """Of the reward that can be gained at a run's divergence, the share that it has gained."""
    rows = []
    for e in experiments:
        if (runs := e.on_frontier) and (found := read_frontier(runs)):
            kls, rewards = np.array([run.on_frontier[:2] for run in runs]).T
            best, start = found[0](kls), found[0](0)
            # At divergence 0, where nothing can be gained, there is no share; an estimate may lie below
            shares = ((rewards - start) / (best - start)).tolist() if (best > start).all() else []
            row = {"script": e.label, "beta": e.beta, "n": len(runs), "KL": kls.mean(), "reward": rewards.mean()}
            row |= {"reward 95 %": interval(np.mean, rewards), "optimum": best.mean()}
            rows.append(row | {"share": np.mean(shares) if shares else None, "share by seed": shares})
    return rows


def frontier_rows(experiments: list[Experiment]) -> list[dict]:
    """The rows of a page: the same, short."""
    found, rows = against_the_optimum(experiments), []
    names = names_in_a_legend(list(dict.fromkeys(without_flag("beta", row["script"]) for row in found)))
    for row in sorted(found, key=lambda row: (names[without_flag("beta", row["script"])], -(row["beta"] or 0))):
        reward, bounds = f"**{row['reward']:.2f}**", row["reward 95 %"]
        reward += f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""
        shares = [f"{100 * share:.0f}" for share in sorted(row["share by seed"])]
        share = f"**{100 * row['share']:.0f} %**" if shares else "-"
        share += f" ({shares[0]} to {shares[-1]})" if len(shares) > 1 else ""
        short_row = {
            "script": names[without_flag("beta", row["script"])],
            "beta": "-" if row["beta"] is None else f"{row['beta']:g}",
            "KL": f"{row['KL']:.2f}",
        }
        short_row |= {"true reward": reward, "optimum at this KL": f"{row['optimum']:.2f}", "share of the gain": share}
        rows.append(short_row)
    return rows


def without_flag(name: str, label: str) -> str:
    return re.sub(rf" {name}=\S+", "", label)


def over_optimisation(experiment: Experiment) -> dict:
    """Where on the way the true reward was highest, on average over the seeds, and how it ended."""
    _, kls, rewards, scores = np.moveaxis(experiment.along.mean(1), -1, 0)
    peak = rewards.argmax()
    row = {"script": experiment.label, "n": len(experiment.done), "highest reward": rewards[peak], "at KL": kls[peak]}
    row |= {"gain of the score so far": scores[peak] - scores[0]}
    return row | {"reward at the end": rewards[-1], "KL": kls[-1], "gain of the score": scores[-1] - scores[0]}


def names_in_a_legend(labels: list[str]) -> dict[str, str]:
    """By label the script and the one argument that tells it from the script's others; if none does, all of them."""
    names = {}
    for label in labels:
        script, *words = label.split(" ")
        others = [other.split(" ")[1:] for other in labels if other.split(" ")[0] == script]
        alone = [i for i in range(len(words)) if len({other[i] for other in others if i < len(other)}) == len(others)]
        words = [] if len(others) == 1 else [words[alone[0]]] if alone else words
        pairs = [word.partition("=")[::2] for word in words]
        names[label] = ", ".join([script, *(f"{k} {v}".replace("_", " ") for k, v in pairs if v != script)])
    return names


def square_roots(axes: Axes, furthest: float) -> None:
    """An axis of divergences that shows small ones, too: the optimum begins on it as a straight line."""
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    ticks = [tick for tick in (0, 0.2, 1, 2, 4, 8, 16, 32, 64, 128) if tick < 1.2 * furthest]
    ticks = [0] + [tick for tick in ticks if tick > furthest / 150]  # closer ones would be written over one another
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(0, 1.2 * furthest)
    axes.set_xlabel("KL divergence from the reference policy, per reply")


def draw_frontier(axes: Axes, experiments: list[Experiment]) -> None:
    """Reward against divergence, one point a run, a line over beta, below the best reward at each divergence.

    That is a curve where it is known for all of them, else a point for each run.
    """
    groups, members = defaultdict(lambda: defaultdict(list)), {}
    for e in experiments:
        for run in e.on_frontier:
            label = without_flag("beta", e.label)
            groups[label][e.beta].append(run.on_frontier)
            members.setdefault(label, e)
    everything = np.array([point for by_beta in groups.values() for points in by_beta.values() for point in points])
    references = everything[np.isfinite(everything[:, 3]), 3]
    runs, furthest = [run for e in experiments for run in e.on_frontier], max(everything[:, 0].max(), 1e-3)
    if curve := optimum(runs, furthest):
        axes.plot(*curve, color=INK, linewidth=1.2, label="the optimum")
        kls, rewards, counts = best_of_n if len(best_of_n := read_frontier(runs)[1]) else np.empty((3, 0))
        if (shown := kls <= 1.2 * furthest).any():
            name = f"the reference's best of n replies, n to {counts[shown].max():,.0f}"
            axes.plot(kls[shown], rewards[shown], ":", color=GREY, linewidth=1.4, label=name)
    elif np.isfinite(everything[:, 2]).any():
        axes.plot(*everything[:, [0, 2]].T, "_", color=INK, markersize=14, label="the optimum at the same divergence")
    names, drawn, labelled = names_in_a_legend([*groups]), defaultdict(int), []
    for (label, by_beta), look in zip(groups.items(), looks_of([*members.values()]), strict=True):
        means = sorted((*np.mean(points, axis=0), str(beta)) for beta, points in by_beta.items())  # by divergence
        kls, rewards, _, _, betas = zip(*means, strict=True)
        marker = "os^D"[drawn[look["color"]] % 4]
        drawn[look["color"]] += 1
        axes.plot(kls, rewards, **look, marker=marker, markersize=6, label=names[label], zorder=3)
        points = np.concatenate([*by_beta.values()])[:, :2].T
        axes.scatter(*points, color=look["color"], marker=marker, s=12, linewidth=0, alpha=0.5, zorder=3)
        for kl, reward, beta in zip(kls, rewards, betas, strict=True):
            # Where a label stands already, a second one goes above, and the same one is left out
            spot = np.array([math.sqrt(max(kl, 0) / max(furthest, 1e-9)), reward / max(np.ptp(everything[:, 1]), 1e-9)])
            near = {other for other, place in labelled if abs(place - spot).max() < 0.03}
            if beta not in near:
                offset, labelled = (-36, 6) if near else (6, -11), [*labelled, (beta, spot)]
                look_of_text = {"textcoords": "offset points", "fontsize": 8, "color": look["color"]}
                axes.annotate(f"β = {beta}", (kl, reward), offset, **look_of_text)
    square_roots(axes, furthest)
    if len(references):
        axes.plot(0, references.mean(), "s", color=GREY, markersize=6, label="the reference policy", clip_on=False)
    axes.set_ylabel("true reward of the replies")
    axes.set_title("what is reached, for several prices β of the divergence")
    axes.legend(loc="upper left" if curve else "lower right")


def draw_over_optimisation(axes: Axes, experiments: list[Experiment], everything: list[Experiment]) -> None:
    """While policies learn from reward models: the true reward and the model's score, against the divergence.

    everything: the experiments of all such panels, which have their colours and their axes in common.
    """
    models = sorted({rewards_of(e) for e in everything}, key=lambda name: int((re.findall(r"\d+", name) or ["0"])[0]))
    for e in sorted(experiments, key=lambda e: models.index(rewards_of(e))):
        # From pale to dark, the more pairs the reward model has seen; in the middle the script's own colour
        color = np.array(matplotlib.colors.to_rgb(looks_of([e])[0]["color"]))
        shade = 1.3 * ((models.index(rewards_of(e)) + 0.5) / len(models) - 0.5)
        color = color * (1 - shade) if shade > 0 else color - (1 - color) * shade
        points = e.along.copy()  # (evaluations, seeds, 4): step, divergence, true reward, score
        points[..., 3] += points[0, :, 2] - points[0, :, 3]
        points[..., 1] = points[..., 1].clip(min=0)  # of samples it can be a little below
        kls, rewards = points.reshape(-1, 4)[:, 1:3].T
        # Learning goes to and fro: the line is the mean at about the same divergence, at whatever step that was
        bins = np.round(2 * np.sqrt(kls))
        line = np.stack([points.reshape(-1, 4)[bins == number].mean(0) for number in np.unique(bins)], 1)
        name = re.sub(r"(\d)(?=(\d{3})+\b)", r"\1,", rewards_of(e).replace("_", " ").replace("model", "reward model"))
        axes.plot(line[1], line[2], color=color, label=name + f", β = {e.beta:g}" * bool(e.beta), zorder=3)
        axes.plot(line[1], line[3], color=color, linestyle="--", linewidth=1.5, zorder=3)
        axes.plot(kls, rewards, ".", color=color, markersize=5, markeredgewidth=0, alpha=0.4)
    # Further away the true reward is as low as it can be, and the score flat
    furthest = np.clip(max(e.along[..., 1].max() for e in experiments), 1e-3, 40)
    if curve := optimum([run for e in everything for run in e.done], furthest):
        axes.plot(*curve, color=INK, linewidth=1.2, label="the optimum")
    axes.plot([], [], color=GREY, marker=".", label="solid, dots: the true reward")
    axes.plot([], [], color=GREY, linestyle="--", linewidth=1.5, label="dashed: the reward model's score")
    square_roots(axes, furthest)
    axes.set_ylabel("reward")
    axes.set_title("learning from a reward model, " + ("with a price of the divergence" if e.beta else "β = 0"))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)  # among the lines there is no room


def rewards_of(experiment: Experiment) -> str:
    return experiment.done[0].config["args"]["reward"]


def plot_frontier(experiments: list[Experiment]) -> Figure:
    """Reinforcement learning from preferences: what is gained for which distance from the reference policy.

    Above, from the truth and from people's choices. Below, while learning from reward models: without a price of the
    distance, and with one.
    """
    above, pushed = [e for e in experiments if e.on_frontier], [e for e in experiments if len(e.along)]
    below = [part for part in ([e for e in pushed if not e.beta], [e for e in pushed if e.beta]) if part]
    size = (5 * len(below) if below else 6.4, 4.2 * bool(above) + 4.8 * bool(below))
    figure, axes = Figure(figsize=size, layout="constrained"), None
    grid = figure.add_gridspec(bool(above) + bool(below), max(len(below), 1))
    if above:
        draw_frontier(figure.add_subplot(grid[0, :]), above)
    for i, part in enumerate(below):
        axes = figure.add_subplot(grid[-1, i], sharey=axes)
        draw_over_optimisation(axes, part, pushed)
    return figure


def plot_logs(experiments: list[Experiment]) -> Figure:
    """Learning from logs: return against the number of transitions. A panel for each behaviour, from poor to good.

    A small dot for each run, a line through the means.
    """
    firsts, panels = {}, defaultdict(list)
    for e in experiments:
        firsts.setdefault(without_flag("dataset", e.label), e)
        panels[e.env_id, e.data["behaviour"]].append(e)
    names, looks = names_in_a_legend([*firsts]), dict(zip(firsts, looks_of([*firsts.values()]), strict=True))
    for label, e in firsts.items():
        if e.script == "iql" and e.done[0].config["args"].get("temperature") == 0:
            names[label], looks[label] = "behaviour cloning: iql, temperature 0", {"color": CLONING, "linestyle": "-"}
    panels = dict(sorted(panels.items(), key=lambda p: (p[0][0], np.mean([e.data["mean_return"] for e in p[1]]))))
    figure, axes = Figure(figsize=(1 + 3.6 * len(panels), 4), layout="constrained"), {}
    for i, ((env_id, behaviour), members) in enumerate(panels.items()):
        panel = axes[env_id] = figure.add_subplot(1, len(panels), i + 1, sharey=axes.get(env_id))
        returns, earned = defaultdict(lambda: defaultdict(list)), defaultdict(list)
        for e in members:  # there may be several data sets of one size
            returns[without_flag("dataset", e.label)][e.data["transitions"]] += e.scores.tolist()
            earned[e.data["transitions"]].append(e.data["mean_return"])
        sizes = sorted(earned)
        for label, by_size in sorted(returns.items()):
            points = [(size, score) for size, scores in by_size.items() for score in scores]
            means = [np.mean(by_size[size]) for size in sorted(by_size)]
            panel.plot(sorted(by_size), means, **looks[label], marker="o", markersize=5, label=names[label])
            panel.plot(*zip(*points, strict=True), ".", color=looks[label]["color"], markersize=5, alpha=0.4)
        line = [np.mean(earned[size]) for size in sizes]
        panel.plot(sizes, line, color=INK, linestyle=":", linewidth=1.5, label="the behaviour")
        if env_id in REFERENCES:
            _, best, who, _ = REFERENCES[env_id]
            panel.plot(sizes, [best] * len(sizes), color=GREY, linewidth=1, linestyle="--", label=who, zorder=1)
        panel.set_xscale("log")
        panel.set_xticks(sizes, [short(size) for size in sizes])
        panel.minorticks_off()
        panel.set_title(textwrap.fill(re.sub(r" on [^,;]+, seed \d+", "", behaviour), 34), fontsize=9)
        panel.set_xlabel("transitions")
        if not i:
            panel.set_ylabel("return")
    handles = {name: handle for a in figure.axes for handle, name in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 5))
    return figure


def captions(experiments: list[Experiment], threshold: float | None) -> dict[str, str]:
    """What stands under each picture."""
    frontier = "True reward of the replies against their KL divergence from the reference policy, on an axis of square "
    frontier += "roots: a point for each run, a line through the means over beta, and the best that any policy can "
    frontier += "reach at that divergence."
    if any(len(run.along) for e in experiments for run in e.done):
        frontier += " Below, policies while they learn from reward models, without and with a price of the divergence: "
        frontier += "the true reward, and what the reward model believes. Its scores, of which only "
        frontier += "differences have a meaning, are shifted to begin at the true reward. The axis ends at 48 at the "
        frontier += "latest. Dots: evaluations of all seeds; lines: their means at about the same divergence."
    seeds = f"thick the mean over seeds, thin each seed (with more than {FEW} of them, their 95 % interval instead)"
    steps, clock = (f"Evaluation during training{axis}: {seeds}." for axis in ("", ", over the seconds since it began"))
    dotted = " Dotted: the reference by which scores are normalised, where it is near; its steps are its own."
    end = " A mean ends where the first of its seeds ends."
    limit = "" if threshold is None else f" Dashed: the threshold of {threshold:g}."
    hollow = " A hollow dot: the reference had more than 1.5 times the steps, so that less than 1 is no failure."
    return {
        "curves-steps": steps + dotted + limit + end,
        "curves-time": clock + dotted + limit + end,
        "aggregate": "Interquartile mean of all normalised scores of a script, and its 95 % bootstrap interval: 0 is a "
        "random policy, 1 the reference of the environment.",
        "overview": "The last evaluation of every experiment that has a reference: a stroke for each seed, a dot for "
        "their mean, a bar for its 95 % bootstrap interval. 0 is a random policy, 1 the reference named at the right."
        + hollow,
        "frontier": frontier,
        "logs": "Learning from logs: the last evaluation against the number of transitions, a panel for each "
        "behaviour, from poor to good. A small dot for each run, a line through the means. Dotted: what the behaviour "
        "itself earns.",
    }  # fmt: skip


def draw(experiments: list[Experiment], headline: list[dict], output: Path, threshold: float | None) -> dict[str, str]:
    """Writes the pictures; returns their names and captions. Of an earlier report in the same place none is left."""
    frontier = [e for e in experiments if e.on_frontier or len(e.along)]
    logs = [e for e in experiments if e.data]
    several = len({(e.env_id, *map(e.data.get, ("behaviour", "transitions"))) for e in logs}) > 1
    timed = [e for e in experiments if all(np.isfinite(run.curve[:, 1]).all() for run in e.done)]
    with_reference = [e for e in experiments if headline and e.env_id in REFERENCES]
    plots = {
        "curves-steps": (plot_curves, experiments, False, threshold),
        "curves-time": (plot_curves, timed, True, threshold),
        "aggregate": (plot_aggregate, with_reference, headline),
        "overview": (plot_overview, with_reference),
        "frontier": (plot_frontier, frontier),
        "logs": (plot_logs, logs if several else []),
    }
    with matplotlib.rc_context(STYLE):
        for name, (plot, data, *options) in plots.items():
            figure = plot(data, *options) if data else None
            for kind in "png", "svg":
                path, picture = output / f"{name}.{kind}", io.BytesIO()
                if figure:  # without its date: the same data, the same file
                    options = {"metadata": {"Date": None}} if kind == "svg" else {"pil_kwargs": {"optimize": True}}
                    figure.savefig(picture, format=kind, **options)
                    figure.set_layout_engine("none")  # it is laid out by now
                    write(path, picture.getvalue())
                else:
                    path.unlink(missing_ok=True)
    texts = captions(experiments, threshold)
    return {name: texts[name] for name, (_, data, *_) in plots.items() if data}


def method(experiments: list[Experiment]) -> str:
    env_ids = list(dict.fromkeys(e.env_id for e in experiments))
    names = "environment", "random", "reference", "who", "source of the reference"
    rows = [dict(zip(names, (env_id, *REFERENCES[env_id]), strict=True)) for env_id in env_ids if env_id in REFERENCES]
    absent = ", ".join(env_id for env_id in env_ids if env_id not in REFERENCES)
    return f"""\
A score is the return of a run's last evaluation, the deviation that of the seeds. SPS are a run's steps divided by its
seconds, evaluations included. Intervals are 95 % bootstrap intervals over seeds, for the aggregate within each
environment; that of a probability is Wilson's. There are none under three seeds. With three and four it is their range,
which holds the true mean in 75 and 87 % of cases only. In the aggregate all environments weigh the same.

Normalised: 0 is a random policy, 1 the reference. Random returns: {RANDOM_SOURCE}.
Without a reference, and so not in the aggregate: {absent or "none"}.

{table(rows) if rows else ""}"""


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: on a full disk the one that was there stays."""
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no plain file")  # such as /dev/null, which would be replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.tmp")
    try:
        new.write_bytes(content if isinstance(content, bytes) else legible(content).encode())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def main() -> None:
    args = parse(Args, __doc__)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold bytes that are no text
    if bool(args.runs) == bool(args.compare):
        refuse("name the runs, or two sets of them with --compare, and not both")
    if args.threshold is not None and not math.isfinite(args.threshold):
        refuse(f"--threshold {args.threshold} is not a finite number")
    if args.table and (args.compare or args.baseline or args.save_baseline or args.save_versions):
        refuse("--table only prints a table: leave out --compare, --baseline, --save-baseline, --save-versions")
    if args.in_a_row < 1:
        refuse(f"--in-a-row is {args.in_a_row} but must be at least 1")
    names = args.compare or args.runs
    sets = [legible(name.rstrip("/")) if args.compare else "" for name in names]
    found = [find_runs(name, group) for name, group in zip(names, sets, strict=True)]
    if args.compare and (twice := {run.folder for run in found[0]} & {run.folder for run in found[1]}):
        refuse(f"--compare: {min(twice)} is in both sets; a run belongs to one of them")
    runs = [run for of_set in found for run in of_set]
    all_experiments = sort_out(runs, args.seeds)
    all_experiments = [e for e in all_experiments if {*args.only} <= {*e.label.split(" "), *e.env_id.split(", ")}]
    if not all_experiments:
        refuse(f"--only {' '.join(args.only)}: no experiment has all of these in its label and environment")
    experiments = [e for e in all_experiments if e.done]
    missing = [f"- {e.label} on {e.env_id}, seed {s}: {why}" for e in all_experiments for s, why in e.missing.items()]
    whole = args.allow_missing or not missing
    if args.table:
        if not whole:
            refuse(f"--table: runs are missing, such as {missing[0][2:]}; --allow-missing makes it all the same")
        rows = frontier_rows(experiments) if args.table == "frontier" else rows_of(experiments, args.table == "short")
        nothing = "started from the task's reference model" if args.table == "frontier" else "ended"
        print(table(rows, aligned=False) if rows else f"no run is known to have {nothing}")
        return
    versions = lock(experiments) if args.save_versions else ""
    pairs = pair_up(experiments, sets) if args.compare and whole else {}
    notes = unequal(pairs, experiments) if pairs else []
    headline = aggregate([e for e in experiments if not pairs or e.env_id in pairs]) if whole else []
    sections = {"Results": [summarise(e) for e in all_experiments]}
    if others := [row for e in experiments for row in beside(e)]:
        sections["What the last evaluations found beside the score"] = others
    if best := against_the_optimum(experiments):
        sections["Against the optimum at the same KL divergence"] = best
    if pushed := [over_optimisation(e) for e in experiments if len(e.along)]:
        sections["Learning from a reward model: the true reward, and what the model believes"] = pushed
    if headline:
        sections["Environments with a reference, normalised"] = headline
    if pairs:
        sections[f"Probability that a run of {sets[0]} beats one of {sets[1]}"] = compare(pairs)
    if args.threshold is not None:
        title = f"Until a return of {args.threshold:g}" + f" {args.in_a_row} times in a row" * (args.in_a_row > 1)
        sections[title] = [until(e, args.threshold, args.in_a_row) for e in experiments]
    if args.baseline:
        sections[f"Against {args.baseline}"] = gate(experiments, args.baseline)
    judged = [row for rows in sections.values() for row in rows if "verdict" in row]
    red = [row for row in judged if row["verdict"] != "ok"]
    nothing = bool(args.baseline) and all(row["verdict"].startswith("not judged") for row in judged)
    worse = [row for row in red if row["verdict"] == "worse" or nothing or not args.allow_missing]
    failed = bool(worse or nothing or not whole)

    console = Console(soft_wrap=True, markup=False, highlight=False)
    if notes:
        console.print("\n".join(notes) + "\n", style="red")
    for title, rows in sections.items():
        console.print(f"{title}\n{table(rows)}\n")
    alarms = [f"{row['script']} on {row['environment']}: {row['of']} {row['verdict']}" for row in red]
    alarms = "\n".join(["Runs are missing:", *missing] * bool(missing) + ["Against the baseline:", *alarms] * bool(red))
    if nothing:
        alarms += "\nNothing was judged: the baseline and the runs need at least three seeds of the same experiment."
    if not whole:
        alarms += "\nNo aggregate: a mean over the survivors would flatter (--allow-missing gives it all the same)."
    if alarms:
        console.print(alarms, style="red")

    output = args.output or Path(os.path.commonpath([run.folder.resolve().parent for run in runs]), "report")
    try:
        pictures = draw(experiments if args.pictures else [], headline, output, args.threshold)
        content = json.dumps({"missing": missing, "unequal": notes, **sections}, indent=1, default=float)
        write(output / "report.json", content + "\n")
        rows = [row for e in experiments for row in published(e)]
        sections["Beside published results"] = [row for i, row in enumerate(rows) if row not in rows[:i]]
        sections["How each row was made"] = [reproduce(e) for e in experiments]
        parts = [
            "# Report",
            "\n".join(notes),
            alarms,
            *(f"## {title}\n\n{table(rows)}" for title, rows in sections.items()),
        ]
        parts += [f"![{name}]({name}.png)\n\n*{caption}*" for name, caption in pictures.items()]
        parts += ["## How to read this", method(experiments)]
        write(output / "report.md", "\n\n".join(part for part in parts if part).rstrip() + "\n")
        if args.save_baseline and not failed:
            text = json.dumps({"experiments": [baseline_entry(e) for e in experiments]}, indent=1)
            text = re.sub(r"(?<=\[)\n[^][{}]*(?=\])", lambda row: re.sub("\n *", " ", row[0]).strip(), text)  # one line
            write(args.save_baseline, text + "\n")
        if args.save_versions:
            write(args.save_versions, versions)
    except OSError as error:
        refuse(f"the report can't be written: {error}")
    files = ["report.md", "report.json", *(f"{name}.png and .svg" for name in pictures)]
    console.print(f"Written to {output}: {', '.join(files)}")
    if args.save_baseline:
        why = "something is worse, or not judged" if whole else "runs are missing"
        console.print(f"No baseline is written: {why}" if failed else f"Baseline: {args.save_baseline}")
        for e in experiments if not failed else []:
            if len(e.done) < 3:
                few = f"{e.label} on {e.env_id} has only {len(e.done)} of the three seeds that a baseline needs"
                console.print(f"warning: {few}: against it nothing can be judged", style="red")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
