"""grpo.py against advantages by hand, exact gradients of policies that can be enumerated, TRL, and known optima."""

import copy
import dataclasses
import importlib
import itertools
import json
import math
import signal
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, rows, timeless
from text_models import bfloat16_autocast, tokenizer_of, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    Qwen3_5TextConfig,
    RwkvConfig,
)

from algorithms import grpo

SCRIPT = ROOT / "algorithms" / "grpo.py"
REVIEWS = ROOT / "benchmark" / "reviews"
ARITHMETIC = ROOT / "benchmark" / "arithmetic"
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"  # noqa: E501
SIZES = {
    "gpt2": GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3),
    "llama": LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=32, max_position_embeddings=64, initializer_range=0.3),
}  # fmt: skip
ADVANTAGES = ["grpo", "dr-grpo", "rloo"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models with random weights, prompts of different lengths, and a reward: as short as possible."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), AutoTokenizer.from_pretrained(REVIEWS / "model")
    tokenizer.chat_template = CHAT
    for name, config in SIZES.items():
        torch.manual_seed(0)
        config = copy.deepcopy(config)
        config.vocab_size, config.eos_token_id, config.bos_token_id = len(tokenizer), tokenizer.eos_token_id, None
        config.pad_token_id = tokenizer.pad_token_id
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = [{"prompt": f"review the {'coffee ' * (i % 3 + 1)}: "} for i in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    short = "def short(prompt, reply):\n    return -len(reply.split()) / 4\n"
    (folder / "reward.py").write_text(f"{short}\n\ndef good(prompt, reply):\n    return 'good' in reply\n")
    return folder


@pytest.fixture(autouse=True)
def signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def arguments(folders, name="gpt2", **changes):
    flags = {"model_name": str(folders / name), "dataset": str(folders / "prompts.jsonl"), "device": "cpu",
             "reward": [f"{folders}/reward.py:short"], "batch_size": 32, "group_size": 4, "num_minibatches": 2,
             "total_timesteps": 128, "eval_frequency": 64, "checkpoint_frequency": 64, "learning_rate": 1e-2,
             "eval_replies": 8, "max_new_tokens": 8}  # fmt: skip
    return grpo.Args(**flags | changes)


def pure(**changes):
    """Arguments for the functions without a run."""
    return grpo.Args(device="cpu", **{"max_new_tokens": 10, "kl": "none"} | changes)


# [1]


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    std = math.sqrt((4 + 1 + 9) / 2), math.sqrt((1 + 1 + 4) / 2)
    expected = {
        "dr-grpo": [[-2, -1, 3], [-1, -1, 2]],
        "grpo": [[x / (std[0] + 1e-4) for x in (-2, -1, 3)], [x / (std[1] + 1e-4) for x in (-1, -1, 2)]],
        "rloo": [[1 - 4, 2 - 3.5, 6 - 1.5], [0 - 1.5, 0 - 1.5, 3 - 0]],
    }
    for kind in ADVANTAGES:
        torch.testing.assert_close(grpo.group_advantages(rewards, kind), torch.tensor(expected[kind]).float())


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_a_group_of_equal_rewards_teaches_nothing_and_the_order_in_a_group_does_not_matter(kind):
    assert torch.equal(grpo.group_advantages(torch.full((2, 4), 0.7), kind), torch.zeros(2, 4))
    rewards = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        grpo.group_advantages(rewards[:, order], kind), grpo.group_advantages(rewards, kind)[:, order]
    )
    apart = torch.cat([grpo.group_advantages(rewards[i : i + 1], kind) for i in range(5)])
    torch.testing.assert_close(grpo.group_advantages(rewards, kind), apart)


# [2]


def example():
    """Two replies of 3 and 1 tokens: log-probabilities now, then, of the reference."""
    now = torch.tensor([-1.0, -2.0, -0.5, -1.5], requires_grad=True)
    return now, torch.tensor([-1.1, -1.5, -0.5, -2.0]), torch.tensor([-1.0, -1.0, -1.0, -1.0])


def test_losses_by_hand():
    now, old, ref = example()
    ratio = [math.exp(0.1), math.exp(-0.5), 1.0, math.exp(0.5)]
    # Advantage 2: at most 1.3. Advantage -3: at least 0.9, and without a limit above
    first, second = [-2 * min(r, 1.3) for r in ratio[:3]], 3 * max(ratio[3], 0.9)
    flags = {"clip_low": 0.1, "clip_high": 0.3, "max_new_tokens": 10}
    loss = {kind: grpo.grpo_loss(now, old, ref, [3, 1], torch.tensor([2.0, -3.0]), pure(advantage=kind, **flags))
            for kind in ADVANTAGES}  # fmt: skip
    assert loss["grpo"][0].tolist() == pytest.approx([sum(first) / 3, second])
    assert loss["dr-grpo"][0].tolist() == pytest.approx([sum(first) / 10, second / 10])
    assert loss["rloo"][0].tolist() == pytest.approx([-2 * math.exp(-0.4), second])
    clipped = dict(zip(grpo.METRICS, loss["grpo"][1].tolist(), strict=True))
    assert clipped["losses/clipfrac"] == pytest.approx([1 / 3, 1])
    assert clipped["losses/approx_kl"][1] == pytest.approx(ratio[3] - 1 - 0.5)
    torch.testing.assert_close(loss["dr-grpo"][1], loss["grpo"][1])  # shares of tokens, whatever the loss is divided by
    # Clipped where the ratio is beyond the band, and would go further: no gradient
    up = grpo.grpo_loss(now, old, ref, [3, 1], torch.tensor([-3.0, 2.0]), pure(advantage="grpo", **flags))
    assert up[0].tolist() == pytest.approx([3 * (ratio[0] + 0.9 + 1) / 3, -2 * 1.3])
    gradient = torch.autograd.grad(up[0].sum(), now)[0].tolist()
    assert gradient == pytest.approx([ratio[0], 0, 1, 0])


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_the_price_in_the_loss_by_hand(kind):
    now, old, ref = example()
    d = [0.0, -1.0, 0.5, -0.5]
    k = {"k2": lambda x: x * x / 2, "k3": lambda x: math.exp(-x) - 1 + x}[kind]
    zero, flags = torch.zeros(2), {"kl": "loss", "kl_estimator": kind, "beta": 0.7}
    loss = {a: grpo.grpo_loss(now, old, ref, [3, 1], zero, pure(advantage=a, **flags))[0].tolist() for a in ADVANTAGES}
    assert loss["grpo"] == pytest.approx([0.7 * sum(map(k, d[:3])) / 3, 0.7 * k(d[3])])
    assert loss["dr-grpo"] == pytest.approx([0.7 * sum(map(k, d[:3])) / 10, 0.7 * k(d[3]) / 10])
    assert loss["rloo"] == pytest.approx([0.7 * k(sum(d[:3])), 0.7 * k(d[3])])


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_at_the_policy_that_wrote_the_ratio_is_1_and_both_divergences_are_0(kind):
    old = torch.tensor([-1.0, -2.0, -0.5])
    losses, metrics = grpo.grpo_loss(old, old, old, [2, 1], torch.tensor([2.0, -1.0]), pure(advantage=kind))
    values = dict(zip(grpo.METRICS, metrics.tolist(), strict=True))
    assert values["losses/approx_kl"] == values["losses/kl"] == values["losses/clipfrac"] == [0, 0]
    scale = {"grpo": [1, 1], "rloo": [1, 1], "dr-grpo": [0.2, 0.1]}[kind]
    assert losses.tolist() == pytest.approx([-2 * scale[0], scale[1]])


def test_shapes_that_would_broadcast_are_refused():
    x = torch.zeros(4)
    for bad in (
        (x, x, x[:1], [3, 1], torch.zeros(2)),
        (x, x, x, [3, 1], torch.zeros(4)),
        (x, x, x, [4, 1], torch.zeros(2)),
    ):
        with pytest.raises(AssertionError):
            grpo.grpo_loss(*bad, pure())


@pytest.mark.parametrize("kind", ["grpo", "dr-grpo", "rloo"])
def test_losses_are_those_of_trl(folders, tmp_path, kind):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, _, replies = written(folders, 4, "llama")  # TRL counts positions from the padding; this model can bear it
    now = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in now.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    advantages, lengths = torch.tensor([1.5, -0.5, -2.0, 1.0]), [len(reply.reply) for reply in replies]
    tensors = grpo.as_tensors([r.prompt for r in replies], [r.reply for r in replies], "cpu")
    old, ref = (torch.tensor([x for r in replies for x in r[i]]) for i in (2, 3))
    ref = ref + 0.1
    flags = {"kl": "loss", "kl_estimator": "k3", "beta": 0.3} if kind != "rloo" else {}
    args = pure(advantage=kind, max_new_tokens=8, clip_high=0.4, **flags)
    actual = grpo.grpo_loss(grpo.token_log_probs(now, *tensors), old, ref, lengths, advantages, args)[0].mean()

    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "per_device_train_batch_size": 4,
              "num_generations": 4, "max_completion_length": 8, "epsilon": 0.2, "epsilon_high": 0.4, "bf16": False,
              "gradient_checkpointing": False}  # fmt: skip
    data, tokenizer = Dataset.from_list([{"prompt": "review"}] * 4), AutoTokenizer.from_pretrained(folders / "gpt2")
    if kind == "rloo":
        config, trainer_class = trl.RLOOConfig(beta=0.0, **common), trl.RLOOTrainer
    else:
        loss_type = kind.replace("-", "_")
        paper = {"beta": 0.3, "loss_type": loss_type, "use_bias_correction_kl": False}  # TRL weights the price by ratio
        config, trainer_class = trl.GRPOConfig(**paper, **common), trl.GRPOTrainer
    trainer = trainer_class(now, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
                            train_dataset=data, processing_class=tokenizer)  # fmt: skip
    trainer.model.eval()

    def padded(lists, value, side="right"):
        return grpo.pad(lists, value, side)

    split_old, split_ref = ([part.tolist() for part in x.split(lengths)] for x in (old, ref))
    inputs = {
        "prompt_ids": padded([r.prompt for r in replies], 0, "left"),
        "prompt_mask": padded([[1] * len(r.prompt) for r in replies], 0, "left"),
        "completion_ids": padded([r.reply for r in replies], 0),
        "completion_mask": padded([[1] * n for n in lengths], 0),
        "old_per_token_logps": padded(split_old, 0.0), "ref_per_token_logps": padded(split_ref, 0.0),
        "old_logps": torch.tensor([sum(part) for part in split_old]), "advantages": advantages,
        "num_items_in_batch": torch.tensor(sum(lengths)),
    }  # fmt: skip
    expected = trainer._compute_loss(trainer.model, inputs)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


