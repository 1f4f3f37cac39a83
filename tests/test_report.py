"""report.py against hand calculations, simulations and hand-made run folders with known answers."""

import csv
import json
import os
import random
import re
import resource
import sys
from itertools import product
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from scipy import stats

from benchmark import report


def make_run(folder, script="ppo", env_id="CartPole-v1", seed=1, returns=(20.0, 500.0), sps=None, steps=100, **args):
    """A run by hand: evaluations at equal distances up to its last step, a second each, or as sps says."""
    folder.mkdir(parents=True)
    args = {"env_id": env_id, "seed": seed, "total_timesteps": steps * len(returns), "eval_episodes": 20} | args
    config = {
        "script": script,
        "args": args,
        "commit": "abcdef0123456789",
        "versions": {"torch": "2.15.0", "other": "1"},
    }
    (folder / "config.json").write_text(json.dumps(config | {"hardware": "here"}))
    rows, pace = [], steps / sps if sps else 1.0
    for i, value in enumerate(returns, 1):
        rows.append({"global_step": steps * i, "time": 0.9 * i * pace, "charts/SPS": steps / 0.9 / pace})
        rows.append({"global_step": steps * i, "time": i * pace, "eval/episodic_return": value})
    write_rows(folder, rows)
    return folder


def write_rows(folder, rows, mode="w", end="\n"):
    with open(folder / "metrics.jsonl", mode) as file:
        file.write("\n".join(json.dumps(row) for row in rows) + end)


def make_runs(root, finals, **settings):
    for seed, final in enumerate(finals, 1):
        env_id, script = settings.get("env_id", "CartPole-v1"), settings.get("script", "ppo")
        make_run(root / f"{script}-{env_id}-{seed}", seed=seed, returns=(20.0, final), **settings)
    return root


def experiments(path):
    return report.sort_out(report.find_runs(str(path), ""), ())


def evaluation(step, value, seconds=0.0):
    return {"global_step": step, "time": seconds, "eval/episodic_return": value}


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Runs the command line; gives the exit code, what report.json says, and what was printed.

    Pictures take most of the time of a call.
    """

    def call(*flags, pictures=False):
        flags = [*flags, "--output", tmp_path / "out", *["--no-pictures"] * (not pictures)]
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, flags)])
        with pytest.raises(SystemExit) as exit:
            report.main()
        path = tmp_path / "out" / "report.json"
        return exit.value.code, json.loads(path.read_text()) if path.exists() else None, capsys.readouterr()

    return call


# ---- Statistics ----


def test_interquartile_mean():
    assert report.iqm(np.array([8.0, 1, 7, 2, 6, 3, 5, 1000])) == (3 + 5 + 6 + 7) / 4  # without 1, 2 and 8, 1000
    assert report.iqm(np.array([1.0, 2, 3, 4, 50])) == 3  # a quarter of five is one, rounded down
    scores = np.random.default_rng(1).normal(size=(7, 11))
    assert np.allclose(report.iqm(scores), stats.trim_mean(scores, 0.25, axis=1))
    assert report.iqm(scores[0], scores[1]) == stats.trim_mean(scores[:2].ravel(), 0.25)


def test_an_environment_with_more_seeds_weighs_no_more():
    rng = np.random.default_rng(6)
    few, many, more = (rng.normal(size=(4, seeds)) for seeds in (3, 4, 6))
    same = np.concatenate([few.repeat(4, 1), many.repeat(3, 1), more.repeat(2, 1)], 1)
    assert np.allclose(report.iqm(few, many, more), stats.trim_mean(same, 0.25, 1))
    assert report.iqm(np.zeros(5), np.ones(30)) == 0.5


def test_intervals_are_reproducible_and_leave_the_global_random_state_alone():
    scores = np.random.default_rng(2).normal(size=6)
    np.random.seed(7)
    random.seed(7)
    before, before_python = np.random.get_state()[1].copy(), random.getstate()
    first = report.interval(np.mean, scores)
    assert (np.random.get_state()[1] == before).all()
    assert random.getstate() == before_python
    np.random.seed(8)
    assert report.interval(np.mean, scores) == first


@pytest.mark.parametrize(("seeds", "low", "high"), [(5, 0.90, 0.97), (10, 0.925, 0.975), (30, 0.93, 0.975)])
@pytest.mark.parametrize("statistic", [np.mean, report.iqm])
def test_coverage_is_near_95_percent(statistic, seeds, low, high):
    """Of 600 samples from a normal distribution; 5 seeds can't reach more than 1 - 2 / 2**5, the whole sample."""
    samples = np.random.default_rng(3).normal(loc=10, size=(600, seeds))
    lows, highs = report.interval(statistic, samples, resamples=1_000)
    assert low < np.mean((lows < 10) & (highs > 10)) < high


def test_coverage_of_a_difference_is_near_95_percent():
    rng = np.random.default_rng(4)
    lows, highs = report.interval(
        report.difference, rng.normal(3, 1, (600, 6)), rng.normal(1, 1, (600, 6)), resamples=1_000
    )
    assert 0.925 < np.mean((lows < 2) & (highs > 2)) < 0.98


def test_coverage_of_a_difference_between_few_and_many_seeds():
    """Pooled as if they were of one size, 3 seeds against 10 had 0.89."""
    rng = np.random.default_rng(4)
    few, many = rng.normal(1, 1, (400, 3)), rng.normal(1, 1, (400, 10))
    found = [report.interval(report.difference, *pair, resamples=4_000) for pair in zip(few, many, strict=True)]
    assert 0.91 < np.mean([low < 0 < high for low, high in found]) < 0.98
    constant = report.interval(report.difference, np.zeros(3), np.ones(10))
    assert constant == (-1, -1)


def test_no_interval_under_three_seeds():
    assert report.interval(np.mean, np.array([1.0])) is None
    assert report.interval(np.mean, np.array([1.0, 2.0])) is None
    assert report.interval(report.difference, np.arange(5.0), np.array([1.0, 2.0])) is None
    assert report.interval(np.mean, np.array([1.0, 2.0, 3.0])) == (1, 3)


def test_aggregate_resamples_within_each_environment():
    low, high = report.interval(report.iqm, np.array([0.0, 0.01, 0.02]), np.array([1.0, 1.01, 1.02]))
    assert 0.49 < low < high < 0.53  # drawn from all six together it would be nearly [0, 1]


def test_probability_of_improvement():
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 6, 8).astype(float), rng.integers(0, 5, 6).astype(float)
    assert np.isclose(report.improvement(a, b)[0], stats.mannwhitneyu(a, b).statistic / 48)
    assert report.improvement(np.array([1.0, 3]), np.array([2.0, 3])) == ((0 + 0 + 1 + 0.5) / 4, None)
    two_environments = report.improvement(np.array([1.0]), np.array([0.0]), np.array([1.0, 3]), np.array([2.0, 3]))
    assert two_environments[0] == (1 + 0.375) / 2


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("distance", [0, 1.5, 9])  # a probability of 0.5, 0.86, 1
def test_coverage_of_a_probability_is_at_least_95_percent(seeds, distance):
    rng, true = np.random.default_rng(4), stats.norm.cdf(distance / 2**0.5)
    for environments in 1, 3:
        found = []
        for _ in range(400):
            pairs = [rng.normal(distance * first, 1, seeds) for _ in range(environments) for first in (1, 0)]
            found.append(report.improvement(*pairs)[1])
        assert np.mean([0 <= low <= true <= high <= 1 for low, high in found]) > 0.935
        assert min(high - low for low, high in found) > 0.1  # never a point


def test_an_interval_of_a_probability_by_another_library():
    """Seven runs of ten beat all others, as if ten pairs were independent. Two environments are twice as many pairs."""
    a, b = np.array([*range(10, 17), -1, -2, -3]), np.arange(10)
    assert report.improvement(a, b)[1] == pytest.approx(wilson(7, 10))
    assert report.improvement(b[:3] + 20, b, b[:3] + 20, b)[1] == pytest.approx(wilson(6, 6))


def wilson(wins, pairs):
    return tuple(stats.binomtest(wins, pairs).proportion_ci(method="wilson"))


def test_steps_to_a_threshold():
    curve = np.array([[10, 1, 5], [20, 2, 200], [30, 3, 100], [40, 4, 210], [50, 5, 220]], dtype=float)
    assert report.steps_to(200, 1, curve) == (20, 2)
    assert report.steps_to(200, 2, curve) == (50, 5)
    assert report.steps_to(200, 3, curve) == (np.inf, np.inf)


def test_curves_of_unequal_length_keep_their_steps():
    long = np.array([[10, 1, 0], [20, 2, 10], [30, 3, 20], [40, 4, 30]], dtype=float)
    short = np.array([[15, 1, 100], [25, 2, 200]], dtype=float)
    grid, values = report.on_one_grid([long, short], seconds=False)
    assert grid.tolist() == [15, 20, 25]  # where both were measured
    assert values.T.tolist() == [[5, 10, 15], [100, 150, 200]]
    seconds, _ = report.on_one_grid([long, short], seconds=True)
    assert (seconds[0], seconds[-1]) == (1, 2)


# ---- Reading ----


def test_a_half_written_last_line_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", returns=(1.0, 2.0))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 300, "eval/episodic_ret')
    assert report.read_run(run, "").curve[:, 2].tolist() == [1, 2]


def test_what_a_resume_repeats_counts_once(tmp_path):
    run = make_run(tmp_path / "run", total_timesteps=400)
    first = [evaluation(100, 1.0), evaluation(200, 2.0), evaluation(300, 3.0), evaluation(350, 3.5)]
    resumed = [evaluation(250, 30.0), evaluation(300, 31.0), evaluation(400, 40.0)]
    write_rows(run, first + resumed)
    assert report.read_run(run, "").curve[:, [0, 2]].tolist() == [[100, 1], [200, 2], [250, 30], [300, 31], [400, 40]]
    write_rows(run, first[:3] + resumed[1:])  # the repetition begins at the very step where the first part ended
    assert report.read_run(run, "").curve[:, 2].tolist() == [1, 2, 31, 40]


def test_null_and_nan_are_not_averaged(tmp_path):
    run = make_run(tmp_path / "run", returns=(1.0, None, float("nan"), 4.0))
    assert report.read_run(run, "").curve[:, 2].tolist() == [1, 4]
    assert not report.read_run(run, "").trouble
    for i, last in enumerate((None, float("nan"), float("inf"))):
        assert "not a number" in report.read_run(make_run(tmp_path / str(i), returns=(1.0, last)), "").trouble


def test_summary_by_hand(call, tmp_path):
    make_runs(tmp_path / "runs", (10.0, 20.0, 30.0, 40.0, 100.0), sps=1000.0)
    code, result, printed = call(tmp_path / "runs")
    row = result["Results"][0]
    assert code == 0
    assert "10.0, 20.0, 30.0, 40.0, 100.0" in printed.out
    assert "10.0, 20.0, 30.0, 40.0, 100.0" in (tmp_path / "out" / "report.md").read_text()
    assert (row["n"], row["of"], row["mean"], row["worst"], row["worst seed"], row["IQM"]) == (5, 5, 40, 10, 1, 30)
    assert row["deviation"] == pytest.approx(np.sqrt(5000 / 4))
    assert row["mean 95 %"][0] < 40 < row["mean 95 %"][1]
    assert (row["steps"], row["returns"]) == (200, [10, 20, 30, 40, 100])


def test_steps_a_second_have_one_definition(call, tmp_path):
    """Steps since the run began over its seconds, with its evaluations: also where an older log counted otherwise."""
    make_runs(tmp_path / "runs", (10.0, 20.0, 30.0), sps=1000.0)
    for log in (tmp_path / "runs").glob("*/metrics.jsonl"):
        assert "1111.1" in log.read_text()  # charts/SPS before the last evaluation, which takes a tenth of the time
    path = tmp_path / "kept.json"
    assert call(tmp_path / "runs", "--save-baseline", path)[1]["Results"][0]["SPS"] == pytest.approx(1000)
    kept = json.loads(path.read_text())
    for run in kept["experiments"][0]["runs"].values():
        run["SPS"] = 7.0  # by another definition
    path.write_text(json.dumps(kept))
    assert call(path)[1]["Results"][0]["SPS"] == pytest.approx(1000)
    rows = call(tmp_path / "runs", "--baseline", path)[1][f"Against {path}"]
    assert [row["verdict"] for row in rows] == ["ok", "ok"]
    assert [row["before"] for row in rows] == [20, pytest.approx(1000)]


