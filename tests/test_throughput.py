"""throughput.py: both sides do the same work, the clock runs over the right rows, and a tiny run end to end."""

import json
import os
import sys
from dataclasses import replace

import gymnasium as gym
import pytest
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from algorithms import dpo, dqn, maddpg, ppo, q_learning, reward_model, sac, td3
from benchmark import throughput


def fake_script(folder, body):
    """A script of our run contract that learns nothing."""
    (folder / "algorithms").mkdir()
    head = (
        "import json, os, sys\nflags = dict(f.split('=') for f in sys.argv[1:] if '=' in f)\nd = flags['--run-dir']\n"
    )
    (folder / "algorithms" / "fake.py").write_text(head + "os.makedirs(d)\n" + body)


def work_of(script="fake"):
    return throughput.Work(
        script, "CartPole-v1", {"num_envs": 4, "norm": False}, "nobody", dict, lambda *_: (1.0, 0.0), 4, 1.0
    )


def test_floating_point_operations_by_hand():
    assert throughput.mlp_flop(4, 64, 2) == 2 * (4 * 64 + 64 * 2)
    actor, critic = 2 * (4 * 64 + 64 * 64 + 64 * 2), 2 * (4 * 64 + 64 * 64 + 64)
    cartpole = throughput.ppo_work("CartPole-v1", 4, 2)
    assert cartpole.flop_per_step == actor + 2 * (actor + critic) + 4 * 3 * (actor + critic)
    assert cartpole.multiple == 512


def gradient_steps(script, args, folder):
    """How often a run learns."""
    names = (
        "update",
        "alphazero_loss",
        "muzero_loss",
        "imitation_loss",
    )  # the first that it has is called in each gradient step
    name = next(name for name in names if hasattr(script, name))
    numbers, update = [], getattr(script, name)

    def counted(*arguments):
        numbers.append(len(numbers))
        return update(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, name, counted)
        script.train(replace(args, run_dir=str(folder / "run")))
    return len(numbers)


@pytest.mark.parametrize("num_envs", [1, 8])
def test_dqn_and_its_peer_learn_as_often(num_envs, tmp_path):
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_vec_env

    work = throughput.dqn_work("CartPole-v1", 4, 2, num_envs)
    settings = work.settings | {"env_id": "CartPole-v1", "eval_episodes": 1}
    args = tyro.cli(dqn.Args, args=[throughput.to_flag(name, value) for name, value in settings.items()])
    assert {name: getattr(args, name) for name in work.settings} == work.settings
    arguments = throughput.sb3_dqn_arguments(work.settings)
    model = DQN("MlpPolicy", make_vec_env("CartPole-v1", num_envs), **arguments)
    # SB3 counts in steps of all environments together, each of which is num_envs of ours
    vector_steps = model.train_freq.frequency
    total = args.learning_starts + vector_steps * num_envs
    short = replace(args, total_timesteps=total, eval_frequency=total, checkpoint_frequency=total)
    assert model.gradient_steps == gradient_steps(dqn, short, tmp_path)
    assert vector_steps * num_envs == model.gradient_steps * args.train_frequency
    assert work.multiple % (vector_steps * num_envs) == 0
    copied_every = args.target_network_frequency * args.train_frequency  # SB3 divides it by num_envs
    assert model.target_update_interval == copied_every
    for name in ("learning_rate", "buffer_size", "learning_starts", "batch_size", "tau", "gamma", "max_grad_norm"):
        assert getattr(model, name) == getattr(args, name)
    theirs = model.exploration_initial_eps, model.exploration_final_eps, model.exploration_fraction
    assert theirs == (args.start_e, args.end_e, args.exploration_fraction)
    assert not args.double_q
    assert not args.dueling
    assert not args.norm_obs
    env = dqn.make_env(args)
    ours = dqn.make_agent(args, env.observation_space.shape, env.action_space)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.q_net.parameters())
    actor, every = 2 * (4 * 128 + 128 * 128 + 128 * 2), 10
    assert work.flop_per_step == actor + 128 * 4 * actor / every


