"""reward_model.py against scores read by hand, losses computed by hand and by TRL, and rewards that are known."""

import copy
import gc
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, rows, steps_of_a_run, timeless
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from algorithms import reward_model

SCRIPT = ROOT / "algorithms" / "reward_model.py"
SIZES = {
    "gpt2": GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3),
    "llama": LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=32, max_position_embeddings=64, initializer_range=0.3),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small language models with random weights whose padding token is their end token, and 60 pairs of reviews."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), reward_model.word_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    for name, config in SIZES.items():
        torch.manual_seed(0)
        config = copy.deepcopy(config)
        config.vocab_size, config.eos_token_id, config.bos_token_id = len(tokenizer), tokenizer.eos_token_id, None
        config.pad_token_id = tokenizer.eos_token_id
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = reward_model.random.Random(0)
    write, prompts = reward_model.write_review, reward_model.repeat_prompts(60)
    records = [{"prompt": p, "chosen": write(p, rng), "rejected": write(p, rng)} for p in prompts]
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
             "learning_rate": 1e-2}  # fmt: skip
    return reward_model.Args(**flags | changes)


def loaded(folders, name="gpt2", **changes):
    args = arguments(folders, name, **changes)
    torch.manual_seed(0)
    return *reward_model.load(args.model_name, args.dataset, args), args


def with_a_head(model):
    with torch.no_grad():
        model.score.weight.copy_(torch.linspace(-1, 1, model.score.weight.numel())[None])
    return model


@pytest.mark.parametrize("name", SIZES)
def test_the_reward_is_read_at_the_end_token_whatever_the_padding(folders, name):
    model, tokenizer, pairs, _ = loaded(folders, name)
    with_a_head(model)
    assert model.config.pad_token_id != tokenizer.eos_token_id == tokenizer.pad_token_id
    assert len({len(pair.chosen) for pair in pairs[:6]}) > 1
    together = torch.stack(reward_model.pair_rewards(model, pairs[:6]), 1)
    for pair, values in zip(pairs[:6], together.tolist(), strict=True):
        for reply, value in zip((pair.chosen, pair.rejected), values, strict=True):
            assert reply[-1] == tokenizer.eos_token_id
            with torch.no_grad():
                hidden = model.base_model(input_ids=torch.tensor([pair.prompt + reply])).last_hidden_state
            assert value == pytest.approx((hidden[0, -1] @ model.score.weight[0]).item(), abs=1e-5)
            before_the_end = (hidden[0, -2] @ model.score.weight[0]).item()
            assert value != pytest.approx(before_the_end, abs=1e-3)


def test_the_score_is_that_of_the_end_tokens_position():
    """T29: a model without layers, whose hidden state says at which position it is and nothing else."""
    tokenizer, length = reward_model.word_tokenizer(), 32
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    config = GPT2Config(n_positions=length, n_embd=length, n_layer=0, n_head=1, num_labels=1, **ids)
    model = reward_model.prepare_model(
        AutoModelForSequenceClassification.from_config(config), "SEQ_CLS", reward_model.Args(device="cpu")
    )
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(length))  # the last layer norm centres and scales it
        model.score.weight.copy_(torch.arange(length)[None] * ((length - 1) / length**2) ** 0.5)
    rng = reward_model.random.Random(0)
    texts = [(prompt, [reward_model.write_review(prompt, rng) for _ in range(2)]) for prompt in reward_model.PROMPTS]
    pairs = [reward_model.Pair(*reward_model.encode("", tokenizer, *text)) for text in texts]
    ends = [[len(pair.prompt) + len(reply) - 1 for reply in (pair.chosen, pair.rejected)] for pair in pairs]
    assert len({end for pair_ends in ends for end in pair_ends}) > 3
    middle = (length - 1) / 2  # which centring takes away from all alike
    for batch in pairs, pairs[:1], pairs[5:7]:
        positions = torch.stack(reward_model.pair_rewards(model, batch), 1) + middle
        expected = [ends[pairs.index(pair)] for pair in batch]
        assert positions.round().int().tolist() == expected
        torch.testing.assert_close(positions, torch.tensor(expected).float(), atol=0.01, rtol=0)