# [3] and [4], on policies whose replies can be enumerated

REWARDS = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def objective(logits, beta):
    """[4] E[r] - beta KL(pi, pi_ref)"""
    log_prob = logits.log_softmax(-1)
    return (log_prob.exp() * (REWARDS - beta * (log_prob - REFERENCE.log()))).sum()


def expected_gradient(logits, args, n=2):
    """Of the loss, on average over all groups of n replies: each reply is one token, the policy is softmax(logits)."""
    total, prob = torch.zeros_like(logits), logits.softmax(-1).detach()
    for group in itertools.product(range(len(logits)), repeat=n):
        now = logits.detach().clone().requires_grad_()
        chosen = now.log_softmax(-1)[list(group)]
        old, ref = chosen.detach(), REFERENCE[list(group)].log()
        rewards = REWARDS[list(group)]
        if args.kl == "reward":
            rewards = rewards - args.beta * grpo.kl_estimate(old, ref, args.kl_estimator)
        advantages = grpo.group_advantages(rewards[None], args.advantage)[0]
        loss = grpo.grpo_loss(chosen, old, ref, [1] * n, advantages, args)[0].mean()
        total += prob[list(group)].prod() * torch.autograd.grad(loss, now)[0]
    return total


def exact_gradient(function, logits):
    now = logits.clone().requires_grad_()
    return torch.autograd.grad(function(now), now)[0]