@pytest.mark.parametrize("script", [td3, sac], ids=["td3", "sac"])
def test_td3_and_sac_and_their_peers_learn_alike(script):
    import stable_baselines3

    name = script.__name__.split(".")[1]
    work = getattr(throughput, f"{name}_work")("Pendulum-v1", 3, 1)
    settings = work.settings | {"env_id": "Pendulum-v1"}
    args = tyro.cli(script.Args, args=[throughput.to_flag(name, value) for name, value in settings.items()])
    assert {name: getattr(args, name) for name in work.settings} == work.settings
    assert (args.num_envs, args.utd, args.num_critics, args.policy_lr) == (1, 1, 2, args.q_lr)
    arguments = work.peer_arguments(work.settings)
    model = getattr(stable_baselines3, name.upper())("MlpPolicy", "Pendulum-v1", **arguments)
    assert (model.train_freq.frequency, model.gradient_steps, model.learning_rate) == (1, 1, args.q_lr)
    for flag in "buffer_size", "learning_starts", "batch_size", "tau", "gamma":
        assert getattr(model, flag) == getattr(args, flag)
    if script is td3:
        theirs = model.policy_delay, model.target_policy_noise, model.target_noise_clip
        assert theirs == (args.policy_frequency, args.policy_noise, args.noise_clip)
    else:
        assert model.log_ent_coef.exp().item() == pytest.approx(args.alpha)
        assert model.target_entropy == -1
    env = script.make_env(args)
    agent = script.make_agent(args, env.observation_space.shape, env.action_space)
    for ours, theirs in (agent.actor, model.actor), (agent.critics, model.critic):
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("script", [td3, sac], ids=["td3", "sac"])
def test_floating_point_operations_of_a_learning_step_are_those_that_torch_counts(script):
    name = script.__name__.split(".")[1]
    args = script.Args(device="cpu", policy_frequency=2) if script is td3 else script.Args(device="cpu")
    agent = script.make_agent(args, (17,), gym.spaces.Box(-1, 1, (6,)))
    parts = {"actor": agent.actor.parameters(), "critic": agent.critics.parameters()}
    parts |= {"alpha": [agent.log_alpha]} if script is sac else {}
    optimizers = {f"{part}_optimizer": torch.optim.Adam(parameters) for part, parameters in parts.items()}
    batch = torch.rand(256, 17), torch.rand(256, 6), torch.rand(256), torch.zeros(256), torch.rand(256, 17)
    with FlopCounterMode(display=False) as counter:
        for number in 1, 2:
            script.update(agent, optimizers, batch, *([number] if script is td3 else []), args)
    flop = getattr(throughput, f"{name}_work")("HalfCheetah-v5", 17, 6).flop_per_step
    assert counter.get_total_flops() / 2 == pytest.approx(flop, rel=0.01)


def test_the_tables_peer_learns_what_the_table_learns():
    settings = throughput.Q_SETTINGS
    args = tyro.cli(q_learning.Args, args=[throughput.to_flag(name, value) for name, value in settings.items()])
    assert {name: getattr(args, name) for name in settings} == settings
    assert (args.algorithm, args.exploration) == ("q-learning", "epsilon-greedy")
    assert 100 < throughput.numpy_q_learning("Taxi-v4", settings, 10, 1000)[0] < 10_000_000


def test_maddpg_stands_beside_its_environment_alone():
    work = throughput.maddpg_work()
    args = tyro.cli(
        maddpg.Args, args=["--device=cpu", *(throughput.to_flag(name, value) for name, value in work.settings.items())]
    )
    assert {name: getattr(args, name) for name in work.settings} == work.settings
    assert work.multiple % args.num_envs == work.multiple % args.train_frequency == 0
    env = maddpg.make_env(args)
    agent = maddpg.make_agent(args, env.observation_space.shape, env.action_space)
    actors, critics = (
        2 * sum(p.numel() for p in networks.parameters() if p.dim() > 1) for networks in (agent.actor_n, agent.critic_n)
    )
    assert work.flop_per_step == actors + 1024 * (4 * actors + 6 * critics) / 100
    assert 100 < work.time_peer(work.env_id, work.settings, 10, 1000)[0] < 100_000


