"""by_hand.py: the physics that its teams count on, and that each team beats random actions."""

import json

import mpe2.simple_spread_v3
import numpy as np
import pytest
from conftest import ROOT, call

from benchmark import by_hand


@pytest.mark.parametrize("continuous", [False, True])
def test_steering_counts_on_what_three_steps_of_mpe2_do(continuous):
    env = mpe2.simple_spread_v3.parallel_env(continuous_actions=continuous)
    rng = np.random.default_rng(0)
    for _ in range(20):
        place, velocity, way = rng.uniform(-1, 1, (3, 2))
        best = by_hand.steer(way * 0.2, velocity, continuous)
        distances = []
        for push in (best, *np.eye(5)):
            env.reset(seed=0)
            agent, *others = env.unwrapped.world.agents
            agent.state.p_pos, agent.state.p_vel = place.copy(), velocity.copy()
            for i, other in enumerate(others):
                other.state.p_pos = np.array([50.0 + i, 50.0])  # out of the way
            for action in (push, np.eye(5)[0], np.eye(5)[0]):
                action = action.astype(np.float32) if continuous else action.argmax()
                env.step(dict.fromkeys(env.agents, action))
            distances.append(np.linalg.norm(place + way * 0.2 - agent.state.p_pos))
        assert distances[0] <= min(distances) + 1e-6


@pytest.mark.slow
def test_teams_that_follow_rules_beat_random_actions(tmp_path):
    result = call(ROOT / "benchmark" / "by_hand.py", "--episodes", 4, "--output", tmp_path / "table.json")
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    kept = json.loads((ROOT / "benchmark" / "results" / "by_hand.json").read_text())
    names = "environment", "continuous_actions", "team"
    labels, kept_labels = ([[row[name] for name in names] for row in rows["rows"]] for rows in (table, kept))
    assert labels == kept_labels
    chance = {}
    for row in table["rows"]:
        task = row["environment"], row["continuous_actions"]
        assert row["episodes"] == 20
        if row["team"] == "random actions":
            chance[task] = row["episodic_return"]
        else:
            assert row["episodic_return"] > chance[task] + 15
