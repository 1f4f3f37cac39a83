"""ppo_rlhf.py against sums by hand, brute force, a bandit whose optimum is known, and itself in other sizes."""

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, rows, timeless
from text_models import bfloat16_autocast, tokenizer_of, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)  # fmt: skip

from algorithms import ppo_rlhf

WORDS = ["<pad>", "<end>", "a", "b", "c", "d", "e", "f", "user", "assistant", "<unknown>"]
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"  # noqa: E501
SIZES = {
    "gpt2": GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3),
    "llama": LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=32, max_position_embeddings=32, initializer_range=0.3),
}  # fmt: skip
PROMPTS = ["a b ", "c ", "d e f a b c ", "b b b "]
REWARD = """
def count(prompt, reply):
    return reply.split().count("a") - 0.3 * len(reply.split())

def bandit(prompt, reply):
    return {"a": 1.0, "b": -1.0, "c": 0.5}.get(reply.strip(), 0.0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small models with random weights, prompts of different lengths, two rewards."""
    folder = tmp_path_factory.mktemp("models")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<unknown>"
    )
    tokenizer.chat_template = CHAT
    for (name, config), (kind, head) in itertools.product(
        SIZES.items(), {"": AutoModelForCausalLM, "-reward": AutoModelForSequenceClassification}.items()
    ):
        torch.manual_seed(len(kind))
        config.vocab_size, config.eos_token_id, config.bos_token_id, config.num_labels = len(tokenizer), 1, None, 1
        config.pad_token_id = 0 if kind else None
        head.from_config(config).save_pretrained(folder / f"{name}{kind}")
        tokenizer.save_pretrained(folder / f"{name}{kind}")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (folder / "one.jsonl").write_text(json.dumps({"prompt": "a b "}) + "\n")
    (folder / "reward.py").write_text(REWARD)
    return folder


def arguments(folder, name="gpt2", **changes):
    flags = {"model_name": str(folder / name), "dataset": str(folder / "prompts.jsonl"), "device": "cpu",
             "reward": f"{folder}/reward.py:count", "batch_size": 16, "num_minibatches": 2, "update_epochs": 2,
             "total_timesteps": 64, "eval_frequency": 32, "eval_replies": 8, "checkpoint_frequency": 16,
             "max_new_tokens": 8, "learning_rate": 3e-3, "critic_learning_rate": 3e-3, "run_dir": "run"}  # fmt: skip
    return ppo_rlhf.Args(**flags | changes)


@contextlib.contextmanager
def started(args):
    """A run as train has it before its first batch."""
    with contextlib.closing(ppo_rlhf.Run(args)) as run:
        agent, optimizer = ppo_rlhf.make_agent(run, args)
        prompts, _ = ppo_rlhf.training_and_held_out_prompts(run, agent.actor, args)
        run.start(agent, optimizer)
        run.agent, run.actor = run.bare, run.bare.actor
        yield run, next(ppo_rlhf.prompts_from(0, prompts, args))


def by_hand(model, prompt, reply):
    """The log-probability of each token of the reply, from one unpadded pass for each."""
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([prompt + reply[:i]])).logits[0, -1] for i in range(len(reply))]
    return [row.double().log_softmax(-1)[token].item() for row, token in zip(logits, reply, strict=True)]


def test_the_score_lands_on_the_end_token_and_the_price_on_every_token_whatever_the_padding():
    old, ref = (
        torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]),
        torch.tensor([[-2.0, -2.0, -1.0], [-3.0, 0.0, 0.0]]),
    )
    scores, lengths = torch.tensor([10.0, 20.0]), torch.tensor([3, 1])
    expected = torch.tensor([[-0.5, 0.0, 1.0 + 10.0], [0.5 + 20.0, 0.0, 0.0]])
    assert ppo_rlhf.token_rewards(old, ref, scores, lengths, 0.5).equal(expected)
    for width in (1, 5):
        more = [nn_pad(x, width) for x in (old, ref)]
        assert ppo_rlhf.token_rewards(*more, scores, lengths, 0.5).equal(nn_pad(expected, width))


def nn_pad(x, width):
    return torch.nn.functional.pad(x, (0, width))


