"""What the tests of the run contract have to know of each script, one entry a script."""

from dataclasses import dataclass, field


def flags(text: str) -> list[str]:
    return text.split()


@dataclass
class Facts:
    """Of one script. Its tiny run has four quarters, with an evaluation and a checkpoint after each."""

    tiny: list[str]  # the flags of a run of seconds, which still learns several times between two checkpoints
    resumed: list[list[str]]  # flags of the runs that are killed and resumed; the last of equal flags counts
    changes: dict[str, object]  # a value for each flag, beside which the tiny run's metrics or folder differ
    mistakes: dict[str, str]  # wrong flags of this script alone, and a word of the answer
    task: str = "CartPole-v1"  # what the tiny run learns
    env_class: str | None = "gymnasium.envs.classic_control.CartPoleEnv"  # of this task; None: not Gymnasium's
    quarter: int = 512  # steps
    rate: str = "learning-rate"  # the flag of a learning rate
    result: str = "eval/episodic_return"
    logged: list[str] = field(default_factory=lambda: ["charts/episodic_return", "charts/episodic_length"])
    model: str = "model.pt"
    checkpoint: str = "checkpoint.pt"
    files: list[str] = field(default_factory=list)  # others in its run folder
    goes_on: str = "--evaluate --capture-video"  # the command that a finished run prints
    acts: bool = True  # in an environment, not on data
    deaths: int = 3  # of a run that is killed and resumed