LOGITS = torch.tensor([0.4, -0.3, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("flags", [{"kl": "reward", "kl_estimator": "k1"}, {"kl": "loss", "kl_estimator": "k2"}, {}])
def test_the_gradient_of_rloo_is_the_exact_one(flags, n):
    args = pure(advantage="rloo", beta=0.6, **flags)
    expected = -exact_gradient(lambda logits: objective(logits, 0.6 if flags else 0.0), LOGITS)
    torch.testing.assert_close(expected_gradient(LOGITS, args, n), expected)
    if flags.get("kl") == "reward":
        smaller = expected_gradient(LOGITS, pure(advantage="dr-grpo", beta=0.6, max_new_tokens=10, **flags), n)
        torch.testing.assert_close(smaller, expected * (n - 1) / n / 10)


def test_the_gradient_of_rloo_is_exact_for_replies_of_several_tokens():
    """Two tokens, the second one after the first: the reply is one action, whose log-probabilities add up."""
    first = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[0.1, 0.5], [-0.4, 0.2]], dtype=torch.float64, requires_grad=True)
    rewards = {(0, 0): 1.0, (0, 1): -1.0, (1, 0): 0.2, (1, 1): 0.7}
    replies, ref, beta = [*rewards], torch.tensor([-1.0, -0.5], dtype=torch.float64), 0.4

    def log_probs(reply):
        return torch.stack((first.log_softmax(-1)[reply[0]], second[reply[0]].log_softmax(-1)[reply[1]]))

    value = sum(log_probs(y).sum().exp() * (rewards[y] - beta * (log_probs(y) - ref).sum()) for y in replies)
    expected = torch.autograd.grad(-value, (first, second))
    totals = [torch.zeros_like(first), torch.zeros_like(second)]
    args = pure(advantage="rloo")
    for group in itertools.product(replies, repeat=2):
        now = torch.cat([log_probs(y) for y in group])
        old = now.detach()
        kl = grpo.sum_of_each(grpo.kl_estimate(old, ref.repeat(2), "k1"), [2, 2])
        r = torch.tensor([rewards[y] for y in group], dtype=torch.float64) - beta * kl
        advantages = grpo.group_advantages(r[None], "rloo")[0]
        loss = grpo.grpo_loss(now, old, ref.repeat(2), [2, 2], advantages, args)[0].mean()
        for total, gradient in zip(totals, torch.autograd.grad(loss, (first, second)), strict=True):
            total += old.sum().exp() * gradient
    torch.testing.assert_close(totals, [*expected])