def test_loss_by_hand_and_shapes():
    losses, metrics = reward_model.bradley_terry_loss(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0]))
    expected = [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(3))]
    assert losses.tolist() == pytest.approx(expected)
    values = dict(zip(reward_model.METRICS, metrics.tolist(), strict=True))
    assert values["loss"] == pytest.approx(expected)
    assert values["rewards/chosen"] == [1, -2]
    assert values["rewards/rejected"] == [0.5, 1]
    assert values["rewards/accuracies"] == [1, 0]
    assert values["rewards/margins"] == [0.5, -3]
    tie = reward_model.bradley_terry_loss(torch.ones(1), torch.ones(1))[1]
    assert tie[reward_model.METRICS.index("rewards/accuracies")] == 0.5
    with pytest.raises(AssertionError):
        reward_model.bradley_terry_loss(torch.zeros(3, 1), torch.zeros(3))


def test_calibration_error_by_hand():
    """Two bins: three pairs at confidence 0.6, of which two are right; one sure and wrong at 0.9."""
    logit = {p: math.log(p / (1 - p)) for p in (0.62, 0.92)}
    margins = np.array([logit[0.62], logit[0.62], -logit[0.62], -logit[0.92]])
    assert reward_model.calibration_error(margins) == pytest.approx((3 * abs(2 / 3 - 0.62) + 0.92) / 4)
    rng = np.random.default_rng(0)
    margins = rng.normal(size=100_000) * 2
    margins = np.where(rng.random(100_000) < 1 / (1 + np.exp(-np.abs(margins))), 1, -1) * np.abs(margins)
    assert reward_model.calibration_error(margins) < 0.01
    assert reward_model.calibration_error(np.zeros(3)) == 0, "a head at 0 guesses, and says so"


def test_loss_is_that_of_trl(folders, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, tokenizer, pairs, args = loaded(folders)
    with_a_head(model)
    records = [json.loads(line) for line in Path(args.dataset).read_text().splitlines()][:8]
    records = [{name: r["prompt"] + r[name] for name in ("chosen", "rejected")} for r in records]
    config = trl.RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=8,
                              max_length=None, gradient_checkpointing=False, bf16=False)  # fmt: skip
    trainer = trl.RewardTrainer(
        model, args=config, train_dataset=Dataset.from_list(records), processing_class=tokenizer
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    expected = trainer.compute_loss(model, batch).item()
    losses, _ = reward_model.bradley_terry_loss(*reward_model.pair_rewards(model, pairs[:8]))
    assert losses.mean().item() == pytest.approx(expected, abs=1e-5)


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
        model = with_a_head(model).double()
        sizes = []
        model.register_forward_pre_hook(count_rows(sizes), with_kwargs=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        metrics = reward_model.update(model, optimizer, pairs, list(range(8)), args)
        results.append((metrics, [parameter.detach() for parameter in model.parameters()]))
        assert sizes == {None: [16], 3: [6, 6, 4], 1: [2] * 8}[args.micro_batch_size]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5, abs=1e-6), "metrics are summed in float32"
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SIZES)
def test_a_run_starts_at_ln_2_repeats_itself_resumes_exactly_and_its_model_loads_anywhere(
    folders, name, tmp_path, monkeypatch, capsys
):
    for run_dir, seed in ("one", 1), ("two", 1), ("other", 2):
        reward_model.train(arguments(folders, name, run_dir=str(tmp_path / run_dir), seed=seed))
    assert timeless(tmp_path / "one") == timeless(tmp_path / "two")
    assert timeless(tmp_path / "one") != timeless(tmp_path / "other")
    steps = [row for row in rows(tmp_path / "one") if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["rewards/margins"] == 0
    second_epoch = [step["loss"] for step in steps[len(steps) // 2 :]]
    assert np.mean(second_epoch) < math.log(2) - 1e-3

    update, count = reward_model.update, []

    def dies(*arguments):
        count.append(1)
        if len(count) == 9:
            raise ZeroDivisionError
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "update", dies)
        with pytest.raises(ZeroDivisionError):
            reward_model.train(arguments(folders, name, run_dir=str(tmp_path / "cut")))
    assert reward_model.load_file(tmp_path / "cut" / "checkpoint.pt")["step"] == 40
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)  # they hold the run, and the run its folder's lock
    gc.collect()
    reward_model.train(arguments(folders, name, run_dir=str(tmp_path / "cut"), resume=True))
    assert timeless(tmp_path / "one") == timeless(tmp_path / "cut")

    capsys.readouterr()
    run_dir = tmp_path / "one"
    reward_model.evaluate_saved(arguments(folders, name, run_dir=str(run_dir), evaluate=True))
    out, last = capsys.readouterr().out, [row for row in rows(run_dir) if "eval/loss" in row][-1]
    for metric in "loss", "accuracy", "margin", "calibration_error":
        assert f"eval/{metric} {last[f'eval/{metric}']:.4g}" in out

    replies = [{"prompt": "review the film : ", "reply": text} for text in ("the plot is good .", "the plot is bad .")]
    Path("replies.jsonl").write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    flags = {"run_dir": str(run_dir), "evaluate": True, "replies": "replies.jsonl"}
    reward_model.evaluate_saved(arguments(folders, name, **flags))
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    texts = [reply["prompt"] + reply["reply"] + "<end>" for reply in replies] + ["the <end>"]
    with torch.no_grad():
        loaded_rewards = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:2, 0].tolist()
    assert [line["reward"] for line in scored] == pytest.approx(loaded_rewards, abs=1e-5)
    assert [{k: v for k, v in line.items() if k != "reward"} for line in scored] == replies