def test_one_seed_has_no_interval_in_the_report(call, tmp_path):
    _, result, _ = call(make_run(tmp_path / "runs" / "only"))
    row = result["Results"][0]
    assert (row["n"], row["mean"], row["mean 95 %"], row["deviation"], row["IQM 95 %"]) == (1, 500, None, None, None)
    assert result["Environments with a reference, normalised"][0]["95 %"] is None


def test_normalised_aggregate_by_hand(call, tmp_path):
    low, reference, *_ = report.REFERENCES["LunarLander-v3"]
    half = low + 0.5 * (reference - low)
    make_runs(tmp_path / "runs", (500.0,) * 3)  # 1 on CartPole
    make_runs(tmp_path / "runs", (half,) * 3, env_id="LunarLander-v3")
    make_runs(tmp_path / "runs", (1e9,) * 3, env_id="Unknown-v0")
    _, result, _ = call(tmp_path / "runs")
    row = result["Environments with a reference, normalised"][0]
    assert (row["environments"], row["which"]) == (2, ["CartPole-v1", "LunarLander-v3"])
    assert row["IQM"] == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert "Unknown-v0" in (tmp_path / "out" / "report.md").read_text().split("Without a reference")[1]


def test_references_stand_in_the_table_of_published_results():
    with open(report.__file__.replace("report.py", "reference_returns.csv"), newline="") as file:
        published = {row["mean"] for row in csv.DictReader(file)}
    published = {float(mean) for mean in published if mean.replace(".", "").replace("-", "").isdigit()}
    for env_id, (low, reference, *_) in report.REFERENCES.items():
        assert reference in published, env_id
        assert low < reference, env_id


def test_runs_are_found_in_folders_and_by_globs(call, tmp_path):
    runs = make_runs(tmp_path / "runs" / "deep", (1.0, 2.0, 3.0))
    weights = runs / "ppo-CartPole-v1-1" / "model"
    weights.mkdir()
    (weights / "config.json").write_text('{"model_type": "gpt2"}')  # as Hugging Face saves it
    for flags in [(tmp_path / "runs",), (runs / "ppo*",), sorted(runs.iterdir()), (runs, runs / "ppo*")]:
        assert call(*flags)[1]["Results"][0]["returns"] == [1, 2, 3]


def test_different_arguments_are_not_averaged(call, tmp_path):
    make_runs(tmp_path / "runs" / "a", (1.0, 2.0, 3.0), gamma=0.9)
    make_runs(tmp_path / "runs" / "b", (4.0, 5.0, 6.0), gamma=0.99)
    _, result, _ = call(tmp_path / "runs")
    means = {row["script"]: row["mean"] for row in result["Results"]}
    assert means == {"ppo gamma=0.9": 2, "ppo gamma=0.99": 5}


@pytest.mark.parametrize(
    ("script", "name", "one", "other"),
    [
        ("ppo", "reward", "sparse", "dense"),
        ("ppo", "layers", "1", 1),
        ("grpo", "reward", "runs/one/model", "runs/other/model"),
        ("grpo", "reward", ["one.py:short"], ["other.py:short"]),
        ("iql", "dataset", "my data/x", "mydata/x"),
        ("iql", "dataset", "/home/me/one/benchmark/logs/x", "/home/me/two/benchmark/logs/x"),
        ("iql", "dataset", "one/x", "one-x"),
    ],
)
def test_values_that_look_alike_are_not_averaged(call, tmp_path, script, name, one, other):
    for folder, value in ("a", one), ("b", other):
        make_run(tmp_path / "runs" / folder, script, None if script == "grpo" else "CartPole-v1", **{name: value})
    _, result, _ = call(tmp_path / "runs", "--save-baseline", tmp_path / "kept.json")
    assert len({row["script"] for row in result["Results"]}) == 2
    assert all(len(row["script"].split(" ")) == 2 for row in result["Results"])
    assert call(tmp_path / "kept.json")[1] == result


def test_reward_models_of_a_seed_are_one_experiment(tmp_path):
    for seed in 1, 2, 3:
        for kind in "one", "two":
            reward = f"runs/default__reward_model__{seed}__{kind}/model"
            make_run(tmp_path / "runs" / f"{kind}-{seed}", "grpo", None, seed, reward=reward)
    assert [len(e.done) for e in experiments(tmp_path / "runs")] == [3, 3]


# ---- Missing runs ----


def ledger_of(root, statuses):
    """As the launcher writes it."""
    runs = {}
    for seed, status in enumerate(statuses, 1):
        name = f"ppo-CartPole-v1-{seed}"
        runs[name] = {"name": name, "launch": ["python", "algorithms/ppo.py"], "flags": [], "env_id": "CartPole-v1"}
        runs[name] |= {"seed": seed, "result": "eval/episodic_return", "status": status}
    return {"asked": list(runs), "runs": runs, "probes": {}}


def test_an_argument_that_only_some_runs_have_tells_them_apart(tmp_path):
    make_run(tmp_path / "runs" / "old", seed=1, returns=(1.0,))
    make_run(tmp_path / "runs" / "new", seed=2, returns=(2.0,), norm_obs=True)
    found = {e.label: e.scores.tolist() for e in experiments(tmp_path / "runs")}
    assert found == {"ppo": [1], "ppo norm_obs=True": [2]}
    make_run(tmp_path / "alike" / "old", seed=1, returns=(1.0,))
    make_run(tmp_path / "alike" / "new", seed=2, returns=(2.0,), norm_obs=None)  # None: as without it
    assert {e.label: e.scores.tolist() for e in experiments(tmp_path / "alike")} == {"ppo": [1, 2]}


def test_scores_of_different_metrics_are_neither_averaged_nor_compared(call, tmp_path):
    for name, key, value in ("a", "eval/exact_return", 0.7), ("b", "eval/episodic_return", 0.5):
        for seed in 1, 2, 3:
            run = make_run(tmp_path / name / str(seed), "q_learning", "FrozenLake-v1", seed)
            write_rows(run, [{"global_step": 200, "time": 1.0, key: value}])
    found = {e.label: e.scores.tolist() for e in report.sort_out(report.find_runs(str(tmp_path / "*"), ""), ())}
    assert found == {
        "q_learning result=eval/exact_return": [0.7] * 3, "q_learning result=eval/episodic_return": [0.5] * 3
    }  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        report.pair_up(
            report.sort_out(
                report.find_runs(str(tmp_path / "a"), "a") + report.find_runs(str(tmp_path / "b"), "b"), ()
            ),
            ["a", "b"],
        )
    assert call(tmp_path / "a", "--save-baseline", tmp_path / "kept.json")[0] == 0
    code, result, _ = call(tmp_path / "b", "--baseline", tmp_path / "kept.json")
    assert code == 1
    assert "not judged: another score" in [row["verdict"] for row in result[f"Against {tmp_path / 'kept.json'}"]]


@pytest.mark.parametrize("shared", [True, False])
def test_logs_of_a_seed_and_logs_for_all_seeds(tmp_path, shared):
    """The name of one data set may end in the number of a seed, too."""
    for seed in 1, 2, 3:
        make_run(tmp_path / "runs" / str(seed), "iql", seed=seed, dataset=f"data/logs-{1 if shared else seed}")
    assert [len(e.done) for e in experiments(tmp_path / "runs")] == [3]


def test_a_name_with_spaces(call, tmp_path):
    make_runs(tmp_path / "my runs", (1.0, 2.0, 3.0))
    make_runs(tmp_path / "other", (1.0, 2.0, 3.0))
    assert call("--compare", tmp_path / "my runs", tmp_path / "other", pictures=True)[0] == 0
    assert report.Experiment("my ppo gamma=0.9", "my ppo", "x", experiments(tmp_path / "other")[0].done, {}).name() == (
        "my ppo, gamma 0.9"
    )


def test_a_missing_seed_is_named_and_withholds_the_headline(call, tmp_path):
    runs = make_runs(tmp_path / "runs", (1.0, 2.0, 3.0))
    (runs / "ledger.json").write_text(json.dumps(ledger_of(runs, ["done"] * 3 + ["timed out"])))
    code, result, printed = call(runs, pictures=True)
    assert code == 1
    assert "seed 4: timed out" in printed.out
    assert (result["Results"][0]["n"], result["Results"][0]["of"]) == (3, 4)
    assert "Environments with a reference, normalised" not in result
    assert not (tmp_path / "out" / "aggregate.png").exists()
    assert "seed 4: timed out" in (tmp_path / "out" / "report.md").read_text()

    code, result, printed = call(runs, "--allow-missing", pictures=True)
    assert code == 0
    assert "seed 4: timed out" in printed.out
    assert result["Environments with a reference, normalised"]
    assert (tmp_path / "out" / "aggregate.png").exists()
    call(runs)
    assert not list((tmp_path / "out").glob("*.[ps][nv]g"))  # of an earlier report none is left


@pytest.mark.parametrize("returns", [(1.0, None), (1.0, float("nan"))])
def test_a_seed_that_ended_in_nan_is_missing(call, tmp_path, returns):
    make_runs(tmp_path / "runs", (1.0, 2.0, 3.0))
    make_run(tmp_path / "runs" / "bad", seed=4, returns=returns)
    code, result, printed = call(tmp_path / "runs")
    assert code == 1
    assert "seed 4: its last evaluation is not a number" in printed.out
    assert result["Results"][0]["returns"] == [1, 2, 3]


def test_an_unfinished_run_is_missing_and_its_status_told(call, tmp_path):
    runs = make_runs(tmp_path / "runs", (1.0, 2.0, 3.0))
    make_run(runs / "ppo-CartPole-v1-4", seed=4, returns=(9.0,), total_timesteps=200)
    code, result, printed = call(runs)
    assert code == 1
    assert "seed 4: stopped at step 100 of 200" in printed.out
    assert result["Results"][0]["returns"] == [1, 2, 3]
    (runs / "ledger.json").write_text(json.dumps(ledger_of(runs, ["done"] * 3 + ["killed"])))
    assert "seed 4: killed, stopped at step 100 of 200" in call(runs)[2].out


@pytest.mark.parametrize("status", ["NaN", "failed"])
def test_a_run_that_failed_after_its_last_evaluation_is_missing(call, tmp_path, status):
    runs = make_runs(tmp_path / "runs", (1.0, 2.0, 3.0))
    (runs / "ppo-CartPole-v1-3").rename(tmp_path / "3")
    (runs / "ppo-CartPole-v1-3").symlink_to(tmp_path / "3")  # also where its folder is elsewhere
    (runs / "ledger.json").write_text(json.dumps(ledger_of(runs, ["done", "done", status])))
    code, result, printed = call(runs)
    assert code == 1
    assert f"seed 3: {status}, though it has its last evaluation" in printed.out
    assert result["Results"][0]["returns"] == [1, 2]


def test_runs_behind_links_are_read(call, tmp_path):
    runs = make_runs(tmp_path / "runs", (1.0, 2.0))
    make_run(tmp_path / "other" / "3", seed=3, returns=(20.0, 3.0))
    for name, place in {"third": tmp_path / "other", "back": runs, "lost": tmp_path / "nothing"}.items():
        (runs / name).symlink_to(place)
    for pattern in runs, runs / "*":
        _, result, printed = call(pattern)
        assert result["Results"][0]["returns"] == [1, 2, 3]
        assert printed.err == f"note: {runs}/lost is a link to nothing: left out\n"


