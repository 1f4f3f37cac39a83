"""The run contract: what every script promises of a run, its folder, its end, and its answers to mistakes."""

import fcntl
import gc
import importlib
import json
import os
import pickle
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, call, rows, start, timeless
from facts import FACTS
from safetensors.numpy import load_file as load_safetensors

each_script = pytest.mark.parametrize("script", [path.stem for path in SCRIPTS])
# For what is the same text in all scripts of a kind: they keep PyTorch's files, NumPy's or Hugging Face's
KINDS = [path.stem for path in SCRIPTS if path.stem in ("ppo", "q_learning", "dpo")]
each_kind = pytest.mark.parametrize("script", KINDS)
ACTING = [path.stem for path in SCRIPTS if FACTS[path.stem].acts]  # in an environment: it has episodes and films
IN_TORCH = [path.stem for path in SCRIPTS if path.stem != "q_learning"]
IN_GYMNASIUM = [path.stem for path in SCRIPTS if FACTS[path.stem].env_class]


def tiny(script, *flags):
    return [*FACTS[script].tiny, *map(str, flags)]


def weights(script, run_dir):
    path = run_dir / FACTS[script].model
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    return importlib.import_module(f"algorithms.{script}").load_file(path)["model"]


def contents(run_dir):
    """Of each file in the folder and in the folders within."""
    return {path.relative_to(run_dir): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def evaluations(script, run_dir):
    """In which quarters of a tiny run they were: a script that plays whole episodes is there some steps later."""
    return [row["global_step"] // FACTS[script].quarter for row in rows(run_dir) if FACTS[script].result in row]


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a script's command line inside this process: cli("ppo", "--seed", 2) -> (exit code, stdout, stderr)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(script, *flags):
        module = importlib.import_module(f"algorithms.{script}")
        monkeypatch.setattr(sys, "argv", [f"algorithms/{script}.py", *map(str, flags)])
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        capsys.readouterr()
        gc.freeze()  # so that the collection after the run need not search a million objects of PyTorch
        try:
            module.main()
            code = 0
        except SystemExit as end:
            code = end.code
        # The run's handlers hold the run, and the run its folder's lock, as long as this process lives
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.collect()
        gc.unfreeze()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def finished(cli, tmp_path, tmp_path_factory):
    """A finished tiny run of a script; one run serves all tests, each has a copy."""

    def make(script, name="run"):
        if script not in FINISHED:
            run_dir = tmp_path_factory.mktemp("finished") / "run"
            code, _, err = cli(script, *tiny(script), "--run-dir", run_dir)
            assert code == 0, err
            FINISHED[script] = run_dir
        return shutil.copytree(FINISHED[script], tmp_path / name)

    return make


FINISHED = {}


@each_script
def test_a_run_folder_holds_all_it_should(script, cli, tmp_path):
    code, out, err = cli(script, *tiny(script), "--seed", 7)
    assert code == 0, err
    (run_dir,) = (tmp_path / "runs").iterdir()
    facts = FACTS[script]
    assert re.fullmatch(rf"{facts.task}__{script}__7__[\d-]+", run_dir.name)
    files = {"config.json", "metrics.jsonl", facts.checkpoint, Path(facts.model).parts[0], ".lock", *facts.files}
    assert {path.name for path in run_dir.iterdir()} == files
    config = json.loads((run_dir / "config.json").read_text())
    assert config["script"] == script
    assert config["args"]["seed"] == 7
    assert config["args"].get("device", "cpu") == "cpu"
    assert config["command"][1:3] == facts.tiny[:2]
    assert config["versions"]["numpy"] == np.__version__
    assert config["versions"]["gymnasium"] == gym.__version__
    assert config["hardware"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (config["commit"] or "").removesuffix("-dirty") == commit
    metrics = rows(run_dir)
    assert all({"global_step", "time"} < row.keys() for row in metrics)
    steps = [row["global_step"] for row in metrics]
    assert steps == sorted(steps)
    assert evaluations(script, run_dir) == [1, 2, 3, 4]
    for name in [*facts.logged, "charts/SPS", "charts/learning_rate"]:
        assert any(name in row for row in metrics), name
    module = importlib.import_module(f"algorithms.{script}")
    assert module.load_file(run_dir / facts.checkpoint)["step"] == 4 * facts.quarter
    assert str(run_dir.relative_to(tmp_path)) in out
    assert facts.goes_on in out
    assert "%|" not in err, "no progress bar where there is no terminal"


def register_as(name, script, **kwargs):
    """The environment of a script's tiny run under another name."""
    module, cls = FACTS[script].env_class.rsplit(".", 1)
    gym.register(name, f"{module}:{cls}", **kwargs)


@pytest.mark.parametrize("script", [script for script in KINDS if script in ACTING])
def test_folders_of_runs_never_collide_and_have_safe_names(script, cli, tmp_path):
    register_as("space/Short-v1", script, max_episode_steps=9)
    for _ in range(2):
        assert cli(script, *tiny(script), "--env-id", "space/Short-v1", "--total-timesteps", 128)[0] == 0
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith("space-Short-v1__") for folder in folders)


@each_script
def test_same_seed_same_bits_in_another_process_and_another_seed_another_run(script, cli, finished, tmp_path):
    a, b, c = tmp_path / "a", finished(script, "b"), tmp_path / "c"
    result = call(script, *tiny(script), "--seed", 1, "--run-dir", a)  # as it is without this flag
    assert result.returncode == 0, result.stderr
    assert cli(script, *tiny(script), "--seed", 2, "--run-dir", c)[0] == 0
    assert timeless(a) == timeless(b)
    assert same(weights(script, a), weights(script, b))
    assert timeless(a) != timeless(c)
    assert not same(weights(script, a), weights(script, c))


@pytest.mark.parametrize("script", ACTING)
def test_no_two_parts_of_a_run_play_the_same_episodes(script, cli, monkeypatch):
    """After each checkpoint the environments begin anew, with seeds that follow from the step."""
    module, quarter, steps = importlib.import_module(f"algorithms.{script}"), FACTS[script].quarter, []
    make_envs = module.make_envs
    monkeypatch.setattr(module, "make_envs", lambda args, step: (steps.append(step), make_envs(args, step))[1])
    short = ["--total-timesteps", quarter, "--checkpoint-frequency", quarter // 4]
    assert cli(script, *tiny(script), *short)[0] == 0
    assert len(set(steps)) == len(steps) > 1


ON_DATA = ["--model-name", "a-model", "--dataset", "pairs.jsonl"]


@pytest.mark.parametrize(
    ("script", "flags", "name"),
    [(script, [], "make_agent") for script in IN_TORCH if script in ACTING]
    + [(script, ON_DATA, "load") for script in IN_TORCH if script not in ACTING]
    + [(script, [], "word_tokenizer") for script in IN_TORCH if script not in ACTING],
)
def test_first_weights_are_drawn_with_the_seed(script, flags, name, cli, monkeypatch):
    """Also those of the reviews' reference, which is made right after its tokenizer."""
    seeds = []

    def make(*_):
        seeds.append(torch.initial_seed())
        raise SystemExit

    monkeypatch.setattr(f"algorithms.{script}.{name}", make)
    for seed in 1, 2:
        cli(script, *tiny(script), *flags, "--seed", seed)
    assert seeds == [1, 2]


@pytest.mark.parametrize(
    ("script", "flags", "small"),
    [(script, [], True) for script in IN_TORCH]
    + [(script, ["--env-id", "ALE/Pong-v5"], False) for script in ("ppo", "dqn")]
    + [(script, ON_DATA, False) for script in IN_TORCH if script not in ACTING],
)
def test_only_small_networks_are_kept_from_a_gpu(script, flags, small, monkeypatch, tmp_path):
    module, told = importlib.import_module(f"algorithms.{script}"), []

    def choose(name, small):
        told.append(small)
        raise SystemExit

    monkeypatch.setattr(module, "choose_device", choose)
    args = tyro.cli(module.Args, args=[*tiny(script), *flags, "--run-dir", str(tmp_path / "run")])
    for function in module.train, module.evaluate_saved:
        with pytest.raises(SystemExit):
            function(args)
    assert told == [small, small]


@each_script
def test_watching_a_run_does_not_change_it(script, cli, finished, tmp_path):
    facts, plain = FACTS[script], finished(script, "plain")
    variants = {
        "often": ["--eval-frequency", facts.quarter // 4],
        "never": ["--eval-frequency", 10**9],
        "tracked": ["--track"],
    }
    films = "capture_video" in importlib.import_module(f"algorithms.{script}").Args.__dataclass_fields__
    if films:
        variants["filmed"] = ["--capture-video", "--eval-frequency", 2 * facts.quarter]
    for name, flags in variants.items():
        code, _, err = cli(script, *tiny(script), "--run-dir", tmp_path / name, *flags)
        assert code == 0, err
    for name in variants:
        assert same(weights(script, plain), weights(script, tmp_path / name)), name
    assert rows(tmp_path / "never")[-1][facts.result] == rows(plain)[-1][facts.result]
    names = [path.name for path in (tmp_path / "filmed").glob("videos/*.mp4")]
    assert sorted(int(re.match(r"step-(\d+)", name)[1]) // facts.quarter for name in names) == ([2, 4] if films else [])


@each_kind
def test_offline_wandb_has_the_rows_of_metrics_jsonl(script, cli, tmp_path):
    run_dir = tmp_path / "run"
    assert cli(script, *tiny(script), "--run-dir", run_dir, "--track", "--wandb-project-name", "a-project")[0] == 0
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    wandb = Path(sys.executable).with_name("wandb")
    out = subprocess.run(
        [wandb, "leet", "inspect", "--json", offline], capture_output=True, text=True, check=True
    ).stdout
    records = [json.loads(line) for line in out.splitlines()]
    (about,) = (record["run"] for record in records if record["type"] == "run")
    assert about["project"] == "a-project"
    assert about["config"]["update"]["total_timesteps"] == 4 * FACTS[script].quarter
    (metric,) = (record["metric"] for record in records if record["type"] == "metric")
    assert metric["step_metric"] == "global_step"
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [{k: v for k, v in row.items() if k[0] != "_"} for row in history] == rows(run_dir)


def wandb_history(offline_run):
    """The rows of an offline W&B run: [(number, row)]"""
    inspect = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", offline_run]
    out = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in out.splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [(row["_step"], {k: v for k, v in row.items() if k[0] != "_"}) for row in history]


@each_kind
def test_wandb_gets_each_row_once_also_when_a_killed_run_goes_on(script, cli, tmp_path, monkeypatch):
    module = importlib.import_module(f"algorithms.{script}")
    run_dir, save = tmp_path / "run", module.Run.save

    def dying(self, step):
        if step // FACTS[script].quarter == 2:
            raise SystemExit(-9)
        save(self, step)

    monkeypatch.setattr(module.Run, "save", dying)
    assert cli(script, *tiny(script), "--run-dir", run_dir, "--track")[0] == -9
    killed = len(rows(run_dir))
    monkeypatch.setattr(module.Run, "save", save)
    import wandb

    wandb.finish()
    assert cli(script, "--run-dir", run_dir, "--resume", "--track")[0] == 0
    first, second = (wandb_history(path) for path in sorted((run_dir / "wandb").glob("offline-run-*")))
    assert [number for number, _ in first] == list(range(killed))
    assert 0 < second[0][0] < killed, "both have the rows from the first checkpoint to the death"
    assert {number: row["global_step"] for number, row in first + second} == {
        number: row["global_step"] for number, row in enumerate(rows(run_dir))
    }
    assert dict(second) == dict(list(enumerate(rows(run_dir)))[second[0][0] :])


@each_kind
def test_wandb_that_has_a_row_does_not_get_it_again(script, cli, tmp_path, monkeypatch):
    """Online, W&B remembers: it continues its run at the row after the last that it got."""
    import wandb

    sent, log, step = [], wandb.Run.log, wandb.Run.step
    monkeypatch.setattr(wandb.Run, "log", lambda self, row, **rest: (sent.append(rest["step"]), log(self, row, **rest)))
    monkeypatch.setattr(wandb.Run, "step", property(lambda self: max(4, step.fget(self))))
    assert cli(script, *tiny(script), "--run-dir", tmp_path / "run", "--track")[0] == 0
    assert sent == list(range(4, len(rows(tmp_path / "run"))))


@each_kind
def test_wandb_is_told_how_the_run_ended(script, cli, tmp_path, monkeypatch):
    import wandb

    module = importlib.import_module(f"algorithms.{script}")
    codes, finish = [], wandb.Run.finish
    monkeypatch.setattr(wandb.Run, "finish", lambda self, *code: (codes.append(*code or (0,)), finish(self, *code))[1])
    assert cli(script, *tiny(script), "--track")[0] == 0
    monkeypatch.setattr(module.Run, "stopped", lambda self: setattr(self, "stop_signal", signal.SIGTERM) or True)
    assert cli(script, *tiny(script), "--track")[0] == 143
    assert codes == [0, 143]


DEATHS = os.environ.get("DEATHS")  # DEATHS=20 python -m pytest tests/test_contract.py -k killed_and_resumed


@pytest.mark.timeout(100 * int(DEATHS or 3))
@pytest.mark.parametrize(
    ("script", "flags"), [(path.stem, flags) for path in SCRIPTS for flags in FACTS[path.stem].resumed]
)
def test_killed_and_resumed_equals_unbroken(script, flags, cli, tmp_path):
    flags = tiny(script, *flags)
    total = int(flags[len(flags) - flags[::-1].index("--total-timesteps")])
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert cli(script, *flags, "--run-dir", unbroken)[0] == 0  # here, in another interpreter than those that die
    process = start(script, *flags, "--run-dir", killed)
    rng = np.random.default_rng(0)
    deaths = 0
    while True:
        goal = reached(killed) + rng.uniform(0.1, 0.4) * total  # where it dies next
        if goal > 0.9 * total:  # too near to its end to be sure of that: some time after its start
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 0.5))
        else:
            while process.poll() is None and reached(killed) < goal:
                time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL, process.stderr.read()
        deaths += 1
        if (killed / "config.json").exists():
            process = start(script, "--run-dir", killed, "--resume")
        else:
            process = start(script, *flags, "--run-dir", killed)
        if deaths == int(DEATHS or FACTS[script].deaths):
            assert process.wait() == 0, process.stderr.read()
            break
    print(f"{script} died {deaths} times")
    assert deaths, "it was killed at least once"
    assert timeless(killed) == timeless(unbroken)
    assert same(weights(script, killed), weights(script, unbroken))


def reached(run_dir):
    """The step of the last whole row."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(-min(9999, os.fstat(file.fileno()).st_size), os.SEEK_END)  # it is asked often, of long files
            return json.loads(file.read().splitlines()[-1])["global_step"]
    except (OSError, IndexError, ValueError):
        return 0


@pytest.mark.parametrize(
    ("script", "number", "code"),
    [(path.stem, signal.SIGTERM, 143) for path in SCRIPTS] + [("ppo", signal.SIGINT, 130)],
)
def test_a_signal_saves_says_how_to_go_on_and_nothing_is_lost(script, number, code, tmp_path):
    run_dir, enough = tmp_path / "run", 2 * FACTS[script].quarter
    process = start(
        script, *tiny(script), "--total-timesteps", 10**6, "--checkpoint-frequency", 10**6, "--run-dir", run_dir
    )
    while process.poll() is None and reached(run_dir) < enough:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"--run-dir {run_dir} --resume" in out
    assert "Traceback" not in err
    before = rows(run_dir)
    step = importlib.import_module(f"algorithms.{script}").load_file(run_dir / FACTS[script].checkpoint)["step"]
    assert step >= enough
    assert before[-1]["global_step"] <= step
    if script == "ppo":  # it writes a row of losses in each turn of its loop, others in some
        assert before[-1]["global_step"] == step
    process = start(script, "--run-dir", run_dir, "--resume")
    while process.poll() is None and reached(run_dir) < step + enough:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    after = rows(run_dir)
    assert after[: len(before)] == before
    assert len(after) > len(before)
    assert [row["time"] for row in after] == sorted(row["time"] for row in after), "the clock goes on where it stopped"


@pytest.mark.parametrize("script", ACTING)
@pytest.mark.parametrize("quarter", [2, 4])
def test_a_signal_does_not_wait_for_an_evaluation_which_is_repeated_when_the_run_goes_on(
    script, quarter, cli, finished, tmp_path, monkeypatch
):
    module = importlib.import_module(f"algorithms.{script}")
    evaluate = module.evaluate

    def interrupted(act, args, name, stopped):
        assert not stopped()

        def act_and_stop(obs):
            if int(name.removeprefix("step-")) // FACTS[script].quarter == quarter:
                signal.raise_signal(signal.SIGTERM)
            return act(obs)

        return evaluate(act_and_stop, args, name, stopped)

    monkeypatch.setattr(module, "evaluate", interrupted)
    code, out, err = cli(script, *tiny(script), "--run-dir", tmp_path / "run")
    assert code == 143, err
    assert "Stopped at step" in out
    assert evaluations(script, tmp_path / "run")[-1] == quarter - 1
    monkeypatch.setattr(module, "evaluate", evaluate)
    assert cli(script, "--run-dir", tmp_path / "run", "--resume")[0] == 0
    assert timeless(tmp_path / "run") == timeless(finished(script, "unbroken"))


@each_kind
def test_the_printed_command_works_in_a_shell(script, cli, tmp_path):
    run_dir = tmp_path / "it's a folder"
    code, out, _ = cli(script, *tiny(script), "--run-dir", run_dir)
    assert code == 0
    words = shlex.split(out.splitlines()[-1])
    assert words == ["python", f"algorithms/{script}.py", "--run-dir", str(run_dir), *FACTS[script].goes_on.split()]


@each_script
def test_evaluate_repeats_the_last_evaluation_and_changes_nothing(script, cli, finished):
    run_dir = finished(script)
    last, before = [row for row in rows(run_dir) if FACTS[script].result in row][-1], contents(run_dir)
    code, out, err = cli(script, "--run-dir", run_dir, "--evaluate")
    assert code == 0, err
    shown = dict(re.findall(r"(eval/\w+) ([-+.\de]+)", out))
    all_of_it = {name for name in last if name.startswith("eval/")}
    assert shown.keys() >= ({"eval/episodic_return", "eval/return_std"} if script in ACTING else all_of_it)
    for name, value in shown.items():
        assert value == f"{last[name]:.4g}"
    assert before == contents(run_dir), "evaluating changes nothing"


@pytest.mark.parametrize("script", ACTING)
def test_evaluate_films(script, cli, finished):
    run_dir = finished(script)
    assert "2 episodes" in cli(script, "--run-dir", run_dir, "--evaluate")[1]
    code, out, _ = cli(script, "--run-dir", run_dir, "--evaluate", "--capture-video", "--eval-episodes", 1)
    assert code == 0
    assert "1 episodes" in out
    (film,) = (run_dir / "videos").glob("*.mp4")
    frames = film_of(film)
    assert len(frames) > 5
    assert frames[0].std() > 5, "something is to be seen"
    assert (frames[0] != frames[-1]).any(), "and it moves"


def film_of(path):
    from moviepy import VideoFileClip

    with VideoFileClip(str(path)) as clip:
        return list(clip.iter_frames())


@each_script
def test_resuming_a_finished_run_adds_nothing(script, cli, finished):
    run_dir = finished(script)
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert cli(script, "--run-dir", run_dir, "--resume")[0] == 0
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@each_script
def test_a_run_killed_before_its_first_checkpoint_begins_anew(script, cli, finished):
    whole, cut = finished(script, "whole"), finished(script, "cut")
    cut_before_its_first_checkpoint(script, cut)
    assert cli(script, "--run-dir", cut, "--resume")[0] == 0
    assert timeless(cut) == timeless(whole)


@pytest.mark.parametrize("script", ["dpo", "reward_model"])
def test_such_a_run_draws_the_same_lora(script, cli, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli(script, *tiny(script), "--lora-rank", 2, "--run-dir", whole)[0] == 0
    shutil.copytree(whole, cut)
    cut_before_its_first_checkpoint(script, cut)
    assert cli(script, "--run-dir", cut, "--resume")[0] == 0
    assert timeless(cut) == timeless(whole)


def cut_before_its_first_checkpoint(script, run_dir):
    (run_dir / FACTS[script].checkpoint).unlink()
    (run_dir / FACTS[script].model).unlink(missing_ok=True)  # with LoRA it has another name
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 99')  # half a row


ELSEWHERE = {"device", "track", "wandb_project_name", "run_dir", "resume", "evaluate"}  # tested by themselves


@pytest.mark.parametrize(
    ("script", "name"),
    [(path.stem, name) for path in SCRIPTS for name, value in FACTS[path.stem].changes.items() if value is not None],
)
def test_every_flag_is_recorded_and_changes_something(script, name, cli, base_of, tmp_path):
    value = FACTS[script].changes[name]
    flag = name.replace("_", "-")
    given = [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", value]
    quarter = FACTS[script].quarter
    short = ["--total-timesteps", quarter, "--checkpoint-frequency", quarter // 2, "--eval-frequency", quarter // 2]
    changed = tmp_path / "changed"
    code, _, err = cli(script, *tiny(script), *short, *given, "--run-dir", changed)
    assert code == 0, err
    assert json.loads((changed / "config.json").read_text())["args"][name] == value
    assert trace(changed) != base_of(script, short)


def trace(run_dir):
    return timeless(run_dir), sorted(path.name for path in run_dir.iterdir())


@pytest.fixture
def base_of(cli, tmp_path_factory):
    """What a script's run with these flags leaves; one run serves all tests."""

    def make(script, flags):
        if script not in BASES:
            run_dir = tmp_path_factory.mktemp("base") / "run"
            assert cli(script, *tiny(script), *flags, "--run-dir", run_dir)[0] == 0
            BASES[script] = trace(run_dir)
        return BASES[script]

    return make


BASES = {}


@each_script
def test_no_flag_is_left_out(script):
    flags = importlib.import_module(f"algorithms.{script}").Args.__dataclass_fields__
    assert set(FACTS[script].changes) | ELSEWHERE >= set(flags)
    assert set(FACTS[script].changes) <= set(flags)


class Odd(gym.Env):
    """An environment with the spaces that it is given."""

    def __init__(self, observation_space, action_space, render_mode=None):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return (
            self.observation_space.sample(),
            0.0,
            True,
            False,
            {},
        )


BOX, DISCRETE = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(2)
for name, spaces in {
    "Sequence": (gym.spaces.Sequence(DISCRETE), DISCRETE),
    "Graph": (gym.spaces.Graph(BOX, None), DISCRETE),
    "MultiBinaryAction": (BOX, gym.spaces.MultiBinary(3)),
    "IntegerAction": (BOX, gym.spaces.Box(0, 9, (2,), np.int64)),
    "TupleAction": (BOX, gym.spaces.Tuple([DISCRETE, BOX])),
}.items():
    gym.register(f"Odd{name}-v0", Odd, disable_env_checker=True,
                 kwargs={"observation_space": spaces[0], "action_space": spaces[1]})  # fmt: skip

MISTAKES = {  # of any script
    "--{rate} -1": "--{rate}",
    "--{rate} nan": "--{rate}",
    "--{rate} inf": "--{rate}",
    "--{rate} fast": "--{rate}",
    "--{rate}s 1": "--{rate}",
    "--total-timesteps 0": "--total-timesteps",
    "--total-timesteps -5": "--total-timesteps",
    "--total-timesteps 1e5": "--total-timesteps",
    "--seed -1": "--seed",
    "--seed 18446744073709551616": "--seed",
    "--seed 1.5": "--seed",
    "--eval-frequency 0": "--eval-frequency",
    "--checkpoint-frequency 0": "--checkpoint-frequency",
    "--resume": "--run-dir",
    "--evaluate": "--run-dir",
    "--resume --run-dir nothing-here": "nothing-here",
    "--evaluate --run-dir nothing-here": "nothing-here",
    "--unknown-flag": "--unknown-flag",
    "stray": "stray",
}
MISTAKES_WITH = {  # of any script with this flag
    "device": {"--device cuda:99": "cpu", "--device tpu": "cpu"},
    "gamma": {"--gamma 1.5": "--gamma", "--gamma -0.1": "--gamma"},
    "num_envs": {"--num-envs 0": "--num-envs", "--total-timesteps 2047 --num-envs 2": "--num-envs"},
    "eval_episodes": {"--eval-episodes 0": "--eval-episodes"},
}
MISTAKES_IN_GYMNASIUM = {
    "--env-id CartPol-v1": "Did you mean: `CartPole`",
    "--env-id LunarLander-v2": "LunarLander-v3",
    "--env-id Taxi-v3": "Taxi-v4",
    "--env-id CartPole-v7": "v1",
    "--env-id nowhere:Thing-v0": "nowhere",
    "--env-id not/there-v0": "not",
    "--env-id spaces_in_it": None,
    "--env-id OddSequence-v0": "Sequence",
    "--env-id OddGraph-v0": "Graph",
    "--env-id GymV26Environment-v0": "install",
}


def mistakes_of(script):
    fields, facts = importlib.import_module(f"algorithms.{script}").Args.__dataclass_fields__, FACTS[script]
    all_ = MISTAKES | facts.mistakes
    for name in MISTAKES_WITH.keys() & fields.keys():
        all_ |= MISTAKES_WITH[name]
    if facts.env_class:
        all_ |= MISTAKES_IN_GYMNASIUM
    return [(flags.replace("{rate}", facts.rate), word and word.replace("{rate}", facts.rate))
            for flags, word in sorted(all_.items())]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "flags", "word"), [(path.stem, *mistake) for path in SCRIPTS for mistake in mistakes_of(path.stem)]
)
def test_a_mistake_gets_a_clear_answer_and_exit_code_2(script, flags, word, cli, tmp_path):
    code, out, err = cli(script, *tiny(script), *flags.split(" "))
    assert code == 2, (out, err)
    assert "Traceback" not in err
    assert (word or "") in err
    if not re.search("For full helptext", err):  # the parser of the command line adds the flag's help to its line
        assert err.count("\n") == 1
        assert err.startswith("error: ")
    assert not list(tmp_path.rglob("metrics.jsonl"))


@each_script
def test_help_explains_itself_and_every_flag(script):
    result = call(script, "--help")
    assert result.returncode == 0
    flags = importlib.import_module(f"algorithms.{script}").Args.__dataclass_fields__
    for name in flags:
        assert f"--{name.replace('_', '-')}" in result.stdout
    assert re.search(r"arXiv:|\b(19|20)\d\d\b", result.stdout), "the paper"


@each_kind
def test_a_folder_with_a_run_is_not_overwritten(script, cli, finished):
    run_dir = finished(script)
    before = contents(run_dir)
    code, _, err = cli(script, *tiny(script), "--run-dir", run_dir)
    assert code == 2
    assert "--resume" in err
    assert before == contents(run_dir)


@each_script
def test_a_resumed_run_keeps_its_arguments(script, cli, finished):
    run_dir = finished(script)
    for flags in [f"--{FACTS[script].rate}", 0.5], ["--seed", 3], ["--total-timesteps", 4096]:
        code, _, err = cli(script, "--run-dir", run_dir, "--resume", *flags)
        assert code == 2
        assert flags[0] in err
    assert cli(script, "--run-dir", run_dir, "--resume", "--seed", 1)[0] == 0, "the same is no change"


@each_kind
def test_a_folder_in_use_is_refused(script, cli, tmp_path):
    run_dir = tmp_path / "run"
    process = start(script, *tiny(script), "--total-timesteps", 10**6, "--run-dir", run_dir)
    while process.poll() is None and not (run_dir / "metrics.jsonl").exists():
        time.sleep(0.01)
    code, _, err = cli(script, "--run-dir", run_dir, "--resume")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert code == 2
    assert "in use" in err


@each_kind
def test_a_folder_whose_parts_do_not_fit_together_is_refused(script, cli, finished):
    run_dir = finished(script)
    whole = (run_dir / "metrics.jsonl").read_bytes()
    (run_dir / "metrics.jsonl").write_bytes(whole[:99])
    code, _, err = cli(script, "--run-dir", run_dir, "--resume")
    assert code == 2
    assert "metrics.jsonl" in err
    assert (run_dir / "metrics.jsonl").read_bytes() == whole[:99]
    (run_dir / "metrics.jsonl").write_bytes(whole)
    (run_dir / "config.json").unlink()
    code, _, err = cli(script, *tiny(script), "--run-dir", run_dir)
    assert code == 2
    assert "holds a run" in err


@each_kind
def test_a_folder_of_another_script_is_refused(script, cli, finished):
    run_dir = finished(script)
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps(config | {"script": "zzz"}))
    for action in "--resume", "--evaluate":
        code, _, err = cli(script, "--run-dir", run_dir, action)
        assert code == 2
        assert "zzz.py" in err


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@each_kind
@pytest.mark.parametrize("damage", ["cut short", "empty", "garbage", "code", "another model"])
def test_a_damaged_checkpoint_is_refused_and_stays_as_it_is(script, damage, cli, finished):
    run_dir = finished(script)
    for name, action in (FACTS[script].checkpoint, "--resume"), (FACTS[script].model, "--evaluate"):
        path = run_dir / name
        whole = path.read_bytes()
        if damage == "code":
            path.write_bytes(pickle.dumps(Bomb()))
        elif damage == "another model":
            importlib.import_module(f"algorithms.{script}").save_file(path, {"model": {"weight": 0.5}})
        else:
            path.write_bytes({"cut short": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * 999}[damage])
        before = contents(run_dir)
        code, _, err = cli(script, "--run-dir", run_dir, action)
        assert code == 2, err
        assert Path(name).parts[0] in err
        assert "Traceback" not in err
        assert not Path("exploded").exists(), "no code was run"
        assert before == contents(run_dir)
        path.write_bytes(whole)