def unequal(seed=0, count=7, longest=6):
    """Rewards and values of replies of different lengths, as lists, and padded."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [longest, *torch.randint(1, longest + 1, (count - 1,), generator=rng).tolist()]
    lists = [[torch.randn(n, generator=rng).tolist() for n in lengths] for _ in range(2)]
    return lengths, lists, [ppo_rlhf.pad(x, 0.0) for x in lists]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (1.0, 1.0)])
def test_advantages_equal_a_double_loop(gamma, gae_lambda):
    lengths, (rewards, values), padded = unequal()
    advantages = ppo_rlhf.gae(*padded, gamma, gae_lambda)
    for row, length in enumerate(lengths):
        v = [*values[row], 0.0]  # nothing comes after the end
        deltas = [rewards[row][t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert (advantages[row, length:] == 0).all()


def test_padding_changes_no_advantage_to_the_bit():
    lengths, _, padded = unequal()
    whole = ppo_rlhf.gae(*padded, 0.99, 0.9)
    wider = ppo_rlhf.gae(*(nn_pad(x, 5) for x in padded), 0.99, 0.9)
    assert wider[:, : whole.shape[1]].equal(whole)
    for row, length in enumerate(lengths):
        assert ppo_rlhf.gae(*(x[row : row + 1, :length] for x in padded), 0.99, 0.9)[0].equal(whole[row, :length])


def test_with_lambda_and_gamma_1_returns_are_the_score_less_the_price_of_what_is_still_to_come():
    lengths, (log_ratios, _), padded = unequal(1)
    scores = torch.arange(7.0)
    rewards = ppo_rlhf.token_rewards(padded[0], torch.zeros_like(padded[0]), scores, torch.tensor(lengths), 0.7)
    returns = ppo_rlhf.gae(rewards, padded[1], 1.0, 1.0) + padded[1]
    for row, length in enumerate(lengths):
        for t in range(length):
            expected = scores[row].item() - 0.7 * sum(log_ratios[row][t:])
            assert returns[row, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_whitening_by_hand_and_without_the_padding():
    x, written = (
        torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]]),
        torch.tensor([[True, True, False], [True, False, False]]),
    )
    spread = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 3)
    expected = [(1 - 3) / spread, (2 - 3) / spread, (6 - 3) / spread]
    assert ppo_rlhf.whitened(x, written)[written].tolist() == pytest.approx(expected, rel=1e-5)
    assert ppo_rlhf.whitened(x[:1, :1], written[:1, :1]).item() == 0, "a single token is no NaN"


def test_the_adaptive_price_by_hand():
    assert ppo_rlhf.adapted_beta(0.5, 6.0, 6.0) == 0.5
    assert ppo_rlhf.adapted_beta(0.5, 6.6, 6.0) == pytest.approx(0.5 * 1.01)  # a tenth above
    assert ppo_rlhf.adapted_beta(0.5, 60.0, 6.0) == pytest.approx(0.5 * 1.02)  # clipped at a fifth
    assert ppo_rlhf.adapted_beta(0.5, 0.0, 6.0) == pytest.approx(0.5 * 0.98)


def test_losses_by_hand(folder):
    args = arguments(folder, clip_coef=0.2, vf_coef=0.5)
    ratios, old = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]), torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0])
    advantages, values = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    old_values, returns = torch.tensor([0.0, 2.0, 3.0, 0.0, 5.5]), torch.tensor([3.0, 2.0, 1.0, 5.0, 6.0])
    batch = old + ratios.log(), values, old, old_values, advantages, returns
    loss, metrics = ppo_rlhf.ppo_loss(*batch, args)
    policy = -(1.2 - 1.5 + 0.5 - 0.8 + 2.2) / 5
    assert metrics["losses/policy_loss"].item() == pytest.approx(policy, rel=1e-5)
    assert metrics["losses/value_loss"].item() == pytest.approx((4 + 0 + 4 + 1 + 1) / 5)
    assert loss.item() == pytest.approx(policy + 0.5 * 2)
    assert metrics["losses/clipfrac"].item() == pytest.approx(4 / 5)
    k3 = sum(r - 1 - math.log(r) for r in ratios.tolist()) / 5
    assert metrics["losses/approx_kl"].item() == pytest.approx(k3, rel=1e-4)
    _, metrics = ppo_rlhf.ppo_loss(*batch, arguments(folder, clip_coef_vf=0.2))
    # V moved to 0.2, 2, 3, 0.2, 5.3 at most: the larger error of the two counts
    assert metrics["losses/value_loss"].item() == pytest.approx((2.8**2 + 0 + 4 + 4.8**2 + 1) / 5)


@pytest.mark.parametrize("name", SIZES)
def test_a_written_reply_ends_once_and_keeps_the_log_probabilities_of_the_policy_that_wrote_it(folder, name):
    model = ppo_rlhf.load_model(str(folder / name), AutoModelForCausalLM, arguments(folder, name))
    prompts = [[2, 3], [4], [5, 6, 7, 2, 3, 4], [3, 3, 3]] * 8
    chances = torch.rand(len(prompts), 8, generator=torch.Generator().manual_seed(0))
    replies, log_probs = ppo_rlhf.write(model, prompts, [1], chances)
    lengths = {len(reply) for reply in replies}
    assert len(lengths) > 3, "replies of different lengths, so that some leave the batch early"
    for prompt, reply, log_prob, row in zip(prompts, replies, log_probs, chances, strict=True):
        assert 1 not in reply[:-1]
        assert reply[-1] == 1 or len(reply) == 8
        assert log_prob == pytest.approx(by_hand(model, prompt, reply), abs=1e-4)
        alone, alone_log_prob = ppo_rlhf.write(model, [prompt], [1], row[None])
        assert alone[0] == reply, "neither neighbours nor padding change it"
        assert alone_log_prob[0] == pytest.approx(log_prob, abs=1e-5)


def test_tokens_are_drawn_with_the_policys_probabilities(folder):
    model = ppo_rlhf.load_model(str(folder / "gpt2"), AutoModelForCausalLM, arguments(folder))
    chances = (torch.arange(2000)[:, None] + 0.5) / 2000  # evenly from 0 to 1
    replies, _ = ppo_rlhf.write(model, [[2, 3]] * 2000, [1], chances)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[2, 3]])).logits[0, -1].softmax(-1)
    shares = torch.bincount(torch.tensor(replies)[:, 0], minlength=len(expected)) / 2000
    torch.testing.assert_close(shares, expected, atol=6e-4, rtol=0)


@pytest.mark.parametrize("name", SIZES)
def test_log_probabilities_and_values_of_a_batch_equal_those_of_single_replies(folder, name):
    with started(arguments(folder, name, reward=str(folder / f"{name}-reward"))) as (run, prompts):
        replies = [[5, 1], [2, 3, 4, 5, 1], [1], [6, 6, 6, 1]] * 4
        ids = [prompt.ids for prompt in prompts]
        with torch.no_grad():
            together = run.bare(*ppo_rlhf.as_tensors(ids, replies, "cpu"))
            single = [run.bare(*ppo_rlhf.as_tensors([x], [y], "cpu")) for x, y in zip(ids, replies, strict=True)]
        for batch, rows in zip(together, zip(*single, strict=True), strict=True):
            torch.testing.assert_close(batch, torch.cat(rows), atol=1e-5, rtol=1e-4)
        expected = [value for x, y in zip(ids, replies, strict=True) for value in by_hand(run.actor, x, y)]
        assert together[0].tolist() == pytest.approx(expected, abs=1e-4)
        # V(s_t) is what the model gives where it has read the prompt and all before y_t
        model = ppo_rlhf.load_model(str(folder / f"{name}-reward"), AutoModelForSequenceClassification, run.args)
        read = [x + y[:t] for x, y in zip(ids, replies, strict=True) for t in range(len(y))]
        with torch.no_grad():
            values = [model(input_ids=torch.tensor([row])).logits.item() for row in read]
        assert together[1].tolist() == pytest.approx(values, abs=1e-4)


def test_what_stands_on_padding_changes_nothing_to_the_bit(folder):
    with started(arguments(folder)) as (run, _):
        ids, targets = ppo_rlhf.as_tensors([[2, 3], [4]], [[5, 1], [2, 3, 4, 5, 1]], "cpu")
        other = torch.where(torch.tensor([[0, 0, 0, 0, 1, 1], [0] * 6]) == 1, 7, ids)
        assert not other.equal(ids)
        with torch.no_grad():
            for one, two in zip(run.bare(ids, targets), run.bare(other, targets), strict=True):
                assert one.equal(two)


def test_a_reply_without_an_end_is_fined(folder):
    for fine in (0.0, 5.0):
        with started(arguments(folder, max_new_tokens=6, missing_eos_penalty=fine, run_dir=f"run{fine}")) as (
            run,
            prompts,
        ):
            episodes = ppo_rlhf.play(run, prompts, "seed", run.args)
            count = ppo_rlhf.load_function("--reward", run.args.reward, "prompt, reply", "a number", math.isfinite)
            ended = [episode.reply[-1] == 1 for episode in episodes]
            assert {*ended} == {True, False}
            for episode, has_end in zip(episodes, ended, strict=True):
                reply = run.tokenizer.decode(episode.reply, skip_special_tokens=True)
                assert episode.score == pytest.approx(count("", reply) - (0 if has_end else fine))


def test_at_first_the_ratio_is_1_and_every_divergence_0(folder):
    with started(arguments(folder)) as (run, prompts):
        episodes = ppo_rlhf.play(run, prompts, "seed", run.args)
        for episode in episodes:
            assert episode.old_log_prob == pytest.approx(episode.ref_log_prob, abs=1e-5)
        ids, targets = ppo_rlhf.as_tensors([e.prompt for e in episodes], [e.reply for e in episodes], "cpu")
        log_prob, values = run.model(ids, targets)
        old, old_values = (torch.tensor([value for e in episodes for value in e[i]]) for i in (2, 4))
        torch.testing.assert_close(values, old_values)
        _, metrics = ppo_rlhf.ppo_loss(log_prob, values, old, old_values, old, old, run.args)
        assert metrics["losses/clipfrac"] == 0
        assert metrics["losses/approx_kl"].item() == pytest.approx(0, abs=1e-8)
    ppo_rlhf.train(arguments(folder, run_dir="whole"))
    assert rows(Path("whole"))[0]["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_in_mixed_precision_too(folder):
    """Writing a token at a time rounds otherwise than the pass that the update makes."""
    with bfloat16_autocast(), started(arguments(folder, "llama", max_new_tokens=24)) as (run, prompts):
        episodes = ppo_rlhf.play(run, prompts, "seed", run.args)
        assert all(episode.old_log_prob == episode.ref_log_prob for episode in episodes)
        first = sorted(episodes, key=lambda e: len(e.prompt) + len(e.reply))[: run.micro_batch_size]
        log_prob, _ = run.model(*ppo_rlhf.as_tensors([e.prompt for e in first], [e.reply for e in first], "cpu"))
        assert log_prob.tolist() == [value for episode in first for value in episode.old_log_prob]
        single = [value for e in first for value in by_hand(run.actor, e.prompt, e.reply)]
        assert max(abs(a - b) for a, b in zip(single, log_prob.tolist(), strict=True)) > 1e-3, "it is bfloat16"


def are_rounded(values):
    values = torch.tensor(values)
    return values.equal(values.bfloat16().float())


def test_scores_and_values_are_not_rounded_to_bfloat16(folder, monkeypatch):
    name = str(folder / "gpt2-reward")
    with bfloat16_autocast(), started(arguments(folder, reward=name)) as (run, prompts):
        values = [value for episode in ppo_rlhf.play(run, prompts, "seed", run.args) for value in episode.values]
    assert not are_rounded(values)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # there, frozen weights are bfloat16
    args = arguments(folder, lora_rank=2, device="auto")
    scores = ppo_rlhf.load_reward(name, args, torch.device("cpu"))(["a b "] * 3, ["c d", "a a", "f"])
    assert not are_rounded(scores)


def weights(agent):
    return torch.cat([value.flatten() for value in agent.state_dict().values()])


def test_an_evaluation_makes_the_passes_of_the_training(folder, monkeypatch):
    """Not of a whole batch: a run that fits into memory can be evaluated there."""
    monkeypatch.setattr(ppo_rlhf, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(ppo_rlhf, "load_reward", lambda *_: None)
    monkeypatch.setattr(ppo_rlhf, "load_model", lambda *_: None)
    for flags, size, passes in ({"num_minibatches": 4}, 64, 2), ({"num_minibatches": 4, "micro_batch_size": 32}, 32, 4):
        run = types.SimpleNamespace(accelerator=types.SimpleNamespace(device="cpu"), micro_batch_size=512)
        ppo_rlhf.load(run, "model", arguments(folder, batch_size=512, total_timesteps=512, **flags))
        assert (run.micro_batch_size, run.accelerator.gradient_accumulation_steps) == (size, passes)


def test_micro_batches_equal_the_batch_for_replies_of_different_lengths(folder):
    found = {}
    for size in (8, 4, 1):
        with started(arguments(folder, micro_batch_size=size, run_dir=f"run{size}")) as (run, prompts):
            before = weights(run.bare)
            episodes = ppo_rlhf.play(run, prompts, "seed", run.args)
            assert len({len(episode.reply) for episode in episodes}) > 3
            advantages = [[score - i for i in range(len(e.reply))] for score, e in enumerate(episodes)]
            for group in run.optimizer.param_groups:
                group["lr"] = 1e-3
            metrics = ppo_rlhf.update(run, zip(episodes, advantages, advantages, strict=True), run.args)
            found[size] = weights(run.bare) - before, metrics
    assert found[8][0].abs().max() > 1e-3
    for size in (4, 1):
        # Adam divides by the size of a gradient: a weight whose gradient is rounding alone moves at random
        close = torch.isclose(found[size][0], found[8][0], atol=3e-5, rtol=1e-2).float().mean()
        assert close > 0.98
        assert found[size][1] == pytest.approx(found[8][1], rel=1e-3, abs=1e-6)


def test_how_many_replies_are_written_at_the_same_time_changes_none(folder):
    found = []
    for size in (16, 3):
        with started(arguments(folder, write_batch_size=size, run_dir=f"run{size}")) as (run, prompts):
            found.append(ppo_rlhf.play(run, prompts, "seed", run.args))
            assert [episode.prompt for episode in found[-1]] == [prompt.ids for prompt in prompts], "in their order"
    for one, two in zip(*found, strict=True):
        assert one[:2] == two[:2]
        assert one.score == two.score
        assert one.old_log_prob == pytest.approx(two.old_log_prob, abs=1e-5)


def test_a_large_beta_keeps_the_policy_at_the_reference(folder):
    flags = {
        "total_timesteps": 640,
        "batch_size": 32,
        "eval_frequency": 640,
        "eval_replies": 256,
        "learning_rate": 2e-4,
    }
    near = ppo_rlhf.train(arguments(folder, beta=1000.0, run_dir="near", **flags))
    far = ppo_rlhf.train(arguments(folder, beta=0.0, run_dir="far", **flags))
    assert abs(near["eval/kl"]) < 0.05 * far["eval/kl"]
    assert far["eval/reward"] > near["eval/reward"] + 1


def test_a_bandit_converges_to_the_closed_form(folder):
    """One prompt, replies of one token: pi* is proportional to pi_ref exp(score / beta) over the vocabulary."""
    flags = {"dataset": str(folder / "one.jsonl"), "reward": f"{folder}/reward.py:bandit", "max_new_tokens": 1,
             "batch_size": 128, "num_minibatches": 4, "update_epochs": 1, "total_timesteps": 128 * 80, "beta": 0.5,
             "eval_frequency": 128 * 80, "checkpoint_frequency": 128 * 80, "learning_rate": 3e-3}  # fmt: skip
    ppo_rlhf.train(arguments(folder, **flags))
    args = arguments(folder)
    reference, policy = (
        ppo_rlhf.load_model(name, AutoModelForCausalLM, args) for name in (args.model_name, "run/model")
    )
    with torch.no_grad():
        at_start, found = (m(input_ids=torch.tensor([[2, 3]])).logits[0, -1].softmax(-1) for m in (reference, policy))
    scores = torch.zeros(len(WORDS))
    scores[2], scores[3], scores[4] = 1.0, -1.0, 0.5
    optimum = at_start * (scores / 0.5).exp()
    optimum /= optimum.sum()
    distance = (optimum - at_start).abs().sum() / 2
    assert distance > 0.1
    assert (optimum - found).abs().sum() / 2 < 0.1 * distance


def test_the_critic_starts_from_the_reward_model_or_from_the_policy_and_both_are_in_the_checkpoint(folder):
    ppo_rlhf.train(arguments(folder, reward=str(folder / "gpt2-reward"), run_dir="of-model"))
    ppo_rlhf.train(arguments(folder, run_dir="of-function"))
    for name, start in (("of-model", "gpt2-reward"), ("of-function", "gpt2")):
        with started(arguments(folder, reward=f"{folder}/reward.py:count" if start == "gpt2" else str(folder / start),
                               run_dir=f"{name}-again")) as (run, _):  # fmt: skip
            kind = AutoModelForCausalLM if start == "gpt2" else AutoModelForSequenceClassification
            source = kind.from_pretrained(folder / start)
            assert run.agent.critic.h[0].mlp.c_fc.weight.equal(source.transformer.h[0].mlp.c_fc.weight)
            assert (run.agent.critic_head.weight == 0).all() == (start == "gpt2")
            untrained = {key: value.clone() for key, value in run.agent.state_dict().items()}
        saved = torch.load(f"{name}/checkpoint.pt", weights_only=True)["model"]
        for part in ("actor.transformer.h.0.mlp.c_fc.weight", "critic.h.0.mlp.c_fc.weight", "critic_head.weight"):
            assert not saved[part].equal(untrained[part]), part
        policy = AutoModelForCausalLM.from_pretrained(f"{name}/model")
        assert policy.transformer.h[0].mlp.c_fc.weight.equal(saved["actor.transformer.h.0.mlp.c_fc.weight"])


@pytest.mark.parametrize("pad_id", [10, None])
def test_scores_of_a_reward_model_are_those_of_single_replies(folder, tmp_path, pad_id):
    """More of them than a batch, and also if nothing tells padding from what was written."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "gpt2-reward", pad_token_id=pad_id).eval()
    model.save_pretrained(tmp_path / "scores")
    AutoTokenizer.from_pretrained(folder / "gpt2").save_pretrained(tmp_path / "scores")
    judge = ppo_rlhf.load_reward(str(tmp_path / "scores"), arguments(folder), torch.device("cpu"))
    texts = [("a b ", "c d"), ("c ", "a a a a"), ("d e f ", "")] * 30
    together = judge(*map(list, zip(*texts, strict=True)))
    for i, ids in enumerate(([2, 3, 4, 5, 1], [4, 2, 2, 2, 2, 1], [5, 6, 7, 1])):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits.item()
        assert together[i::3] == pytest.approx([expected] * 30, abs=1e-5)