def test_estimators_as_values_and_as_losses():
    """k1 and k3 have the right mean. As losses, k1 has no gradient, k2 the right one, k3 the other divergence's."""

    def kl(p, q):
        return (p * (p.log() - q.log())).sum()

    now = LOGITS.clone().requires_grad_()
    prob = now.softmax(-1)
    means, gradients = {}, {}
    for kind in "k1", "k2", "k3":
        estimates = grpo.kl_estimate(prob.log(), REFERENCE.log(), kind)
        means[kind] = (prob.detach() * estimates).sum().item()
        gradients[kind] = torch.autograd.grad((prob.detach() * estimates).sum(), now, retain_graph=True)[0]
    divergence = kl(prob, REFERENCE)
    assert means["k1"] == pytest.approx(divergence.item())
    assert means["k3"] == pytest.approx(divergence.item())
    assert abs(means["k2"] - divergence.item()) > 0.01
    assert (grpo.kl_estimate(prob.log(), REFERENCE.log(), "k3") >= 0).all()
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(LOGITS))
    torch.testing.assert_close(gradients["k2"], exact_gradient(lambda x: kl(x.softmax(-1), REFERENCE), LOGITS))
    torch.testing.assert_close(gradients["k3"], exact_gradient(lambda x: kl(REFERENCE, x.softmax(-1)), LOGITS))


def test_in_the_reward_only_k1_leads_to_the_reference(monkeypatch):
    """k2 and k3 there would lead away from it, and hardly anywhere beside it."""
    monkeypatch.setitem(globals(), "REWARDS", torch.zeros(2, dtype=torch.float64))
    monkeypatch.setitem(globals(), "REFERENCE", torch.tensor([0.3, 0.7], dtype=torch.float64))
    for distance in -2.0, -0.1, 0.1, 2.0:
        logits = REFERENCE.log() + torch.tensor([distance, 0.0], dtype=torch.float64)
        to_reference = exact_gradient(lambda x: objective(x, 1.0), logits)[0].item()
        for kind in "k1", "k2", "k3":
            args = pure(kl="reward", beta=1.0)
            args.kl_estimator = kind
            step = -expected_gradient(logits, args)[0].item()
            if kind == "k1":
                assert step == pytest.approx(to_reference)
            elif abs(distance) < 1:
                assert abs(step / to_reference) < 0.03
            else:
                assert step / to_reference < -0.05
    for kind in "k2", "k3":
        with pytest.raises(grpo.UsageError, match="--kl reward needs"):
            pure(kl="reward", kl_estimator=kind)
    assert pure(kl="none", kl_estimator="k3").beta == 0


def fixed_point(args, monkeypatch):
    """Of a bandit with two replies: the log-odds of the better one that gradient descent goes to from either side."""
    monkeypatch.setitem(globals(), "REWARDS", torch.tensor([1.0, 0.0], dtype=torch.float64))
    monkeypatch.setitem(globals(), "REFERENCE", torch.tensor([0.3, 0.7], dtype=torch.float64))
    low, high = -5.0, 5.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        falls = expected_gradient(torch.tensor([middle, 0.0], dtype=torch.float64), args)[0] > 0
        low, high = (low, middle) if falls else (middle, high)
    return low


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_in_a_bandit_all_reach_the_optimum_with_k1_in_the_reward(advantage, monkeypatch):
    """pi* is proportional to pi_ref exp(r / beta): its log-odds are those of pi_ref, and 1 / beta."""
    beta = 0.5
    result = fixed_point(pure(advantage=advantage, kl="reward", beta=beta), monkeypatch)
    assert result == pytest.approx(math.log(0.3 / 0.7) + 1 / beta, abs=1e-5)