@each_kind
@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda text: text[: len(text) // 2], "config.json"),
        (lambda text: "[]", "config.json"),
        (lambda text: text.replace('"seed": ', '"seed": "high", "old": '), None),
        (lambda text: re.sub(r'"seed": \d+', '"seed": -1', text), "--seed"),
        (lambda text: re.sub(r'"seed": \d+', '"sed": 1', text), "sed"),
    ],
)
def test_a_config_damaged_by_hand_is_refused(script, edit, word, cli, finished):
    run_dir = finished(script)
    path = run_dir / "config.json"
    path.write_text(edit(path.read_text()))
    code, _, err = cli(script, "--run-dir", run_dir, "--resume")
    assert code == 2
    assert (word or "") in err
    assert "Traceback" not in err


@each_kind
def test_a_full_disk_ends_the_run_with_one_line_and_spares_the_last_checkpoint(script, cli, finished, tmp_path):
    """A limit on the size of files stands for the disk: the operating system refuses to write, in the middle of one."""
    run_dir = tmp_path / "run"
    start_full = (
        f"import resource, runpy, signal, sys, algorithms.{script} as script\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save = script.Run.save\n"
        "def full(self, step):\n"
        f"    if step // {FACTS[script].quarter} == 2:\n"
        f"        size = (self.dir / {FACTS[script].model!r}).stat().st_size\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))\n"
        "    save(self, step)\n"
        "script.Run.save = full\n"
        "script.main()\n"
    )
    command = [sys.executable, "-c", start_full, *tiny(script), "--run-dir", run_dir]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert re.fullmatch(r"error: \[Errno 27\] File too large.*\n", result.stderr), result.stderr
    assert not list(run_dir.glob("*.tmp"))
    module = importlib.import_module(f"algorithms.{script}")
    assert module.load_file(run_dir / FACTS[script].checkpoint)["step"] // FACTS[script].quarter == 1
    assert cli(script, "--run-dir", run_dir, "--resume")[0] == 0
    assert timeless(run_dir) == timeless(finished(script, "unbroken"))