@pytest.mark.parametrize("flags", [{}, {"adaptive_kl": 0.5}, {"lora_rank": 2}], ids=str)
def test_killed_and_resumed_equals_unbroken(folder, flags, monkeypatch):
    ppo_rlhf.train(arguments(folder, run_dir="whole", **flags))
    log = ppo_rlhf.Run.log

    def killed(run, row):
        if run.global_step == 48 and "losses/policy_loss" in row:
            raise KeyboardInterrupt  # after a checkpoint at 32
        log(run, row)

    monkeypatch.setattr(ppo_rlhf.Run, "log", killed)
    with pytest.raises(KeyboardInterrupt):
        ppo_rlhf.train(arguments(folder, checkpoint_frequency=32, run_dir="broken", **flags))
    monkeypatch.setattr(ppo_rlhf.Run, "log", log)
    ppo_rlhf.train(ppo_rlhf.saved_args("broken", resume=True))
    assert timeless(Path("broken")) == timeless(Path("whole"))
    assert len(timeless(Path("whole"))) == 64 / 16 + 2
    if "adaptive_kl" in flags:
        assert len({row["objective/beta"] for row in rows(Path("whole")) if "objective/beta" in row}) == 4


def test_lora_leaves_the_reference_alone_and_saves_an_adapter(folder):
    args = arguments(folder, lora_rank=2, learning_rate=1e-2, reward=str(folder / "gpt2-reward"))
    result = ppo_rlhf.train(args)
    assert rows(Path("run"))[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert result["eval/kl"] > 1e-3
    assert os.path.exists("run/model/adapter_config.json")
    again = ppo_rlhf.evaluate_saved(ppo_rlhf.saved_args("run", evaluate=True))
    assert again == pytest.approx(result, abs=1e-4)


def test_prompts_of_a_chat_and_the_ends_of_its_turns(folder, tmp_path):
    chats = [[{"role": "user", "content": "a b"}], [{"role": "user", "content": "c"}]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    with started(arguments(folder, dataset=str(tmp_path / "chats.jsonl"))) as (run, prompts):
        assert sorted({tuple(prompt.ids) for prompt in prompts}) == [(8, 2, 3, 1, 9), (8, 4, 1, 9)]
        assert run.ends == [1]
    with started(arguments(folder, chat=True, run_dir="chat")) as (_, prompts):
        assert (8, 2, 3, 1, 9) in {tuple(prompt.ids) for prompt in prompts}


def prompts_and_ends(folder, tokenizer, *texts):
    """What training reads of prompts: token ids of each, and the tokens that end a reply."""
    data = write_jsonl(folder / "texts.jsonl", [{"messages" if isinstance(x, list) else "prompt": x} for x in texts])
    run = types.SimpleNamespace(tokenizer=tokenizer, accelerator=types.SimpleNamespace(print=print))
    model = ppo_rlhf.load_model(str(folder / "gpt2"), AutoModelForCausalLM, arguments(folder))
    args = arguments(folder, dataset=str(data), max_length=10_000)
    model.config.n_positions = 10_000
    prompts, _ = ppo_rlhf.training_and_held_out_prompts(run, model, args)
    return [prompt.ids for prompt in prompts], run.ends


@pytest.mark.parametrize("form", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_a_prompt_keeps_all_its_tokens_and_no_end_is_added(folder, form):
    """Of a tokenizer that has tokens for " a" and "ca", and writes a BOS, an end, both or none around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<s>", "</s>", *alphabet, "Ġa", "ca"])}
    tokenizer = Tokenizer(models.BPE(words, [("Ġ", "a"), ("c", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    texts, bos = ["x ", "xc", "a a", "x</s>", ""], "<s>" * form.startswith("<s>")
    found, ends = prompts_and_ends(folder, tokenizer, *texts)
    *decoded, empty = [tokenizer.decode(ids) for ids in found]
    assert decoded == [f"{bos}{text}" for text in texts[:-1]]
    assert empty in ("<s>", "</s>"), "the first token needs one before it"
    assert ends == [1]


def test_a_chat_ends_with_its_turn_or_with_the_eos_token(folder):
    """Gemma's eos token is no part of its template. A template that begins the reply itself is kept whole."""
    user, gemma, thoughtless = [{"role": "user", "content": "hi"}], tokenizer_of("gemma"), tokenizer_of("thoughtless")
    (ids,), ends = prompts_and_ends(folder, gemma, user)
    assert gemma.decode(ids).endswith("hi<end_of_turn>\n<start_of_turn>model\n")
    assert gemma.convert_ids_to_tokens(ends) == ["<eos>", "<end_of_turn>"]
    (ids,), ends = prompts_and_ends(folder, thoughtless, user)
    assert thoughtless.decode(ids).endswith("<|im_start|>assistant\n<think>\n")
    assert thoughtless.convert_ids_to_tokens(ends) == ["<|im_end|>"]


def test_evaluate_asks_what_the_run_held_out(folder, monkeypatch):
    """Also with another seed, or more replies. Of another data set it may ask all, so it does."""
    texts = [f"{' '.join(words)} " for words in itertools.product("abcdef", repeat=2)]
    data = write_jsonl(folder / "many.jsonl", [{"prompt": text} for text in texts])
    other = write_jsonl(folder / "others.jsonl", [{"prompt": f"{text}a "} for text in texts])
    asked, evaluate = [], ppo_rlhf.evaluate

    def looking(run, prompts, args):
        asked.append({prompt.text for prompt in prompts})
        return evaluate(run, prompts, args)

    monkeypatch.setattr(ppo_rlhf, "evaluate", looking)
    result = ppo_rlhf.train(arguments(folder, dataset=str(data), eval_replies=2, total_timesteps=16))
    held_out = asked[-1]
    assert len(held_out) == 2
    again = ppo_rlhf.evaluate_saved(ppo_rlhf.saved_args("run", evaluate=True))
    assert again == pytest.approx(result, abs=1e-5)
    spelled = {"dataset": f"{folder}/./many.jsonl"}, {"dataset_split": "train"}
    for flags in ({}, {"seed": 5}, {"eval_replies": 100}, *spelled, {"max_length": 12}, {"chat": True}):
        ppo_rlhf.evaluate_saved(ppo_rlhf.saved_args("run", evaluate=True, **flags))
        assert asked[-1] == held_out, flags
    for flags, count in ({"dataset": str(other)}, 36), ({"dataset_split": "train[:20]"}, 20):
        ppo_rlhf.evaluate_saved(ppo_rlhf.saved_args("run", evaluate=True, **flags))
        assert len(asked[-1]) == count, flags


def test_evaluations_have_the_beta_that_the_run_has_come_to(folder):
    result = ppo_rlhf.train(arguments(folder, beta=0.5, adaptive_kl=0.01))
    beta = torch.load("run/checkpoint.pt", weights_only=True)["model"]["beta"].item()
    assert beta != pytest.approx(0.5, rel=1e-2)
    assert result["eval/rlhf_reward"] == pytest.approx(result["eval/reward"] - beta * result["eval/kl"], abs=1e-6)
    again = ppo_rlhf.evaluate_saved(ppo_rlhf.saved_args("run", evaluate=True))
    assert again == pytest.approx(result, abs=1e-5)
    checkpoint = Path("run/checkpoint.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    for _ in range(2):  # cut short, then gone
        with pytest.raises(ppo_rlhf.UsageError, match=r"checkpoint\.pt"):
            ppo_rlhf.evaluate_saved(ppo_rlhf.saved_args("run", evaluate=True))
        checkpoint.unlink(missing_ok=True)


def test_every_prompt_comes_once_in_each_epoch_and_a_resumed_run_goes_on_with_the_next(folder):
    args, prompts = arguments(folder, batch_size=4, num_minibatches=1), [*range(10)]
    stream = ppo_rlhf.prompts_from(0, prompts, args)
    batches = [next(stream) for _ in range(10)]
    order = [*itertools.chain(*batches)]
    for epoch in range(4):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == prompts
    assert order[:10] != order[10:20]
    later = ppo_rlhf.prompts_from(24, prompts, args)
    assert [next(later) for _ in range(4)] == batches[6:10]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"reward": None}, "--reward"), ({"reward": "nothing.py:here"}, "nothing.py"), ({"beta": -1.0}, "--beta"),
        ({"num_minibatches": 3}, "--num-minibatches"), ({"gae_lambda": 1.5}, "--gae-lambda"),
        ({"gamma": 2.0}, "--gamma"), ({"adaptive_kl": 0.0}, "--adaptive-kl"),
        ({"adaptive_kl": 6.0, "beta": 0.0}, "--adaptive-kl"),
        ({"max_new_tokens": 40}, "tokens"), ({"prompt_column": "text"}, "--prompt-column"),
        ({"total_timesteps": 60}, "--total-timesteps"), ({"micro_batch_size": 3}, "--micro-batch-size"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(folder, flags, word):
    with pytest.raises(ppo_rlhf.UsageError, match=word):
        ppo_rlhf.train(arguments(folder, **flags))


def test_fsdp_is_refused_before_it_fails(folder, monkeypatch):
    monkeypatch.setattr(ppo_rlhf.Accelerator, "distributed_type", "FSDP")
    with pytest.raises(ppo_rlhf.UsageError, match="torchrun"):
        ppo_rlhf.train(arguments(folder))


@pytest.mark.slow
def test_two_processes_equal_one(folder, tmp_path):
    args = arguments(folder)
    names = ["model_name", "dataset", "reward", "batch_size", "num_minibatches", "update_epochs", "total_timesteps",
             "eval_frequency", "eval_replies", "max_new_tokens", "learning_rate", "critic_learning_rate"]  # fmt: skip
    flags = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    script = str(ROOT / "algorithms" / "ppo_rlhf.py")
    for count in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), script]
        command = [*launch, *flags, "--device", "cpu", "--run-dir", str(tmp_path / str(count))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (timeless(tmp_path / str(count)) for count in (1, 2))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)