@pytest.mark.slow
@pytest.mark.parametrize("script", [dpo, reward_model])
def test_trl_learns_the_same_from_the_same_pairs(script, tmp_path):
    trl = pytest.importorskip("trl")

    (work,) = (work for work in throughput.WORKS if work.name == f"{script.__name__.split('.')[1]}/pairs")
    settings = work.settings | work.make_data(str(tmp_path), 320) | {"device": "cpu"}
    args = tyro.cli(script.Args, args=[throughput.to_flag(name, value) for name, value in settings.items()])
    assert {name: getattr(args, name) for name in settings} == settings
    make_config = trl.DPOConfig if script is dpo else trl.RewardConfig
    config = make_config(str(tmp_path), **throughput.trl_arguments(work.settings))
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (args.batch_size, 1)
    for name in ("learning_rate", "max_grad_norm", "weight_decay", "beta")[: 4 if script is dpo else 3]:
        assert getattr(config, name) == getattr(args, name)
    assert config.get_warmup_steps(100) == 100 * args.warmup
    assert config.lr_scheduler_type == "linear"
    run = script.Run(args)
    model = script.load(run, args.model_name, args)
    pairs, _ = script.training_and_held_out(run.tokenizer, model, args)
    if script is reward_model:
        script.set_padding(run.tokenizer, model, pairs, args)
    assert len(pairs) == 320
    tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs) / len(pairs)
    assert work.note == "(115 tokens a pair)"
    assert tokens == pytest.approx(115, rel=0.05)
    with FlopCounterMode(display=False) as counter:
        for pair in pairs[:40]:
            asked = [pair.prompt] * 2, [pair.chosen, pair.rejected]
            both = dpo.log_probs(model, *asked) if script is dpo else reward_model.pair_rewards(model, [pair], 0)
            sum(both).sum().backward()
    padded = sum(2 * (len(p.prompt) + max(len(p.chosen), len(p.rejected))) for p in pairs[:40])
    forward_and_backward = counter.get_total_flops() / padded * 115
    assert forward_and_backward == pytest.approx(work.flop_per_step * (3 / 4 if script is dpo else 1), rel=0.15)


@pytest.mark.slow
def test_the_model_alone_has_the_head_of_the_script():
    flop, expected = [], []
    for script, share in ("dpo", 3 / 4), ("reward_model", 1):  # a quarter of dpo's is the reference
        (work,) = (work for work in throughput.WORKS if work.script == script)
        with FlopCounterMode(display=False) as counter:
            assert work.time_alone("pairs", 160) > 0
        flop.append(counter.get_total_flops())
        expected.append(work.flop_per_step * share)
    assert flop[0] / flop[1] == pytest.approx(expected[0] / expected[1], rel=0.05), "the words are a seventh of it"


