"""dpo.py against log-probabilities summed by hand, losses computed by hand and by TRL, and rewards that are known."""

import contextlib
import copy
import gc
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, rows, steps_of_a_run, timeless
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from algorithms import dpo, reward_model

SCRIPT = ROOT / "algorithms" / "dpo.py"
both = pytest.mark.parametrize("script", [dpo, reward_model], ids=["dpo", "reward_model"])
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}staff : {% endif %}"  # noqa: E501
SIZES = {
    "gpt2": GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3),
    "llama": LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=32, max_position_embeddings=64, initializer_range=0.3),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models with random weights, and 60 pairs of reviews of very different lengths."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), dpo.word_tokenizer()
    tokenizer.chat_template = CHAT
    for name, config in SIZES.items():
        torch.manual_seed(0)
        config = copy.deepcopy(config)
        config.vocab_size, config.eos_token_id, config.bos_token_id = len(tokenizer), tokenizer.eos_token_id, None
        config.pad_token_id = None
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = dpo.random.Random(0)
    prompts = dpo.repeat_prompts(60)
    records = [{"prompt": p, "chosen": dpo.write_review(p, rng), "rejected": dpo.write_review(p, rng)} for p in prompts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(autouse=True)
def signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def arguments(folders, name="gpt2", **changes):
    flags = {"model_name": str(folders / name), "dataset": str(folders / "pairs.jsonl"), "device": "cpu",
             "batch_size": 8, "total_timesteps": 108, "eval_frequency": 54, "checkpoint_frequency": 40,
             "learning_rate": 1e-3}  # fmt: skip
    return dpo.Args(**flags | changes)


def loaded(folders, name="gpt2", **changes):
    args = arguments(folders, name, **changes)
    torch.manual_seed(0)
    return *dpo.load(args.model_name, args.dataset, args), args


def by_hand(model, prompt, reply):
    """The log-probability of each token of the reply, from one unpadded pass for each."""
    total = 0.0
    for i in range(len(reply)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + reply[:i]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[reply[i]].item()
    return total


@pytest.mark.parametrize("name", SIZES)
def test_log_probability_is_the_sum_over_the_replys_tokens_and_its_end_whatever_the_padding(folders, name):
    model, tokenizer, pairs, _ = loaded(folders, name)
    end = tokenizer.eos_token_id
    assert model.config.pad_token_id == end, "this model has no padding token: the end token stands in"
    assert all(ids[-1] == end and ids.count(end) == 1 for pair in pairs for ids in (pair.chosen, pair.rejected))
    expected = [[by_hand(model, pair.prompt, ids) for ids in (pair.chosen, pair.rejected)] for pair in pairs[:6]]
    together = torch.stack(dpo.pair_log_probs(model, pairs[:6]), 1)
    torch.testing.assert_close(together.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-4)
    for pair, values in zip(pairs[:6], expected, strict=True):
        alone = torch.stack(dpo.pair_log_probs(model, [pair]), 1)[0].tolist()
        assert alone == pytest.approx(values, rel=1e-5)
    tokenizer.padding_side = "left"
    args = arguments(folders, name)
    again = dpo.read_pairs(args.dataset, tokenizer, 64)
    assert again == pairs
    model.config.pad_token_id = 7
    torch.testing.assert_close(torch.stack(dpo.pair_log_probs(model, pairs[:6]), 1), together)


def test_prompts_of_different_lengths_in_one_batch(folders):
    model, _, pairs, _ = loaded(folders)
    pairs = [dpo.Pair(pairs[0].prompt[:2], pairs[0].chosen, pairs[0].rejected[:2]), pairs[1],
             dpo.Pair([5, 6, 7, 8, 9, 10, 11], [3], [4, 5, 1])]  # fmt: skip
    expected = [[by_hand(model, pair.prompt, ids) for ids in (pair.chosen, pair.rejected)] for pair in pairs]
    actual = torch.stack(dpo.pair_log_probs(model, pairs), 1)
    torch.testing.assert_close(actual.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-4)


LOG_PROBS = [torch.tensor(x) for x in ([-5.0, -7.0], [-9.0, -6.0], [-6.0, -6.5], [-8.0, -7.0])]


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "expected"),  # the implicit margins are 0.1 * (1 + 1) and 0.1 * (-0.5 - 1)
    [
        ("sigmoid", 0.0, [math.log(1 + math.exp(-0.2)), math.log(1 + math.exp(0.15))]),
        ("sigmoid", 0.1, [0.9 * math.log(1 + math.exp(-0.2)) + 0.1 * math.log(1 + math.exp(0.2)),
                          0.9 * math.log(1 + math.exp(0.15)) + 0.1 * math.log(1 + math.exp(-0.15))]),
        ("hinge", 0.0, [0.8, 1.15]),
        ("ipo", 0.0, [(2 - 5) ** 2, (-1.5 - 5) ** 2]),
    ],
)  # fmt: skip
def test_losses_by_hand(loss_type, smoothing, expected):
    losses, metrics = dpo.dpo_loss(*LOG_PROBS, 0.1, loss_type, smoothing)
    assert losses.tolist() == pytest.approx(expected)
    values = dict(zip(dpo.METRICS, metrics.tolist(), strict=True))
    assert values["loss"] == pytest.approx(expected)
    assert values["rewards/chosen"] == pytest.approx([0.1, -0.05])
    assert values["rewards/rejected"] == pytest.approx([-0.1, 0.1])
    assert values["rewards/margins"] == pytest.approx([0.2, -0.15])
    assert values["rewards/accuracies"] == [1, 0]
    assert values["logps/chosen"] == [-5, -7]
    assert values["logps/rejected"] == [-9, -6]
    tie = dpo.dpo_loss(*[torch.ones(1)] * 4, 0.1, loss_type, smoothing)[1]
    assert tie[dpo.METRICS.index("rewards/accuracies")] == 0.5


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected():
    for loss_type in "sigmoid", "hinge", "ipo":
        log_probs = [x.clone().requires_grad_() for x in LOG_PROBS]
        dpo.dpo_loss(*log_probs, 0.1, loss_type, 0.0)[0].sum().backward()
        assert (log_probs[0].grad < 0).all()
        assert (log_probs[1].grad > 0).all()


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        dpo.dpo_loss(torch.zeros(4, 1), *[torch.zeros(4)] * 3, 0.1, "sigmoid", 0.0)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_losses_and_log_probabilities_are_those_of_trl(folders, tmp_path, loss_type):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, tokenizer, pairs, args = loaded(folders, loss_type=loss_type, beta=0.3)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01
    records = [json.loads(line) for line in Path(args.dataset).read_text().splitlines()][:8]
    config = trl.DPOConfig(
        output_dir=str(tmp_path),
        beta=0.3,
        loss_type=[loss_type],
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=8,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
    )
    trainer = trl.DPOTrainer(other, copy.deepcopy(model), args=config, train_dataset=Dataset.from_list(records),
                             processing_class=tokenizer)  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    expected = trainer.compute_loss(other, batch).item()
    reference = torch.stack(dpo.pair_log_probs(model, pairs[:8]), 1)
    losses, metrics = dpo.dpo_loss(*dpo.pair_log_probs(other, pairs[:8]), *reference.unbind(1), 0.3, loss_type, 0.0)
    assert losses.mean().item() == pytest.approx(expected, abs=1e-5)
    seen = {name: np.mean(values) for name, values in trainer._metrics["train"].items()}
    for name, values in zip(dpo.METRICS[1:], metrics[1:], strict=True):
        assert values.mean().item() == pytest.approx(seen[name], abs=1e-4), name