def test_a_step_follows_the_mean_gradient_scaled_down_to_the_largest_norm(folders):
    model, _, pairs, args = loaded(folders)
    with_a_head(model)
    batch = [7, 3, 11, 30, 2]
    losses, metrics = reward_model.bradley_terry_loss(*reward_model.pair_rewards(model, [pairs[row] for row in batch]))
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    for max_norm in 2 * norm, norm / 3:
        moved = copy.deepcopy(model)
        args.max_grad_norm = max_norm
        optimizer = torch.optim.SGD(moved.parameters(), 0.1)
        for _ in range(2):  # no gradient is left from the first time
            moved.load_state_dict(model.state_dict())
            result = reward_model.update(moved, optimizer, pairs, batch, args)
        for old, new, gradient in zip(model.parameters(), moved.parameters(), gradients, strict=True):
            torch.testing.assert_close(new, old - 0.1 * min(1, max_norm / norm) * gradient, rtol=1e-4, atol=1e-6)
        assert result["losses/grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert [result[name] for name in reward_model.METRICS] == pytest.approx(metrics.mean(1).tolist(), rel=1e-4)


def test_held_out_pairs_are_judged_by_their_own_rewards(folders):
    model, tokenizer, pairs, args = loaded(folders)
    with_a_head(model)
    held_out = [17, 4, 59, 8, 30, 2, 41, 23, 5]  # one more than a batch
    chosen, rejected = (torch.cat(x) for x in zip(*(reward_model.pair_rewards(model, [pairs[i]]) for i in held_out),
                                                  strict=True))  # fmt: skip
    margins = (chosen - rejected).detach().double().numpy()
    assert 0 < (margins > 0).mean() < 1
    result = reward_model.evaluate_pairs(model, tokenizer, pairs, held_out, args)
    assert result == {
        "eval/loss": pytest.approx(np.log(1 + np.exp(-margins)).mean(), rel=1e-4),
        "eval/accuracy": pytest.approx((margins > 0).mean()),
        "eval/margin": pytest.approx(margins.mean(), abs=1e-4),
        "eval/calibration_error": pytest.approx(reward_model.calibration_error(margins), abs=1e-4),
    }
    args.model_name = None  # these are reviews: the accuracy of the truth stands beside
    (_, *texts), own = zip(*(json.loads(line).values() for line in open(args.dataset)), strict=True), []
    prompts = reward_model.repeat_prompts(60)
    for row in held_out:
        better, worse = (reward_model.true_reward(prompts[row], text[row]) for text in texts)
        own.append((better > worse) + (better == worse) / 2)
    result = reward_model.evaluate_pairs(model, tokenizer, pairs, held_out, args)
    assert result["eval/bayes_accuracy"] == pytest.approx(np.mean(own))
    with torch.no_grad():
        model.score.weight.zero_()
    assert reward_model.evaluate_pairs(model, tokenizer, pairs, held_out, args)["eval/accuracy"] == 0.5, (
        "a tie is a guess"
    )


def test_a_run_takes_each_epochs_batches_in_turn_at_a_rate_that_rises_and_falls(folders, tmp_path, monkeypatch):
    args = arguments(folders, run_dir=str(tmp_path / "run"), total_timesteps=100, warmup=0.2, weight_decay=0.3, seed=3)
    batches = steps_of_a_run(reward_model, args, monkeypatch)
    pairs = loaded(folders)[2]
    train, _ = reward_model.split(pairs, args)
    expected = [batch for epoch in (0, 1) for batch in reward_model.epoch_batches(train, pairs, 8, 3, epoch)]
    assert [batch for batch, _, _ in batches[:-1]] == expected[:12]
    assert batches[-1][0] == expected[12][:6], "the last batch is cut to the number of steps"
    ends = np.cumsum([len(batch) for batch, _, _ in batches])
    rates = [1e-2 * min(1, end / 20) * (1 - start / 100) for start, end in zip([0, *ends], ends, strict=False)]
    assert [rate for _, rate, _ in batches] == pytest.approx(rates)
    assert {decay for _, _, decay in batches} == {0.3}


@pytest.mark.parametrize("name", SIZES)
def test_no_layer_keeps_its_dropout(folders, name):
    config = copy.deepcopy(SIZES[name])
    for flag in [flag for flag in config.to_dict() if "pdrop" in flag or flag == "attention_dropout"]:
        setattr(config, flag, 0.5)
    config.vocab_size, config.pad_token_id, config.num_labels = 60, 0, 1
    model = AutoModelForSequenceClassification.from_config(config)
    model = reward_model.prepare_model(model, "SEQ_CLS", arguments(folders))
    assert model.training
    ids = torch.arange(1, 20)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_saved_reward_model_goes_on_with_its_head_and_its_padding(folders, tmp_path):
    """--model-name may name one: then nothing in it is new."""
    reward_model.train(arguments(folders, run_dir=str(tmp_path / "run")))
    name = str(tmp_path / "run" / "model")
    saved, tokenizer, _ = reward_model.load(name, folders / "pairs.jsonl", arguments(folders))
    assert saved.score.weight.abs().sum() > 0
    assert saved.config.pad_token_id not in (None, tokenizer.eos_token_id)
    assert len(tokenizer) == saved.get_input_embeddings().num_embeddings, "nothing was added"


def test_pairs_longer_than_the_model_are_left_out(folders, capsys):
    _, _, pairs, args = loaded(folders, max_length=20)
    assert max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs) <= 20 < 64
    assert "more than 20 tokens" in capsys.readouterr().out
    records = [json.loads(line) for line in open(args.dataset)]
    records[0]["chosen"] = "good " * 64  # longer than the model's 64 positions
    Path("long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    reward_model.load(args.model_name, "long.jsonl", arguments(folders))
    assert "1 of 60 pairs have more than 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"learning_rate": 1e-12}, "--learning-rate"), ({"learning_rate": 1e-12, "total_timesteps": 98}, ""),
        ({"learning_rate": 1e-2}, ""),
    ],
)  # fmt: skip
def test_a_run_in_which_nothing_moves_in_fifty_updates_says_so(folders, capsys, changes, word):
    reward_model.train(arguments(folders, batch_size=2, **changes))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [word in line for line in warnings] == [True] * bool(word)