def test_in_a_bandit_grpos_std_changes_beta_and_k3_the_optimum(monkeypatch):
    beta, start = 0.5, math.log(0.3 / 0.7)
    flags = {"kl": "loss", "beta": beta}
    assert fixed_point(pure(advantage="rloo", kl_estimator="k2", **flags), monkeypatch) == pytest.approx(
        start + 2, abs=1e-3
    )
    # Two replies with the rewards 1 and 0: rloo's advantages are 1 and -1, grpo's 1/2 divided by std, sqrt(1/2)
    size = 0.5 / (math.sqrt(0.5) + 1e-4)
    found = fixed_point(pure(advantage="grpo", kl_estimator="k2", **flags), monkeypatch)
    assert found == pytest.approx(start + size / beta, abs=1e-5)
    # k3: the gradient of KL(pi_ref, pi) is p - q, that of the reward p (1 - p)
    odds = fixed_point(pure(advantage="rloo", kl_estimator="k3", **flags), monkeypatch)
    p = 1 / (1 + math.exp(-odds))
    assert p * (1 - p) == pytest.approx(beta * (p - 0.3), abs=1e-5)
    assert abs(odds - (start + 2)) > 0.2


# Runs


def written(folders, count, name="gpt2", **changes):
    """A model, its Run and replies of it to several prompts."""
    args = arguments(folders, name, **changes)
    run = types.SimpleNamespace(global_step=0)
    run.accelerator = types.SimpleNamespace(
        device="cpu", print=lambda *_: None, autocast=grpo.contextlib.nullcontext, reduce=lambda x, _: x,
        mixed_precision="no", accumulate=lambda _: grpo.contextlib.nullcontext(),
    )  # fmt: skip
    model = grpo.load(run, args.model_name, args)
    prompts, _ = grpo.training_and_held_out_prompts(run, model, args)
    run.model = run.actor = model
    run.ends = [*range(1, 12)]  # so many that replies have several lengths
    run.reference = copy.deepcopy(model)
    return model, run, grpo.play(run, prompts[:count], "seed", args)


@pytest.mark.parametrize("script", ["grpo", "ppo_rlhf"])
def test_the_answer_at_the_end_of_a_chat_is_no_part_of_the_prompt(script, tmp_path, capsys):
    module = importlib.import_module(f"algorithms.{script}")
    asked, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    data = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [asked, answer]}, {"messages": [asked]}])
    run = types.SimpleNamespace(tokenizer=tokenizer_of("qwen2"), accelerator=types.SimpleNamespace(print=print))
    model = types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: None))
    model.generation_config = types.SimpleNamespace(eos_token_id=None)
    reward = "judge.py:f" if script == "ppo_rlhf" else ["judge.py:f"]
    args = module.Args(dataset=str(data), max_new_tokens=8, reward=reward)
    (first, second), _ = module.training_and_held_out_prompts(run, model, args)
    assert first == second
    assert first.text == [asked]
    assert "chats.jsonl, messages: 2 prompts" in capsys.readouterr().out


USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}


@pytest.mark.parametrize("script", ["grpo", "ppo_rlhf"])
@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "hi", "input": "you", "answer": "4"}, "hi\n\nyou"),
        ({"query": "hi", "system": "be kind", "answer": "4"}, [SYSTEM, USER]),
        ({"messages": [SYSTEM, USER], "system_prompt": "be kind", "answer": "4"}, [SYSTEM, USER]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "answer": "4"}, [USER]),
    ],
)  # fmt: skip
def test_columns_that_belong_to_the_prompt(script, row, text, tmp_path, capsys):
    module = importlib.import_module(f"algorithms.{script}")
    data = write_jsonl(tmp_path / "rows.jsonl", [row, row])
    run = types.SimpleNamespace(tokenizer=tokenizer_of("qwen2"), accelerator=types.SimpleNamespace(print=print))
    model = types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: None))
    model.generation_config = types.SimpleNamespace(eos_token_id=None)
    reward = "judge.py:f" if script == "ppo_rlhf" else ["judge.py:f"]
    args = module.Args(dataset=str(data), max_new_tokens=8, reward=reward)
    assert module.training_and_held_out_prompts(run, model, args)[0][0].text == text
    assert capsys.readouterr().out.endswith("not used: answer\n")


