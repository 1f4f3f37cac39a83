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
            "compile": None,  # tested in test_ppo.py
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
            "--target-kl -1": "--target-kl",
            "--target-kl x": "--target-kl",
            "--optimizer sgd": "adam",
            "--anneal-lr maybe": "maybe",
            "--env-id ALE/Pong-v5 --norm-obs": "--norm-obs",
            "--env-id OddMultiBinaryAction-v0": "MultiBinary",
            "--env-id OddTupleAction-v0": "Tuple",
            "--env-id OddIntegerAction-v0": "Box",
        },
    ),
}  # fmt: skip