def test_a_folder_that_can_not_be_read_is_refused(call, tmp_path, monkeypatch):
    runs, real = make_runs(tmp_path / "runs", (1.0, 2.0)), os.scandir

    def scandir(path):
        if str(path).endswith("-2"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    code, _, printed = call(runs)
    assert (code, printed.err.count("\n")) == (2, 1)
    assert "Permission denied" in printed.err


def test_a_run_without_any_row_is_missing(call, tmp_path):
    make_runs(tmp_path / "runs", (1.0, 2.0, 3.0))
    (make_run(tmp_path / "runs" / "new", seed=4) / "metrics.jsonl").unlink()
    code, _, printed = call(tmp_path / "runs")
    assert code == 1
    assert "seed 4: no evaluation" in printed.out


def test_seeds_that_must_be_there(call, tmp_path):
    make_runs(tmp_path / "runs", (1.0, 2.0, 3.0))
    code, _, printed = call(tmp_path / "runs", "--seeds", 1, 2, 3, 7)
    assert code == 1
    assert "seed 7: no such run" in printed.out
    assert call(tmp_path / "runs", "--seeds", 1, 2, 3)[0] == 0


def test_bad_news_is_red_on_a_terminal(call, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    runs = make_runs(tmp_path / "runs", (1.0, 2.0, 3.0))
    assert "\x1b[31m" not in call(runs)[2].out
    assert "\x1b[31m" in call(runs, "--seeds", 1, 2, 3, 4)[2].out


def test_a_ledger_in_plain_form_and_a_folder_that_moved(call, tmp_path):
    runs = make_runs(tmp_path / "runs", (1.0, 2.0))
    entries = [
        {
            "script": "ppo",
            "env_id": "CartPole-v1",
            "seed": s,
            "run_dir": f"/elsewhere/ppo-CartPole-v1-{s}",
            "status": "done",
        }
        for s in (1, 2, 3)
    ]
    (runs / "ledger.json").write_text(json.dumps({"runs": entries}))
    code, result, printed = call(runs)
    assert code == 1
    assert "seed 3: done, no config.json" in printed.out
    assert result["Results"][0]["returns"] == [1, 2]


def test_what_a_newer_script_has_repeated_is_left_out(call, tmp_path):
    runs = make_runs(tmp_path / "runs", (1.0, 2.0, 3.0))
    ledger = ledger_of(runs, ["done"] * 3)
    for seed in 1, 2, 3:  # the same runs, of an older script
        old = make_run(runs / f"old-{seed}", seed=seed, returns=(-99.0,), total_timesteps=100)
        ledger["runs"][old.name] = ledger["runs"][f"ppo-CartPole-v1-{seed}"] | {"name": old.name}
    (runs / "ledger.json").write_text(json.dumps(ledger))
    code, result, printed = call(runs)
    assert code == 0
    assert result["Results"][0]["returns"] == [1, 2, 3]
    assert "3 folders" in printed.err


def launched(root, calls):
    """A ledger after some calls of the launcher: each (seeds, env_id, script_hash, flags, status)."""
    runs, asked = {}, []
    for seeds, env_id, script_hash, flags, status in calls:
        asked = []
        for seed in seeds:
            asked.append(name := f"{env_id}__ppo__{seed}__{abs(hash((script_hash, *flags)))}")
            runs[name] = {"name": name, "launch": ["python", "algorithms/ppo.py"], "flags": flags, "env_id": env_id}
            runs[name] |= {"seed": seed, "status": status, "script_hash": script_hash}
            if status == "done":
                args = {"gamma": 0.9} | report.read_flags(flags)
                make_run(root / name, env_id=env_id, seed=seed, returns=(float(script_hash),), **args)
    root.mkdir(exist_ok=True)
    (root / "ledger.json").write_text(json.dumps({"asked": asked, "runs": runs, "probes": {}}))
    return root


@pytest.mark.parametrize(
    ("calls", "expected"),  # expected: by label and environment, the seeds' returns and how many there should be
    [
        pytest.param(
            [([1, 2], "CartPole-v1", "1", [], "done"), ([1], "Acrobot-v1", "1", [], "failed")],
            {("ppo", "CartPole-v1"): ([1, 1], 2), ("ppo", "Acrobot-v1"): ([], 1)}, id="asked for, all failed",
        ),
        pytest.param(
            [([1], "Typo-v1", "1", [], "failed"), ([1, 2], "CartPole-v1", "1", [], "done")],
            {("ppo", "CartPole-v1"): ([1, 1], 2)}, id="a typo of an earlier call",
        ),
        pytest.param(
            [([1, 2, 3], "CartPole-v1", "1", [], "pending"), ([1, 2], "CartPole-v1", "1", [], "done")],
            {("ppo", "CartPole-v1"): ([1, 1], 2)}, id="fewer seeds than at first",
        ),
        pytest.param(
            [([1, 2], "CartPole-v1", "1", [], "done"), ([3], "CartPole-v1", "1", [], "failed"),
             ([1], "Acrobot-v1", "1", [], "done")],
            {("ppo", "CartPole-v1"): ([1, 1], 3), ("ppo", "Acrobot-v1"): ([1], 1)}, id="an earlier call's failure",
        ),
        pytest.param(
            [([1, 2, 3], "CartPole-v1", "1", [], "done"), ([1, 2], "CartPole-v1", "2", [], "done")],
            {("ppo", "CartPole-v1"): ([2, 2], 2)}, id="fewer seeds of a newer script",
        ),
        pytest.param(
            [([1], "CartPole-v1", "1", [], "done"), ([1], "CartPole-v1", "2", [], "done"),
             ([1], "Acrobot-v1", "2", [], "done")],
            {("ppo", "CartPole-v1"): ([2], 1), ("ppo", "Acrobot-v1"): ([2], 1)}, id="a newer script, not the last call",
        ),
        pytest.param(
            [([1], "CartPole-v1", "1", ["--eval-frequency=10"], "done"),
             ([1], "CartPole-v1", "1", ["--eval-frequency", "20"], "done")],
            {("ppo", "CartPole-v1"): ([1], 1)}, id="other evaluations",
        ),
        pytest.param(
            [([1, 2], "CartPole-v1", "1", ["--gamma=0.5"], "done"),
             ([1, 2], "CartPole-v1", "1", ["--gamma=0.6"], "pending")],
            {("ppo gamma=0.5", "CartPole-v1"): ([1, 1], 2), ("ppo gamma=0.6", "CartPole-v1"): ([], 2)},
            id="another experiment that has not begun",
        ),
        pytest.param(
            [([1], "CartPole-v1", "1", ["--gamma", "0.5"], "done"), ([1], "CartPole-v1", "1", [], "done"),
             ([2], "CartPole-v1", "1", [], "failed")],
            {("ppo gamma=0.5", "CartPole-v1"): ([1], 1), ("ppo gamma=0.9", "CartPole-v1"): ([1], 2)},
            id="a run without a folder among its like",
        ),
    ],
)  # fmt: skip
def test_which_runs_of_a_ledger_count(call, tmp_path, calls, expected):
    _, result, _ = call(launched(tmp_path / "runs", calls))
    found = {(row["script"], row["environment"]): (row.get("returns", []), row["of"]) for row in result["Results"]}
    assert found == expected


def test_a_run_that_failed_and_waits_to_begin_again_is_missed(tmp_path, capsys):
    calls = [([1, 2], "CartPole-v1", "1", [], "done"), ([3], "CartPole-v1", "1", [], "failed"),
             ([1], "Typo-v1", "1", [], "failed"), ([1], "Acrobot-v1", "1", [], "done")]  # fmt: skip
    path = launched(tmp_path / "runs", calls) / "ledger.json"
    ledger = json.loads(path.read_text())
    for row in ledger["runs"].values():
        row |= {"status": "pending", "attempts": 1} if row["seed"] == 3 else {}
    path.write_text(json.dumps(ledger))
    rows = {e.env_id: [*e.missing] for e in experiments(tmp_path / "runs")}
    assert rows == {"CartPole-v1": [3], "Acrobot-v1": []}
    assert "note: Typo-v1__ppo__1" in capsys.readouterr().err


def test_flags_as_arguments():
    words = ["--gamma=0.9", "--seed", "3", "--no-anneal-lr", "--ent-coef", "-1e-2", "--optimizer", "adam", "--track"]
    expected = {"gamma": 0.9, "seed": 3, "anneal_lr": False, "ent_coef": -0.01, "optimizer": "adam", "track": True}
    assert report.read_flags(words) == expected
    assert report.without(words, ("seed", "anneal_lr", "track")) == [words[0], *words[4:8]]


def test_a_ledgers_own_folders_go_before_those_of_the_same_name_elsewhere(call, tmp_path, monkeypatch):
    for name in "here", "there":
        launched(tmp_path / name, [([1, 2, 3], "CartPole-v1", {"here": "1", "there": "2"}[name], [], "done")])
        for i, run in enumerate(sorted((tmp_path / name).glob("Cart*")), 1):
            run.rename(tmp_path / name / f"{i}")
        text = json.loads((tmp_path / name / "ledger.json").read_text())
        runs = {str(row["seed"]): row | {"name": str(row["seed"])} for row in text["runs"].values()}
        (tmp_path / name / "ledger.json").write_text(json.dumps({"asked": list(runs), "runs": runs}))
    monkeypatch.chdir(tmp_path / "here")
    assert call(tmp_path / "there")[1]["Results"][0]["returns"] == [2, 2, 2]


# ---- Comparison, thresholds, regression gate ----


def test_compare_two_sets(call, tmp_path):
    a, b = tmp_path / "new", tmp_path / "old"
    for root, finals in (a, (1.0, 3.0, 5.0)), (b, (2.0, 3.0, 4.0)):
        make_runs(root, finals)
        make_runs(root, finals, env_id="Acrobot-v1")
    code, result, _ = call("--compare", a, b)
    (rows,) = [rows for title, rows in result.items() if title.startswith("Probability")]
    assert code == 0
    assert {row["environment"]: row["P"] for row in rows} == {"CartPole-v1": 0.5, "Acrobot-v1": 0.5, "all": 0.5}
    make_runs(tmp_path / "best", (10.0, 11.0, 12.0))
    _, result, _ = call("--compare", tmp_path / "best", a)
    (rows,) = [rows for title, rows in result.items() if title.startswith("Probability")]
    assert [(row["P"], row["95 %"]) for row in rows] == [(1, pytest.approx([*wilson(3, 3)]))]


def test_units_of_returns_do_not_matter_to_a_comparison(call, tmp_path):
    found = []
    for unit in 1.0, 1000.0:
        a, b = tmp_path / f"a{unit}", tmp_path / f"b{unit}"
        make_runs(a, (1.0, 3.0, 5.0, 7.0, 9.0))
        make_runs(b, (2.0, 2.5, 4.0))
        make_runs(a, (unit, 2 * unit, 3 * unit), env_id="Acrobot-v1")
        make_runs(b, (2.5 * unit, 2.6 * unit, 2.7 * unit, 2.8 * unit, 4 * unit), env_id="Acrobot-v1")
        _, result, _ = call("--compare", a, b)
        found += [rows for title, rows in result.items() if title.startswith("Probability")]
    assert found[0] == found[1]


def test_compare_refuses_unequal_steps(call, tmp_path):
    make_runs(tmp_path / "long", (10.0, 11.0, 12.0), steps=300)
    make_runs(tmp_path / "short", (1.0, 3.0, 5.0), steps=50)
    code, result, printed = call("--compare", tmp_path / "long", tmp_path / "short")
    assert (code, result) == (2, None)
    assert printed.err.startswith("error: --compare: on CartPole-v1 the runs have unequal steps (600 in ")
    assert ", 100 in " in " ".join(printed.err.split()).replace(" and", ",")
    make_runs(tmp_path / "nearly", (1.0, 3.0, 5.0), steps=301)
    assert call("--compare", tmp_path / "long", tmp_path / "nearly")[0] == 0


def test_compare_says_first_what_else_is_unequal(call, tmp_path):
    make_runs(tmp_path / "two", (10.0, 11.0))
    make_runs(tmp_path / "one", (1.0,), eval_episodes=5)
    _, result, printed = call("--compare", tmp_path / "two", tmp_path / "one")
    said = [f"Unequal seeds on CartPole-v1: 1, 2 in {tmp_path}/two and 1 in {tmp_path}/one."]
    said += [f"Unequal evaluation episodes on CartPole-v1: 20 in {tmp_path}/two and 5 in {tmp_path}/one."]
    assert printed.out.splitlines()[:2] == result["unequal"] == said
    assert (tmp_path / "out" / "report.md").read_text().startswith("# Report\n\n" + "\n".join(said))
    make_runs(tmp_path / "other", (5.0, 6.0))
    _, result, printed = call("--compare", tmp_path / "two", tmp_path / "other")
    assert result["unequal"] == []
    assert printed.out.startswith("Results")


def test_compare_says_how_differently_runs_were_made_and_what_only_one_set_has(call, tmp_path):
    a, b = make_runs(tmp_path / "a", (10.0, 11.0)), make_runs(tmp_path / "b", (10.0, 11.0), eval_max_steps=9)
    make_runs(a, (-80.0, -90.0), env_id="Acrobot-v1")
    for path in b.glob("*/config.json"):
        made = {"commit": "fedcba9876543210-dirty", "hardware": "there\nand there", "versions": {"torch": "2.16.0"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | made))
    _, result, _ = call("--compare", a, b)
    assert result["unequal"] == [
        f"Only {a} has Acrobot-v1: left out of the comparison.",
        f"Unequal eval_max_steps on CartPole-v1: None in {a} and 9 in {b}.",
        f"Unequal commit on CartPole-v1: abcdef0123 in {a} and fedcba9876 changed in {b}.",
        f"Unequal hardware on CartPole-v1: here in {a} and there and there in {b}.",
        f"Unequal torch version on CartPole-v1: 2.15.0 in {a} and 2.16.0 in {b}.",
    ]
    headline = result["Environments with a reference, normalised"]
    assert [row["which"] for row in headline] == [["CartPole-v1"]] * 2


def test_threshold_counts_seeds_that_never_get_there(call, tmp_path):
    for seed, returns in enumerate([(200.0, 300.0), (0.0, 300.0), (0.0, 0.0)], 1):
        make_run(tmp_path / "runs" / str(seed), seed=seed, returns=returns)
    _, result, _ = call(tmp_path / "runs", "--threshold", 200)
    row = result["Until a return of 200"][0]
    assert (row["reached"], row["of"], row["steps"], row["seconds"]) == (2, 3, [100, 200, None], [1, 2, None])
    assert (row["median steps"], row["median s"]) == (200, 2)  # of 100, 200 and infinity
    _, result, _ = call(tmp_path / "runs", "--threshold", 200, "--in-a-row", 2)
    assert result["Until a return of 200 2 times in a row"][0]["median steps"] is None


@pytest.fixture
def baseline(call, tmp_path):
    make_runs(tmp_path / "before", (200.0, 210.0, 190.0, 205.0, 195.0), sps=4000.0)
    path = tmp_path / "results" / "x.json"
    assert call(tmp_path / "before", "--save-baseline", path)[0] == 0
    return path


@pytest.mark.parametrize(
    ("finals", "sps", "code", "red"),
    [
        ((200.0, 210.0, 190.0, 205.0, 195.0), 4000.0, 0, None),
        ((199.0, 214.0, 185.0, 203.0, 194.0), 4100.0, 0, None),  # a little worse, within the interval
        ((250.0, 260.0, 240.0, 255.0, 245.0), 4000.0, 0, None),
        ((150.0, 160.0, 140.0, 155.0, 145.0), 4000.0, 1, "return"),
        ((200.0, 210.0, 190.0, 205.0, 195.0), 3900.0, 1, "SPS"),
    ],
)
def test_regression_gate(call, tmp_path, baseline, finals, sps, code, red):
    make_runs(tmp_path / "after", finals, sps=sps)
    got, result, printed = call(tmp_path / "after", "--baseline", baseline)
    verdicts = {row["of"]: row["verdict"] for row in result[f"Against {baseline}"]}
    assert verdicts == {what: "worse" if what == red else "ok" for what in ("return", "SPS")}
    assert got == code
    assert ("worse" in printed.out.split("Against the baseline:")[-1]) == bool(red)


def test_a_baseline_stays_when_something_is_worse(call, tmp_path, baseline):
    kept = baseline.read_text()
    for finals, why in ((150.0, 160.0, 140.0), "worse"), ((1e3,), "not judged"):
        after = make_runs(tmp_path / why, finals)
        for _ in range(2):
            code, _, printed = call(after, "--baseline", baseline, "--save-baseline", baseline)
            assert code == 1
            assert "No baseline is written: something is worse, or not judged" in printed.out
    assert baseline.read_text() == kept
    better = make_runs(tmp_path / "better", (250.0, 260.0, 240.0), sps=4000.0)
    assert call(better, "--baseline", baseline, "--save-baseline", baseline)[0] == 0
    assert baseline.read_text() != kept


def test_a_full_disk_leaves_what_was_there(call, tmp_path, baseline):
    files = *(tmp_path / "out").iterdir(), baseline
    before, limits = [path.read_bytes() for path in files], resource.getrlimit(resource.RLIMIT_FSIZE)
    make_runs(tmp_path / "more", (1.0, 2.0, 3.0), script="dqn")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # bytes
    try:
        code, _, printed = call(tmp_path / "more", "--save-baseline", baseline)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert "can't be written" in printed.err
    assert [path.read_bytes() for path in files] == before
    assert {*files} == {*(tmp_path / "out").iterdir(), baseline}


def test_what_is_no_plain_file_is_not_replaced(call, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert call(make_run(tmp_path / "run"), "--save-baseline", tmp_path / "pipe")[0] == 2
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to(tmp_path / "kept.json")
    assert call(tmp_path / "run", "--save-baseline", tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "kept.json").is_file()


def test_gate_does_not_pass_what_it_can_not_judge(call, tmp_path, baseline):
    make_runs(tmp_path / "after", (200.0, 210.0))
    code, result, _ = call(tmp_path / "after", "--baseline", baseline)
    assert code == 1
    assert {row["verdict"] for row in result[f"Against {baseline}"]} == {"not judged: under three seeds"}
    make_runs(tmp_path / "other", (200.0, 210.0, 190.0), env_id="Acrobot-v1")
    code, result, _ = call(tmp_path / "other", "--baseline", baseline)
    assert code == 1
    assert {row["verdict"] for row in result[f"Against {baseline}"]} == {"not judged: no such runs"}
    code, _, printed = call(tmp_path / "other", "--baseline", baseline, "--allow-missing")
    assert code == 1  # a gate that judged nothing is not green
    assert "Nothing was judged" in printed.out


def test_gate_does_not_judge_runs_of_another_length(call, tmp_path, baseline):
    make_runs(tmp_path / "after", (300.0, 310.0, 290.0), steps=200)
    code, result, _ = call(tmp_path / "after", "--baseline", baseline)
    assert code == 1
    assert {row["verdict"] for row in result[f"Against {baseline}"]} == {"not judged: unequal steps"}


def test_gate_holds_an_experiment_against_its_like(call, tmp_path):
    """Labels name what differs within a call, and so are others when fewer experiments are there."""
    for name, gamma, final in ("a", 0.9, 100.0), ("b", 0.99, 300.0):
        make_runs(tmp_path / "before" / name, (final, final + 1, final + 2), gamma=gamma)
    path = tmp_path / "kept.json"
    assert call(tmp_path / "before", "--save-baseline", path)[0] == 0
    make_runs(tmp_path / "after", (300.0, 301.0, 302.0), gamma=0.99, new_flag=True)
    code, result, _ = call(tmp_path / "after", "--baseline", path)
    rows = [row for row in result[f"Against {path}"] if row["of"] == "return"]
    assert code == 1
    assert [(row["script"], row["verdict"], row["differs in"]) for row in rows] == [
        ("ppo gamma=0.9", "not judged: no such runs", []), ("ppo gamma=0.99", "ok", ["new_flag"]),
    ]  # fmt: skip
    assert call(tmp_path / "after", "--baseline", path, "--allow-missing")[0] == 0


def test_gate_takes_no_rounding_for_a_regression(call, tmp_path):
    path, returns = tmp_path / "kept.json", (0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2)
    assert call(make_runs(tmp_path / "before", returns), "--save-baseline", path)[0] == 0
    assert call(make_runs(tmp_path / "after", (0.3, 0.3, 0.3)), "--baseline", path)[0] == 0
    assert call(make_runs(tmp_path / "worse", (0.29999, 0.29999, 0.29999)), "--baseline", path)[0] == 1


def test_a_baseline_of_one_seed_judges_nothing(call, tmp_path):
    path = tmp_path / "kept.json"
    assert call(make_runs(tmp_path / "before", (100.0,)), "--save-baseline", path)[0] == 0
    code, result, _ = call(make_runs(tmp_path / "after", (1.0, 2.0, 3.0)), "--baseline", path)
    assert code == 1
    verdicts = {row["verdict"] for row in result[f"Against {path}"]}
    assert verdicts == {"not judged: the baseline has under three seeds"}
    path.write_text('{"experiments": []}')
    code, _, printed = call(tmp_path / "after", "--baseline", path, "--allow-missing")
    assert code == 1
    assert "Nothing was judged" in printed.out


def test_what_can_not_be_judged_is_red_unless_something_else_was(call, tmp_path):
    path = tmp_path / "kept.json"
    make_runs(tmp_path / "before", (100.0,))
    make_runs(tmp_path / "before", (1.0, 2.0, 3.0), env_id="Acrobot-v1")
    _, _, printed = call(tmp_path / "before", "--save-baseline", path)
    assert "ppo on CartPole-v1 has only 1 of the three seeds that a baseline needs" in printed.out
    assert "on Acrobot-v1 has only" not in printed.out
    assert call(tmp_path / "before", "--baseline", path)[0] == 1
    code, _, printed = call(tmp_path / "before", "--baseline", path, "--allow-missing")
    assert code == 0
    assert "ppo on CartPole-v1: return not judged: the baseline has under three seeds" in printed.out


def test_baseline_says_where_it_comes_from(baseline):
    (entry,) = json.loads(baseline.read_text())["experiments"]
    curve = [[100, 0.025, 20], [200, 0.05, 210]]
    assert entry["runs"]["2"] == {"return": 210, "SPS": 4000, "curve": curve, "last": {"eval/episodic_return": 210}}
    assert (entry["commit"], entry["hardware"]) == ("abcdef0123456789", "here")
    assert (entry["args"]["eval_episodes"], entry["versions"]) == (20, {"torch": "2.15.0"})  # nothing needs "other"
    assert baseline.stat().st_size < 2000


def test_a_kept_baseline_makes_the_same_report(call, tmp_path):
    for script, env_id in ("ppo", "CartPole-v1"), ("dqn", "Acrobot-v1"):
        make_runs(tmp_path / "runs", (1 / 3, 20.5, 300.0), script=script, env_id=env_id)
    path = tmp_path / "kept" / "classic.json"
    code, result, _ = call(tmp_path / "runs", "--save-baseline", path, pictures=True)
    text = (tmp_path / "out" / "report.md").read_text()
    assert (code, len(result["Results"])) == (0, 2)
    again, same, _ = call(tmp_path / "kept" / "*.json", pictures=True)
    assert (again, same) == (code, result)
    assert (tmp_path / "out" / "report.md").read_text() == text
    assert (tmp_path / "out" / "overview.png").exists()
    path.write_text('{"experiments": [{"runs": {"1": {}}}]}')
    code, _, printed = call(path)
    assert code == 2
    assert str(path) in printed.err


def test_each_row_says_how_it_was_made():
    runs = [report.Run(Path(), "dqn", "Acrobot-v1", seed) for seed in (1, 2)]
    command = [
        "/home/me/algorithms/dqn.py",
        "--env-id=Acrobot-v1",
        "--seed",
        "1",
        "--tau",
        "1",
        "--run-dir=a b",
        "--x=a b",
    ]
    runs[0].config = {"command": command, "commit": "0123456789abcdef-dirty", "versions": {"torch": "2", "tqdm": "4"}}
    row = report.reproduce(report.Experiment("dqn", "dqn", "Acrobot-v1", runs, {}))
    assert row["command, and --seed"] == "`python algorithms/dqn.py --env-id=Acrobot-v1 --tau 1 '--x=a b'`"
    assert report.command_of(runs[0].config) == ["algorithms/dqn.py", "--env-id=Acrobot-v1", "--tau", "1", "--x=a b"]
    assert report.command_of({"command": report.command_of(runs[0].config)}) == report.command_of(runs[0].config)
    assert report.command_of({}) == []
    assert (row["seeds"], row["commit"], row["versions"]) == ("1, 2", "0123456789 changed", "torch 2")


def test_no_baseline_from_an_incomplete_set(call, tmp_path):
    make_runs(tmp_path / "runs", (1.0, 2.0, 3.0))
    assert call(tmp_path / "runs", "--seeds", 1, 2, 3, 4, "--save-baseline", tmp_path / "x.json")[0] == 1
    assert not (tmp_path / "x.json").exists()


# ---- Pictures and text ----


def colourful(path):
    """The shares of the pixels that are drawn in colour, and drawn dark (text and axes), on a white that is opaque."""
    pixels = matplotlib.image.imread(path)  # (H, W, 3 or 4)
    assert (pixels[..., 3:] == 1).all()
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()
    spread = np.ptp(pixels[..., :3], axis=-1)
    return (spread > 0.3).mean(), ((spread < 0.1) & (pixels[..., :3].max(-1) < 0.6)).mean()


def test_pictures_are_legible_on_any_page_and_have_captions(call, tmp_path):
    for env_id in "CartPole-v1", "Acrobot-v1":
        make_runs(tmp_path / "runs", (400.0, 450.0, 500.0), env_id=env_id)
        make_runs(tmp_path / "runs", (300.0, 350.0, 380.0), env_id=env_id, script="dqn")
    call(tmp_path / "runs", "--threshold", 200, pictures=True)
    text = (tmp_path / "out" / "report.md").read_text()
    for name in "curves-steps", "curves-time", "aggregate", "overview":
        colour, dark = colourful(tmp_path / "out" / f"{name}.png")
        assert colour > 0.005, name
        assert dark > 0.005, name
        caption = text.split(f"]({name}.png)\n\n*")[1].split("*\n")[0]
        assert len(caption) > 80, name
        assert ("Dashed: the threshold of 200." in caption) == name.startswith("curves")
        drawing = (tmp_path / "out" / f"{name}.svg").read_text()
        assert "<text" in drawing  # that can be searched and read aloud
        assert "<dc:date>" not in drawing
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.svg")}
    call(tmp_path / "runs", "--threshold", 200, pictures=True)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.svg")}


def draw_frontier(path):
    figure = report.plot_frontier(experiments(path))
    return {line.get_label(): np.array(line.get_data()).T for line in figure.axes[0].lines}, figure.axes[0]


def test_frontier(call, tmp_path):
    for beta in 0.1, 1.0:
        for seed in 1, 2, 3:
            run = make_run(tmp_path / "runs" / f"{beta}-{seed}", "dpo", "", seed, beta=beta)
            rows = [{"global_step": 200, "time": 1.0, "eval/true_reward": seed - beta, "eval/kl": 1 / beta}]
            write_rows(run, rows)
    code, result, _ = call(tmp_path / "runs", pictures=True)
    assert code == 0
    means = {row["script"]: round(row["mean"], 6) for row in result["Results"]}
    assert means == {"dpo beta=0.1": 1.9, "dpo beta=1.0": 1.0}
    assert colourful(tmp_path / "out" / "frontier.png")[0] > 0.003
    lines, axes = draw_frontier(tmp_path / "runs")
    assert lines.keys() == {"dpo"}
    assert np.allclose(lines["dpo"], [[1, 1], [10, 1.9]])
    assert sorted(text.get_text() for text in axes.texts) == ["β = 0.1", "β = 1.0"]


def test_a_line_of_the_frontier_is_one_experiment(tmp_path):
    for loss_type in "ipo", "sigmoid":
        for beta in 0.1, 1.0:
            run = make_run(tmp_path / f"{loss_type}{beta}", "dpo", "", beta=beta, loss_type=loss_type)
            write_rows(run, [{"global_step": 200, "time": 1.0, "eval/true_reward": 1.0, "eval/kl": 1 / beta}])
    assert [*draw_frontier(tmp_path)[0]] == ["dpo, loss type ipo", "dpo, loss type sigmoid"]


def make_log_runs(root):
    """Two sizes of two behaviours, seeds 1 and 2 of each with logs of their own."""
    for behaviour, size, seed in product(("poor", "good"), (100, 9000), (1, 2)):
        data = root / "data" / f"{behaviour}-{size}-{seed}"
        data.mkdir(parents=True)
        earned = 0.1 * seed + (behaviour == "good")
        about = {"behaviour": f"{behaviour} one", "transitions": size, "mean_return": earned}
        (data / "data.json").write_text(json.dumps(about))
        for script, temperature in ("iql", 3.0), ("iql", 0), ("cql", None):
            folder = root / "runs" / f"{script}-{temperature}-{data.name}"
            args = {"dataset": str(data)} | ({} if temperature is None else {"temperature": temperature})
            final = size / 100 + seed + 10.0 * (temperature == 0)
            make_run(folder, script, "FrozenLake-v1", seed, returns=(0.0, final), **args)
    return root / "runs"


def test_the_picture_of_logs_has_a_panel_for_each_behaviour_and_a_dot_for_each_run(call, tmp_path):
    runs, kept = make_log_runs(tmp_path), tmp_path / "kept.json"
    assert call(runs, "--save-baseline", kept, pictures=True)[0] == 0
    assert colourful(tmp_path / "out" / "logs.png")[0] > 0.003
    for place in runs, kept:
        assert all(len(e.done) == 2 for e in experiments(place))
        figure = report.plot_logs(experiments(place))
        assert [axes.get_title() for axes in figure.axes] == ["poor one", "good one"]
        lines = {line.get_label(): np.array(line.get_data()).T for line in figure.axes[1].lines}
        dots = [line for name, line in lines.items() if name.startswith("_")]
        lines = {name: line for name, line in lines.items() if not name.startswith("_")}
        cloning, best = "behaviour cloning: iql, temperature 0", "best stationary policy"
        assert lines.keys() == {"cql", "iql, temperature 3.0", cloning, "the behaviour", best}
        colours = {line.get_label(): line.get_color() for line in figure.axes[1].lines}
        assert colours[cloning] != colours["iql, temperature 3.0"]
        assert np.allclose(lines["cql"], [[100, 2.5], [9000, 91.5]])
        assert np.allclose(lines["behaviour cloning: iql, temperature 0"], [[100, 12.5], [9000, 101.5]])
        assert np.allclose(lines["the behaviour"], [[100, 1.15], [9000, 1.15]])
        assert sorted(map(tuple, dots[0])) == [(100, 2), (100, 3), (9000, 91), (9000, 92)]


def test_the_picture_of_logs_shows_the_runs_of_all_data_sets_of_a_size(tmp_path):
    for name, final, size in ("a", 1.0, 100), ("b", 3.0, 100), ("c", 5.0, 900):
        (tmp_path / "data" / name).mkdir(parents=True)
        about = {"behaviour": "dqn on Walk-v0, seed 7; random actions", "transitions": size, "mean_return": final / 10}
        (tmp_path / "data" / name / "data.json").write_text(json.dumps(about))
        make_run(tmp_path / "runs" / name, "iql", returns=(final,), dataset=str(tmp_path / "data" / name))
    (axes,) = report.plot_logs(experiments(tmp_path / "runs")).axes
    assert axes.get_title() == "dqn; random actions"
    lines = {line.get_label(): np.array(line.get_data()).T.tolist() for line in axes.lines}
    assert lines["iql"] == [[100, 2], [900, 5]]
    assert np.allclose(lines["the behaviour"], [[100, 0.2], [900, 0.5]])
    assert sorted(next(points for name, points in lines.items() if name.startswith("_"))) == [
        [100, 1],
        [100, 3],
        [900, 5],
    ]


def test_logs_without_a_description_or_all_alike_have_no_picture(call, tmp_path):
    runs = make_log_runs(tmp_path)
    for data in (tmp_path / "data").iterdir():
        (data / "data.json").write_text("{")
    assert call(runs, pictures=True)[0] == 0
    assert not (tmp_path / "out" / "logs.png").exists()
    about = {"behaviour": "one", "transitions": 5, "mean_return": 0.5}
    for data in (tmp_path / "data").iterdir():
        (data / "data.json").write_text(json.dumps(about))
    assert experiments(runs)[0].data == about
    assert call(runs, pictures=True)[0] == 0
    assert not (tmp_path / "out" / "logs.png").exists()


def test_paths_in_the_repository_are_kept_without_the_machine(tmp_path):
    paths = {"dataset": f"{report.ROOT}/data/half", "shipped": "/x/benchmark/offline/frozenlake", "other": "/x/lake"}
    args = report.read_run(make_run(tmp_path / "run", "iql", **paths), "").config["args"]
    assert [args[name] for name in paths] == ["data/half", "benchmark/offline/frozenlake", "/x/lake"]


def make_frontier_runs(root, betas):
    for beta in betas:
        for seed in 1, 2, 3:
            run = make_run(root / f"{beta}-{seed}", "dpo", "", seed, beta=beta)
            rewards = {"true": seed - beta, "optimal": seed + 3 - beta, "reference": -1.5}
            row = {f"eval/{name}_reward": value for name, value in rewards.items()}
            write_rows(run, [{"global_step": 200, "time": 1.0, "eval/kl": 1 / beta, **row}])
    return root


def test_without_a_known_curve_the_optimum_is_a_point_for_each_run(call, tmp_path, monkeypatch):
    """A line between them would cut through the curve, which is steepest at 0."""
    monkeypatch.setattr(report, "FRONTIER", tmp_path / "none.json")
    runs, path = make_frontier_runs(tmp_path / "runs", (0.1, 1.0)), tmp_path / "dpo.json"
    assert call(runs, "--save-baseline", path)[0] == 0
    for place in runs, path:
        lines, axes = draw_frontier(place)
        best = sorted(lines["the optimum at the same divergence"].tolist())
        assert np.allclose(best, [[1, 3], [1, 4], [1, 5], [10, 3.9], [10, 4.9], [10, 5.9]]), place
        assert axes.lines[0].get_linestyle() == "None"
        assert np.allclose(lines["dpo"], [[1, 1], [10, 1.9]]), place
        assert np.allclose(lines["the reference policy"], [[0, -1.5]]), place


@pytest.mark.parametrize("betas", [(1.0,), (0.1, 1.0)])
def test_the_optimum_is_the_whole_curve_whatever_was_run(tmp_path, monkeypatch, betas):
    """Also with one beta: here the best reward is -1.5 + sqrt(KL), which no chord resembles."""
    monkeypatch.setattr(report, "FRONTIER", tmp_path / "frontier.json")
    kls = [20.0, 0.0, *np.geomspace(0.01, 15, 40)]
    rows = [{"beta": None if kl == 0 else 1.0, "kl": kl, "reward": -1.5 + kl**0.5} for kl in kls]
    (tmp_path / "frontier.json").write_text(json.dumps({"optimum": rows}))
    lines, _ = draw_frontier(make_frontier_runs(tmp_path / "runs", betas))
    curve = lines["the optimum"]
    assert len(curve) >= 100
    assert np.allclose(curve[:, 1], -1.5 + curve[:, 0] ** 0.5, atol=0.01)
    assert curve[0].tolist() == [0, -1.5]
    assert curve[-1, 0] == pytest.approx(1.2 / min(betas))
    assert "the optimum at the same divergence" not in lines
    for row in rows:  # of another reference model
        row["reward"] -= 0.1
    (tmp_path / "frontier.json").write_text(json.dumps({"optimum": rows}))
    assert "the optimum" not in draw_frontier(tmp_path / "runs")[0]
    # A run that names the files of the task has started from their reference model, and need not know its reward
    run = make_run(tmp_path / "named", "grpo", "", beta=1.0, dataset="benchmark/reviews/prompts.parquet")
    write_rows(run, [{"global_step": 200, "time": 1.0, "eval/kl": 2.0, "eval/reward": 0.5}])
    lines, _ = draw_frontier(tmp_path / "named")
    assert lines["grpo"].tolist() == [[2, 0.5]]
    assert np.allclose(lines["the optimum"][0], [0, -1.6])
    assert "the reference policy" not in lines
    (tmp_path / "frontier.json").write_text('{"optimum": [{"kl": 1}]}')
    with pytest.raises(SystemExit, match="2"):
        draw_frontier(tmp_path / "runs")


def write_frontier(path):
    """The best reward is sqrt(KL) - 0.5, until 2.5; the best of n has less."""
    kls = np.linspace(0, 3, 50) ** 2
    rows = [{"beta": None if kl == 0 else 1.0, "kl": kl, "reward": kl**0.5 - 0.5} for kl in kls]
    best = [{"n": n, "kl": n / 4, "reward": 0.75 * (n / 4) ** 0.5} for n in (1, 4, 16, 64)]
    path.write_text(json.dumps({"optimum": rows, "best_of_n": best}))


def test_against_the_optimum_by_hand(call, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FRONTIER", tmp_path / "frontier.json")
    write_frontier(tmp_path / "frontier.json")
    for beta, kl in ("0.5", 4.0), ("0.1", 100.0):  # behind the curve's end there is no more to gain
        for seed in 1, 2, 3:
            files = {
                "model_name": "/a/machine/benchmark/reviews/model",
                "reward": "/a/benchmark/reviews/reward.py:true_reward",
            }
            run = make_run(tmp_path / "runs" / f"{beta}-{seed}", "grpo", "", seed, beta=float(beta), **files)
            write_rows(run, [{"global_step": 200, "time": 1.0, "eval/kl": kl, "eval/reward": 0.25 * seed}])
    code, result, _ = call(tmp_path / "runs")
    assert code == 0
    rows = {row["beta"]: row for row in result["Against the optimum at the same KL divergence"]}
    assert [rows[0.5][name] for name in ("n", "KL", "reward")] == [3, 4, 0.5]
    assert rows[0.5]["reward 95 %"] == [0.25, 0.75]
    assert rows[0.5]["optimum"] == pytest.approx(1.5, abs=1e-3)
    assert rows[0.5]["share by seed"] == pytest.approx([0.375, 0.5, 0.625], abs=1e-3)  # of the gain, from -0.5 on
    assert rows[0.5]["share"] == pytest.approx(0.5, abs=1e-3)
    assert rows[0.1]["optimum"] == pytest.approx(2.5)
    lines, _ = draw_frontier(tmp_path / "runs")
    best = [[0.25, 0.375], [1, 0.75], [4, 1.5], [16, 3]]
    assert lines["the reference's best of n replies, n to 64"].tolist() == best
    args = experiments(tmp_path / "runs")[0].done[0].config["args"]
    assert (args["model_name"], args["reward"]) == ("benchmark/reviews/model", "true_reward")


def test_a_divergence_of_nothing_has_no_share(call, tmp_path, monkeypatch):
    """An estimate may lie below 0: after a few steps, the policy is still the reference."""
    monkeypatch.setattr(report, "FRONTIER", tmp_path / "frontier.json")
    write_frontier(tmp_path / "frontier.json")
    run = make_run(tmp_path / "runs" / "one", "grpo", "", beta=1.0, dataset="benchmark/reviews/prompts.parquet")
    write_rows(run, [{"global_step": 200, "time": 1.0, "eval/kl": -0.001, "eval/reward": -0.5}])
    code, result, _ = call(tmp_path / "runs", pictures=True)
    assert code == 0
    (row,) = result["Against the optimum at the same KL divergence"]
    assert (row["share"], row["share by seed"]) == (None, [])
    assert report.frontier_rows(experiments(tmp_path / "runs"))[0]["share of the gain"] == "-"


def test_the_table_of_the_frontier(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "FRONTIER", tmp_path / "frontier.json")
    write_frontier(tmp_path / "frontier.json")
    for beta, kl, seeds in (0.5, 4.0, (1, 2, 3)), (2.0, 1.0, (1,)):
        for seed in seeds:
            args = {"beta": beta, "model_name": "benchmark/reviews/model"}
            run = make_run(tmp_path / "runs" / f"{beta}-{seed}", "dpo", "", seed, **args)
            write_rows(run, [{"global_step": 200, "time": 1.0, "eval/kl": kl, "eval/reward": 0.25 * seed}])
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "runs"), "--table", "frontier"])
    report.main()
    assert capsys.readouterr().out.splitlines() == [
        "| script | beta | KL | true reward | optimum at this KL | share of the gain |",
        "| --- | --- | --- | --- | --- | --- |",
        "| dpo | 2 | 1.00 | **0.25** | 0.50 | **75 %** |",
        "| dpo | 0.5 | 4.00 | **0.50** [0.25, 0.75] | 1.50 | **50 %** (38 to 62) |",
    ]
    (tmp_path / "frontier.json").unlink()
    report.main()
    assert capsys.readouterr().out.startswith("no run is known")


def test_a_legend_says_what_tells_lines_apart():
    labels = ["dpo", "grpo advantage=rloo kl=reward beta_2=1", "grpo advantage=grpo kl=loss beta_2=1"]
    names = ["dpo", "grpo, advantage rloo", "grpo"]
    assert report.names_in_a_legend(labels) == dict(zip(labels, names, strict=True))
    labels = ["ppo a=1 b=1", "ppo a=1 b=2", "ppo a=2 b=2"]  # none of the two alone would do
    assert [*report.names_in_a_legend(labels).values()] == ["ppo, a 1, b 1", "ppo, a 1, b 2", "ppo, a 2, b 2"]
    assert report.names_in_a_legend(["ppo a=1"]) == {"ppo a=1": "ppo"}


@pytest.fixture
def pushed(tmp_path, monkeypatch):
    """Policies that learn from reward models of 1,000 and 4,000 pairs, without and with a price."""
    monkeypatch.setattr(report, "FRONTIER", tmp_path / "frontier.json")
    write_frontier(tmp_path / "frontier.json")
    for seed in 1, 2, 3:
        for pairs in 4000, 1000:
            split = {"dataset_split": f"train[:{pairs}]"}
            model = make_run(tmp_path / "runs" / f"model-{pairs}-{seed}", "reward_model", None, seed, **split)
            write_rows(model, [{"global_step": 200, "time": 1.0, "eval/accuracy": 0.7}])
            for beta in 0.0, 0.5:
                args = {"beta": beta, "reward": [f"/far/away/{model.name}/model", "/x/reward.py:true_reward"]}
                args |= {"reward_weights": [1, 0], "dataset": "/x/benchmark/reviews/prompts.parquet"}
                run = make_run(tmp_path / "runs" / f"{beta}-{pairs}-{seed}", "grpo", None, seed, steps=50, **args)
                rows = []
                for step, kl, truth, score in (50, 0.1 * seed, 1.0, 5.0), (75, 1.0, 4.0 + seed, 6.0), (100, 9, 1, 8.0):
                    row = {"global_step": step, "time": 1.0, "eval/kl": kl, "eval/reward": score}
                    rows.append(row | {"eval/reward/1-model": score, "eval/reward/2-true_reward": truth})
                write_rows(run, rows)
    return tmp_path / "runs"


def test_over_optimisation_by_hand(call, pushed, tmp_path):
    title = "Learning from a reward model: the true reward, and what the model believes"
    code, result, _ = call(pushed, "--save-baseline", tmp_path / "kept.json")
    assert code == 0
    assert "Against the optimum at the same KL divergence" not in result
    rows = {row["script"]: row for row in result[title]}
    taught = [f"grpo beta={beta} reward=model_of_{pairs}_pairs" for beta in (0.0, 0.5) for pairs in (1000, 4000)]
    assert sorted(rows) == taught
    row = {"script": taught[0], "n": 3, "highest reward": 6, "at KL": 1, "gain of the score so far": 1}
    assert rows[taught[0]] == row | {"reward at the end": 1, "KL": 9, "gain of the score": 3}
    scores = {(row["script"], row["environment"]): row["mean"] for row in result["Results"] if row["script"] in taught}
    assert scores == {(name, "preferences, true reward"): 1 for name in taught}
    assert call(tmp_path / "kept.json")[1][title] == result[title]
    figures = [report.plot_frontier(experiments(place)) for place in (pushed, tmp_path / "kept.json")]
    lines = [[line.get_xydata() for axes in figure.axes for line in axes.lines] for figure in figures]
    assert all(np.allclose(*pair) for pair in zip(*lines, strict=True))
    assert "[50.0, 0.1, 1.0, 5.0]" in (tmp_path / "kept.json").read_text()  # an evaluation is one line


def test_the_panels_of_over_optimisation(pushed):
    figure = report.plot_frontier(experiments(pushed))
    free, priced = figure.axes
    assert "β = 0" in free.get_title()
    lines = {line.get_label(): line for line in free.lines if not line.get_label().startswith("_")}
    assert [*lines][:2] == ["reward model of 1,000 pairs", "reward model of 4,000 pairs"]
    assert [*lines][2:] == ["the optimum", "solid, dots: the true reward", "dashed: the reward model's score"]
    means = [[0.2, 1], [1, 6], [9, 1]]
    assert np.allclose(np.array(lines["reward model of 1,000 pairs"].get_data()).T, means)
    dashed = [line for line in free.lines if line.get_linestyle() == "--" and line.get_linewidth() == 1.5]
    assert np.allclose(dashed[0].get_ydata(), [1, 2, 4])  # shifted to the true reward at its beginning
    dots = [line for line in free.lines if line.get_marker() == "." and line.get_linestyle() == "None"]
    assert [len(line.get_xdata()) for line in dots] == [9, 9]
    colors = [lines[f"reward model of {pairs} pairs"].get_color() for pairs in ("1,000", "4,000")]
    assert sum(colors[0]) > sum(colors[1])  # from pale to dark
    assert "reward model of 4,000 pairs, β = 0.5" in [line.get_label() for line in priced.lines]
    assert np.allclose(free.get_ylim(), priced.get_ylim())


def test_the_truth_and_a_models_belief_are_not_mixed_up(tmp_path):
    """A score by a reward model alone stands on no frontier; beside it the truth is the run's score."""
    alone = make_run(tmp_path / "alone", "ppo_rlhf", None, reward="runs/rm/model", beta=1.0)
    write_rows(alone, [{"global_step": 200, "time": 1.0, "eval/kl": 1.0, "eval/reward": 9.0}])
    assert experiments(tmp_path / "alone")[0].on_frontier == []
    both = make_run(tmp_path / "both", "grpo", None, reward=["r.py:true_reward", "r.py:short"], beta=1.0)
    found = {"eval/reward": 9.0, "eval/reward/1-true_reward": 2.0, "eval/reward/2-short": 7.0}
    write_rows(both, [{"global_step": 200, "time": 1.0, "eval/kl": 1.0} | found])
    (experiment,) = experiments(tmp_path / "both")
    assert experiment.env_id == "preferences, true reward"
    assert experiment.metric == "true reward of the replies"
    assert experiment.scores.tolist() == [2]
    assert [run.on_frontier[1] for run in experiment.on_frontier] == [2]
    assert experiment.done[0].config["args"]["reward"] == "r.py:true_reward+r.py:short"


def test_the_folder_of_the_repository_is_not_kept():
    command = [
        f"{report.ROOT}/algorithms/grpo.py",
        "--reward",
        f"{report.ROOT}/runs/x/model",
        "--seed=3",
        "--run-dir=y",
    ]
    assert report.command_of({"command": command}) == ["algorithms/grpo.py", "--reward", "runs/x/model"]


def test_what_the_last_evaluations_found_beside_the_score(call, tmp_path):
    title, path = "What the last evaluations found beside the score", tmp_path / "kept.json"
    for seed in 1, 2, 3:
        run = make_run(tmp_path / "runs" / str(seed), "reward_model", "", seed)
        found = {"eval/accuracy": 0.7, "eval/return_std": 9.0, "losses/loss": 5.0}
        margin = 1.0 if seed == 1 else None  # what not all seeds know is left out
        steps = {100: {"eval/reward_accuracy": 0.0}, 200: {"eval/reward_accuracy": 0.25 * seed, "eval/margin": margin}}
        write_rows(run, [{"global_step": step, "time": 1.0} | found | more for step, more in steps.items()])
    row = {"script": "reward_model", "environment": "preferences, accuracy", "of": "reward_accuracy"}
    row |= {"mean": 0.5, "by seed": [0.25, 0.5, 0.75]}
    assert call(tmp_path / "runs", "--save-baseline", path)[1][title] == [row]
    assert call(path)[1][title] == [row]
    make_run(tmp_path / "plain", returns=(1.0,))
    assert title not in call(tmp_path / "plain", pictures=True)[1]
    assert not (tmp_path / "out" / "frontier.png").exists()


def test_curves_show_the_mean_on_the_common_steps(tmp_path):
    make_run(tmp_path / "1", seed=1, returns=(0.0, 10.0, 20.0), total_timesteps=1)
    make_run(tmp_path / "2", seed=2, returns=(10.0, 30.0), total_timesteps=1)
    line = report.plot_curves(experiments(tmp_path), False, None).axes[0].lines[0]
    assert np.array(line.get_data()).T.tolist() == [[100, 5], [200, 20]]


def test_runs_by_hand_may_have_one_evaluation_or_no_time(call, tmp_path):
    for seed in 1, 2, 3:
        make_run(tmp_path / "one" / str(seed), seed=seed, returns=(10.0 * seed,))
        rows = [{"global_step": step, "eval/episodic_return": 1.0} for step in (100, 200)]
        write_rows(make_run(tmp_path / "timeless" / str(seed), seed=seed), rows)
        write_rows(make_run(tmp_path / "apart" / str(seed), seed=seed), [evaluation(200 + seed, 1.0)])
    assert call(tmp_path / "one", pictures=True)[0] == 0
    assert colourful(tmp_path / "out" / "curves-steps.png")[0] > 0.0001
    assert call(tmp_path / "timeless", "--threshold", 1, pictures=True)[0] == 0
    assert not (tmp_path / "out" / "curves-time.png").exists()
    assert call(tmp_path / "apart", pictures=True)[0] == 0


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("HalfCheetah-v5", "halfcheetah"),
        ("simple_spread_v3 N=3 (MPE2)", "simple_spread"),
        ("ALE/Pong-v5", "pong"),
        ("ALE Pong-v5", "pong"),
        ("PongNoFrameskip-v4", "pong"),
        ("LunarLanderContinuous-v2", "lunarlandercontinuous"),
    ],
)
def test_versions_of_an_environment_share_a_name(env_id, name):
    assert report.base_name(env_id) == name