@pytest.mark.parametrize("name", SIZES)
def test_the_log_probabilities_are_those_of_the_policy_that_wrote(folders, name):
    model, run, replies = written(folders, 6, name)
    assert len({len(r.prompt) for r in replies}) > 1 and len({len(r.reply) for r in replies}) > 1
    for reply in replies:
        for t, (token, old, ref) in enumerate(zip(*reply[1:4], strict=True)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([reply.prompt + reply.reply[:t]])).logits[0, -1]
            assert old == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-4)
            assert ref == pytest.approx(old, abs=1e-4)
        ended = [token in run.ends for token in reply.reply]
        assert not any(ended[:-1])
        assert ended[-1] or len(reply.reply) == 8
        text = run.tokenizer.decode(reply.reply, skip_special_tokens=True)
        assert reply.scores == [-len(text.split()) / 4]


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
RECURRENT = [
    MambaConfig(**SMALL, state_size=4),
    Mamba2Config(**SMALL, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
    Qwen3_5TextConfig(
        **SMALL, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, head_dim=8,
        linear_num_value_heads=2, linear_num_key_heads=1, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    Lfm2Config(**SMALL, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, full_attn_idxs=[1]),
]  # fmt: skip


@pytest.mark.parametrize("config", RECURRENT, ids=lambda config: config.model_type)
def test_recurrent_layers_write_with_their_own_probabilities(config):
    """Prompts of several lengths, and replies that end at different times."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    prompts = [[3], [4, 5, 6, 7, 8], [9, 10]] * 2
    replies, log_probs = grpo.write(model, prompts, [*range(8)], torch.rand(len(prompts), 12))
    assert len({*map(len, replies)}) > 2
    with torch.no_grad():
        expected = grpo.token_log_probs(model, *grpo.as_tensors(prompts, replies, "cpu"))
    torch.testing.assert_close(torch.tensor([*itertools.chain(*log_probs)]), expected, rtol=0, atol=1e-4)


def test_a_model_without_a_cache_is_refused():
    model = AutoModelForCausalLM.from_config(RwkvConfig(**SMALL, attention_hidden_size=16))
    with pytest.raises(grpo.UsageError, match="rwkv models can't be used"):
        grpo.write(model, [[3, 4]], [0], torch.rand(1, 4))


def test_what_stands_in_the_padding_changes_nothing_to_the_bit(folders, monkeypatch):
    model, _, replies = written(folders, 6)
    tensors = grpo.as_tensors([r.prompt for r in replies], [r.reply for r in replies], "cpu")
    expected, pad = grpo.token_log_probs(model, *tensors), grpo.pad
    assert len(expected) == sum(len(r.reply) for r in replies)
    monkeypatch.setattr(grpo, "pad", lambda lists, value, side="right": pad(lists, 7 if value == 0 else value, side))
    others = grpo.as_tensors([r.prompt for r in replies], [r.reply for r in replies], "cpu")
    assert not torch.equal(others[0], tensors[0])
    assert torch.equal(grpo.token_log_probs(model, *others), expected)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_micro_batches_of_unequal_lengths_have_the_batchs_gradient(folders, kind, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    results = []
    for size in 8, 2, 1:
        flags = {"batch_size": 8, "num_minibatches": 1, "micro_batch_size": size, "advantage": kind}
        args = arguments(folders, **flags)
        model, run, replies = written(folders, 8, **flags)
        assert len({len(reply.reply) for reply in replies}) > 1
        run.model = model.double()
        run.step = lambda loss, parts=8 // size: (loss / parts).backward() or 0.0
        advantages = [float(i - 3) for i in range(8)]
        metrics = grpo.update(run, zip(replies, advantages, strict=True), args)
        results.append((metrics, [parameter.grad for parameter in model.parameters()]))
    for metrics, gradients in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-5, abs=1e-6)
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-8, atol=1e-10)


def test_the_first_step_has_ratio_1_and_divergence_0_and_a_high_price_keeps_the_policy_at_the_reference(
    folders, tmp_path
):
    flags = {"num_minibatches": 1, "update_epochs": 1, "total_timesteps": 640, "eval_frequency": 640}
    for beta, folder in (0.0, "free"), (1e4, "dear"):
        grpo.train(arguments(folders, beta=beta, run_dir=str(tmp_path / folder), **flags))
    free, dear = ([row for row in rows(tmp_path / name) if "losses/approx_kl" in row] for name in ("free", "dear"))
    assert free[0]["losses/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert free[0]["losses/clipfrac"] == 0
    assert free[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert free[-1]["objective/scores"] > free[0]["objective/scores"] + 0.3, "it learns to be short"
    assert free[-1]["objective/kl"] > 0.5
    assert dear[-1]["objective/kl"] < free[-1]["objective/kl"] / 10


def test_in_mixed_precision_too_the_ratio_of_a_whole_reply_is_1(folders, tmp_path):
    """The sum over many tokens shows what rounding does to each."""
    flags = {"num_minibatches": 1, "update_epochs": 1, "total_timesteps": 32, "max_new_tokens": 32}
    with bfloat16_autocast():
        grpo.train(arguments(folders, run_dir=str(tmp_path / "run"), **flags))
    first = next(row for row in rows(tmp_path / "run") if "losses/approx_kl" in row)
    assert first["losses/clipfrac"] == 0
    assert first["losses/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-6)


def test_several_rewards_are_added_up_with_their_weights(folders, tmp_path):
    rewards = [f"{folders}/reward.py:short", f"{folders}/reward.py:good"]
    args = arguments(folders, reward=rewards, reward_weights=[2.0, -0.5], run_dir=str(tmp_path / "run"))
    result = grpo.train(args)
    parts = [result["eval/reward/1-short"], result["eval/reward/2-good"]]
    assert result["eval/reward"] == pytest.approx(2 * parts[0] - 0.5 * parts[1], abs=1e-5)
    row = next(row for row in rows(tmp_path / "run") if "objective/scores" in row)
    expected = 2 * row["objective/scores/1-short"] - 0.5 * row["objective/scores/2-good"]
    assert row["objective/scores"] == pytest.approx(expected, abs=1e-5)
    assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"] - row["objective/kl"], abs=1e-5)


def test_every_prompt_comes_once_an_epoch_with_its_whole_group(folders):
    prompts = [grpo.Prompt([i], str(i)) for i in range(12)]
    args = arguments(folders, batch_size=32, group_size=4)
    batches = grpo.prompts_from(0, prompts, args, args.group_size)
    seen = [next(batches) for _ in range(3)]  # 24 groups: two epochs
    groups = [batch[i : i + 4] for batch in seen for i in range(0, 32, 4)]
    assert all(len({prompt.text for prompt in group}) == 1 for group in groups)
    first, second = ([group[0].text for group in groups[i : i + 12]] for i in (0, 12))
    assert sorted(first) == sorted(second) == sorted(prompt.text for prompt in prompts)
    assert first != second
    assert next(grpo.prompts_from(64, prompts, args, args.group_size)) == seen[2]


def test_killed_and_resumed_equals_unbroken(folders, tmp_path):
    flags = {"total_timesteps": 160, "checkpoint_frequency": 32, "eval_frequency": 32}
    grpo.train(arguments(folders, run_dir=str(tmp_path / "whole"), **flags))
    args = dataclasses.asdict(arguments(folders, run_dir=str(tmp_path / "killed"), **flags))
    (tmp_path / "program.py").write_text(f"{ENDS_WITH_ITS_GROUP}\ngrpo.train(grpo.Args(**{args!r}))")
    environ = grpo.os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], env=environ)
    while run.poll() is None and not (tmp_path / "killed" / "checkpoint.pt").exists():
        grpo.time.sleep(0.01)
    run.kill()
    run.wait()
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    grpo.train(grpo.saved_args(str(tmp_path / "killed"), resume=True))
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")


ENDS_WITH_ITS_GROUP = """
import gc
from torch.nn.parallel import DistributedDataParallel
from algorithms import grpo

class Accelerator(grpo.Accelerator):
    def end_training(self):
        assert not [thing for thing in gc.get_objects() if isinstance(thing, DistributedDataParallel)]
        super().end_training()

grpo.Accelerator = Accelerator
"""


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(folders, tmp_path):
    """Seven replies are evaluated: one process has fewer of them.

    What averages the gradients is gone before the group ends: freed later, it can wait for ever for a thread of gloo's
    that waits for Python.
    """
    flags = {"total_timesteps": 64, "eval_replies": 7}
    grpo.train(arguments(folders, run_dir=str(tmp_path / "one"), **flags))
    args = dataclasses.asdict(arguments(folders, run_dir=str(tmp_path / "two"), micro_batch_size=8, **flags))
    (tmp_path / "program.py").write_text(f"{ENDS_WITH_ITS_GROUP}\ngrpo.train(grpo.Args(**{args!r}))")
    subprocess.run([*TWO, str(tmp_path / "program.py")], check=True, env=grpo.os.environ | {"PYTHONPATH": str(ROOT)})
    for one, two in zip(timeless(tmp_path / "one"), timeless(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


WRITES = """
import json, sys, torch
from torch.distributed.fsdp import fully_shard
from algorithms import grpo

accelerator = grpo.Accelerator(cpu=True)
model = grpo.load_model(sys.argv[1], grpo.AutoModelForCausalLM, grpo.Args(device="cpu"))
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
chances = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))[grpo.RANK :: 2]
replies, _ = grpo.write(model, [[3, 4, 5]] * 3, [*range(grpo.RANK, 24, 2)] if grpo.RANK else [48], chances)
json.dump(replies, open(f"{sys.argv[2]}/{grpo.RANK}", "w"))
accelerator.wait_for_everyone()
accelerator.end_training()
"""


@pytest.mark.slow
def test_with_fsdp_a_process_goes_on_until_all_have_written(folders, tmp_path):
    """Each has a part of the weights, so that each pass needs both. The second one's replies end much earlier."""
    (tmp_path / "program.py").write_text(WRITES)
    command = [*TWO, str(tmp_path / "program.py"), str(folders / "llama"), str(tmp_path)]
    # What counts is what they wrote: in one of ten runs gloo aborts a process that has finished
    subprocess.run(command, check=False, env=grpo.os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    model = grpo.load_model(str(folders / "llama"), AutoModelForCausalLM, arguments(folders))
    chances, lengths = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)), []
    for rank, ends in enumerate(([48], [*range(1, 24, 2)])):
        expected, _ = grpo.write(model, [[3, 4, 5]] * 3, ends, chances[rank::2])
        assert json.loads((tmp_path / str(rank)).read_text()) == expected
        lengths.append(max(map(len, expected)))
    assert lengths[0] > lengths[1]