def test_at_the_start_the_loss_is_ln_2_and_the_reference_never_changes(folders, tmp_path):
    before = {path: path.read_bytes() for path in (folders / "gpt2").iterdir()}
    dpo.train(arguments(folders, run_dir=str(tmp_path / "run")))
    assert before == {path: path.read_bytes() for path in (folders / "gpt2").iterdir()}
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["rewards/margins"] != pytest.approx(0, abs=1e-3)
    assert [row["global_step"] for row in steps] == [8, 16, 24, 32, 40, 48, 54, 62, 70, 78, 86, 94, 102, 108]
    model, _, pairs, _ = loaded(folders)
    stored = torch.load(tmp_path / "run" / "reference.pt", weights_only=True)["log_probs"]
    for i in (0, 30, 59):
        assert stored[i, 1].item() == pytest.approx(by_hand(model, pairs[i].prompt, pairs[i].rejected), rel=1e-4)


def test_dropout_is_off(folders, tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = dpo.prepare_model(AutoModelForCausalLM.from_config(config), "CAUSAL_LM", arguments(folders))
    ids = torch.arange(20)[None]
    assert model.training
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def count_rows(sizes):
    return lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"]))


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size": 3}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}]
)
def test_micro_batches_and_checkpointing_change_nothing(folders, changes, monkeypatch):
    """In float64, where what is left is no rounding error."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    results = []
    for more in {}, changes:
        model, _, pairs, args = loaded(folders, **more)
        model = model.double()
        sizes = []
        model.register_forward_pre_hook(count_rows(sizes), with_kwargs=True)
        reference = -20 + 5 * torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        metrics = dpo.update(model, optimizer, pairs, reference, list(range(8)), args)
        results.append((metrics, [parameter.detach() for parameter in model.parameters()]))
        assert sizes == {None: [16], 3: [6, 6, 4], 1: [2] * 8}[args.micro_batch_size]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5, abs=1e-6), "metrics are summed in float32"
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-10)


@pytest.fixture
def bfloat16(monkeypatch):
    """Autocasting as on CUDA, but on the CPU. Returns for which kinds of devices it was asked."""
    autocast, asked = torch.autocast, []

    def always(device_type, dtype, enabled):
        asked.append((device_type, dtype, enabled))
        return autocast(device_type, dtype)

    monkeypatch.setattr(torch, "autocast", always)
    return asked


def test_bfloat16_is_for_matrix_products_and_not_for_sums(folders, bfloat16):
    model, _, pairs, _ = loaded(folders)
    rounded = torch.stack(dpo.pair_log_probs(model, pairs), 1)
    assert bfloat16 == [("cpu", torch.bfloat16, False)], "on the CPU it is off"
    expected = [[by_hand(model, pair.prompt, ids) for ids in (pair.chosen, pair.rejected)] for pair in pairs[:6]]
    torch.testing.assert_close(rounded[:6], torch.tensor(expected), rtol=0.01, atol=0.1)
    assert rounded.dtype == torch.float32
    assert (rounded != rounded.bfloat16()).float().mean() > 0.9


def test_a_run_in_bfloat16_starts_at_ln_2_and_moves(folders, tmp_path, bfloat16, capsys):
    dpo.train(arguments(folders, run_dir=str(tmp_path / "run")))
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=0.01)
    assert abs(steps[-1]["rewards/margins"]) > 0.1


def test_models_in_bfloat16_are_trained_and_saved_in_float32(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "gpt2").bfloat16()
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(folders / "gpt2").save_pretrained(tmp_path / "half")
    learned = {"model_name": str(tmp_path / "half"), "run_dir": str(tmp_path / "run"), "total_timesteps": 8}
    dpo.train(arguments(folders, **learned, learning_rate=1e-6))  # a step too small for most numbers in bfloat16
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "run/model"))
    for name, value in after.items():
        assert value.dtype == torch.float32
        assert (value != before[name].float()).any(), name


def test_lora_keeps_the_frozen_weights_in_bfloat16_and_its_own_in_float32(folders, tmp_path):
    pytest.importorskip("peft")
    flags = {"lora_rank": 2, "device": "cpu:0"}  # any device but cpu
    model = loaded(folders, **flags)[0]
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}
    dpo.train(arguments(folders, run_dir=str(tmp_path / "run"), **flags))
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    assert abs(steps[-1]["rewards/margins"]) > 1e-3


@pytest.mark.parametrize("nll_coef", [0.0, 0.7])
def test_a_step_follows_the_mean_gradient_scaled_down_to_the_largest_norm(folders, nll_coef):
    model, _, pairs, args = loaded(folders, nll_coef=nll_coef)
    reference = -20 + 5 * torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(0))
    batch = [7, 3, 11, 30, 2]
    log_probs = dpo.pair_log_probs(model, [pairs[row] for row in batch])
    losses, metrics = dpo.dpo_loss(*log_probs, *reference[batch].unbind(1), args.beta, "sigmoid", 0.0)
    lengths = [len(pairs[row].chosen) for row in batch]
    likelihood = sum(chosen / length for chosen, length in zip(log_probs[0], lengths, strict=True)) / 5
    gradients = torch.autograd.grad(losses.mean() - nll_coef * likelihood, list(model.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    for max_norm in 2 * norm, norm / 3:
        moved = copy.deepcopy(model)
        args.max_grad_norm = max_norm
        optimizer = torch.optim.SGD(moved.parameters(), 0.1)
        for _ in range(2):  # no gradient is left from the first time
            moved.load_state_dict(model.state_dict())
            result = dpo.update(moved, optimizer, pairs, reference, batch, args)
        for old, new, gradient in zip(model.parameters(), moved.parameters(), gradients, strict=True):
            torch.testing.assert_close(new, old - 0.1 * min(1, max_norm / norm) * gradient, rtol=1e-4, atol=1e-6)
        assert result["losses/grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert [result[name] for name in dpo.METRICS] == pytest.approx(metrics.mean(1).tolist(), rel=1e-4)


def test_log_probabilities_stand_in_their_rows(folders):
    model, _, pairs, args = loaded(folders)
    rows = [17, 4, 59, 8, 30, 2, 41, 23, 5]  # one more than a batch
    result = dpo.all_log_probs(model, pairs, rows, args)
    assert not result.requires_grad
    assert result.shape == (60, 2)
    assert (result == 0).all(1).nonzero().flatten().tolist() == [row for row in range(60) if row not in rows]
    for row in rows:
        alone = torch.stack(dpo.pair_log_probs(model, [pairs[row]]), 1)[0]
        torch.testing.assert_close(result[row], alone, rtol=1e-4, atol=1e-4)


def test_the_reference_itself_has_no_margins_on_held_out_pairs(folders):
    model, _, pairs, args = loaded(folders)
    reference = dpo.all_log_probs(model, pairs, list(range(60)), args)
    result = dpo.evaluate_pairs(model, pairs, reference, [40, 3, 22, 51], args)
    assert result == {"eval/loss": pytest.approx(math.log(2), abs=1e-4), "eval/margin": pytest.approx(0, abs=1e-4),
                      "eval/accuracy": pytest.approx(0.5, abs=0.5)}  # fmt: skip


def test_a_run_takes_each_epochs_batches_in_turn_at_a_rate_that_rises_and_falls(folders, tmp_path, monkeypatch):
    args = arguments(folders, run_dir=str(tmp_path / "run"), total_timesteps=100, warmup=0.2, weight_decay=0.3, seed=3)
    batches = steps_of_a_run(dpo, args, monkeypatch)
    pairs = loaded(folders)[2]
    train, _ = dpo.split(pairs, args)
    expected = [batch for epoch in (0, 1) for batch in dpo.epoch_batches(train, pairs, 8, 3, epoch)]
    assert [batch for batch, _, _ in batches[:-1]] == expected[:12]
    assert batches[-1][0] == expected[12][:6], "the last batch is cut to the number of steps"
    ends = np.cumsum([len(batch) for batch, _, _ in batches])
    rates = [1e-3 * min(1, end / 20) * (1 - start / 100) for start, end in zip([0, *ends], ends, strict=False)]
    assert [rate for _, rate, _ in batches] == pytest.approx(rates)
    assert {decay for _, _, decay in batches} == {0.3}


@pytest.mark.parametrize("name", SIZES)
def test_no_layer_keeps_its_dropout(folders, name):
    config = copy.deepcopy(SIZES[name])
    for flag in [flag for flag in config.to_dict() if "pdrop" in flag or flag == "attention_dropout"]:
        setattr(config, flag, 0.5)
    config.vocab_size = 60
    assert "0.5" in str(config)
    model = dpo.prepare_model(AutoModelForCausalLM.from_config(config), "CAUSAL_LM", arguments(folders))
    assert model.training
    ids = torch.arange(20)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@both
@pytest.mark.parametrize(
    ("template", "ends"),  # of user and assistant messages; what the reply ends in, and whether it is only one
    [
        ("{{ m['content'] }} <end> ", "<end>"),
        ("{{ m['content'] }} <end> the ", "<end>"),  # the word stands for the line break of many templates
        ("{{ m['content'] }} ", "<end>"),
        ("{% if m['role'] == 'user' %}<end> {% endif %}{{ m['content'] }} ", "<end>"),
    ],
)
def test_a_chat_has_its_end_token_once_whoever_writes_it(script, folders, template, ends):
    tokenizer = AutoTokenizer.from_pretrained(folders / "gpt2")
    tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
    user, staff = {"role": "user", "content": "the price ."}, {"role": "staff", "content": "the cup is good ."}
    for reply, times in ([staff], 1), ([staff, user, staff], ends.count("<end>") + template.count("<end>") * 2):
        _, ids = script.encode("", tokenizer, [user], [reply])
        text = tokenizer.decode(ids)
        assert text.endswith(f"the cup is good . {ends}")
        if len(reply) == 1:
            assert text.count("<end>") == times


def test_what_is_judged_of_a_policy_by_hand(monkeypatch):
    prompts = dpo.repeat_prompts(16)  # two reviews of each thing
    reviews = [f"the {dpo.FITS[prompt.split()[2]][0]} is good ." for prompt in prompts]
    reviews[0], reviews[9] = "the the", "the music is very superb and the sound is good ."  # of coffee and of a concert
    monkeypatch.setattr(dpo, "sample_reviews", lambda *_: reviews)
    monkeypatch.setattr(dpo, "all_log_probs", lambda model, pairs, rows, args: torch.full((len(rows), 2), model))
    rng = np.random.default_rng(0)
    pool = np.stack([rng.normal(size=(8, 50)), rng.integers(5, 20, (8, 50)), rng.random((8, 50)) < 0.9], 2)
    pool[3, :, 0] += 100  # the reference is good at hotels alone: there, no review wins
    pool[5, :20, 0] = 0.6  # and as good at phones, in two of five: a tie is half a win
    args = dpo.Args(eval_replies=16, device="cpu")
    result = dpo.evaluate_reviews(-9.0, -9.7, dpo.word_tokenizer(), pool, args)
    rewards = [0.6] * 16
    rewards[0], rewards[9] = dpo.NONSENSE, 2.4
    assert result["eval/true_reward"] == pytest.approx(np.mean(rewards))
    assert result["eval/kl"] == pytest.approx(0.7)
    assert result["eval/length"] == pytest.approx((14 * 5 + 2 + 11) / 16)
    assert result["eval/fluency"] == pytest.approx(15 / 16)
    wins = [np.mean((np.sign(reward - pool[i % 8, :, 0]) + 1) / 2) for i, reward in enumerate(rewards)]
    assert wins[3] == 0
    assert result["eval/win_rate"] == pytest.approx(np.mean(wins))
    assert result["eval/reference_reward"] == pytest.approx(pool[..., 0].mean())
    weights, _ = dpo.optimum(pool[..., 0], 0.7)
    for name, column in ("reward", 0), ("length", 1), ("fluency", 2):
        best = np.mean([weights[i] @ pool[i, :, column] for i in range(8)])
        assert result[f"eval/optimal_{name}"] == pytest.approx(best)


@both
def test_each_epoch_has_every_pair_once_in_another_order(script, folders):
    _, _, pairs, _ = loaded(folders)
    rows = list(range(3, 57))
    epochs = [script.epoch_batches(rows, pairs, 8, 1, epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(row for batch in batches for row in batch) == rows
        assert [len(batch) for batch in batches] == [8] * 6 + [6]
    assert epochs[0] != epochs[1]
    assert epochs[0] == script.epoch_batches(rows, pairs, 8, 1, 0)
    assert epochs[0] != script.epoch_batches(rows, pairs, 8, 2, 0)
    lengths = [[len(pairs[row].prompt) + max(map(len, pairs[row][1:])) for row in batch] for batch in epochs[0][:-1]]
    assert np.mean([np.std(x) for x in lengths]) < 0.5 * np.std(np.concatenate(lengths)), "of similar length"


@both
def test_held_out_pairs_are_a_tenth_at_most_and_never_trained_on(script, folders):
    _, _, pairs, args = loaded(folders)
    train, held_out = script.split(pairs, args)
    assert len(held_out) == 6
    assert sorted(train + held_out) == list(range(60))


def test_a_run_repeats_itself_resumes_exactly_and_evaluates_as_it_did(folders, tmp_path, capsys, monkeypatch):
    for name in "one", "two":
        dpo.train(arguments(folders, run_dir=str(tmp_path / name)))
    assert timeless(tmp_path / "one") == timeless(tmp_path / "two")
    dpo.train(arguments(folders, run_dir=str(tmp_path / "other"), seed=2))
    assert timeless(tmp_path / "one") != timeless(tmp_path / "other")

    update, count = dpo.update, []

    def dies(*arguments):
        count.append(1)
        if len(count) == 9:
            raise ZeroDivisionError
        return update(*arguments)

    monkeypatch.setattr(dpo, "update", dies)
    with pytest.raises(ZeroDivisionError):
        dpo.train(arguments(folders, run_dir=str(tmp_path / "cut")))
    assert dpo.load_file(tmp_path / "cut" / "checkpoint.pt")["step"] == 40
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)  # they hold the run, and the run its folder's lock
    gc.collect()
    dpo.train(arguments(folders, run_dir=str(tmp_path / "cut"), resume=True))
    assert timeless(tmp_path / "one") == timeless(tmp_path / "cut")
    files = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("one", "cut", "other")]
    assert files[0] == files[1] != files[2]

    capsys.readouterr()
    dpo.evaluate_saved(arguments(folders, run_dir=str(tmp_path / "one"), evaluate=True))
    last = [row for row in rows(tmp_path / "one") if "eval/loss" in row][-1]
    out = capsys.readouterr().out
    for name in "loss", "accuracy", "margin":
        assert f"eval/{name} {last[f'eval/{name}']:.4g}" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "one" / "model").eos_token == "<end>"
    assert not torch.equal(next(model.parameters()), next(loaded(folders)[0].parameters()))


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(folders, tmp_path):
    flags = ["--model-name", folders / "gpt2", "--dataset", folders / "pairs.jsonl", "--device", "cpu", "--batch-size",
             "9", "--micro-batch-size", "2", "--total-timesteps", "54", "--eval-frequency", "27"]  # fmt: skip
    one = [sys.executable, SCRIPT]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two += [Path(__file__).with_name("what_is_left.py"), SCRIPT]
    for name, command in ("one", one), ("two", two):
        command = [*map(str, command), *map(str, flags), "--run-dir", str(tmp_path / name)]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=200, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("run directory") == 1, "one process writes"
    assert result.stdout.count("left: []") == 2, "no thread of the two outlives its process group"
    a, b = timeless(tmp_path / "one"), timeless(tmp_path / "two")
    assert len(a) == len(b)
    for first in a, b:  # before the first update margins are 0 but for rounding, and so have any sign
        next(row for row in first if "rewards/margins" in row).pop("rewards/accuracies")
    for first, second in zip(a, b, strict=True):
        assert first == pytest.approx(second, rel=1e-3, abs=2e-4)

    command = [*map(str, two), "--run-dir", str(tmp_path / "two"), "--evaluate"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    loss = float(re.search(r"eval/loss ([\d.e-]+),", result.stdout)[1])
    assert loss == pytest.approx([row for row in b if "eval/loss" in row][-1]["eval/loss"], rel=1e-3)
    assert result.stdout.count("left: []") == 2


def test_torchrun_is_refused_where_it_makes_no_sense(monkeypatch, capsys):
    monkeypatch.setattr(dpo, "PROCESSES", 2)
    for flags, word in ({}, "one process"), ({"model_name": "x", "dataset": "y", "device": "cuda:1"}, "cuda:1"):
        with pytest.raises(SystemExit) as end:
            dpo.train(dpo.Args(**flags))
        assert end.value.code == 2
        assert word in capsys.readouterr().err


def test_lora_trains_its_matrices_alone_and_loads_again(folders, tmp_path):
    pytest.importorskip("peft")
    run_dir = tmp_path / "run"
    dpo.train(arguments(folders, run_dir=str(run_dir), lora_rank=2))
    parts = torch.load(run_dir / "checkpoint.pt", weights_only=True)["model"]
    assert parts
    assert all("lora_" in name for name in parts)
    config = json.loads((run_dir / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    steps = [row for row in rows(run_dir) if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["rewards/margins"] != 0
    base, _, pairs, _ = loaded(folders)
    adapted = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    ids = torch.tensor([pairs[0].prompt])
    assert not torch.allclose(base(input_ids=ids).logits, adapted(input_ids=ids).logits)
    dpo.evaluate_saved(arguments(folders, run_dir=str(run_dir), lora_rank=2))


@pytest.fixture
def tokenize(script, folders):
    """Write each record several times to a file, and give the texts of its first pair as the script reads them."""

    def read(*records):
        path = Path("data.jsonl")
        path.write_text("".join(json.dumps(record) + "\n" for record in records for _ in range(10)))
        tokenizer = AutoTokenizer.from_pretrained(folders / "gpt2")
        pair = script.read_pairs(str(path), tokenizer, 64)[0]
        return [tokenizer.decode(ids) for ids in pair]

    return read


@both
def test_prompts_explicit_implicit_and_in_chats(tokenize):
    good, bad = "the cup is good .", "the cup is bad ."
    expected = ["review the coffee :", f"{good} <end>", f"{bad} <end>"]
    explicit = {"prompt": "review the coffee : ", "chosen": good, "rejected": bad}
    assert tokenize(explicit) == expected
    assert tokenize({"chosen": "review the coffee : " + good, "rejected": "review the coffee : " + bad}) == [
        "review the coffee : the cup is", "good . <end>", "bad . <end>"]  # fmt: skip
    user = {"role": "coffee", "content": "the price ."}
    chat = [[user, {"role": "staff", "content": text}] for text in (good, bad)]
    expected = ["coffee : the price . <end> staff :", f"{good} <end>", f"{bad} <end>"]
    assert tokenize({"chosen": chat[0], "rejected": chat[1]}) == expected
    split = {"prompt": [user], "chosen": chat[0][1:], "rejected": chat[1][1:]}
    assert tokenize(split) == expected
    assert tokenize(explicit | {"chosen": ""})[1] == "<end>"
    assert tokenize(explicit | {"prompt": ""}) == ["<end>", f"{good} <end>", f"{bad} <end>"]
    assert tokenize({"prompt": "the price .", "chosen": chat[0], "rejected": chat[1]}) == expected


@both
def test_parquet_is_read_as_jsonl_is(script, folders, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    records = [record for _, record in script.read_records(str(folders / "pairs.jsonl"))]
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "pairs.parquet"))
    assert [record for _, record in script.read_records(str(tmp_path / "pairs.parquet"))] == records


GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}'


@both
@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "JSON"), ("", "JSON"), (b"\xff\xfe", "JSON"), ("[1]", "object"), ("3", "object"),
        ('{"chosen": "b"}', "rejected must be a text or a list of messages with role and content; it is missing"),
        ('{"chosen": null, "rejected": null}', "it is None"),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}', "it is 3"), ('{"chosen": [], "rejected": []}', "it is []"),
        ('{"prompt": 7, "chosen": "b", "rejected": "c"}', "it is 7"),
        ('{"chosen": "b", "rejected": "b"}', "differently"),
        ('{"chosen": "b", "rejected": [{"role": "user", "content": "c"}]}', "both"),
        ('{"chosen": [{"role": "user"}], "rejected": [{"role": "user"}]}', "it is [{'role': 'user'}]"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(script, folders, line, word, capsys):
    line = line if isinstance(line, bytes) else line.encode()
    Path("data.jsonl").write_bytes(GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    with pytest.raises(SystemExit) as end:
        script.read_pairs("data.jsonl", AutoTokenizer.from_pretrained(folders / "gpt2"), 64)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert "data.jsonl, line 2" in message
    assert word in message
    assert message.count("\n") == 1


def test_evaluation_of_other_pairs_has_the_reference_of_these(folders, tmp_path, capsys):
    """A model of an untrained run is its reference: on whatever pairs, all margins are 0 and the loss is log 2."""
    args = arguments(folders, run_dir=str(tmp_path / "run"), learning_rate=1e-30)
    dpo.train(args)
    lines = (folders / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "others.jsonl").write_text("\n".join(lines[::-1] + lines))
    for changes in {"max_length": 22}, {"dataset": str(tmp_path / "others.jsonl")}:
        capsys.readouterr()
        dpo.evaluate_saved(arguments(folders, run_dir=args.run_dir, **changes))
        assert f"eval/loss {math.log(2):.4g}," in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        dpo.train(arguments(folders, run_dir=args.run_dir, resume=True, **changes))
    assert end.value.code == 2
    assert "120 now" in capsys.readouterr().err


@both
def test_long_pairs_are_counted_and_left_out(script, folders, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folders / "gpt2")
    everything = script.read_pairs(str(folders / "pairs.jsonl"), tokenizer, 64)
    lengths = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in everything]
    capsys.readouterr()
    kept = script.read_pairs(str(folders / "pairs.jsonl"), tokenizer, 20)
    assert kept == [pair for pair, length in zip(everything, lengths, strict=True) if length <= 20]
    assert f"{60 - len(kept)} of 60 pairs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.read_pairs(str(folders / "pairs.jsonl"), tokenizer, 3)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"dataset": None}, "--dataset"), ({"model_name": None}, "--model-name"), ({"beta": 0.0}, "--beta"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "--label-smoothing"), ({"label_smoothing": 0.6}, "--label"),
        ({"warmup": 1.5}, "--warmup"), ({"batch_size": 0}, "--batch-size"), ({"lora_rank": -1}, "--lora-rank"),
    ],
)  # fmt: skip
def test_flags_that_contradict_are_refused(folders, changes, word, capsys):
    with pytest.raises(SystemExit) as end:
        arguments(folders, **changes)
    assert end.value.code == 2
    assert word in capsys.readouterr().err


def test_what_cannot_be_loaded_is_one_line(folders, capsys, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folders / "gpt2")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    for changes in (
        {"model_name": str(tmp_path / "nothing")},
        {"model_name": str(tmp_path / "endless")},
        {"dataset": "no.jsonl"},
    ):
        with pytest.raises(SystemExit) as end:
            dpo.train(arguments(folders, **changes))
        assert end.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"learning_rate": 1e-12}, "--learning-rate"), ({"learning_rate": 1e-12, "total_timesteps": 98}, ""),
        ({"learning_rate": 1e-3}, ""),
    ],
)  # fmt: skip
def test_a_run_in_which_nothing_moves_in_fifty_updates_says_so(folders, capsys, changes, word):
    dpo.train(arguments(folders, batch_size=2, **changes))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [word in line for line in warnings] == [True] * bool(word)


def test_a_gradient_of_zero_has_another_cause(capsys):
    dpo.warn_if_stuck({"rewards/margins": 1e-5, "losses/grad_norm": 0.0})
    assert "frozen" in capsys.readouterr().err
    dpo.warn_if_stuck({"rewards/margins": -1e-3, "losses/grad_norm": 0.0})
    assert not capsys.readouterr().err


@both
def test_true_reward_by_hand(script):
    prompt = "review the coffee : "
    for review, reward in {
        "the cup is good .": 0.6,
        "the cup is very awful .": -1.8,
        "the cup is not superb .": -0.6,
        "the plot is good .": 0.0,
        "the cup is good and the taste is lovely .": 1.5,
        "the cup is good but the taste is lovely .": 1.2,
        "the cup is good and the cup is good .": 0.6,
        "the cup is bad but the smell is not bad .": -0.45,
        "the cup is good": script.NONSENSE,
        "the cup is good and .": script.NONSENSE,
        "the cup is good . .": script.NONSENSE,
        "and the cup is good .": script.NONSENSE,
        " and ".join(["the cup is good"] * 5) + " .": script.NONSENSE,  # the grammar writes at most four clauses
        ".": script.NONSENSE,
        "": script.NONSENSE,
    }.items():
        assert script.true_reward(prompt, review) == pytest.approx(reward), review
    rng = script.random.Random(0)
    assert all(script.parse_review(script.write_review(prompt, rng)) for _ in range(99))


@pytest.mark.slow
@both
def test_the_made_reference_learns_at_a_rate_that_rises_and_falls(script, tmp_path, monkeypatch):
    rates, adamw = [], torch.optim.AdamW
    step = adamw.step
    monkeypatch.setattr(adamw, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    monkeypatch.setattr(script, "sample_reviews", lambda model, tokenizer, prompts, *_: ["."] * len(prompts))
    script.make_reviews(tmp_path, script.Args(num_pairs=1600, device="cpu"))
    assert len(rates) == 100, "one epoch, sixteen pairs at a time"
    expected = {0: 1e-4, 9: 1e-3, 24: 2.5e-3, 75: 1.25e-3, 99: 5e-5}
    assert {i: rates[i] for i in expected} == pytest.approx(expected)
    assert (tmp_path / "pairs.jsonl").read_text().count("\n") == 1599


def test_optimum_of_a_gaussian_reward_and_of_two_replies():
    rewards = np.random.default_rng(0).normal(size=(4, 50_000))
    weights, beta = dpo.optimum(rewards, 0.5)  # for a normal reward: gain 1 / beta, divergence 1 / (2 beta^2)
    assert weights.sum(1) == pytest.approx(1)
    assert (weights * rewards).sum(1).mean() == pytest.approx(1, abs=0.03)
    assert beta == pytest.approx(1, abs=0.03)
    weights, beta = dpo.optimum(np.array([[0.0, 1.0]]), 0.1)
    p = 1 / (1 + math.exp(-1 / beta))
    assert weights[0] == pytest.approx([1 - p, p])
    assert p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The default task with a seventh of its pairs, and so at twice its learning rate. Returns arguments and output."""
    folder = tmp_path_factory.mktemp("reviews")
    args = dpo.Args(
        num_pairs=6000,
        total_timesteps=5400,
        learning_rate=1e-3,
        eval_frequency=2700,
        eval_replies=400,
        run_dir=str(folder / "run"),
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        dpo.train(args)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return args, out.getvalue()


@pytest.mark.slow
def test_the_policy_gains_reward_and_stays_fluent(learned):
    args, out = learned
    assert out.count("before") == out.count("after") == 3
    results = [row for row in rows(Path(args.run_dir)) if "eval/kl" in row]
    assert len(results) == 2
    last = results[-1]
    pool = dpo.judge_reference(Path(args.run_dir))
    assert last["eval/reference_reward"] == pytest.approx(pool[..., 0].mean())
    gain = last["eval/true_reward"] - last["eval/reference_reward"]
    assert gain > 0.5 * (last["eval/optimal_reward"] - last["eval/reference_reward"])
    assert 0.3 < last["eval/kl"] < 1.2
    assert last["eval/win_rate"] > 0.6
    assert last["eval/fluency"] > 0.85
    assert last["eval/optimal_fluency"] > pool[..., 2].mean(), "nonsense earns less than a review"
    length = pool[..., 1].mean()
    assert length < last["eval/optimal_length"] < 1.3 * length
    assert 0.7 * length < last["eval/length"] < 1.3 * length


@pytest.mark.slow
def test_the_reference_writes_reviews_and_has_no_dropout(learned):
    args, _ = learned
    folder = Path(args.run_dir)
    pool = dpo.judge_reference(folder)
    assert pool.shape == (8, 1500, 3)
    assert pool[..., 2].mean() > 0.9, "most of them the grammar can have written"
    assert not any(value for name, value in GPT2Config.from_pretrained(folder / "reference").to_dict().items()
                   if name.endswith("pdrop"))  # fmt: skip
    reference, tokenizer = dpo.load_model(folder / "reference", args), dpo.load_tokenizer(folder / "reference")
    rng = dpo.random.Random(99)
    reviews = [(prompt, dpo.write_review(prompt, rng)) for prompt in dpo.repeat_prompts(400)]
    pairs = [dpo.Pair(*dpo.encode("", tokenizer, prompt, [review] * 2)) for prompt, review in reviews]
    with torch.no_grad():
        nats = -dpo.pair_log_probs(reference, pairs)[0].mean().item()
    assert nats < 1.1 * np.mean([entropy(*text) for text in reviews])

    def length(clauses):
        return np.mean([len(review.split()) for _, review in reviews if len(dpo.parse_review(review)) == clauses])

    assert length(1) < length(2) < length(4)


def entropy(prompt, review):
    """-log of the probability with which the grammar writes it."""
    fits, clauses, p = dpo.FITS[prompt.split()[2]], dpo.parse_review(review), 1.0
    for i, (link, aspect, degree, value) in enumerate(clause.groups() for clause in clauses):
        p *= (0.5 if link else 1) * (0.75 * (aspect in fits) / len(fits) + 0.25 / len(dpo.ASPECTS))
        p *= {"not ": 0.25, "very ": 0.25, "": 0.5}[degree] / len(dpo.VALUES)
        goes_on = 1 / (1 + math.exp(-1.5 * dpo.DEGREES[degree] * dpo.VALUES[value] - 0.5))
        p *= 1 if i == 3 else goes_on if i < len(clauses) - 1 else 1 - goes_on
    return -math.log(p)


@both
def test_the_grammars_probabilities_sum_to_one(script):
    """Over all reviews of one clause: that many are written."""
    prompt, rng = script.PROMPTS[0], script.random.Random(0)
    single = [f"the {a} is {d}{v} ." for a in script.ASPECTS for d in script.DEGREES for v in script.VALUES]
    written = [len(script.parse_review(script.write_review(prompt, rng))) for _ in range(4000)]
    assert set(written) == {1, 2, 3, 4}
    share = sum(math.exp(-entropy(prompt, review)) for review in single)
    assert np.mean([count == 1 for count in written]) == pytest.approx(share, abs=0.03)


@pytest.mark.slow
def test_labels_are_drawn_from_the_true_reward(learned):
    labels = [record for _, record in dpo.read_records(learned[0].run_dir + "/pairs.jsonl")]
    assert len(labels) == 6000
    margins = [dpo.true_reward(r["prompt"], r["chosen"]) - dpo.true_reward(r["prompt"], r["rejected"]) for r in labels]
    expected = np.mean([1 / (1 + math.exp(-abs(m))) for m in margins])
    assert np.mean([(m > 0) + (m == 0) / 2 for m in margins]) == pytest.approx(expected, abs=0.03)


@pytest.mark.slow
def test_the_reference_judged_as_a_policy_is_itself(learned, capsys):
    args, _ = learned
    folder = Path(args.run_dir)
    tokenizer = AutoTokenizer.from_pretrained(folder / "reference")
    reference, pool = dpo.load_model(folder / "reference", args), dpo.judge_reference(folder)
    result = dpo.evaluate_reviews(reference, reference, tokenizer, pool, args)
    assert result["eval/kl"] == pytest.approx(0, abs=1e-4)
    assert result["eval/win_rate"] == pytest.approx(0.5, abs=0.06)
    for name, column in ("true_reward", 0), ("length", 1), ("fluency", 2):
        values = pool[..., column]
        assert result[f"eval/{name}"] == pytest.approx(values.mean(), abs=0.25 * values.std())
    assert result["eval/optimal_reward"] == pytest.approx(pool[..., 0].mean(), abs=0.02)
    dpo.evaluate_saved(args)
    last = [row for row in rows(folder) if "eval/kl" in row][-1]
    shown = capsys.readouterr().out
    for name, value in last.items():
        assert not name.startswith("eval/") or f"{name} {value:.4g}" in shown