@pytest.mark.parametrize(
    "env_id, result, name",
    [
        ("CartPole-v1", "eval/episodic_return", "CartPole-v1"),
        ("gymnasium_robotics:FetchReach-v4", None, "FetchReach-v4"),
        (None, "eval/true_reward", "preferences, true reward"),
        (None, None, "preferences"),
    ],
)
def test_preferences_are_named_by_what_is_measured(env_id, result, name):
    assert report.name_env(env_id, result) == name


def test_with_actions_in_a_box_it_is_another_environment(call, tmp_path):
    """That has a reference of its own, also where runs are missing."""
    env_id = "simple_speaker_listener_v4"
    best = report.REFERENCES[f"{env_id}, continuous"][1]
    make_runs(tmp_path / "runs" / "a", (best,) * 3, env_id=env_id, continuous_actions=True)
    make_runs(tmp_path / "runs" / "b", (best,) * 3, env_id=env_id, continuous_actions=False)
    low, high, *_ = report.REFERENCES[env_id]
    row = call(tmp_path / "runs")[1]["Environments with a reference, normalised"][0]
    assert row["IQM"] == pytest.approx((1 + (best - low) / (high - low)) / 2)
    run = {"script": "ppo", "env_id": env_id, "seed": 4, "run_dir": "gone", "status": "failed"}
    (tmp_path / "launched").mkdir()
    ledger = {"runs": [run | {"flags": ["--continuous-actions"]}]}
    (tmp_path / "launched" / "ledger.json").write_text(json.dumps(ledger))
    _, result, _ = call(tmp_path / "runs", tmp_path / "launched")
    found = {row["environment"]: (row["n"], row["of"]) for row in result["Results"]}
    assert found == {env_id: (3, 3), f"{env_id}, continuous": (3, 4)}