def test_lora_and_the_evaluation_of_a_finished_run(folders, tmp_path):
    pytest.importorskip("peft")
    result = grpo.train(arguments(folders, "llama", lora_rank=2, run_dir=str(tmp_path / "run")))
    assert (tmp_path / "run" / "model" / "adapter_config.json").exists()
    first = next(row for row in rows(tmp_path / "run") if "objective/kl" in row)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert result["eval/kl"] != pytest.approx(0, abs=1e-4)
    again = grpo.evaluate_saved(grpo.saved_args(str(tmp_path / "run"), evaluate=True))
    assert again == pytest.approx(result, abs=1e-2)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--group-size", "1"], "--group-size"),
        (["--group-size", "5"], "--group-size"),
        (["--clip-low", "1.5"], "--clip-low"),
        (["--beta", "-1"], "--beta"),
        (["--kl", "loss"], "--kl-estimator"),
        (["--kl-estimator", "k2"], "--kl reward"),
        (["--kl-estimator", "k3"], "--kl reward"),
        (["--advantage", "ppo"], "rloo"),
        (["--num-minibatches", "5"], "--num-minibatches"),
        (["--reward-weights", "1", "2"], "--reward-weights"),
        (["--reward", "nothing.py:here"], "--reward"),
        (["--prompt-column", "text"], "--prompt-column"),
        (["--max-new-tokens", "63"], "leave room"),
    ],
)
def test_mistakes_are_one_line(cli, folders, tmp_path, flags, word):
    given = ["--model-name", folders / "gpt2", "--dataset", folders / "prompts.jsonl", "--run-dir", tmp_path / "run",
             "--reward", f"{folders}/reward.py:short", "--device", "cpu", "--total-timesteps", 512]  # fmt: skip
    code, _, err = cli("grpo", *given, *flags)
    assert code == 2
    assert word in err
    assert err.count("\n") == 1