@pytest.fixture
def bfloat16(monkeypatch):
    """Autocasting as on CUDA, but on the CPU. Returns for which kinds of devices it was asked."""
    autocast, asked = torch.autocast, []

    def always(device_type, dtype, enabled):
        asked.append((device_type, dtype, enabled))
        return autocast(device_type, dtype)

    monkeypatch.setattr(torch, "autocast", always)
    return asked


def test_bfloat16_is_for_matrix_products_and_not_for_losses(folders, bfloat16, tmp_path):
    reward_model.train(arguments(folders, run_dir=str(tmp_path / "run")))
    assert set(bfloat16) == {("cpu", torch.bfloat16, False)}, "on the CPU it is off"
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(steps[-1]["rewards/margins"]) > 1e-3
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    model, _, pairs, _ = loaded(folders)
    rounded = reward_model.pair_rewards(with_a_head(model), pairs)[0]
    assert rounded.dtype == torch.float32


def test_lora_keeps_the_frozen_weights_in_bfloat16_and_its_own_and_the_head_in_float32(folders, tmp_path, bfloat16):
    pytest.importorskip("peft")
    flags = {"lora_rank": 2, "device": "cpu:0"}  # any device but cpu
    model = loaded(folders, "llama", **flags)[0]
    dtypes = {(p.requires_grad, p.dtype) for name, p in model.named_parameters() if "original_module" not in name}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    reward_model.train(arguments(folders, "llama", run_dir=str(tmp_path / "run"), **flags))
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    trained = {name: value.dtype for name, value in saved.items() if "lora_" in name or "score" in name}
    assert set(trained.values()) == {torch.float32}
    assert any("score" in name for name in trained)
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(steps[-1]["rewards/margins"]) > 1e-3


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
    for row, other in zip(a, b, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=2e-4)