def test_a_return_that_is_exact_goes_before_one_of_episodes_and_says_so(call, tmp_path):
    for seed in 1, 2, 3:
        folder = make_run(tmp_path / "runs" / str(seed), "q_learning", "Taxi-v4", seed)
        write_rows(folder, [{"global_step": 200, "time": 2.0, "eval/exact_return": 7.5, "eval/episodic_return": 3.0}])
    _, result, _ = call(tmp_path / "runs", "--save-baseline", tmp_path / "kept.json")
    assert result["Results"][0]["mean"] == 7.5
    for source in tmp_path / "runs", tmp_path / "kept.json":
        call(source)
        assert "evaluation at the last step, exact; mean" in (tmp_path / "out" / "report.md").read_text()


def test_accuracies_and_rewards_share_no_panel(call, tmp_path):
    for script, key in {"dpo": "eval/true_reward", "reward_model": "eval/accuracy"}.items():
        for seed in 1, 2:
            folder = make_run(tmp_path / "runs" / f"{script}{seed}", script, None, seed, eval_episodes=None)
            write_rows(folder, [{"global_step": 200, "time": 2.0, "eval/accuracy": 0.5, key: 0.7 + seed / 10}])
    _, result, _ = call(tmp_path / "runs")
    rows = {row["script"]: (row["environment"], round(row["mean"], 3)) for row in result["Results"]}
    assert rows == {"dpo": ("preferences, true reward", 0.85), "reward_model": ("preferences, accuracy", 0.85)}
    assert (tmp_path / "out" / "report.md").read_text().count("evaluation at the last step, held-out data;") == 2
    panels = report.plot_curves(experiments(tmp_path / "runs"), False, None).axes
    assert [axes.get_title() for axes in panels] == ["preferences, true reward", "preferences, accuracy"]