ON_TEXT = flags(
    "--dataset-split train[:200] --batch-size 8 --eval-frequency 64 --checkpoint-frequency 64 --total-timesteps 256"
)
TEXT_CHANGES = {
    "seed": 2, "total_timesteps": 40, "eval_frequency": 16, "dataset_split": "train[:100]",
    "eval_pairs": 3, "max_length": 24, "learning_rate": 5e-2, "warmup": 0.5, "batch_size": 4, "max_grad_norm": 0.01,
    "weight_decay": 10.0, "lora_rank": 2,
    # tested in test_dpo.py and test_reward_model.py
    "model_name": None, "dataset": None, "dataset_config": None, "prompt_column": None, "chosen_column": None,
    "rejected_column": None, "convert": None, "chat": None, "labels": None, "eval_dataset": None, "eval_split": None,
    "reward": None, "micro_batch_size": None, "gradient_checkpointing": None, "load_in_4bit": None,
    "checkpoint_frequency": None,
}  # fmt: skip
TEXT_MISTAKES = {
    "--model-name nothing-here": "nothing-here",
    "--dataset nothing-here.jsonl": "nothing-here",
    "--dataset-split nothing": "nothing",
    "--chosen-column better": "--chosen-column",
    "--labels judge": "--labels",
    "--reward nowhere.py:judge": "--reward",
    "--eval-pairs 0": "--eval-pairs",
    "--max-length 0": "--max-length",
    "--max-length 3": "of over 3 tokens",
    "--warmup -0.1": "--warmup",
    "--warmup 1.5": "--warmup",
    "--batch-size 0": "--batch-size",
    "--batch-size 7": "--batch-size",
    "--batch-size 256": "--batch-size",
    "--micro-batch-size 0": "--micro-batch-size",
    "--micro-batch-size 3": "--micro-batch-size",
    "--max-grad-norm -1": "--max-grad-norm",
    "--weight-decay -1": "--weight-decay",
    "--lora-rank -1": "--lora-rank",
    "--lora-rank x": "--lora-rank",
    "--load-in-4bit": "--lora-rank",
    "--gradient-checkpointing maybe": "maybe",
}
EVALUATED = flags("--eval-episodes 2 --eval-frequency 512 --checkpoint-frequency 512 --total-timesteps 2048")
FACTS = {
    "ppo": Facts(
        tiny=flags(
            "--env-id CartPole-v1 --num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 2"
        ) + EVALUATED,
        resumed=[
            flags("--norm-obs --total-timesteps 8192 --checkpoint-frequency 1024 --eval-frequency 4096"),
            flags("--env-id LunarLander-v3 --norm-obs --total-timesteps 8192 --checkpoint-frequency 1024"),
            flags("--env-id HalfCheetah-v5 --norm-obs --total-timesteps 4096 --eval-frequency 2048 --eval-episodes 1"),
            flags("--env-id ALE/Pong-v5 --total-timesteps 512 --checkpoint-frequency 128 --eval-episodes 1"),
        ],
        changes={
            "env_id": "Acrobot-v1", "seed": 2, "total_timesteps": 1024, "num_envs": 4, "eval_frequency": 1024,
            "eval_episodes": 3, "checkpoint_frequency": 1024, "capture_video": True, "learning_rate": 1e-3,
            "anneal_lr": False, "num_steps": 32, "num_minibatches": 4, "update_epochs": 3, "gamma": 0.9,
            "gae_lambda": 0.5, "clip_coef": 0.01, "vf_coef": 0.1, "ent_coef": 0.1, "max_grad_norm": 0.01,
            "target_kl": 1e-9, "norm_adv": False, "norm_obs": True, "norm_reward": False, "optimizer": "rmsprop",
            "log_std_init": None, "compile": None,  # tested in test_ppo.py
        },
        mistakes={
            "--num-minibatches 3": "--num-minibatches",
            "--num-minibatches 0": "--num-minibatches",
            "--num-steps 0": "--num-steps",
            "--update-epochs 0": "--update-epochs",
            "--gae-lambda 1.1": "--gae-lambda",
            "--clip-coef -0.2": "--clip-coef",
            "--ent-coef -1": "--ent-coef",
            "--vf-coef -1": "--vf-coef",
            "--max-grad-norm -1": "--max-grad-norm",
            "--max-grad-norm 0": "--max-grad-norm",
            "--target-kl -1": "--target-kl",
            "--target-kl x": "--target-kl",
            "--optimizer sgd": "adam",
            "--log-std-init 3": "--log-std-init",
            "--log-std-init nan": "--log-std-init",
            "--anneal-lr maybe": "maybe",
            "--env-id BreakoutNoFrameskip-v4": "ALE/",
            "--env-id ale_py:ALE/Pong-v5": "ALE/Pong-v5",
            "--env-id OddMultiBinaryAction-v0": "MultiBinary",
            "--env-id OddTupleAction-v0": "Tuple",
            "--env-id OddIntegerAction-v0": "Box",
        },
    ),
    "q_learning": Facts(
        tiny=flags(
            "--env-id FrozenLake-v1 --eval-episodes 2 --eval-frequency 2048 --checkpoint-frequency 2048"
            " --total-timesteps 8192"
        ),
        resumed=[
            flags("--total-timesteps 60000 --checkpoint-frequency 5000 --eval-episodes 1"),
            flags("--env-id Taxi-v4 --algorithm double-q-learning --total-timesteps 60000 --eval-episodes 1"),
            flags("--env-id CliffWalking-v1 --algorithm sarsa --exploration boltzmann --total-timesteps 60000"),
            flags("--env-id Blackjack-v1 --algorithm expected-sarsa --exploration ucb --total-timesteps 50000"),
        ],
        changes={
            "env_id": "CliffWalking-v1", "seed": 2, "total_timesteps": 4096, "eval_frequency": 4096,
            "eval_episodes": 3, "checkpoint_frequency": 4096, "capture_video": True, "algorithm": "sarsa",
            "learning_rate": 0.3, "anneal_lr": False, "gamma": 0.9, "initial_value": 0.5, "exploration": "ucb",
            "start_e": 0.5, "end_e": 0.5, "exploration_fraction": 0.9, "plot_values": True,
            "ucb_c": None,  # tested in test_q_learning.py
        },
        mistakes={
            "--learning-rate 1.1": "--learning-rate",
            "--start-e 2": "--start-e",
            "--end-e -1": "--end-e",
            "--exploration boltzmann --end-e 0": "--end-e",
            "--exploration-fraction 1.5": "--exploration-fraction",
            "--ucb-c -1": "--ucb-c",
            "--initial-value nan": "--initial-value",
            "--algorithm td": "sarsa",
            "--exploration greedy": "boltzmann",
            "--env-id CartPole-v1": "dqn.py",
            "--env-id Pendulum-v1": "ppo.py",
        },
        task="FrozenLake-v1",
        env_class="gymnasium.envs.toy_text.frozen_lake.FrozenLakeEnv",
        quarter=2048,
    ),
    "reinforce": Facts(
        tiny=flags("--env-id CartPole-v1 --num-steps 48") + EVALUATED,
        resumed=[
            flags("--total-timesteps 8192 --checkpoint-frequency 1024 --eval-frequency 4096"),
            flags("--env-id LunarLander-v3 --total-timesteps 8192 --checkpoint-frequency 1024 --eval-frequency 4096"),
            flags("--env-id InvertedPendulum-v5 --total-timesteps 4096 --eval-frequency 2048"),
        ],
        changes={
            "env_id": "Acrobot-v1", "seed": 2, "total_timesteps": 1024, "eval_frequency": 1024,
            "eval_episodes": 3, "checkpoint_frequency": 1024, "capture_video": True, "num_steps": 32,
            "learning_rate": 1e-3, "anneal_lr": False, "value_learning_rate": 1e-3, "value_epochs": 2, "gamma": 0.9,
            "baseline": "mean",
        },
        mistakes={
            "--num-steps 0": "--num-steps",
            "--value-learning-rate -1": "--value-learning-rate",
            "--value-epochs 0": "--value-epochs",
            "--baseline all": "mean",
            "--env-id CarRacing-v3": "ppo.py",
            "--env-id OddMultiBinaryAction-v0": "MultiBinary",
            "--env-id OddTupleAction-v0": "Tuple",
            "--env-id OddIntegerAction-v0": "ppo.py",
        },
    ),
    "dqn": Facts(
        tiny=flags(
            "--env-id CartPole-v1 --num-envs 2 --buffer-size 1000 --learning-starts 64 --train-frequency 2 "
            "--batch-size 16 --target-network-frequency 5 --learning-rate 0.03"
        ) + EVALUATED,
        resumed=[
            flags("--total-timesteps 8192 --checkpoint-frequency 1024 --eval-frequency 4096"),
            flags("--env-id LunarLander-v3 --no-norm-obs --exploration ez-greedy --total-timesteps 8192"),
            flags("--env-id ALE/Pong-v5 --total-timesteps 512 --checkpoint-frequency 128 --eval-episodes 1"),
        ],
        changes={
            "env_id": "Acrobot-v1", "seed": 2, "total_timesteps": 1024, "num_envs": 4, "eval_frequency": 1024,
            "eval_episodes": 3, "checkpoint_frequency": 1024, "capture_video": True, "learning_rate": 3e-3,
            "anneal_lr": False, "buffer_size": 100, "batch_size": 8, "learning_starts": 200, "train_frequency": 8,
            "target_network_frequency": 7, "tau": 0.5, "gamma": 0.9, "exploration": "boltzmann", "start_e": 0.5,
            "end_e": 0.3, "exploration_fraction": 0.5, "max_grad_norm": 0.01, "huber": True, "double_q": False,
            "dueling": True, "norm_obs": False, "compile": None,
        },
        mistakes={
            "--buffer-size 1": "--buffer-size",
            "--buffer-size 1000000000000": "GB",
            "--batch-size 0": "--batch-size",
            "--learning-starts -1": "--learning-starts",
            "--train-frequency 0": "--train-frequency",
            "--target-network-frequency 0": "--target-network-frequency",
            "--max-grad-norm -1": "--max-grad-norm",
            "--max-grad-norm 0": "--max-grad-norm",
            "--tau 1.1": "--tau",
            "--start-e 1.1": "--start-e",
            "--end-e -0.1": "--end-e",
            "--exploration-fraction 2": "--exploration-fraction",
            "--exploration ucb": "boltzmann",
            "--double-q maybe": "maybe",
            "--env-id Pendulum-v1": "sac.py",
            "--env-id OddMultiBinaryAction-v0": "MultiBinary",
            "--env-id OddTupleAction-v0": "Tuple",
            "--env-id OddIntegerAction-v0": "Box",
        },
    ),
    "dpo": Facts(
        task="preferences", acts=False, env_class=None, quarter=64, result="eval/reward", deaths=1,
        tiny=[*ON_TEXT, "--eval-replies", "8", "--max-new-tokens", "16"],
        resumed=[flags("--total-timesteps 1024 --checkpoint-frequency 100 --eval-frequency 512")],
        changes=TEXT_CHANGES | {"eval_replies": 16, "max_new_tokens": 3, "beta": 0.5, "loss_type": "ipo",
                                "label_smoothing": 0.2, "nll_coef": 1.0, "simpo_gamma": None},
        mistakes=TEXT_MISTAKES | {
            "--eval-replies 0": "--eval-replies",
            "--beta 0": "--beta",
            "--beta -1": "--beta",
            "--loss-type kto": "hinge",
            "--label-smoothing 0.6": "--label-smoothing",
            "--nll-coef -1": "--nll-coef",
            "--label-smoothing -0.1": "--label-smoothing",
            "--label-smoothing 0.1 --loss-type ipo": "--label-smoothing",
        },
        logged=["loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "losses/grad_norm", "eval/kl"],
        model="model/model.safetensors", goes_on="--evaluate",
    ),
    "reward_model": Facts(
        task="preferences", acts=False, env_class=None, quarter=64, result="eval/accuracy", deaths=1,
        tiny=ON_TEXT,
        resumed=[flags("--total-timesteps 1024 --checkpoint-frequency 100 --eval-frequency 512")],
        changes=TEXT_CHANGES | {"replies": None},  # tested in test_reward_model.py
        mistakes=TEXT_MISTAKES | {"--replies replies.jsonl": "--evaluate"},
        logged=["loss", "rewards/margins", "rewards/accuracies", "losses/grad_norm", "eval/reward_accuracy"],
        model="model/model.safetensors", goes_on="--evaluate",
    ),
    "ppo_rlhf": Facts(
        task="prompts", acts=False, env_class=None, quarter=64, result="eval/reward", deaths=1,
        tiny=flags(
            "--dataset-split train[:200] --batch-size 16 --num-minibatches 2 --max-new-tokens 12 --eval-replies 8"
            " --update-epochs 2 --eval-frequency 64 --checkpoint-frequency 64 --total-timesteps 256"
        ),
        resumed=[flags("--total-timesteps 1024 --checkpoint-frequency 100 --eval-frequency 512")],
        changes={
            "seed": 2, "total_timesteps": 32, "eval_frequency": 16, "dataset_split": "train[:100]", "eval_replies": 16,
            "learning_rate": 5e-2, "critic_learning_rate": 5e-2, "warmup": 0.5, "batch_size": 8, "num_minibatches": 4,
            "update_epochs": 1, "max_grad_norm": 0.01, "weight_decay": 10.0, "lora_rank": 2, "max_new_tokens": 3,
            "gamma": 0.9, "gae_lambda": 0.5, "beta": 0.1, "adaptive_kl": 6.0, "missing_eos_penalty": 1.0,
            "clip_coef": 0.001, "clip_coef_vf": 0.001, "vf_coef": 5.0, "norm_adv": False,
            # tested in test_ppo_rlhf.py
            "model_name": None, "dataset": None, "dataset_config": None, "prompt_column": None, "chat": None,
            "reward": None, "max_length": None, "micro_batch_size": None, "write_batch_size": None,
            "gradient_checkpointing": None, "load_in_4bit": None, "checkpoint_frequency": None,
        },
        mistakes={
            "--model-name nothing-here": "nothing-here",
            "--dataset nothing-here.jsonl --reward nothing-here": "nothing-here",
            "--dataset-split nothing": "nothing",
            "--prompt-column question": "--prompt-column",
            "--reward nowhere.py:judge": "--reward",
            "--dataset other.jsonl": "--reward",
            "--max-new-tokens 0": "--max-new-tokens",
            "--max-new-tokens 100": "room for a reply",
            "--max-length 3": "room for a reply",
            "--eval-replies 0": "--eval-replies",
            "--warmup 1.5": "--warmup",
            "--batch-size 0": "--batch-size",
            "--batch-size 7": "--batch-size",
            "--num-minibatches 3": "--num-minibatches",
            "--num-minibatches 0": "--num-minibatches",
            "--update-epochs 0": "--update-epochs",
            "--micro-batch-size 3": "--micro-batch-size",
            "--write-batch-size 0": "--write-batch-size",
            "--gae-lambda 1.1": "--gae-lambda",
            "--beta -1": "--beta",
            "--adaptive-kl 0": "--adaptive-kl",
            "--adaptive-kl 6 --beta 0": "--adaptive-kl",
            "--clip-coef -0.1": "--clip-coef",
            "--clip-coef-vf -1": "--clip-coef-vf",
            "--load-in-4bit": "--lora-rank",
            "--norm-adv maybe": "maybe",
        },
        logged=["objective/kl", "objective/rlhf_reward", "objective/scores", "objective/entropy", "losses/policy_loss",
                "losses/value_loss", "losses/clipfrac", "losses/approx_kl", "losses/grad_norm", "eval/kl"],
        model="model/model.safetensors", goes_on="--evaluate",
    ),
    "grpo": Facts(
        task="prompts", acts=False, env_class=None, quarter=64, result="eval/reward", deaths=1,
        tiny=flags(
            "--dataset-split train[:200] --batch-size 16 --group-size 4 --num-minibatches 2 --max-new-tokens 12"
            " --eval-replies 8 --update-epochs 2 --eval-frequency 64 --checkpoint-frequency 64 --total-timesteps 256"
        ),
        resumed=[flags("--total-timesteps 1024 --checkpoint-frequency 100 --eval-frequency 512")],
        changes={
            "seed": 2, "total_timesteps": 32, "eval_frequency": 16, "dataset_split": "train[:100]", "eval_replies": 16,
            "learning_rate": 5e-2, "warmup": 0.5, "batch_size": 8, "group_size": 8, "num_minibatches": 4,
            "update_epochs": 1, "max_grad_norm": 0.01, "weight_decay": 10.0, "lora_rank": 2, "max_new_tokens": 3,
            "advantage": "grpo", "clip_low": 0.001, "clip_high": 0.001, "kl": "none", "beta": 0.1,
            # tested in test_grpo.py
            "model_name": None, "dataset": None, "dataset_config": None, "prompt_column": None, "chat": None,
            "reward": None, "reward_weights": None, "max_length": None, "micro_batch_size": None,
            "write_batch_size": None, "gradient_checkpointing": None, "load_in_4bit": None, "kl_estimator": None,
            "checkpoint_frequency": None,
        },
        mistakes={
            "--model-name nothing-here": "nothing-here",
            "--dataset nothing-here.jsonl --reward nothing-here": "nothing-here",
            "--dataset-split nothing": "nothing",
            "--prompt-column question": "--prompt-column",
            "--reward nowhere.py:judge": "--reward",
            "--reward-weights 1 2": "--reward-weights",
            "--dataset other.jsonl": "--reward",
            "--max-new-tokens 0": "--max-new-tokens",
            "--max-new-tokens 100": "room for a reply",
            "--group-size 1": "--group-size",
            "--group-size 5": "--group-size",
            "--batch-size 7": "--batch-size",
            "--num-minibatches 3": "--num-minibatches",
            "--micro-batch-size 3": "--micro-batch-size",
            "--advantage ppo": "rloo",
            "--clip-low 1.1": "--clip-low",
            "--clip-high -1": "--clip-high",
            "--kl loss": "--kl-estimator",
            "--kl-estimator k3": "--kl reward",
            "--kl-estimator k4": "k3",
            "--beta -1": "--beta",
            "--load-in-4bit": "--lora-rank",
        },
        logged=["objective/kl", "objective/rlhf_reward", "objective/scores", "objective/entropy", "losses/policy_loss",
                "losses/kl", "losses/clipfrac", "losses/approx_kl", "losses/grad_norm", "eval/kl"],
        model="model/model.safetensors", goes_on="--evaluate",
    ),
    "sft": Facts(
        task="demonstrations", acts=False, env_class=None, quarter=64, result="eval/loss", deaths=1,
        tiny=[*ON_TEXT, "--eval-replies", "8", "--max-new-tokens", "16"],
        resumed=[flags("--total-timesteps 1024 --checkpoint-frequency 100 --eval-frequency 512")],
        changes={name: change for name, change in TEXT_CHANGES.items()
                 if name not in ("eval_pairs", "chosen_column", "rejected_column", "labels", "lora_rank")} | {
            "eval_demonstrations": 3, "eval_replies": 16, "max_new_tokens": 3, "from_scratch": False,
            "reply_column": None, "lora_rank": None,  # tested in test_sft.py
        },
        mistakes={wrong: word for wrong, word in TEXT_MISTAKES.items()
                  if wrong.split()[0] not in ("--eval-pairs", "--chosen-column", "--labels")} | {
            "--reply-column better": "--reply-column",
            "--eval-demonstrations 0": "--eval-demonstrations",
            "--from-scratch maybe": "maybe",
            "--lora-rank 2": "--from-scratch",
        },
        logged=["losses/loss", "losses/accuracy", "losses/grad_norm", "eval/accuracy", "eval/reward", "eval/length"],
        model="model/model.safetensors", goes_on="--evaluate",
    ),
    "maddpg": Facts(
        tiny=flags(
            "--env-id simple_spread_v3 --num-envs 2 --learning-starts 64 --train-frequency 4 --batch-size 16"
            " --hidden-size 16"
        ) + EVALUATED,
        resumed=[
            flags("--total-timesteps 4096 --buffer-size 1000"),
            flags("--env-id simple_speaker_listener_v4 --continuous-actions --total-timesteps 4096"),
        ],
        changes={
            "env_id": "simple_tag_v3", "seed": 2, "total_timesteps": 1024, "num_envs": 4, "eval_frequency": 512,
            "eval_episodes": 3, "checkpoint_frequency": 512, "capture_video": True, "algorithm": "ddpg",
            "continuous_actions": True, "actor_gradient": "exact", "learning_rate": 0.1, "anneal_lr": True,
            "beta2": 0.9, "hidden_size": 8, "buffer_size": 64, "batch_size": 8, "learning_starts": 128,
            "train_frequency": 16, "gamma": 0.5, "tau": 0.5, "output_coef": 1.0,
            "exploration_noise": None, "opponent_dir": None,  # tested in test_maddpg.py
        },
        mistakes={
            "--env-id LunarLander-v3": "mpe2.farama.org",
            "--env-id nowhere:env": "nowhere",
            "--env-id mpe2.simple_spread_v3:env": "parallel",
            "--algorithm qmix": "maddpg",
            "--beta2 1": "--beta2",
            "--hidden-size 0": "--hidden-size",
            "--buffer-size 0": "--buffer-size",
            "--buffer-size 1000000000000 --total-timesteps 1000000000000": "GB",
            "--batch-size 0": "--batch-size",
            "--learning-starts -1": "--learning-starts",
            "--train-frequency 0": "--train-frequency",
            "--tau 1.1": "--tau",
            "--output-coef -1": "--output-coef",
            "--exploration-noise -1": "--exploration-noise",
            "--continuous-actions maybe": "maybe",
            "--opponent-dir elsewhere": "--evaluate",
        },
        task="simple_spread_v3",
        env_class=None,
    ),
    "muzero": Facts(
        tiny=flags(
            "--env-id CartPole-v1 --num-envs 8 --num-simulations 6 --learning-starts 64 --train-frequency 4"
            " --batch-size 8 --hidden-size 16 --latent-size 8 --unroll-steps 2 --eval-simulations 2"
            " --learning-rate 0.01"
        ) + EVALUATED,
        resumed=[
            flags("--total-timesteps 8192 --buffer-size 1000 --checkpoint-frequency 500 --eval-frequency 4096"),
            flags("--env-id tic_tac_toe --eval-positions 50 --total-timesteps 4096"),
        ],
        changes={
            "env_id": "tic_tac_toe", "seed": 2, "total_timesteps": 1024, "num_envs": 4, "eval_frequency": 1024,
            "eval_episodes": 3, "checkpoint_frequency": 1024, "capture_video": True, "num_simulations": 5,
            "eval_simulations": 7, "c_init": 3.0, "c_base": 1.0, "dirichlet_alpha": 0.1, "noise_fraction": 0.9,
            "temperature": 0.5, "final_temperature": 0.9, "gamma": 0.9, "td_steps": 3, "unroll_steps": 3,
            "support_size": 9, "latent_size": 7, "hidden_size": 8, "learning_rate": 0.1, "anneal_lr": False,
            "weight_decay": 1.0, "buffer_size": 64, "batch_size": 16, "learning_starts": 128,
            "train_frequency": 16,
            # of games: tested in test_muzero.py
            "temperature_moves": None, "random_moves": None, "eval_positions": None, "opponent_simulations": None,
        },
        mistakes={
            "--env-id tic_tac_toe(size=4)": "size",
            "--env-id kuhn_poker": "dice or cards",
            "--env-id phantom_ttt": "nothing hidden",
            "--env-id Pendulum-v1": "sac.py",
            "--env-id CarRacing-v3": "ppo.py",
            "--num-simulations 0": "--num-simulations",
            "--eval-simulations 0": "--eval-simulations",
            "--c-init -1": "--c-init",
            "--c-base 0": "--c-base",
            "--dirichlet-alpha 0": "--dirichlet-alpha",
            "--noise-fraction 1.1": "--noise-fraction",
            "--temperature -1": "--temperature",
            "--final-temperature -1": "--final-temperature",
            "--temperature-moves -1": "--temperature-moves",
            "--random-moves -1": "--random-moves",
            "--gamma 1.1": "--gamma",
            "--td-steps 0": "--td-steps",
            "--unroll-steps 0": "--unroll-steps",
            "--support-size 0": "--support-size",
            "--latent-size 0": "--latent-size",
            "--hidden-size 0": "--hidden-size",
            "--weight-decay -1": "--weight-decay",
            "--buffer-size 0": "--buffer-size",
            "--buffer-size 1000000000000 --total-timesteps 1000000000000": "GB",
            "--batch-size 0": "--batch-size",
            "--learning-starts -1": "--learning-starts",
            "--train-frequency 0": "--train-frequency",
            "--eval-positions 0": "--eval-positions",
            "--opponent-simulations 0": "--opponent-simulations",
        },
    ),
    "alphazero": Facts(
        task="tic_tac_toe", env_class=None,
        tiny=flags(
            "--env-id tic_tac_toe --num-envs 8 --num-simulations 4 --learning-starts 64 --train-frequency 4"
            " --batch-size 16 --hidden-size 16 --eval-simulations 4 --eval-positions 50"
        ) + EVALUATED,
        resumed=[
            flags("--total-timesteps 8192 --buffer-size 1000 --checkpoint-frequency 500 --eval-frequency 4096"),
            flags("--env-id connect_four(rows=4,columns=5) --num-blocks 1 --opponent-simulations 5 --num-envs 16"),
        ],
        changes={
            "env_id": "connect_four(rows=3,columns=3,x_in_row=3)", "seed": 2, "total_timesteps": 1024, "num_envs": 4,
            "eval_frequency": 512, "eval_episodes": 3, "checkpoint_frequency": 512, "capture_video": True,
            "num_simulations": 5, "c_init": 3.0, "c_base": 1.0, "dirichlet_alpha": 0.1, "noise_fraction": 0.9,
            "temperature": 0.5, "temperature_moves": 2, "random_moves": 2, "num_blocks": 1, "hidden_size": 8,
            "learning_rate": 0.1, "anneal_lr": False, "weight_decay": 1.0, "buffer_size": 64, "batch_size": 8,
            "learning_starts": 128, "train_frequency": 16, "eval_simulations": 5, "eval_positions": 60,
            # tested in test_alphazero.py
            "num_channels": None, "opponent_simulations": None, "play": None,
        },
        mistakes={
            "--env-id LunarLander-v3": "registered_names",
            "--env-id connect_four(rows=4": "bracket",
            "--env-id tic_tac_toe(size=4)": "size",
            "--env-id kuhn_poker": "dice or cards",
            "--env-id catch": "two players",
            "--env-id phantom_ttt": "nothing hidden",
            "--env-id matrix_pd": "in turn",
            "--num-simulations 0": "--num-simulations",
            "--eval-simulations 0": "--eval-simulations",
            "--c-init -1": "--c-init",
            "--c-base 0": "--c-base",
            "--dirichlet-alpha 0": "--dirichlet-alpha",
            "--noise-fraction 1.1": "--noise-fraction",
            "--temperature -1": "--temperature",
            "--temperature-moves -1": "--temperature-moves",
            "--random-moves -1": "--random-moves",
            "--num-blocks -1": "--num-blocks",
            "--hidden-size 0": "--hidden-size",
            "--num-channels 0": "--num-channels",
            "--weight-decay -1": "--weight-decay",
            "--buffer-size 0": "--buffer-size",
            "--buffer-size 1000000000000 --total-timesteps 1000000000000": "GB",
            "--batch-size 0": "--batch-size",
            "--learning-starts -1": "--learning-starts",
            "--train-frequency 0": "--train-frequency",
            "--eval-positions 0": "--eval-positions",
            "--opponent-simulations 0": "--opponent-simulations",
            "--play": "--evaluate",
        },
    ),
    "iql": Facts(
        task="FrozenLake-v1", env_class="gymnasium.envs.toy_text.FrozenLakeEnv", quarter=128,
        logged=["losses/value_loss", "losses/actor_loss", "losses/qf1_loss", "losses/values", "losses/clipfrac"],
        tiny=flags(
            "--env-id FrozenLake-v1 --batch-size 8 --eval-episodes 2 --eval-frequency 128 --checkpoint-frequency 128"
            " --total-timesteps 512"
        ),
        resumed=[flags("--total-timesteps 1024 --norm-obs")],
        changes={
            "seed": 2, "total_timesteps": 64, "eval_frequency": 32, "checkpoint_frequency": 64,
            "capture_video": True, "learning_rate": 1e-2, "anneal_lr": False, "gamma": 0.5, "tau": 0.5,
            "batch_size": 16, "expectile": 0.5, "temperature": 0.5, "max_weight": 1.0, "return_range": 10.0,
            "norm_obs": True, "env_id": None, "dataset": None, "eval_episodes": None,  # tested in test_iql.py
        },
        mistakes={
            "--dataset nothing-here.npz": "nothing-here",
            "--dataset nothing-here": "minari",
            "--tau 1.1": "--tau",
            "--batch-size 0": "--batch-size",
            "--expectile 1.1": "--expectile",
            "--expectile 1": "--expectile",
            "--expectile 0": "--expectile",
            "--temperature -1": "--temperature",
            "--max-weight 0": "--max-weight",
            "--return-range -1": "--return-range",
            "--norm-obs maybe": "maybe",
            "--env-id CliffWalking-v1": "FrozenLake-v1",
            "--env-id CarRacing-v3": "ppo.py",
            "--env-id OddMultiBinaryAction-v0": "MultiBinary",
            "--env-id OddIntegerAction-v0": "Box",
        },
    ),
    "cql": Facts(
        task="FrozenLake-v1", env_class="gymnasium.envs.toy_text.FrozenLakeEnv", quarter=128,
        logged=["losses/qf1_loss", "losses/q_values", "losses/penalty"],
        tiny=flags(
            "--env-id FrozenLake-v1 --batch-size 8 --eval-episodes 2 --eval-frequency 128 --checkpoint-frequency 128"
            " --total-timesteps 512"
        ),
        resumed=[flags("--total-timesteps 1024 --cql-alpha 0.5")],
        changes={
            "seed": 2, "total_timesteps": 64, "eval_frequency": 32, "checkpoint_frequency": 64,
            "capture_video": True, "learning_rate": 1e-2, "anneal_lr": False, "gamma": 0.5, "tau": 0.5,
            "batch_size": 16, "cql_alpha": 0.0, "reward_scale": 10.0,
            "num_samples": None,  # tested in test_cql.py
            "env_id": None, "dataset": None, "eval_episodes": None,  # tested in test_iql.py
        },
        mistakes={
            "--dataset nothing-here.npz": "nothing-here",
            "--dataset nothing-here": "minari",
            "--tau 1.1": "--tau",
            "--batch-size 0": "--batch-size",
            "--cql-alpha -1": "--cql-alpha",
            "--num-samples 0": "--num-samples",
            "--reward-scale -1": "--reward-scale",
            "--anneal-lr maybe": "maybe",
            "--env-id CliffWalking-v1": "FrozenLake-v1",
            "--env-id CarRacing-v3": "ppo.py",
            "--env-id OddMultiBinaryAction-v0": "MultiBinary",
            "--env-id OddIntegerAction-v0": "Box",
        },
    ),
    "decision_transformer": Facts(
        task="FrozenLake-v1", env_class="gymnasium.envs.toy_text.FrozenLakeEnv", quarter=64,
        logged=["losses/action_loss", "losses/grad_norm"],
        tiny=flags(
            "--env-id FrozenLake-v1 --batch-size 8 --hidden-size 16 --num-layers 1 --context-length 4 --warmup 10"
            " --eval-episodes 2 --eval-frequency 64 --checkpoint-frequency 64 --total-timesteps 256"
        ),
        resumed=[flags("--total-timesteps 1024 --norm-obs")],
        changes={
            "seed": 2, "total_timesteps": 128, "eval_frequency": 64, "checkpoint_frequency": 128,
            "capture_video": True, "target_return": 0.5, "draw_actions": True, "condition": False, "context_length": 5,
            "num_layers": 2, "hidden_size": 8, "max_timestep": 50, "learning_rate": 1e-2, "warmup": 1,
            "max_grad_norm": 0.01, "batch_size": 16, "norm_obs": True,
            "env_id": None, "dataset": None, "eval_episodes": None,  # tested in test_decision_transformer.py
        },
        mistakes={
            "--dataset nothing-here.npz": "nothing-here",
            "--dataset nothing-here": "minari",
            "--target-return nan": "--target-return",
            "--target-return best": "--target-return",
            "--draw-actions maybe": "maybe",
            "--condition maybe": "maybe",
            "--context-length 0": "--context-length",
            "--num-layers 0": "--num-layers",
            "--hidden-size 0": "--hidden-size",
            "--max-timestep 0": "--max-timestep",
            "--warmup 0": "--warmup",
            "--max-grad-norm 0": "--max-grad-norm",
            "--batch-size 0": "--batch-size",
            "--env-id CliffWalking-v1": "FrozenLake-v1",
            "--env-id CarRacing-v3": "ppo.py",
            "--env-id OddMultiBinaryAction-v0": "MultiBinary",
            "--env-id OddIntegerAction-v0": "Box",
        },
    ),
    "td3": Facts(
        task="Pendulum-v1", env_class="gymnasium.envs.classic_control.PendulumEnv", rate="q-lr",
        tiny=flags(
            "--env-id Pendulum-v1 --num-envs 2 --learning-starts 100 --batch-size 8 --utd 0.25"
        ) + EVALUATED,
        resumed=[
            flags("--total-timesteps 4096"),
            flags("--env-id HalfCheetah-v5 --total-timesteps 2048 --eval-episodes 1"),
        ],
        changes={
            "env_id": "InvertedPendulum-v5", "seed": 2, "total_timesteps": 1024, "num_envs": 4, "eval_frequency": 1024,
            "eval_episodes": 3, "checkpoint_frequency": 1024, "capture_video": True, "policy_lr": 1e-4, "q_lr": 1e-4,
            "gamma": 0.9, "tau": 0.1, "buffer_size": 200, "batch_size": 16, "learning_starts": 200, "utd": 0.5,
            "num_critics": 1, "policy_frequency": 1, "policy_noise": 0.5, "noise_clip": 0.01, "exploration_noise": 0.5,
        },
        mistakes={
            "--policy-lr -1": "--policy-lr",
            "--tau 1.1": "--tau",
            "--utd -1": "--utd",
            "--utd nan": "--utd",
            "--num-critics 0": "--num-critics",
            "--policy-frequency 0": "--policy-frequency",
            "--policy-noise -1": "--policy-noise",
            "--noise-clip -1": "--noise-clip",
            "--exploration-noise -1": "--exploration-noise",
            "--buffer-size 1": "--buffer-size",
            "--buffer-size 1000000000000 --total-timesteps 1000000000000": "GB",
            "--batch-size 0": "--batch-size",
            "--learning-starts -1": "--learning-starts",
            "--env-id CartPole-v1": "ppo.py",
            "--env-id CarRacing-v3": "ppo.py",
            "--env-id OddMultiBinaryAction-v0": "MultiBinary",
            "--env-id OddIntegerAction-v0": "Box",
        },
    ),
    "sac": Facts(
        task="Pendulum-v1", env_class="gymnasium.envs.classic_control.PendulumEnv", rate="q-lr",
        tiny=flags(
            "--env-id Pendulum-v1 --num-envs 2 --learning-starts 100 --batch-size 8 --utd 0.25"
        ) + EVALUATED,
        resumed=[
            flags("--total-timesteps 4096"),
            flags("--env-id HalfCheetah-v5 --total-timesteps 2048 --eval-episodes 1"),
        ],
        changes={
            "env_id": "InvertedPendulum-v5", "seed": 2, "total_timesteps": 1024, "num_envs": 4, "eval_frequency": 1024,
            "eval_episodes": 3, "checkpoint_frequency": 1024, "capture_video": True, "policy_lr": 1e-4, "q_lr": 1e-4,
            "gamma": 0.9, "tau": 0.1, "buffer_size": 200, "batch_size": 16, "learning_starts": 200, "utd": 0.5,
            "num_critics": 1, "alpha": 0.5, "autotune": False,
        },
        mistakes={
            "--policy-lr -1": "--policy-lr",
            "--tau 1.1": "--tau",
            "--utd -1": "--utd",
            "--num-critics 0": "--num-critics",
            "--alpha -1": "--alpha",
            "--alpha 0": "--no-autotune",
            "--buffer-size 1": "--buffer-size",
            "--buffer-size 1000000000000 --total-timesteps 1000000000000": "GB",
            "--batch-size 0": "--batch-size",
            "--learning-starts -1": "--learning-starts",
            "--env-id CartPole-v1": "ppo.py",
            "--env-id CarRacing-v3": "ppo.py",
            "--env-id OddMultiBinaryAction-v0": "MultiBinary",
            "--env-id OddIntegerAction-v0": "Box",
        },
    ),
    "her": Facts(
        task="goal_env-Point-v0", env_class=None,
        tiny=flags(
            "--env-id goal_env:Point-v0 --num-envs 2 --learning-starts 100 --batch-size 8 --utd 0.25"
        ) + EVALUATED,
        resumed=[flags("--total-timesteps 4096")],
        changes={
            "env_id": "goal_env:Far-v0", "seed": 2, "total_timesteps": 1024, "num_envs": 4, "eval_frequency": 1024,
            "eval_episodes": 40, "checkpoint_frequency": 1024, "capture_video": True, "policy_lr": 1e-4, "q_lr": 1e-4,
            "gamma": 0.9, "tau": 0.1, "buffer_size": 200, "batch_size": 16, "learning_starts": 200, "utd": 0.5,
            "num_critics": 1, "alpha": 0.5, "autotune": False, "her_strategy": "final", "her_ratio": 0.5,
        },
        mistakes={
            "--her-strategy past": "future",
            "--her-ratio -1": "--her-ratio",
            "--buffer-size 1000000000000 --total-timesteps 1000000000000": "GB",
            "--alpha 0": "--no-autotune",
            "--env-id Pendulum-v1": "sac.py",
            "--env-id CartPole-v1": "ppo.py",
        },
        rate="q-lr",
    ),
}  # fmt: skip