def test_our_flags_say_what_the_peer_is_called_with():
    from stable_baselines3 import PPO

    settings = throughput.PPO_SETTINGS
    args = tyro.cli(ppo.Args, args=[throughput.to_flag(name, value) for name, value in settings.items()])
    assert {name: getattr(args, name) for name in settings} == settings
    assert (args.optimizer, args.target_kl) == ("adam", None)
    model = PPO("MlpPolicy", "CartPole-v1", **throughput.sb3_ppo_arguments(settings))
    theirs = model.n_steps, model.n_epochs, model.batch_size, model.gamma, model.gae_lambda, model.clip_range(1)
    ours = args.num_steps, args.update_epochs, 128, args.gamma, args.gae_lambda, args.clip_coef
    assert theirs == ours
    theirs = model.learning_rate, model.ent_coef, model.vf_coef, model.max_grad_norm, model.normalize_advantage
    assert theirs == (args.learning_rate, args.ent_coef, args.vf_coef, args.max_grad_norm, args.norm_adv)
    assert model.target_kl is None
    env = ppo.make_env(replace(args, env_id="CartPole-v1"))
    ours, theirs = ppo.make_agent(args, env.observation_space.shape, env.action_space), model.policy
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_clock_runs_from_the_end_of_the_warm_up_to_the_last_learning_step(monkeypatch, tmp_path):
    rows = [(100, 50.0, "charts/SPS"), (200, 60.0, "charts/SPS"), (200, 90.0, "eval/episodic_return")]
    rows += [(250, 91.0, "charts/episodic_return"), (400, 100.0, "charts/SPS"), (400, 900.0, "eval/episodic_return")]
    rows = [{"global_step": step, "time": time, name: 1.0} for step, time, name in rows]
    body = f"print(*map(json.dumps, {rows!r}), sep=chr(10), file=open(d + '/metrics.jsonl', 'w'))"
    fake_script(tmp_path, body)
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    sps, start, flags = throughput.time_script(work_of(), 150, 250)
    assert sps == (400 - 200) / (100 - 60)
    assert start == 60 - 200 / sps  # 20 s: of the 60 until step 200, these are 40 at the later speed
    assert {"--num-envs=4", "--no-norm", "--total-timesteps=400", "--eval-frequency=400"} <= set(flags)


def test_the_record_names_no_folder_of_this_machine(monkeypatch, tmp_path):
    row = "dict(global_step=400, time=4.0, **{'charts/SPS': 1.0})"
    fake_script(tmp_path, f"print(json.dumps({row}), file=open(d + '/metrics.jsonl', 'w'))")
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    work = replace(work_of(), make_data=lambda folder, steps: {"dataset": f"{folder}/{steps}.jsonl"})
    sps, _, flags = throughput.time_script(work, 150, 250)
    assert sps == 100
    assert "--dataset=FOLDER/400.jsonl" in flags


def test_scripts_run_with_one_thread(monkeypatch, tmp_path):
    row = {"charts/SPS": 1.0}
    body = "threads = int(os.environ['OMP_NUM_THREADS'])\n"
    body += f"rows = [dict(global_step=s, time=t * threads, **{row}) for s, t in ((10, 1), (20, 2))]\n"
    fake_script(tmp_path, body + "print(*map(json.dumps, rows), sep=chr(10), file=open(d + '/metrics.jsonl', 'w'))")
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert throughput.time_script(work_of(), 10, 10)[0] == 10


def test_a_script_that_fails_fails_the_measurement(monkeypatch, tmp_path, capsys):
    fake_script(tmp_path, "raise SystemExit('it broke')")
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as exit:
        throughput.time_script(work_of(), 10, 10)
    assert exit.value.code == 1
    assert "it broke" in capsys.readouterr().err


def test_a_measurement_whose_process_dies_fails(capsys):
    for end, argument, code in (os._exit, 2, 1), (throughput.refuse, "it lacks memory", 2):
        with pytest.raises(SystemExit) as exit:
            throughput.in_new_process(end, argument)
        assert exit.value.code == code
    assert capsys.readouterr().err == "error: the process of _exit died\n"  # the other says itself what it lacks


def test_too_few_steps_get_one_line(monkeypatch, tmp_path, capsys):
    row = "dict(global_step=400, time=4.0, **{'charts/SPS': 1.0})"  # the clock has a start, but no end
    fake_script(tmp_path, f"print(json.dumps({row}), file=open(d + '/metrics.jsonl', 'w'))")
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as exit:
        throughput.time_script(work_of(), 150, 250)
    assert exit.value.code == 2
    assert "learns too seldom in 250 steps" in capsys.readouterr().err


def test_a_start_of_made_data_names_no_folder_of_this_machine(monkeypatch):
    monkeypatch.setattr(throughput, "time_command", lambda command: 1.0)
    monkeypatch.setattr(throughput, "make_pairs", lambda folder, pairs: {"dataset": f"{folder}/pairs.jsonl"})
    row = throughput.measure_start("dpo", throughput.Args(repeats=1))
    assert row["command"][-1] == "--dataset=FOLDER/pairs.jsonl"