def test_the_overview_tells_experiments_of_one_script_apart(tmp_path):
    for algorithm in "maddpg", "ddpg":
        make_run(tmp_path / "runs" / algorithm, script="maddpg", env_id="simple_spread_v3", algorithm=algorithm)
    figure = report.plot_overview(experiments(tmp_path / "runs"))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sorted(names) == ["maddpg, algorithm ddpg:  simple_spread_v3, 200", "maddpg:  simple_spread_v3, 200"]


def test_the_overview_names_its_references_and_marks_those_of_longer_runs(tmp_path):
    for steps in 50_000, 500_000:
        make_run(tmp_path / "runs" / str(steps), "td3", "Hopper-v5", returns=(1.0, 900.0), steps=steps)
    longer, same = report.plot_overview(sorted(experiments(tmp_path / "runs"), key=lambda e: e.budget)).axes
    assert [label.get_text() for label in same.get_yticklabels()] == ["3,606: TD3 on v3, 1M steps"] * 2
    hollow = [dot.get_markerfacecolor() == "white" for dot in longer.lines if dot.get_marker() == "o"]
    assert hollow == [True, False]  # after 100k steps and after 1M


def curves(path, seconds=False, threshold=None):
    return report.plot_curves(experiments(path), seconds, threshold).axes