def test_lora_trains_its_matrices_and_the_head_and_loads_again(folders, tmp_path, capsys):
    pytest.importorskip("peft")
    args = arguments(folders, "llama", run_dir=str(tmp_path / "run"), lora_rank=2)
    reward_model.train(args)
    capsys.readouterr()
    reward_model.evaluate_saved(args)
    last = [row for row in rows(tmp_path / "run") if "eval/accuracy" in row][-1]
    assert f"eval/loss {last['eval/loss']:.4g}," in capsys.readouterr().out
    parts = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert parts
    assert all("lora_" in name or "score" in name for name in parts)
    assert any("score" in name for name in parts)
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[-1]["loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_a_model_whose_attention_looks_ahead_is_refused(folders, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folders / "gpt2")
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, num_labels=1)  # fmt: skip
    for part in AutoModelForSequenceClassification.from_config(config), tokenizer:
        part.save_pretrained(tmp_path / "bert")
    with pytest.raises(SystemExit) as end:
        reward_model.train(arguments(folders, model_name=str(tmp_path / "bert")))
    assert end.value.code == 2
    assert "causal" in capsys.readouterr().err


def test_a_reply_longer_than_the_model_is_refused(folders, tmp_path, capsys):
    model, tokenizer, _, _ = loaded(folders)
    lines = [
        {"prompt": "review the film : ", "reply": " ".join(["good"] * n)} for n in (59, 60)
    ]  # and four, and the end
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit) as end:
        reward_model.print_rewards(model, tokenizer, str(tmp_path / "replies.jsonl"))
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out.count("reward") == 1
    assert "line 2 has 65 tokens" in err


def test_replies_are_for_evaluation_alone(folders, capsys):
    with pytest.raises(SystemExit) as end:
        arguments(folders, replies="x.jsonl")
    assert end.value.code == 2
    assert "--evaluate" in capsys.readouterr().err


@pytest.mark.slow
def test_reviews_are_made_and_learned(tmp_path):
    """The default task with an eighth of its pairs."""
    run_dir = tmp_path / "run"
    args = reward_model.Args(num_pairs=5000, total_timesteps=9000, eval_frequency=4500, run_dir=str(run_dir))
    reward_model.train(args)
    first, last = (row for row in rows(run_dir) if "eval/accuracy" in row)
    assert first["eval/bayes_accuracy"] == last["eval/bayes_accuracy"] == pytest.approx(0.745, abs=0.05)
    assert last["eval/accuracy"] > 0.85 * last["eval/bayes_accuracy"]
    assert last["eval/loss"] < math.log(2) - 0.03
    assert last["eval/calibration_error"] < 0.1
    labels = [record for _, record in reward_model.read_records(str(run_dir / "pairs.jsonl"))]
    rewards = [[reward_model.true_reward(r["prompt"], r[name]) for name in ("chosen", "rejected")] for r in labels]
    _, held_out = reward_model.split(labels, args)
    right = [(better > worse) + (better == worse) / 2 for better, worse in (rewards[row] for row in held_out)]
    assert last["eval/bayes_accuracy"] == pytest.approx(np.mean(right))


def test_a_full_disk_is_an_error_of_the_system_and_spares_what_was_there(tmp_path):
    """Libraries in Rust raise exceptions of their own."""

    class Part:
        def __init__(self, error):
            self.error = error

        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            (folder / "file").write_text("new")
            if self.error:
                raise self.error

    folder = tmp_path / "model"
    reward_model.save_pretrained(folder, Part(None))
    with pytest.raises(OSError, match="No space left") as caught:
        reward_model.save_pretrained(folder, Part(None), Part(Exception("I/O error: something (os error 28)")))
    assert caught.value.errno == 28
    with pytest.raises(KeyError):
        reward_model.save_pretrained(folder, Part(KeyError("x")))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (folder / "stale").write_text("old")
    reward_model.save_pretrained(folder, Part(None))
    assert [path.name for path in folder.iterdir()] == ["file"]