def test_repeats_alternate_and_their_median_counts(monkeypatch):
    calls, ours, theirs = [], iter([100.0, 300.0, 200.0]), iter([50.0, 100.0, 200.0])
    peer, env, matmul = object(), throughput.time_env, throughput.time_matmul

    def time_script(work, warm_up, steps):
        calls.append("ours")
        return next(ours), 2.0, ["--flag"]

    def in_new_process(function, *args):
        calls.append({peer: "theirs", env: "env", matmul: "matmul"}[function])
        return {peer: lambda: (next(theirs), 12.0), env: lambda: 1000.0, matmul: lambda: 2e9}[function]()

    monkeypatch.setattr(throughput, "time_script", time_script)
    monkeypatch.setattr(throughput, "in_new_process", in_new_process)
    work = throughput.Work("ppo", "CartPole-v1", {}, "SBX PPO", dict, peer, 512, 1e6)
    row = throughput.measure(work, throughput.Args(repeats=3, steps=5000, cores=2))
    assert calls == ["ours", "theirs", "env"] * 3 + ["matmul"]
    assert row["name"] == "ppo/CartPole-v1 (2 cores)"
    assert (row["ratios"], row["ratio"]) == ([2, 3, 1], 2)
    assert (row["steps"], row["warm_up"]) == (5120, 512)  # whole batches
    assert (row["gflop_per_s"], row["matmul_limit"]) == (2, 2000)
    result = {kind: [] for kind in throughput.KINDS}
    result["rows"] = [row | {"hardware": "this", "versions": "torch 1", "commit": "abc"}]
    cells = "| **2.00** (1.00-3.00) | 1,000 | 2,000 (2 GFLOP/s), of which 10% are reached |"
    assert cells in throughput.to_markdown(result)
    pays = "the script's start takes 2.0 s, SBX's 12.0 s; the script is ahead after 0 steps."
    assert pays in throughput.to_markdown(result)


@pytest.mark.parametrize(
    ("script", "cores", "threads"), [("td3", 1, None), ("td3", 2, 2), ("sac", 2, 2), ("dqn", 2, None)]
)
def test_with_more_cores_wide_networks_get_more_threads(monkeypatch, script, cores, threads):
    given, args_of = [], {}

    def time_script(work, *_):
        given.append(work.settings)
        return 1.0, 0.0, []

    def in_new_process(function, *args):
        args_of[function] = args
        return (1.0, 0.0) if function is peer else 1.0

    peer = object()
    monkeypatch.setattr(throughput, "time_script", time_script)
    monkeypatch.setattr(throughput, "in_new_process", in_new_process)
    work = throughput.Work(script, "CartPole-v1", {"gamma": 0.9}, "nobody", dict, peer, 1, 1e6)
    throughput.measure(work, throughput.Args(repeats=1, steps=100, cores=cores))
    assert given == [{"gamma": 0.9} | ({"threads": threads} if threads else {})]
    assert args_of[peer][1] == given[0]
    assert args_of[throughput.time_matmul] == (cores,), "the limit is that of as many threads"


def test_a_long_start_pays_when_the_speed_has_made_up_for_it():
    # 10 s more at the start; 1/100 s less for each step: 1000 steps later both have taken 20 s
    assert throughput.pays_after(100, 10, 50, 0) == pytest.approx(1000)
    assert 10 + 1000 / 100 == 0 + 1000 / 50
    assert throughput.pays_after(50, 0, 100, 10) == pytest.approx(1000), "from either side"
    assert throughput.pays_after(100, 1, 50, 3) == 0
    assert throughput.pays_after(50, 1, 50, 3) == float("inf")


