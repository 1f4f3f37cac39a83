"""reward_model.py against scores read by hand, losses computed by hand and by TRL, and rewards that are known."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, rows, timeless
from safetensors.torch import load_file
from text_models import SIZES, bfloat16_autocast, pairs_of_words, save_model, tokenizer_of, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
)

from algorithms import dpo, grpo, ppo_rlhf, reward_model, sft

SCRIPTS = [dpo, grpo, ppo_rlhf, reward_model, sft]
SCRIPT = ROOT / "algorithms" / "reward_model.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small language models with random weights, and 60 pairs of very different lengths."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "gpt2", "gpt2", "gpt2")  # its only special token is its end token
    save_model(folder / "llama", "llama", "llama2")
    write_jsonl(folder / "pairs.jsonl", pairs_of_words())
    return folder


def arguments(folders, name="gpt2", **changes):
    flags = {"model_name": str(folders / name), "dataset": str(folders / "pairs.jsonl"), "device": "cpu",
             "batch_size": 8, "total_timesteps": 96, "eval_frequency": 48, "checkpoint_frequency": 40,
             "learning_rate": 1e-2}  # fmt: skip
    return reward_model.Args(**flags | changes)


def started(folders, name="gpt2", **changes):
    """A run that has begun, with its pairs for training and those held out. Its head is not at 0."""
    args = arguments(folders, name, **changes)
    run = reward_model.Run(args)
    model = reward_model.load(run, args.model_name, args)
    with torch.no_grad():
        model.score.weight.copy_(torch.linspace(-1, 1, model.score.weight.numel())[None])
    pairs, held_out = reward_model.training_and_held_out(run.tokenizer, model, args)
    reward_model.set_padding(run.tokenizer, model, pairs, args)
    run.start(model, torch.optim.SGD(model.parameters(), 0.1))
    return run, pairs, held_out


@pytest.mark.parametrize("name", SIZES)
def test_the_reward_is_read_at_the_end_token_whatever_the_padding(folders, name):
    run, pairs, _ = started(folders, name, run_dir="run")
    assert run.tokenizer.pad_token_id == run.bare.config.pad_token_id != run.tokenizer.eos_token_id
    together = torch.stack(reward_model.pair_rewards(run.model, pairs[:6], run.tokenizer.pad_token_id), 1)
    for pair, values in zip(pairs[:6], together.tolist(), strict=True):
        for reply, value in zip((pair.chosen, pair.rejected), values, strict=True):
            assert reply[-1] == run.tokenizer.eos_token_id
            with torch.no_grad():
                hidden = run.bare.base_model(input_ids=torch.tensor([pair.prompt + reply])).last_hidden_state
            assert value == pytest.approx((hidden[0, -1] @ run.bare.score.weight[0]).item(), abs=1e-5)
            assert value != pytest.approx((hidden[0, -2] @ run.bare.score.weight[0]).item(), abs=1e-3)


def test_the_score_is_that_of_the_end_tokens_position():
    """T29: a model without layers, whose hidden state says at which position it is and nothing else."""
    length = 32
    config = GPT2Config(n_positions=length, n_embd=length, n_layer=0, n_head=1, num_labels=1, vocab_size=9,
                        pad_token_id=0, eos_token_id=1)  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(length))  # the last layer norm centres and scales it
        model.score.weight.copy_(torch.arange(length)[None] * ((length - 1) / length**2) ** 0.5)
    pairs = [reward_model.Pair([2] * (i + 1), [3] * (2 * i) + [1], [4] * (9 - i) + [1], "") for i in range(7)]
    middle = (length - 1) / 2  # which centring takes away from all alike
    for batch in pairs, pairs[:1], pairs[5:7]:
        with torch.no_grad():
            positions = torch.stack(reward_model.pair_rewards(model, batch, 0), 1) + middle
        expected = [[len(p.prompt + reply) - 1 for reply in (p.chosen, p.rejected)] for p in batch]
        assert positions.round().int().tolist() == expected


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
    """Two bins: three pairs at confidence 0.62, of which two are right; one sure and wrong at 0.92."""
    logit = {p: math.log(p / (1 - p)) for p in (0.62, 0.92)}
    margins = torch.tensor([logit[0.62], logit[0.62], -logit[0.62], -logit[0.92]]).double()
    assert reward_model.calibration_error(margins) == pytest.approx((3 * abs(2 / 3 - 0.62) + 0.92) / 4)
    generator = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(100_000, generator=generator).abs()
    right = torch.rand(100_000, generator=generator) < margins.sigmoid()
    assert reward_model.calibration_error(torch.where(right, margins, -margins)) < 0.01
    assert reward_model.calibration_error(torch.zeros(3)) == 0, "a head at 0 guesses, and says so"


def test_loss_is_that_of_trl(folders, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    run, _, _ = started(folders, run_dir="run")
    records = pairs_of_words()[:8]
    write_jsonl(tmp_path / "eight.jsonl", records)
    records = [{name: r["prompt"] + r[name] for name in ("chosen", "rejected")} for r in records]
    config = trl.RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=8,
                              max_length=None, gradient_checkpointing=False, bf16=False)  # fmt: skip
    trainer = trl.RewardTrainer(
        run.bare, args=config, train_dataset=Dataset.from_list(records), processing_class=run.tokenizer
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    expected = trainer.compute_loss(run.bare, batch).item()
    pairs = reward_model.read_pairs(str(tmp_path / "eight.jsonl"), None, run.tokenizer, 256, run.args)
    losses, _ = reward_model.bradley_terry_loss(*reward_model.pair_rewards(run.bare, pairs, run.tokenizer.pad_token_id))
    assert losses.mean().item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 2}, {"gradient_checkpointing": True}])
def test_micro_batches_and_checkpointing_change_nothing(folders, changes):
    results = []
    for number, more in enumerate(({}, changes)):
        run, pairs, _ = started(folders, run_dir=f"run{number}", **more)
        metrics = reward_model.update(run, pairs[:8], run.args)
        results.append((metrics, [parameter.detach() for parameter in run.bare.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_a_step_follows_the_mean_gradient_scaled_down_to_the_largest_norm(folders):
    run, pairs, _ = started(folders, run_dir="run")
    rewards = reward_model.pair_rewards(run.bare, pairs[:8], run.tokenizer.pad_token_id)
    losses, metrics = reward_model.bradley_terry_loss(*rewards)
    gradients = torch.autograd.grad(losses.mean(), list(run.bare.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    state = copy.deepcopy(run.bare.state_dict())
    for max_norm in 2 * norm, norm / 3:
        run.args.max_grad_norm = max_norm
        for _ in range(2):  # no gradient is left from the first time
            run.bare.load_state_dict(state)
            old = [parameter.detach().clone() for parameter in run.bare.parameters()]
            result = reward_model.update(run, pairs[:8], run.args)
        for before, after, gradient in zip(old, run.bare.parameters(), gradients, strict=True):
            torch.testing.assert_close(after, before - 0.1 * min(1, max_norm / norm) * gradient, rtol=1e-4, atol=1e-6)
        assert result["losses/grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert [result[name] for name in reward_model.METRICS] == pytest.approx(metrics.mean(1).tolist(), rel=1e-4)


def test_a_run_starts_at_ln_2_repeats_itself_and_resumes_exactly(folders, monkeypatch, capsys):
    for run_dir, seed in ("one", 1), ("two", 1), ("other", 2):
        reward_model.train(arguments(folders, run_dir=run_dir, seed=seed))
    assert timeless(Path("one")) == timeless(Path("two"))
    assert timeless(Path("one")) != timeless(Path("other"))
    steps = [row for row in rows(Path("one")) if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["rewards/margins"] == 0
    assert sum(step["loss"] for step in steps[6:]) / 6 < math.log(2) - 1e-3
    rates = [1e-2 * min(1, step / 9.6) * (1 - (step - 8) / 96) for step in range(8, 97, 8)]
    assert [step["charts/learning_rate"] for step in steps] == pytest.approx(rates)
    update, count = reward_model.update, []

    def dies(*arguments):
        count.append(1)
        if len(count) == 9:
            raise ZeroDivisionError
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "update", dies)
        with pytest.raises(ZeroDivisionError):
            reward_model.train(arguments(folders, run_dir="cut"))
    reward_model.train(reward_model.saved_args("cut", resume=True))
    assert timeless(Path("one")) == timeless(Path("cut"))
    last = [row for row in rows(Path("one")) if "eval/loss" in row][-1]
    result = reward_model.evaluate_saved(reward_model.saved_args("one", evaluate=True))
    assert result == {name: pytest.approx(value, rel=1e-4) for name, value in last.items() if "eval" in name}


@pytest.mark.parametrize("name", SIZES)
def test_the_saved_folder_scores_the_same_in_any_batch_in_plain_transformers(folders, name, capsys):
    """Also where the model's tokenizer had no padding token, or its end token for one. And with nothing but a file."""
    reward_model.train(arguments(folders, name, run_dir="run", total_timesteps=48))
    texts = [{"prompt": "9 the cup: ", "reply": "good"}, {"prompt": "9 the cup: ", "reply": "the music is bad bad bad"}]
    write_jsonl(Path("replies.jsonl"), texts)
    config = json.loads(Path("run/config.json").read_text())
    config["args"]["dataset"] = "/no/longer/there.jsonl"  # it isn't needed to score replies
    Path("run/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    args = reward_model.saved_args("run", evaluate=True, replies="replies.jsonl")
    assert reward_model.evaluate_saved(args) == {}
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [{k: v for k, v in line.items() if k != "reward"} for line in scored] == texts
    model, tokenizer = (
        auto.from_pretrained("run/model") for auto in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    whole = [text["prompt"] + text["reply"] + tokenizer.eos_token for text in texts]
    with torch.no_grad():
        together = model(**tokenizer(whole, padding=True, return_tensors="pt")).logits[:, 0].tolist()
        alone = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in whole]
    assert together == pytest.approx(alone, abs=1e-5)
    assert [line["reward"] for line in scored] == pytest.approx(alone, abs=1e-5)
    assert alone[0] != pytest.approx(alone[1], abs=1e-4)
    assert tokenizer.pad_token_id < model.get_input_embeddings().num_embeddings


def test_a_tokenizer_keeps_how_it_reads_texts(folders):
    run = reward_model.Run(arguments(folders))
    for name in SIZES:
        model = reward_model.load(run, str(folders / name), run.args)
        reward_model.set_padding(run.tokenizer, model, [], run.args)
        plain = tokenizer_of({"gpt2": "gpt2", "llama": "llama2"}[name])
        for text in "the cup!", "<unk> & !!", "<pad>":
            assert run.tokenizer(text).input_ids == plain(text).input_ids


def chats(folder):
    """A model whose end token is <|endoftext|>, as the tokenizer says, but turns end with <|im_end|>; and pairs."""
    save_model(folder, "llama", "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    write_jsonl(folder / "pairs.jsonl", pairs_of_words())
    return {"model_name": str(folder), "dataset": str(folder / "pairs.jsonl"), "chat": True, "device": "cpu",
            "batch_size": 8, "total_timesteps": 16, "run_dir": "run"}  # fmt: skip


def test_no_token_that_ends_a_reply_in_the_data_is_padding(tmp_path):
    reward_model.train(reward_model.Args(**chats(tmp_path / "model")))
    model, tokenizer = (
        auto.from_pretrained("run/model") for auto in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    assert tokenizer.pad_token not in ("<|im_end|>", "<|endoftext|>")
    prompt, reply = reward_model.encode(tokenizer, [{"role": "user", "content": "hi"}], ["yes"])
    assert tokenizer.decode(reply[-1:]) == "<|im_end|>"
    with torch.no_grad():
        state = model.base_model(input_ids=torch.tensor([prompt + reply])).last_hidden_state[0, -1]
        rewards = reward_model.pair_rewards(
            model, [reward_model.Pair(prompt, reply, reply[:1] + reply, "")], tokenizer.pad_token_id
        )
    assert rewards[0].item() == pytest.approx((state @ model.score.weight[0]).item(), abs=1e-6)


def test_replies_of_a_chat_are_read_as_those_of_the_data(tmp_path, capsys):
    reward_model.train(reward_model.Args(**chats(tmp_path / "model")))
    user, says = ({"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yes")))
    files = [{"prompt": "hi", "reply": "yes"}], [{"prompt": [user], "reply": [says]}]
    files += ([{"system": "be kind", "prompt": "hi", "reply": "yes"}],)
    capsys.readouterr()
    for file in files:
        write_jsonl(Path("replies.jsonl"), file)
        reward_model.evaluate_saved(reward_model.saved_args("run", evaluate=True, replies="replies.jsonl"))
    rewards = [json.loads(line)["reward"] for line in capsys.readouterr().out.splitlines()]
    model, tokenizer = (
        auto.from_pretrained("run/model") for auto in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nyes<|im_end|>"
    texts = [asked, asked, "<|im_start|>system\nbe kind<|im_end|>\n" + asked]
    expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert rewards == pytest.approx(expected, abs=1e-6)
    assert rewards[0] != pytest.approx(rewards[2], abs=1e-5)
    write_jsonl(Path("replies.jsonl"), [{"question": "hi", "reply": "yes"}])
    with pytest.raises(reward_model.UsageError, match="columns prompt and reply, not question, reply"):
        reward_model.evaluate_saved(reward_model.saved_args("run", evaluate=True, replies="replies.jsonl"))


def test_lora_trains_its_matrices_and_the_head_and_loads_again(folders):
    flags = {"lora_rank": 2, "learning_rate": 3e-2}
    reward_model.train(arguments(folders, "llama", run_dir="run", **flags))
    saved = load_file("run/model/adapter_model.safetensors")
    assert any("score" in name for name in saved)
    assert all("score" in name or "lora_" in name for name in saved)
    steps = [row for row in rows(Path("run")) if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(steps[-1]["rewards/margins"]) > 1e-4
    last = [row for row in rows(Path("run")) if "eval/loss" in row][-1]
    result = reward_model.evaluate_saved(reward_model.saved_args("run", evaluate=True))
    assert result["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-4)
    with pytest.raises(reward_model.UsageError, match="could be padding"):
        reward_model.train(arguments(folders, "gpt2", run_dir="other", **flags))


def test_rewards_of_a_lora_adapter_are_read_where_it_learned_them(folders, tmp_path, capsys):
    """Its base may pad with the end token, and an adapter's folder has no config that says otherwise."""
    eos = tokenizer_of("qwen2").eos_token_id
    base = save_model(tmp_path / "base", "llama", "qwen2", pad_token_id=eos)
    flags = {"model_name": str(base), "lora_rank": 2, "learning_rate": 3e-2, "run_dir": "run"}
    reward_model.train(arguments(folders, **flags))
    texts = [
        {"prompt": "hi ", "reply": x, "at": "2024-01-05T10:00:00"} for x in ("yes", "no", "a longer one")
    ]  # a date
    write_jsonl(Path("replies.jsonl"), texts)
    capsys.readouterr()
    reward_model.evaluate_saved(reward_model.saved_args("run", evaluate=True, replies="replies.jsonl"))
    printed = [json.loads(line)["reward"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    judge = reward_model.load_reward("run/model", arguments(folders), torch.device("cpu"))
    assert judge(["hi "] * 3, [text["reply"] for text in texts]) == pytest.approx(printed, abs=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_autocast_does_not_round_rewards(folders, lora_rank):
    """To bfloat16, as all other products: two replies near 5 would tie that differ by less than 1/32."""
    with bfloat16_autocast():
        run, pairs, _ = started(folders, "llama", run_dir="run", lora_rank=lora_rank)
        model = reward_model.make_trainable(run.bare, "SEQ_CLS", run.args)
        rewards = torch.cat(reward_model.pair_rewards(model, pairs[:6], run.tokenizer.pad_token_id))
    assert rewards.dtype == torch.float32
    assert not torch.equal(rewards, rewards.bfloat16().float())
    rewards.sum().backward()
    (head,) = (part for name, part in model.named_parameters() if "score" in name and part.requires_grad)
    assert head.grad.any()


def test_lora_trains_float32_also_where_frozen_weights_are_bfloat16(folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = arguments(folders, "llama", lora_rank=2, device="auto")
    model = reward_model.load_model(args.model_name, AutoModelForSequenceClassification, args)
    model = reward_model.make_trainable(model, "SEQ_CLS", args)
    trained, frozen = ([p for p in model.parameters() if p.requires_grad == is_trained] for is_trained in (True, False))
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert torch.bfloat16 in {parameter.dtype for parameter in frozen}
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits.sum().backward()
    assert any(parameter.grad is not None for parameter in trained)


def test_tokens_that_were_added_to_the_tokenizer_alone_are_learned_or_refused(folders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folders / "llama")
    tokenizer.add_tokens(["<turn>"])
    AutoModelForCausalLM.from_pretrained(folders / "llama").save_pretrained(tmp_path / "added")
    tokenizer.save_pretrained(tmp_path / "added")
    pairs = [row | {"prompt": f"<turn> {i} "} for i, row in enumerate(pairs_of_words())]
    data = write_jsonl(tmp_path / "data.jsonl", pairs)
    flags = {"model_name": str(tmp_path / "added"), "dataset": str(data), "total_timesteps": 8}
    reward_model.train(arguments(folders, run_dir="run", **flags))
    model = AutoModelForSequenceClassification.from_pretrained("run/model")
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    with pytest.raises(reward_model.UsageError, match="lacks an embedding"):
        reward_model.train(arguments(folders, run_dir="other", lora_rank=2, **flags))


def test_a_reward_model_goes_on_with_its_head(folders):
    reward_model.train(arguments(folders, run_dir="run", total_timesteps=48))
    args = arguments(folders, model_name="run/model")
    model = reward_model.load(reward_model.Run(args), "run/model", args)
    assert model.score.weight.abs().sum() > 0


def test_the_accuracy_of_a_known_reward_stands_beside(folders):
    Path("judge.py").write_text("def by_length(prompt, reply):\n    return len(reply)\n")
    run, _, held_out = started(folders, run_dir="run", reward="judge.py:by_length")
    texts = [[run.tokenizer.decode(ids, skip_special_tokens=True) for ids in pair[1:3]] for pair in held_out]
    wins = [(len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in texts]
    assert reward_model.evaluate(run, held_out)["eval/reward_accuracy"] == pytest.approx(sum(wins) / len(wins))
    for wrong in "judge.py:nothing", "nowhere.py:f", "judge.py":
        with pytest.raises(reward_model.UsageError, match=r"--reward .* must be FILE.py:function"):
            reward_model.load_reward(wrong, arguments(folders), torch.device("cpu"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("function", "words"),
    [("(x, y): return None", "a number, not None"), ("(x, y): return 'good'", "a number, not 'good'"),
     ("(x, y): return [1.0]", "a number"), ("(x, y): return float('nan')", "a number, not nan"),
     ("(x): return 1", "FILE.py:function .prompt, reply.")],
)  # fmt: skip
def test_a_function_that_rewards_must_return_a_number(script, function, words):
    Path("judge.py").write_text(f"def f{function}\n")
    with pytest.raises(script.UsageError, match=f"--reward judge.py:f must .*{words}"):
        script.load_reward("judge.py:f", None, torch.device("cpu"))(["a"], ["b"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_function_that_rewards_may_change_what_it_is_given(script):
    Path("judge.py").write_text(
        "import numpy as np\ndef f(x, y):\n    return np.float32(len(x.pop()['content'] + y))\n"
    )
    chat = [{"role": "user", "content": "hi"}]
    assert script.load_reward("judge.py:f", None, torch.device("cpu"))([chat, chat], ["a", ""]) == [3.0, 2.0]
    assert len(chat) == 1


def test_a_model_whose_attention_looks_ahead_is_refused(folders, tmp_path):
    config = BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, num_labels=1)  # fmt: skip
    for part in AutoModelForSequenceClassification.from_config(config), tokenizer_of("gemma"):
        part.save_pretrained(tmp_path / "bert")
    with pytest.raises(reward_model.UsageError, match="causal"):
        reward_model.train(arguments(folders, model_name=str(tmp_path / "bert")))
    assert not Path("runs").exists()


def test_replies_are_for_evaluation_alone(folders):
    with pytest.raises(reward_model.UsageError, match="--evaluate"):
        arguments(folders, replies="x.jsonl")