def test_a_chat_ends_with_its_turn(folders, tmp_path):
    result = grpo.train(arguments(folders, chat=True, run_dir=str(tmp_path / "run"), total_timesteps=32))
    assert result["eval/length"] <= 8


# The additions


def test_the_verifier_and_the_base_model_of_the_additions():
    reward = grpo.load_function(
        "--reward", f"{ARITHMETIC}/reward.py:correct", "prompt, reply", "a number", math.isfinite
    )
    assert reward("47+86=", "331") == 1
    assert [reward("47+86=", reply) for reply in ("133", "33", "3310", "", "431")] == [0] * 5
    assert reward("02+03=", "500") == 1
    size = sum(path.stat().st_size for path in ARITHMETIC.rglob("*") if path.is_file())
    assert size < 1_000_000


@pytest.mark.slow
def test_additions_are_learned_from_the_verifier_alone(tmp_path):
    files = {"model_name": f"{ARITHMETIC}/model", "dataset": f"{ARITHMETIC}/prompts.parquet",
             "reward": [f"{ARITHMETIC}/reward.py:correct"]}  # fmt: skip
    flags = {"kl": "none", "max_new_tokens": 4, "learning_rate": 1e-3, "update_epochs": 1}
    args = grpo.Args(**files, **flags, device="cpu", run_dir=str(tmp_path / "run"))
    result = grpo.train(args)
    first = next(row for row in rows(tmp_path / "run") if "objective/scores" in row)
    assert first["objective/scores"] < 0.2
    assert result["eval/reward"] > 0.8