@each_kind
def test_a_folder_that_cannot_be_written_is_one_line(script, cli, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli(script, *tiny(script), "--run-dir", tmp_path / "file" / "run")
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@each_script
def test_nan_in_the_weights_ends_the_run_and_spares_the_last_checkpoint(script, cli, tmp_path, monkeypatch):
    module = importlib.import_module(f"algorithms.{script}")
    save, saves = module.Run.save, []

    def poisoned(self, step):
        saves.append(step)
        if len(saves) == 2:
            state = self.parts["model"].state_dict()
            next(iter(state.values()))[:] = np.nan
            self.parts["model"].load_state_dict(state)
        save(self, step)

    monkeypatch.setattr(module.Run, "save", poisoned)
    code, _, err = cli(script, *tiny(script), "--run-dir", tmp_path / "run")
    assert code == 1
    assert "NaN" in err
    assert module.load_file(tmp_path / "run" / FACTS[script].checkpoint)["step"] // FACTS[script].quarter == 1


class Broken(gym.Wrapper):
    """Pays NaN."""

    def step(self, action):
        obs, _, *rest = self.env.step(action)
        return obs, float("nan"), *rest


@pytest.mark.parametrize("script", IN_GYMNASIUM)
def test_nan_in_the_reward_ends_the_run(script, cli, tmp_path):
    register_as("Broken-v0", script, max_episode_steps=20, additional_wrappers=(Broken.wrapper_spec(),))
    code, _, err = cli(script, *tiny(script), "--env-id", "Broken-v0", "--run-dir", tmp_path / "run")
    assert code == 1
    assert "NaN" in err
    assert None in rows(tmp_path / "run")[-1].values()


def test_nan_in_the_gradient_ends_the_run_before_an_environment_sees_it(cli, tmp_path, monkeypatch):
    from algorithms import ppo

    calls, loss = [], ppo.ppo_loss

    def poisoned(log_prob, *rest):
        calls.append(1)
        value, metrics = loss(log_prob, *rest)
        if len(calls) == 4:  # the last of the two minibatches of two epochs
            value = value + (0 * log_prob).sum().sqrt()  # the root has no slope at 0
        return value, metrics

    monkeypatch.setattr(ppo, "ppo_loss", poisoned)
    code, _, err = cli("ppo", *tiny("ppo"), "--run-dir", tmp_path / "run")
    assert code == 1
    assert "NaN" in err
    assert err.endswith("in losses/grad_norm\n")


@each_kind
def test_wandb_that_fails_in_mid_run_does_not_stop_it(script, cli, finished, tmp_path, monkeypatch):
    import wandb

    calls, log = [], wandb.Run.log

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise ConnectionError("the line is dead")
        log(self, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", failing)
    code, _, err = cli(script, *tiny(script), "--track", "--run-dir", tmp_path / "tracked")
    assert code == 0
    assert err.count("the line is dead") == 1
    assert timeless(tmp_path / "tracked") == timeless(finished(script, "plain"))


@each_kind
def test_wandb_that_cannot_start_is_one_line_and_leaves_nothing_behind(script, cli, tmp_path, monkeypatch):
    import wandb

    run_dir = tmp_path / "run"

    def fail(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", fail)
    code, _, err = cli(script, *tiny(script), "--track", "--run-dir", run_dir)
    assert code == 2
    assert "No API key" in err
    assert "WANDB_MODE=offline" in err
    monkeypatch.undo()
    assert cli(script, *tiny(script), "--track", "--run-dir", run_dir)[0] == 0, "the same command works when W&B does"


@pytest.mark.parametrize("script", [script for script in KINDS if script in ACTING])
def test_a_film_that_cannot_be_made_is_one_line_before_the_run(script, cli, monkeypatch, tmp_path):
    for render in lambda self: 1 / 0, lambda self: None:
        monkeypatch.setattr(f"{FACTS[script].env_class}.render", render)
        code, _, err = cli(script, *tiny(script), "--capture-video", "--run-dir", tmp_path / "run")
        assert code == 2
        assert err.count("\n") == 1
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


@each_kind
def test_a_terminal_shows_progress(script, tmp_path):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, ROOT / "algorithms" / f"{script}.py", *tiny(script), "--run-dir", tmp_path / "run"]
    process = subprocess.Popen(command, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            shown += os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
    assert process.wait() == 0
    assert b"%|" in shown
    assert b"{0}/{0}".replace(b"{0}", str(4 * FACTS[script].quarter).encode()) in shown
    assert b"steps/s" in shown