def test_the_start_of_a_model_is_what_its_warm_up_takes_beyond_its_steps(monkeypatch):
    class Model:
        def learn(self, steps, reset_num_timesteps=True):
            calls.append((steps, reset_num_timesteps))

    calls = []
    monkeypatch.setattr(throughput.time, "perf_counter", iter([100.0, 109.0, 119.0]).__next__)
    # 200 steps in 10 s; the 60 before took 9 s, 6 more than 60 do
    assert throughput.time_learning(Model(), 60, 200) == (20.0, 6.0)
    assert calls == [(60, True), (200, False)]


@pytest.mark.parametrize("work", throughput.BESIDE_SBX, ids=lambda work: work.name)
def test_sbx_learns_as_often_as_ours_with_networks_of_the_same_size(work):
    sbx, jax = pytest.importorskip("sbx"), pytest.importorskip("jax")
    script = {"ppo": ppo, "dqn": dqn, "td3": td3, "sac": sac}[work.script]
    settings = work.settings | {"env_id": work.env_id}
    args = tyro.cli(script.Args, args=[throughput.to_flag(name, value) for name, value in settings.items()])
    assert {name: getattr(args, name) for name in work.settings} == work.settings
    num_envs = work.settings.get("num_envs", 1)
    from stable_baselines3.common.env_util import make_vec_env

    arguments = work.peer_arguments(work.settings)
    model = getattr(sbx, work.script.upper())("MlpPolicy", make_vec_env(work.env_id, num_envs), **arguments)
    if work.script == "dqn":
        assert (args.max_grad_norm, args.huber, args.double_q, args.norm_obs) == (None, False, False, False)
        learns = model.train_freq.frequency * num_envs / model.gradient_steps
        assert learns == args.train_frequency
        assert model.target_update_interval == args.target_network_frequency * args.train_frequency
    states = {"ppo": ["actor_state", "vf_state"], "dqn": ["qf_state"]}.get(work.script, ["actor_state", "qf_state"])
    params = [jax.tree_util.tree_leaves(getattr(model.policy, name).params) for name in states]
    env = script.make_env(args)
    agent = script.make_agent(args, env.observation_space.shape, env.action_space)
    ours = [p for name, p in agent.named_parameters() if not name.startswith("target_") and name != "log_alpha"]
    assert sum(p.numel() for p in ours) == sum(leaf.size for leaves in params for leaf in leaves)
    warm_up = throughput.Args().steps * work.share_of_steps / 10
    assert warm_up > settings.get("learning_starts", 0), "what is compiled at the first gradient step is not timed"


@pytest.mark.slow
def test_a_start_is_a_whole_run_beside_its_imports(monkeypatch):
    commands, seconds = [], iter([9.0, 9.0, 3.0, 2.0, 4.0, 1.0])

    def time_command(command):
        commands.append(command)
        return next(seconds)

    monkeypatch.setattr(throughput, "time_command", time_command)
    row = throughput.measure_start("dqn", throughput.Args(repeats=2))
    assert (row["ours"], row["limit"], row["ratios"], row["ratio"]) == ([3, 4], [2, 1], [1.5, 4], 2.75)
    assert [len(set(map(str, commands[i::2]))) for i in (0, 1)] == [3, 1], "each run has a folder of its own"
    assert commands[1] == [sys.executable, "-c", "import gymnasium, torch"]
    row |= {"hardware": "this", "versions": "torch 1", "commit": "abc"}
    lines = throughput.to_markdown({kind: [] for kind in throughput.KINDS} | {"starts": [row]}).splitlines()
    assert lines[2] == "| dqn | 3.5 | 1.5 | **2.75** (1.50-4.00) |"
    assert lines[-1] == "start/dqn: this, one thread each; torch 1; commit abc."


@pytest.mark.parametrize(
    "name",
    [
        "alphazero",
        "cql",
        "decision_transformer",
        "dqn",
        "her",
        "iql",
        "maddpg",
        "muzero",
        "ppo",
        "reinforce",
        "sac",
        "td3",
    ],
)
def test_a_start_learns_once(name, tmp_path):
    script = pytest.importorskip(f"algorithms.{name}")
    args = tyro.cli(script.Args, args=throughput.STARTS[name][1].split())
    assert gradient_steps(script, args, tmp_path) == 1