def test_no_two_curves_look_alike(tmp_path):
    count = 2 * len(report.SPARE_COLORS)
    for number in range(count):
        make_run(tmp_path / "runs" / f"script{number:02}", script=f"script{number:02}")
    (axes,) = curves(tmp_path / "runs")
    looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines][:count]
    assert len(set(looks)) == len(looks) == count
    assert [(line.get_color(), line.get_linestyle()) for line in axes.get_legend().get_lines()][:count] == looks


def test_a_script_has_its_colour_in_every_picture_and_each_panel_its_legend(tmp_path):
    for env_id, scripts in {"CartPole-v1": ("dqn", "ppo"), "LunarLander-v3": ("ppo", "sac")}.items():
        for script in scripts:
            make_runs(tmp_path / "runs", (20.0, 30.0, 40.0), env_id=env_id, script=script)
    for steps in 5, 300:
        make_run(
            tmp_path / "runs" / f"lander-{steps}", "ppo", "LunarLander-v3", returns=(20.0, 40.0), steps=steps, seed=9
        )
    scripts = [path.stem for path in (report.ROOT / "algorithms").glob("*.py")]
    assert len({report.SCRIPT_COLORS[script] for script in scripts}) == len(scripts)
    by_panel = {}
    for axes in curves(tmp_path / "runs"):
        handles, names = axes.get_legend_handles_labels()
        by_panel[axes.get_title()] = [text.get_text() for text in axes.get_legend().get_texts()]
        for handle, name in zip(handles, names, strict=True):
            if not name.startswith("reference"):
                assert handle.get_color() == report.SCRIPT_COLORS[name.split(",")[0].split(" ")[0]], name
    assert by_panel["CartPole-v1"] == ["dqn (3 seeds)", "ppo (3 seeds)"]  # the reference is far above
    assert by_panel["LunarLander-v3"] == [
        "ppo, 600 steps (one seed)", "ppo, 200 steps (3 seeds)", "ppo, 10 steps (one seed)", "sac (3 seeds)",
    ]  # fmt: skip
    lines = {line.get_label(): line.get_linestyle() for line in curves(tmp_path / "runs")[1].lines}
    assert [lines[name] for name in by_panel["LunarLander-v3"]] == ["-", "--", ":", "-"]  # the longest is solid
    overview = report.plot_overview([e for e in experiments(tmp_path / "runs") if e.script == "sac"])
    assert {line.get_color() for line in overview.axes[0].lines} >= {report.SCRIPT_COLORS["sac"]}


@pytest.mark.parametrize("seeds", [1, 2, report.FEW, report.FEW + 1])
def test_each_seed_is_a_thin_line_where_they_are_few(tmp_path, seeds):
    make_runs(tmp_path / "runs", [100.0 * seed for seed in range(1, seeds + 1)], env_id="Unknown-v0")
    (axes,) = curves(tmp_path / "runs")
    thin = [line.get_ydata()[-1] for line in axes.lines if line.get_linewidth() < 1]
    assert thin == ([100.0 * seed for seed in range(1, seeds + 1)] if 1 < seeds <= report.FEW else [])
    assert bool(axes.collections) == (seeds > report.FEW)  # the interval


@pytest.mark.parametrize(
    ("returns", "random", "bottom"),
    [
        ([*range(100)], None, 0),
        ([*range(100)], -50, 0),  # a curve that begins above the random policy is shown whole
        ([-100.0, *range(100)], 0, 0),  # worse than the random policy
        ([-500.0, -498.0, *[-80.0] * 30, -70.0], -498.7, -90.0),  # Acrobot: few points that would flatten all others
        ([-12_000.0, *[-1000.0] * 6, *[-13.0] * 20], None, -1987.0),  # CliffWalking
        ([-103.0, *range(-100, 250)], -100, -103),  # a cut that gains nothing
        ([7.0, 7.0], None, 7.0),
        ([-5.0, -6.0], 20.0, -6.0),  # nothing is as good as the random policy
    ],
)
def test_where_an_axis_begins(returns, random, bottom):
    assert report.floor(np.array(returns, dtype=float), random) == pytest.approx(bottom)


def test_an_axis_shows_what_matters_and_says_what_it_leaves_out(tmp_path):
    for seed in 1, 2, 3:
        returns = (-500.0 if seed == 1 else -82.0, *[-80.0] * 12, -75.0)
        make_run(tmp_path / "runs" / str(seed), env_id="Acrobot-v1", seed=seed, returns=returns)
    (axes,) = curves(tmp_path / "runs")
    assert -95 < axes.get_ylim()[0] < -82
    assert -75 < axes.get_ylim()[1] < -70  # the reference, -73.5, is near and has its line
    assert axes.get_xlabel() == "environment steps\nevaluations below the axis: 1, the lowest -500.0"
    assert axes.get_ylabel() == "evaluation return"
    (axes,) = curves(tmp_path / "runs", threshold=-110.0)
    assert axes.get_ylim()[0] < -110


def test_an_axis_does_not_magnify_the_last_digits_of_an_optimum(tmp_path):
    for seed in 1, 2, 3:
        returns = (0.0, *[0.7401] * 12, 0.74011)
        make_run(tmp_path / "runs" / str(seed), env_id="FrozenLake-v1", seed=seed, returns=returns)
    (axes,) = curves(tmp_path / "runs")
    assert axes.get_ylim()[0] < 0.725


def test_one_stalled_seed_does_not_stretch_the_axis_of_time(tmp_path):
    for seed in 1, 2, 3:
        make_run(tmp_path / "runs" / str(seed), seed=seed, sps=1.0 if seed == 3 else 100.0)
    (axes,) = curves(tmp_path / "runs", seconds=True)
    assert axes.get_xlim()[1] == pytest.approx(1.03 * 2)
    assert axes.get_xlabel() == "seconds"


def test_labels_fit_the_metric(tmp_path):
    kinds = {"q_learning": ("Taxi-v4", "eval/exact_return"), "maddpg": ("simple_spread_v3", "eval/episodic_return")}
    kinds |= {"dpo": (None, "eval/true_reward"), "reward_model": (None, "eval/accuracy")}
    for script, (env_id, key) in kinds.items():
        folder = make_run(tmp_path / "runs" / script, script, env_id)
        write_rows(folder, [{"global_step": step, "time": 2.0, key: 0.7} for step in (100, 200)])
    labels = {axes.get_title(): (axes.get_xlabel(), axes.get_ylabel()) for axes in curves(tmp_path / "runs")}
    assert labels == {
        "Taxi-v4": ("environment steps", "exact return of the greedy policy"),
        "simple_spread_v3": ("environment steps", "evaluation return, sum over agents"),
        "preferences, true reward": ("pairs", "true reward of the replies"),
        "preferences, accuracy": ("pairs", "accuracy on held-out pairs"),
    }


# ---- Tables for pages, versions ----


def test_tables_for_pages(tmp_path, monkeypatch, capsys):
    for script, env_id, returns, steps in (
        ("ppo", "LunarLander-v3", (200.0, 220.0, 240.0, 260.0, 280.0), 250_000),
        ("ppo", "Acrobot-v1", (-80.0, -81.0), 250_000),
        ("q_learning", "Taxi-v4", (7.5,), 100_000),
        ("td3", "HalfCheetah-v5", (5000.0, 6000.0, 7000.0, 8000.0, 9000.0), 50_000),
    ):
        make_runs(tmp_path / "runs", returns, script=script, env_id=env_id, steps=steps)
    make_runs(tmp_path / "runs" / "more", (9000.0,), script="td3", env_id="HalfCheetah-v5", steps=500_000)
    run = make_run(tmp_path / "runs" / "rewards", "dpo", None, returns=(0.0,))
    found = {"eval/true_reward": 0.5, "eval/optimal_reward": 0.75, "eval/reference_reward": -0.25}
    write_rows(run, [{"global_step": 100, "time": 1.0} | found])

    def lines(kind):
        monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "runs"), "--table", kind])
        report.main()
        return capsys.readouterr().out.splitlines()

    long, brief = lines("long"), lines("short")
    assert [line.split(" | ")[0] for line in long[2:]] == ["| q_learning", "| ppo", "| ppo", "| td3", "| td3", "| dpo"]
    assert brief == [line for line in long if "Acrobot" not in line and "| 1M |" not in line]  # more seeds go first
    assert long[:2] == [
        "| script | environment | steps | seeds | return | lowest | compare with |",
        "|" + " --- |" * 7,
    ]
    assert long[2] == "| q_learning | Taxi-v4 | 200k | 1 | **7.500** | 7.500 | 7.930 (optimum) |"
    assert long[3].startswith("| ppo | Acrobot-v1 | 500k | 1-2 | **-80.5** | -81.0 | -81.8 (CleanRL, training return)")
    (lander,) = [line for line in long if "LunarLander" in line]
    assert lander.startswith("| ppo | LunarLander-v3 | 500k | 1-5 | **240.0** [")
    assert "242.1 at 1M (RL Zoo, tuned, on v2)" in lander
    (cheetah,) = [line for line in brief if "HalfCheetah" in line]
    assert re.search(r"\*\*7000\*\* \[\d{4}, \d{4}\] \| 5000 \| ", cheetah)
    assert "5579 (Spinning Up, on v3); 5514 (the authors, on v1)" in cheetah
    assert long[-1] == (
        "| dpo | preferences, true reward | 100 pairs | 1 | **0.500** | 0.500 | "
        "the optimum at this divergence 0.750; where it began -0.250 |"
    )
    assert not (tmp_path / "runs" / "report").exists()