EVALUATIONS = """
for step, value in enumerate(VALUES):
    with open(d + "/metrics.jsonl", "a") as file:
        print(json.dumps({"global_step": step, "losses/value_loss": 1.0}), file=file)
        print(json.dumps({"global_step": step, "eval/episodic_return": value}), file=file)
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("values", "waits", "steps"),
    [
        ([0, 250, 250, 199.9, 200, 201, 202], True, 6),  # that goes on: it is ended
        ([0, 250, 250, 199.9, 200, 201, 202], False, 6),  # that has ended
        ([250, 250, 250, 0, 0], False, 2),  # what comes later doesn't count
        ([250, 250, 100, 250, 250], False, float("inf")),
    ],
)
def test_solved_is_the_third_evaluation_in_a_row(monkeypatch, tmp_path, values, waits, steps):
    head = "import json, os, sys, time\nflags = dict(f.split('=') for f in sys.argv[1:] if '=' in f)\n"
    head += "d = flags['--run-dir']\nos.makedirs(d)\nassert flags['--seed'] == '5'\n"
    body = EVALUATIONS.replace("VALUES", str(values)) + ("time.sleep(60)" if waits else "")
    (tmp_path / "algorithms").mkdir()
    (tmp_path / "algorithms" / "ppo.py").write_text(head + body)
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    seconds, reached = throughput.time_to_solve(5)
    assert reached == steps
    assert seconds == float("inf") if steps == float("inf") else 0 < seconds < 30


@pytest.mark.parametrize(
    "end", ["raise SystemExit('it broke')", "print('it broke', flush=True); os.kill(os.getpid(), 9)"]
)
def test_a_script_that_fails_is_not_solved(monkeypatch, tmp_path, capsys, end):
    (tmp_path / "algorithms").mkdir()
    (tmp_path / "algorithms" / "ppo.py").write_text(f"import os\n{end}")
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as exit:
        throughput.time_to_solve(1)
    assert exit.value.code == 1
    assert "it broke" in capsys.readouterr().err


@pytest.mark.slow
def test_peers_that_are_solved_after_the_same_evaluations(monkeypatch):
    import stable_baselines3.common.evaluation

    returns, asked = iter([250, 250, 100, 200, 201, 202]), []

    def evaluate_policy(model, env, episodes):
        asked.append((model.num_timesteps, episodes, env.num_envs))
        return next(returns), 0.0

    monkeypatch.setattr(stable_baselines3.common.evaluation, "evaluate_policy", evaluate_policy)
    monkeypatch.setattr(throughput, "SOLVE_FREQUENCY", 1)  # SB3 always finishes its batch: of 16 x 1024 steps
    monkeypatch.setattr(stable_baselines3.PPO, "train", lambda self: None)
    assert throughput.sb3_solve(1) == 6 * 16_384
    assert asked == [(n * 16_384, throughput.SOLVE_EPISODES, 1) for n in range(1, 7)]


def test_solving_and_memory_in_the_tables(monkeypatch):
    ours, theirs = iter([(10.0, 1000), (30.0, 2000), (20.0, 4000)]), iter([7000, 8000, 9000])
    monkeypatch.setattr(throughput, "time_to_solve", lambda seed: next(ours))
    monkeypatch.setattr(throughput, "in_new_process", lambda function, *args: next(theirs))
    monkeypatch.setattr(throughput.time, "perf_counter", iter([0.0, 100.0, 100.0, 400.0, 400.0, 700.0]).__next__)
    row = throughput.measure_solve("ppo", throughput.Args(repeats=3))
    assert (row["ratios"], row["ratio"]) == ([10, 10, 15], 10)
    where = {"hardware": "this", "versions": "torch 1", "commit": "abc"}
    memory = {"name": "memory/dqn", "ours": 7.25e9, "theirs": 56.4e9, "frames": 7.056e9}
    result = {kind: [] for kind in throughput.KINDS} | {"solves": [row | where], "memory": [memory | where]}
    table = throughput.to_markdown(result)
    assert "| ppo | 20 | 2,000 | 300 | 8,000 | **10.0** (10.0-15.0) |" in table
    assert "| dqn | 7.25 | 56.40 | 7.06 |" in table
    assert "solve/ppo, memory/dqn: this" in table


@pytest.mark.slow
def test_replay_of_images_holds_each_frame_once_and_sb3s_eight_times():
    frames = 40_000 * 84 * 84
    assert 0.9 < throughput.in_new_process(throughput.fill_replay, 40_000) / frames < 1.1
    assert 8.0 < throughput.sb3_replay_bytes(40_000) / frames < 8.01


def test_every_script_has_a_start():
    assert throughput.STARTS.keys() == {path.stem for path in throughput.ROOT.glob("algorithms/*.py")}


@pytest.mark.slow
def test_a_tiny_run_end_to_end_keeps_what_was_measured_before(monkeypatch, tmp_path):
    pinned = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: pinned.append((process, len(cores))))

    def run(*flags):
        output = "--output", str(tmp_path / "results")
        monkeypatch.setattr(sys, "argv", ["throughput.py", *flags, "--repeats", "1", "--steps", "512", *output])
        throughput.main()
        return json.loads((tmp_path / "results" / "throughput.json").read_text())

    (row,) = run("--only", "ppo/CartPole-v1")["rows"]
    assert row["name"] == "ppo/CartPole-v1"
    assert row["ratio"] == row["ours"][0] / row["theirs"][0]
    assert 100 < row["ours"][0] < row["env_only"][0] < 10_000_000
    assert 100 < row["theirs"][0] < row["env_only"][0]
    assert row["gflop_per_s"] > 1
    assert row["matmul_limit"] > row["ours"][0]
    assert row["peer_arguments"]["n_steps"] == row["settings"]["num_steps"] == 128
    assert "--num-steps=128" in row["command"]
    assert "stable-baselines3" in row["versions"]
    assert pinned == [(0, 1)]

    path, measure_start = tmp_path / "results" / "throughput.json", throughput.measure_start
    elsewhere = row | {"name": "measured meanwhile"}

    def measuring(*arguments):
        path.write_text(json.dumps({"rows": [row, elsewhere]}))
        return measure_start(*arguments)

    with monkeypatch.context() as patch:
        patch.setitem(throughput.KINDS, "starts", measuring)
        result = run("--only", "start/q_learning")
    assert result["rows"] == [row, elsewhere]
    (start,) = result["starts"]
    assert 1 < start["ratio"] < 20
    again = run("--only", "start/q_learning")
    assert again["rows"] == [row, elsewhere]
    assert again["starts"] != [start]
    assert len(again["starts"]) == 1
    table = (tmp_path / "results" / "throughput.md").read_text()
    assert "| ppo/CartPole-v1 |" in table
    assert "| q_learning |" in table


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "nothing"], "ppo/CartPole-v1"),
        (["--repeats", "0"], "--repeats"),
        (["--steps", "0"], "--steps"),
        (["--cores", "0"], "--cores"),
        (["--cores", "999"], "--cores"),
        (["--output", "file"], "--output"),
        (["--output", "damaged"], "--output"),
        (["--only", "ppo/LunarLander-v3 beside SBX"], "nothing is left to measure"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(monkeypatch, tmp_path, capsys, flags, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "throughput.json").write_text('{"rows": [')
    monkeypatch.setattr(sys, "argv", ["throughput.py", *flags])
    monkeypatch.setattr(throughput, "find_spec", lambda name: None)  # no SBX
    with pytest.raises(SystemExit) as exit:
        throughput.main()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert error.count("\n") == 1
    assert words in error
    assert sys.stdout.line_buffering  # what is measured is seen, and kept, at once