def test_a_baseline_within_a_script_is_not_set_beside_what_others_report_of_the_script(tmp_path):
    for algorithm in "maddpg", "ddpg":
        folder = tmp_path / algorithm
        make_run(folder, script="maddpg", env_id="simple_spread_v3", algorithm=algorithm, steps=300_000)
    beside = {row["environment"]: row["compare with"] for row in report.rows_of(experiments(tmp_path), False)}
    assert "EPyMARL" in beside["simple_spread_v3"]
    assert "EPyMARL" not in beside["simple_spread_v3, algorithm ddpg"]


def test_only_some_experiments(call, tmp_path):
    for steps in 100, 200:
        make_run(tmp_path / "runs" / str(steps), "ppo", "CartPole-v1", steps=steps)
    make_run(tmp_path / "runs" / "dqn", "dqn", "CartPole-v1")
    _, result, _ = call(tmp_path / "runs", "--only", "CartPole-v1", "total_timesteps=400")
    assert [(row["script"], row["steps"]) for row in result["Results"]] == [("ppo total_timesteps=400", 400)]


def test_versions_are_kept_and_written_for_pip(call, tmp_path):
    versions = {
        "Gymnasium": "1.4.0",
        "torch": "2.15.0+cpu",
        "python": "3.11.7 (main, today)",
        "ale_py": "0.11",
        "idna": "3",
    }
    for script, more in ("dqn", {}), ("ppo", {}), ("sac", {"torch": "2.14.0"}), ("td3", {"mpe2": "1.1"}):
        make_run(tmp_path / "runs" / script, script)
        path = tmp_path / "runs" / script / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": versions | more}))
    kept, out = tmp_path / "kept.json", tmp_path / "results" / "versions.txt"
    call(tmp_path / "runs", "--save-baseline", kept)
    assert json.loads(kept.read_text())["experiments"][0]["versions"] == {
        "ale-py": "0.11", "gymnasium": "1.4.0", "python": "3.11.7", "torch": "2.15.0+cpu",
    }  # fmt: skip
    for source in tmp_path / "runs", kept:
        call(source, "--save-versions", out)
        assert out.read_text().splitlines() == [
            "# The versions behind 4 rows of results; for pip install -r",
            "# Python 3.11.7",
            "ale-py==0.11",
            "gymnasium==1.4.0",
            "mpe2==1.1  # named by 1 of the 4 rows",
            "torch==2.15.0  # 2.14.0 in sac on CartPole-v1",
        ]


def test_an_environment_of_a_module_has_its_reference(call, tmp_path):
    make_runs(tmp_path / "runs", (-22.617,) * 3, env_id="mpe2:simple_spread_v3")
    assert call(tmp_path / "runs")[1]["Environments with a reference, normalised"][0]["IQM"] == pytest.approx(1)


def test_nothing_but_missing_runs(call, tmp_path):
    make_run(tmp_path / "runs" / "1", returns=(None,))
    code, result, _ = call(tmp_path / "runs", "--threshold", 1)
    assert code == 1
    assert (result["Results"][0]["n"], result["Results"][0]["of"]) == (0, 1)


def test_markdown_gives_published_results_with_source_and_protocol(call, tmp_path):
    make_runs(tmp_path / "runs", (200.0, 220.0, 240.0), env_id="LunarLander-v3", steps=150_000)
    call(tmp_path / "runs")
    text = (tmp_path / "out" / "report.md").read_text()
    (row,) = [line for line in text.splitlines() if "242.119" in line and "LunarLander-v2" in line]
    assert "DLR-RM/rl-baselines3-zoo" in row
    assert "eval return" in row
    (ours,) = [line for line in text.splitlines() if line.startswith("| **ppo**")]
    assert "220.0" in ours
    assert "20 episodes" in ours
    assert "commit abcdef0123" in ours
    assert "SLM-Lab" in text
    assert "155.751" not in text  # that is A2C's


@pytest.mark.parametrize("steps", [100_000, 1_000_000])
def test_of_one_source_the_nearest_budget_is_shown(tmp_path, steps):
    make_run(tmp_path / "run", "sac", "HalfCheetah-v5", returns=(1.0,), steps=steps)
    (experiment,) = experiments(tmp_path)
    shown = [row for row in report.published(experiment) if row["source"].startswith("openai/spinningup")]
    assert {row["steps"] for row in shown} == {steps}


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "name the runs"),
        (["runs", "--compare", "runs", "runs"], "not both"),
        (["nowhere"], "nowhere holds no run"),
        (["empty"], "empty holds no run"),
        (["runs", "--in-a-row", "0"], "--in-a-row"),
        (["runs", "--threshold", "inf"], "--threshold"),
        (["runs", "--table", "long", "--baseline", "kept.json"], "--table only prints"),
        (["runs", "--table", "long", "--save-baseline", "kept.json"], "--table only prints"),
        (["runs", "--only", "dqn"], "no experiment has all of these"),
        (["runs", "--table", "long", "--seeds", "9"], "seed 9: no such run"),
        (["unversioned", "--save-versions", "v.txt"], "name no versions"),
        (["runs", "--baseline", "nowhere.json"], "nowhere.json"),
        (["runs", "--baseline", "runs/ppo-CartPole-v1-1/config.json"], "--save-baseline"),
        (["damaged-config"], "config.json"),
        (["no-script"], "script and args"),
        (["no-config"], "config.json"),
        (["damaged-line"], "line 2"),
        (["damaged-ledger"], "ledger.json"),
        (["runs", "copy"], "seed 1 of ppo on CartPole-v1 is there twice"),
        (["--compare", "runs", "other"], "no environment in common"),
        (["--compare", "runs", "mixed"], "mixes experiments"),
        (["--compare", "runs", "runs/ppo*-1"], "is in both sets"),
        (["runs", "--seeds", "1.5"], "--seeds"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(call, tmp_path, flags, words):
    make_runs(tmp_path / "runs", (1.0, 2.0, 3.0))
    make_run(tmp_path / "copy" / "again")
    make_runs(tmp_path / "other", (1.0, 2.0, 3.0), env_id="Acrobot-v1")
    make_runs(tmp_path / "mixed", (1.0, 2.0, 3.0))
    make_runs(tmp_path / "mixed", (1.0, 2.0, 3.0), script="dqn")
    (make_run(tmp_path / "damaged-config") / "config.json").write_text('{"script": "ppo", "args"')
    (make_run(tmp_path / "no-script") / "config.json").write_text('{"script": "ppo"}')
    (make_run(tmp_path / "no-config") / "config.json").unlink()
    (make_run(tmp_path / "damaged-line") / "metrics.jsonl").write_text(
        '{"global_step": 1}\n{"glo\n{"global_step": 3}\n'
    )
    unversioned = make_run(tmp_path / "unversioned") / "config.json"
    unversioned.write_text(json.dumps(json.loads(unversioned.read_text()) | {"versions": {}}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged-ledger").mkdir()
    (tmp_path / "damaged-ledger" / "ledger.json").write_text('{"runs": [{"seed": 1}]}')
    code, result, printed = call(*flags)
    assert code == 2
    assert result is None
    assert printed.err.startswith("error:")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_odd_values_of_a_run_are_refused_in_one_line_with_its_name(call, tmp_path):
    weights = {"reward": ["a.py:f", "b.py:f"], "reward_weights": [1]}
    config = json.loads((make_run(tmp_path / "plain") / "config.json").read_text())
    odd = {
        "no-total": {"args": config["args"] | {"total_timesteps": None}},
        "text-total": {"args": config["args"] | {"total_timesteps": "200"}},
        "no-seed": {"args": config["args"] | {"seed": None}},
        "weights": {"args": weights},
        "model": {"args": {"reward": f"{tmp_path}/half/model"}},
        "command": {"command": 5},
        "versions": {"versions": {"torch": 2}},
        "script": {"script": 5},
        "environment": {"args": {"env_id": 5}},
    }
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"args"')
    for name, values in odd.items():
        (make_run(tmp_path / name) / "config.json").write_text(json.dumps(config | values))
    rows = {"unreadable": None, "text-time": {"time": "soon"}, "endless": {"global_step": float("inf")}}
    for name, values in rows.items():
        folder = make_run(tmp_path / name)
        if values:
            write_rows(folder, [evaluation(100, 1.0) | values] * 2)
        else:
            (folder / "metrics.jsonl").unlink()
            (folder / "metrics.jsonl").mkdir()
    ledger = {"runs": [{"script": "ppo", "env_id": "x", "seed": None, "run_dir": "y", "status": "failed"}]}
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "ledger.json").write_text(json.dumps(ledger))
    (tmp_path / "kept.json").write_text(
        '{"experiments": [{"label": "x", "env_id": "y", "group": "z", "runs": {"1": '
        '{"curve": [[1, 2, 3]], "return": 3, "last": {}}}}]}'
    )
    for name in (*odd, *rows, "ledger", "kept.json"):
        code, result, printed = call(tmp_path / name)
        assert (code, result) == (2, None), name
        assert printed.err.startswith("error:"), name
        assert printed.err.count("\n") == 1, name
        assert {"model": "half"}.get(name, name) in printed.err, name


def test_what_is_no_number_is_no_evaluation(call, tmp_path):
    folder = make_run(tmp_path / "runs" / "only", reward=1.0)
    rows = [evaluation(100, [1]), evaluation(200, 5.0) | {"eval/best_model": "x.pt"}]
    write_rows(folder, rows)
    assert call(tmp_path / "runs")[1]["Results"][0]["returns"] == [5]
    write_rows(folder, rows[:1] * 2)
    assert "no evaluation, stopped at step 100" in call(tmp_path / "runs")[2].out


def test_a_run_that_was_judged_before_its_first_step(call, tmp_path):
    write_rows(make_run(tmp_path / "run", env_id="LunarLander-v3", total_timesteps=0), [evaluation(0, 5.0)])
    assert call(tmp_path / "run")[0] == 0
    assert "**5.000**" in (tmp_path / "out" / "report.md").read_text()


def test_names_that_are_no_text_or_look_like_formulas(call, tmp_path):
    names = os.fsdecode(b"by\xff"), "costs$^$"
    for name in names:
        make_run(tmp_path / name / "1", dataset=f"data/{name}")
    assert call("--compare", *(tmp_path / name for name in names), pictures=True)[0] == 0
    assert "costs$^$" in (tmp_path / "out" / "curves-steps.svg").read_text()
    make_run(tmp_path / names[0] / "2", seed=2, returns=(None,))
    code, _, printed = call(tmp_path / names[0])
    assert code == 1
    assert r"by\udcff/2)" in printed.out


def test_a_kept_command_is_what_it_was(call, tmp_path):
    path = make_run(tmp_path / "run") / "config.json"
    words = ["algorithms/ppo.py", "--note", "two  spaces"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"command": words}))
    call(tmp_path / "run", "--save-baseline", tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text())["experiments"][0]["command"] == words


def test_unwritable_output(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["report.py", str(make_run(tmp_path / "run")), "--output", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as exit:
        report.main()
    assert exit.value.code == 2
    assert "can't be written" in capsys.readouterr().err


def test_default_output_is_beside_the_runs(monkeypatch, tmp_path):
    make_runs(tmp_path / "runs", (1.0, 2.0, 3.0))
    flags = "--save-baseline", str(tmp_path / "kept" / "ppo.json")
    for words in (tmp_path / "runs", *flags), (tmp_path / "runs",), flags[1:]:  # the second time beside a report
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            report.main()
        assert exit.value.code == 0
    for name in "runs", "kept":
        assert (tmp_path / name / "report" / "report.md").exists()
