"""dpo.py against log-probabilities summed by hand, losses computed by hand and by TRL, and a reward that is known.

What dpo.py and reward_model.py have in common (data, chat templates, models, runs of several processes) is tested here,
on dpo.py; test_consistency.py holds reward_model.py to the same text.
"""

import copy
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, rows, timeless
from safetensors.torch import load_file
from text_models import SIZES, TEMPLATES, bfloat16_autocast, pairs_of_words, save_model, tokenizer_of, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    CTRLConfig,
    Gemma3Config,
    MambaConfig,
    OPTConfig,
    XGLMConfig,
)

from algorithms import dpo, reward_model, sft

SCRIPT = ROOT / "algorithms" / "dpo.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models with random weights, and 60 pairs of very different lengths."""
    folder = tmp_path_factory.mktemp("models")
    for name in SIZES:
        save_model(folder / name, name)
    write_jsonl(folder / "pairs.jsonl", pairs_of_words())
    return folder


def arguments(folders, name="gpt2", **changes):
    flags = {"model_name": str(folders / name), "dataset": str(folders / "pairs.jsonl"), "device": "cpu",
             "batch_size": 8, "total_timesteps": 96, "eval_frequency": 48, "checkpoint_frequency": 40,
             "learning_rate": 1e-3, "eval_replies": 8, "max_new_tokens": 8}  # fmt: skip
    return dpo.Args(**flags | changes)


def started(folders, name="gpt2", **changes):
    """A run that has begun, with its pairs for training."""
    args = arguments(folders, name, **changes)
    run = dpo.Run(args)
    model = dpo.load(run, args.model_name, args)
    pairs, held_out = dpo.training_and_held_out(run.tokenizer, model, args)
    run.reference = None if args.lora_rank else copy.deepcopy(model)
    model = dpo.make_trainable(model, "CAUSAL_LM", args)
    run.start(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
    run.actor = run.bare
    return run, pairs, held_out


def by_hand(model, prompt, reply):
    """The log-probability of the reply, token by token, from one unpadded pass for each."""
    total = 0.0
    for i in range(len(reply)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + reply[:i]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[reply[i]].item()
    return total


# ---- The loss


@pytest.mark.parametrize("name", SIZES)
def test_log_probability_is_the_sum_over_the_replys_tokens_and_its_end_whatever_the_padding(folders, name):
    run, pairs, _ = started(folders, name, run_dir="run")
    pairs = [*pairs[:4], dpo.Pair(pairs[0].prompt[:2], pairs[0].chosen, pairs[0].rejected[:2], "")]
    eos = run.tokenizer.eos_token_id
    assert all(ids[-1] == eos and ids.count(eos) == 1 for pair in pairs[:4] for ids in pair[1:3])
    expected = [[by_hand(run.bare, pair.prompt, ids) for ids in pair[1:3]] for pair in pairs]
    replies = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    together = torch.stack(dpo.log_probs(run.model, [pair.prompt for pair in pairs] * 2, replies).chunk(2), 1)
    torch.testing.assert_close(together.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-4)
    for pair, values in zip(pairs, expected, strict=True):
        alone = dpo.log_probs(run.model, [pair.prompt] * 2, [pair.chosen, pair.rejected])
        assert alone.tolist() == pytest.approx(values, rel=1e-5)


LOG_PROBS = [torch.tensor(x) for x in ([-5.0, -7.0], [-9.0, -6.0], [-6.0, -6.5], [-8.0, -7.0])]
LENGTHS = torch.tensor([[2, 4], [3, 5]])


def loss_of(log_probs=LOG_PROBS, lengths=LENGTHS, **flags):
    return dpo.dpo_loss(*log_probs, lengths, dpo.Args(**flags))


@pytest.mark.parametrize(
    ("flags", "expected"),  # the implicit margins are 0.1 * (1 + 1) and 0.1 * (-0.5 - 1)
    [
        ({}, [math.log(1 + math.exp(-0.2)), math.log(1 + math.exp(0.15))]),
        ({"label_smoothing": 0.1}, [0.9 * math.log(1 + math.exp(-0.2)) + 0.1 * math.log(1 + math.exp(0.2)),
                                    0.9 * math.log(1 + math.exp(0.15)) + 0.1 * math.log(1 + math.exp(-0.15))]),
        ({"loss_type": "hinge"}, [0.8, 1.15]),
        ({"loss_type": "ipo"}, [(2 - 5) ** 2, (-1.5 - 5) ** 2]),
        ({"nll_coef": 0.5}, [math.log(1 + math.exp(-0.2)) + 0.5 * 5 / 2, math.log(1 + math.exp(0.15)) + 0.5 * 7 / 4]),
        ({"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5},  # 2 (-5/2 + 9/3) = 1 and 2 (-7/4 + 6/5) = -1.1
         [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(1.6))]),
    ],
)  # fmt: skip
def test_losses_by_hand(flags, expected):
    losses, metrics = loss_of(**flags)
    assert losses.tolist() == pytest.approx(expected)
    values = dict(zip(dpo.METRICS, metrics.tolist(), strict=True))
    without = loss_of(**flags | {"nll_coef": 0.0})[0]
    assert values["loss"] == pytest.approx(without.tolist())
    if flags.get("loss_type") != "simpo":
        assert values["rewards/chosen"] == pytest.approx([0.1, -0.05])
        assert values["rewards/rejected"] == pytest.approx([-0.1, 0.1])
        assert values["rewards/margins"] == pytest.approx([0.2, -0.15])
        assert values["rewards/accuracies"] == [1, 0]
        tie = loss_of([torch.ones(2)] * 4, **flags)[1]
        assert tie[dpo.METRICS.index("rewards/accuracies")].tolist() == [0.5, 0.5]
    assert values["logps/chosen"] == [-5, -7]
    assert values["logps/rejected"] == [-9, -6]


def test_the_default_loss_is_the_papers():
    args = dpo.Args()
    assert (args.loss_type, args.beta, args.label_smoothing, args.nll_coef) == ("sigmoid", 0.1, 0, 0)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected(loss_type):
    log_probs = [x.clone().requires_grad_() for x in LOG_PROBS]
    loss_of(log_probs, loss_type=loss_type)[0].sum().backward()
    assert (log_probs[0].grad < 0).all()
    assert (log_probs[1].grad > 0).all()


def test_simpo_asks_no_reference(folders):
    run, pairs, _ = started(folders, run_dir="run", loss_type="simpo", beta=2.0)
    run.reference = run.actor = None
    losses, _ = dpo.loss_of_pairs(run, pairs[:1], run.args)
    rewards = [2 * by_hand(run.bare, pairs[0].prompt, reply) / len(reply) for reply in pairs[0][1:3]]
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(rewards[1] - rewards[0] + 0.5))], rel=1e-4)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        loss_of([torch.zeros(2, 1), *LOG_PROBS[1:]])


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_losses_are_those_of_trl(folders, tmp_path, loss_type):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    run, _, _ = started(folders, loss_type=loss_type, beta=0.3, run_dir="run")
    other = copy.deepcopy(run.bare)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01
    records = pairs_of_words()[:8]
    config = trl.DPOConfig(
        output_dir=str(tmp_path), beta=0.3, loss_type=[loss_type], use_cpu=True, report_to=[], bf16=False,
        per_device_train_batch_size=8, max_length=None, gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folders / "gpt2")
    trainer = trl.DPOTrainer(other, copy.deepcopy(run.bare), args=config, train_dataset=Dataset.from_list(records),
                             processing_class=tokenizer)  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    expected = trainer.compute_loss(other, batch).item()
    write_jsonl(tmp_path / "eight.jsonl", records)
    pairs = dpo.read_pairs(str(tmp_path / "eight.jsonl"), None, run.tokenizer, 256, run.args)
    run.model = other
    losses, _ = dpo.loss_of_pairs(run, pairs, run.args)
    assert losses.mean().item() == pytest.approx(expected, abs=1e-5)


# ---- Whole runs


def steps_of(run_dir):
    return [row for row in rows(Path(run_dir)) if "loss" in row]


def test_at_the_start_the_loss_is_ln_2_and_the_reference_never_changes(folders):
    before = {path: path.read_bytes() for path in (folders / "gpt2").iterdir()}
    result = dpo.train(arguments(folders, run_dir="run"))
    assert before == {path: path.read_bytes() for path in (folders / "gpt2").iterdir()}
    steps = steps_of("run")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(steps[-1]["rewards/margins"]) > 1e-3
    assert [row["global_step"] for row in steps] == [*range(8, 97, 8)]
    last = [row for row in rows(Path("run")) if "eval/kl" in row][-1]
    assert result == {name: value for name, value in last.items() if name.startswith("eval/")}
    assert last["eval/kl"] > 0
    assert last["eval/length"] <= 8


def test_a_step_follows_the_mean_gradient_scaled_down_to_the_largest_norm(folders):
    run, pairs, _ = started(folders, run_dir="run", nll_coef=0.7)
    with torch.no_grad():
        next(run.reference.parameters()).mul_(1.1)  # else all margins are 0
    losses, metrics = dpo.loss_of_pairs(run, pairs[:8], run.args)
    gradients = torch.autograd.grad(losses.mean(), list(run.bare.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    state = copy.deepcopy(run.bare.state_dict())
    for max_norm in 2 * norm, norm / 3:
        run.args.max_grad_norm = max_norm
        for _ in range(2):  # no gradient is left from the first time
            run.bare.load_state_dict(state)
            old = [parameter.detach().clone() for parameter in run.bare.parameters()]
            result = dpo.update(run, pairs[:8], run.args)
        for before, after, gradient in zip(old, run.bare.parameters(), gradients, strict=True):
            torch.testing.assert_close(after, before - 0.1 * min(1, max_norm / norm) * gradient, rtol=1e-4, atol=1e-6)
        assert result["losses/grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert [result[name] for name in dpo.METRICS] == pytest.approx(metrics.mean(1).tolist(), rel=1e-4)


def count_rows(sizes):
    return lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"]))


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size": 2}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}]
)
def test_micro_batches_and_checkpointing_change_nothing(folders, changes):
    results = []
    for number, more in enumerate(({}, changes)):
        run, pairs, _ = started(folders, "llama", run_dir=f"run{number}", **more)
        sizes = []
        run.bare.register_forward_pre_hook(count_rows(sizes), with_kwargs=True)
        with torch.no_grad():
            next(run.reference.parameters()).mul_(1.1)
        metrics = dpo.update(run, pairs[:8], run.args)
        results.append((metrics, [parameter.detach() for parameter in run.bare.parameters()]))
        assert sizes == [2 * run.micro_batch_size] * (8 // run.micro_batch_size)
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4, abs=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_a_run_repeats_itself_resumes_exactly_and_evaluates_as_it_did(folders, monkeypatch, capsys):
    for name, seed in ("one", 1), ("two", 1), ("other", 2):
        dpo.train(arguments(folders, run_dir=name, seed=seed))
    assert timeless(Path("one")) == timeless(Path("two"))
    assert timeless(Path("one")) != timeless(Path("other"))
    update, count = dpo.update, []

    def dies(*arguments):
        count.append(1)
        if len(count) == 9:
            raise ZeroDivisionError
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dpo, "update", dies)
        with pytest.raises(ZeroDivisionError):
            dpo.train(arguments(folders, run_dir="cut"))
    assert torch.load("cut/checkpoint.pt", weights_only=True)["step"] == 40
    shutil.rmtree("cut/model")  # as after a kill while it was replaced
    dpo.train(dpo.saved_args("cut", resume=True))
    assert timeless(Path("one")) == timeless(Path("cut"))
    files = [Path(name, "model", "model.safetensors").read_bytes() for name in ("one", "cut", "other")]
    assert files[0] == files[1] != files[2]
    capsys.readouterr()
    result = dpo.evaluate_saved(dpo.saved_args("one", evaluate=True))
    last = [row for row in rows(Path("one")) if "eval/kl" in row][-1]
    assert result == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in last.items() if "eval" in name}
    out = capsys.readouterr().out
    assert out.count("before") == out.count("after") == 3
    model = AutoModelForCausalLM.from_pretrained("one/model")
    assert AutoTokenizer.from_pretrained("one/model").eos_token == "<eos>"
    assert not torch.equal(next(model.parameters()), next(dpo.load_model(str(folders / "gpt2"), AutoModelForCausalLM,
                                                                        dpo.Args()).parameters()))  # fmt: skip


def test_evaluating_a_run_has_its_precision(folders):
    """Policy and reference alike: a policy that has not moved has a divergence of exactly 0."""
    with bfloat16_autocast():
        for rate in 1e-3, 1e-30:
            dpo.train(arguments(folders, run_dir=str(rate), learning_rate=rate, total_timesteps=48))
            result = dpo.evaluate_saved(dpo.saved_args(str(rate), evaluate=True))
            last = [row for row in rows(Path(str(rate))) if "eval/kl" in row][-1]
            assert [*result] == ["eval/loss", "eval/accuracy", "eval/margin", "eval/kl", "eval/length"]
            assert result == {name: value for name, value in last.items() if name in result}
    assert result["eval/kl"] == 0


def test_a_longer_run_goes_on(folders):
    dpo.train(arguments(folders, run_dir="run", total_timesteps=48))
    with pytest.raises(dpo.UsageError, match="n x --batch-size"):
        dpo.train(dpo.saved_args("run", resume=True, total_timesteps=97))
    with pytest.raises(dpo.UsageError, match="total_timesteps"):
        dpo.train(dpo.saved_args("run", resume=True, total_timesteps=40))
    dpo.train(dpo.saved_args("run", resume=True, total_timesteps=96))
    assert [row["global_step"] for row in steps_of("run")] == [*range(8, 97, 8)]


def test_lora_trains_its_matrices_alone_resumes_and_loads_in_plain_transformers(folders, monkeypatch):
    flags = {"lora_rank": 2, "learning_rate": 1e-2}
    dpo.train(arguments(folders, "llama", run_dir="run", **flags))
    parts = torch.load("run/checkpoint.pt", weights_only=True)["model"]
    assert parts
    assert all("lora_" in name for name in parts)
    config = json.loads(Path("run/model/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    steps = steps_of("run")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(steps[-1]["rewards/margins"]) > 1e-4
    assert rows(Path("run"))[-1]["eval/kl"] != 0, "the reference is without them, the policy with them"
    monkeypatch.setattr(dpo.Run, "stop_signal", signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        dpo.train(arguments(folders, "llama", run_dir="cut", **flags))
    assert end.value.code == 143
    monkeypatch.setattr(dpo.Run, "stop_signal", 0)
    dpo.train(dpo.saved_args("cut", resume=True))
    assert timeless(Path("cut")) == timeless(Path("run"))
    dpo.evaluate_saved(dpo.saved_args("run", evaluate=True))
    base, adapted = (AutoModelForCausalLM.from_pretrained(name) for name in (folders / "llama", "run/model"))
    ids = torch.arange(9)[None]
    merged = dpo.load_model("run/model", AutoModelForCausalLM, dpo.Args())
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4)
    dpo.train(arguments(folders, model_name="run/model", run_dir="second", total_timesteps=8,
                        lora_rank=2, learning_rate=1e-9))  # fmt: skip
    again = dpo.load_model("second/model", AutoModelForCausalLM, dpo.Args())
    torch.testing.assert_close(again(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    shutil.rmtree("second")
    dpo.train(arguments(folders, model_name="run/model", run_dir="second", total_timesteps=8, learning_rate=1e-9))
    whole = AutoModelForCausalLM.from_pretrained("second/model")
    torch.testing.assert_close(whole(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_becomes_part_of_weights_in_float32_also_on_cuda(folders, monkeypatch):
    """Where LoRA's frozen weights are bfloat16, in which its steps would be lost."""
    import peft

    flags = {"lora_rank": 2, "learning_rate": 1e-4, "total_timesteps": 16, "run_dir": "run"}
    dpo.train(arguments(folders, "llama", **flags))
    base = AutoModelForCausalLM.from_pretrained(folders / "llama").bfloat16().float()
    expected = peft.PeftModel.from_pretrained(base, "run/model").merge_and_unload().state_dict()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cpu")
    assert dpo.load_model(str(folders / "llama"), AutoModelForCausalLM, dpo.Args(lora_rank=2)).dtype == torch.bfloat16
    merged = dpo.load_model("run/model", AutoModelForCausalLM, dpo.Args(lora_rank=2)).state_dict()
    torch.testing.assert_close(merged, expected, rtol=0, atol=0)


# ---- Tokens


USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be kind"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
PROMPTS = {  # how a prompt of USER, and SYSTEM if it is allowed, looks in each family; what a reply "one" looks like
    "llama2": ("<s>[INST] hi [/INST]", "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhi [/INST]", " one </s>"),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "one<|eot_id|>",
    ),
    "qwen2": (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "one<|im_end|>",
    ),
    "qwen3": (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\none<|im_end|>",
    ),
    "gemma": ("<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", None, "one<end_of_turn>"),
    "mistral": ("<s>[INST] hi[/INST]", None, " one</s>"),
}


@pytest.mark.parametrize("family", PROMPTS)
def test_chats_of_each_family_end_where_their_turn_ends(family):
    tokenizer = tokenizer_of(family)
    plain, with_system, reply = PROMPTS[family]
    ids = dpo.encode(tokenizer, [USER], ["one", [{"role": "assistant", "content": "two"}]])
    assert [tokenizer.decode(row) for row in ids] == [plain, reply, reply.replace("one", "two")]
    if with_system:
        assert tokenizer.decode(dpo.encode(tokenizer, [SYSTEM, USER], ["one"])[0]) == with_system
    else:
        with pytest.raises(dpo.UsageError, match=r"System role|Only user"):
            dpo.encode(tokenizer, [SYSTEM, USER], ["one"])


@pytest.mark.parametrize("family", PROMPTS)
def test_chats_have_the_tokens_that_trl_gives_them_but_for_what_follows_the_end(family, tmp_path):
    """TRL learns the line break behind <|im_end|> and <end_of_turn> too, which no model has to write: it has stopped.
    We are right to cut it off. Elsewhere both agree."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    save_model(tmp_path / "model", "llama", family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    row = {"prompt": [USER], "chosen": [{"role": "assistant", "content": "one"}],
           "rejected": [{"role": "assistant", "content": "two"}]}  # fmt: skip
    if "tools" in TEMPLATES[family][2]:
        row["tools"] = [TOOL]
    config = trl.DPOConfig(str(tmp_path / "trl"), use_cpu=True, report_to=[], bf16=False, max_length=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = trl.DPOTrainer(model, args=config, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    theirs = trainer.train_dataset[0]
    prompt, chosen, rejected = dpo.encode(tokenizer, row["prompt"], [row["chosen"], row["rejected"]], row.get("tools"))
    assert prompt == theirs["prompt_ids"]
    line_break = tokenizer("\n", add_special_tokens=False).input_ids
    rest = line_break if family in ("qwen2", "qwen3", "gemma") else []
    assert [chosen + rest, rejected + rest] == [theirs["chosen_ids"], theirs["rejected_ids"]]


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "mistral"])
def test_tools_reach_the_template(family, tmp_path):
    tokenizer, args = tokenizer_of(family), dpo.Args()
    for tools in [TOOL], json.dumps([TOOL]):
        rows = [{"prompt": [USER], "chosen": "yes", "rejected": "no", "tools": tools}]
        rows += [{"prompt": [USER], "chosen": "yes", "rejected": "no", "tools": None}] * isinstance(tools, list)
        write_jsonl(tmp_path / "tools.jsonl", [{k: v for k, v in row.items() if v} for row in rows])
        first, *rest = dpo.read_pairs(str(tmp_path / "tools.jsonl"), None, tokenizer, 999, args)
        assert '"weather"' in tokenizer.decode(first.prompt)
        assert "None" not in tokenizer.decode(first.prompt)
        assert "null" not in tokenizer.decode(first.prompt)
        assert all("weather" not in tokenizer.decode(pair.prompt) for pair in rest)


def test_a_text_has_one_bos_and_its_end_once():
    tokenizer = tokenizer_of("llama2")
    for prompt in "[INST] hi [/INST]", "<s>[INST] hi [/INST]":
        ids = dpo.encode(tokenizer, prompt, [" one", " two </s>"])
        assert [tokenizer.decode(row) for row in ids] == ["<s>[INST] hi [/INST]", " one</s>", " two </s>"]
    assert [tokenizer.decode(row) for row in dpo.encode(tokenizer, "", ["", "one"])] == ["<s>", "</s>", "one</s>"]
    chatml = tokenizer_of("qwen2")
    ids = dpo.encode(chatml, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", ["one<|im_end|>\n", "two "])
    assert [chatml.decode(row) for row in ids[1:]] == ["one<|im_end|>", "two <|im_end|>"]
    assert [chatml.decode(row) for row in dpo.encode(chatml, "", ["one"])] == ["<|im_end|>", "one<|im_end|>"]


def test_where_a_token_spans_prompt_and_reply_the_prompt_ends_before_it():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(words, [("a", "b")])), eos_token="<eos>")
    assert dpo.encode(tokenizer, "ca", ["b", "c"]) == [[3], [4, 0], [1, 3, 0]]


# ---- People's data: layouts


def texts_of(rows, family="qwen3", path="data.jsonl", **flags):
    """What the script makes of the first row: the text of prompt, chosen and rejected."""
    tokenizer = tokenizer_of(family)
    pair = dpo.read_pairs(str(write_jsonl(Path(path), rows)), None, tokenizer, 999, dpo.Args(**flags))[0]
    return [tokenizer.decode(ids) for ids in pair[:3]]


def says(text):
    return {"role": "assistant", "content": text}


def in_parts(role, text):
    return {"role": role, "content": [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]}


ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
ASKED_KINDLY = "<|im_start|>system\nbe kind<|im_end|>\n" + ASKED
YES, NO = "<think>\n\n</think>\n\nyes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"
LAYOUTS = {
    "TRL, texts": ({"prompt": "hi ", "chosen": "yes", "rejected": "no"}, ["hi ", "yes<|im_end|>", "no<|im_end|>"]),
    "TRL, chats": ({"prompt": [USER], "chosen": [says("yes")], "rejected": [says("no")]}, [ASKED, YES, NO]),
    "TRL, without a prompt": ({"chosen": [USER, says("yes")], "rejected": [USER, says("no")]}, [ASKED, YES, NO]),
    "the prompt repeated": ({"prompt": [USER], "chosen": [USER, says("yes")], "rejected": [USER, says("no")]},
                            [ASKED, YES, NO]),
    "a text before a chat": ({"prompt": "hi", "chosen": [says("yes")], "rejected": [says("no")]}, [ASKED, YES, NO]),
    "HH-RLHF": ({"chosen": "\n\nHuman: hi\n\nAssistant: I say yes", "rejected": "\n\nHuman: hi\n\nAssistant: I say no"},
                ["\n\nHuman: hi\n\nAssistant:", " I say yes<|im_end|>", " I say no<|im_end|>"]),
    "UltraFeedback binarized": (
        {"prompt": "hi", "prompt_id": "1", "chosen": [USER, says("yes")], "rejected": [USER, says("no")],
         "messages": [USER, says("yes")], "score_chosen": 8.0, "score_rejected": 5.0}, [ASKED, YES, NO]),
    "orca pairs": ({"system": "be kind", "question": "hi", "chosen": "yes", "rejected": "no"}, [ASKED_KINDLY, YES, NO]),
    "orca pairs, no system": ({"system": "", "question": "hi", "chosen": "yes", "rejected": "no"}, [ASKED, YES, NO]),
    "argilla, orca": ({"system": "be kind", "input": "hi", "chosen": "yes", "rejected": "no", "generations": ["a", "b"],
                       "rating": [9.0, 7.0]}, [ASKED_KINDLY, YES, NO]),
    "argilla, dpo-mix": ({"dataset": "x", "chosen": [USER, says("yes")], "rejected": [USER, says("no")],
                          "chosen_rating": 5.0}, [ASKED, YES, NO]),
    "argilla, responses": ({"instruction": "hi ", "chosen_response": "yes", "rejected_response": "no"},
                           ["hi ", "yes<|im_end|>", "no<|im_end|>"]),
    "OpenRLHF": ({"chosen": [SYSTEM, USER, says("yes")], "rejected": [SYSTEM, USER, says("no")]},
                 [ASKED_KINDLY, YES, NO]),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yes"},
                  "rejected": {"from": "gpt", "value": "no"}}, [ASKED, YES, NO]),
    "contents of parts": ({"chosen": [in_parts("user", "hi"), in_parts("assistant", "yes")],
                           "rejected": [in_parts("user", "hi"), in_parts("assistant", "no")]}, [ASKED, YES, NO]),
    "chats as JSON, in CSV": ({"chosen": json.dumps([USER, says("yes")]), "rejected": json.dumps([USER, says("no")])},
                              [ASKED, YES, NO]),
    "roles of other names": (
        {"prompt": [{"role": "Human", "content": "hi"}], "chosen": [{"from": "chatgpt", "value": "yes"}],
         "rejected": [{"role": "Assistant", "content": "no"}]}, [ASKED, YES, NO]),
    "the system turn twice": ({"system": "be kind", "chosen": [SYSTEM, USER, says("yes")],
                               "rejected": [SYSTEM, USER, says("no")]}, [ASKED_KINDLY, YES, NO]),
    "a text prompt repeated": ({"prompt": "Q: hi\nA:", "chosen": "Q: hi\nA: yes", "rejected": "Q: hi\nA: no"},
                               ["Q: hi\nA:", " yes<|im_end|>", " no<|im_end|>"]),
    "a greeting returned": ({"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi"},
                            ["Hi", "Hi you<|im_end|>", "Hi<|im_end|>"]),
    "replies with a common beginning": ({"problem": "1 + 1?", "chosen": "Step 1: 2", "rejected": "Step 1: 3"},
                                        ["1 + 1?", "Step 1: 2<|im_end|>", "Step 1: 3<|im_end|>"]),
    "replies that are JSON": ({"prompt": "hi ", "chosen": '[{"value": 3}, {"value": 4}]', "rejected": '[{"role": 3}]'},
                              ["hi ", '[{"value": 3}, {"value": 4}]<|im_end|>', '[{"role": 3}]<|im_end|>']),
    "Alpaca": ({"instruction": "hi", "input": "you ", "chosen": "yes", "rejected": "no"},
               ["hi\n\nyou ", "yes<|im_end|>", "no<|im_end|>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_as_it_is(name, capsys):
    row, expected = LAYOUTS[name]
    assert texts_of([row, row]) == expected
    unused = row.keys() - {n for names in dpo.USUAL.values() for n in names}
    out = capsys.readouterr().out
    assert all(column in out.split("not used")[1] for column in unused), "no column is left out without a word"


SHP = {"history": "hi ", "human_ref_A": "yes", "human_ref_B": "no", "labels": 1}
OTHER_LAYOUTS = {  # the rows, and the lines with which --convert reads them
    "SHP": ([SHP, SHP | {"labels": 0}], """
        [{"prompt": r["history"], "chosen": r["human_ref_" + "BA"[r["labels"]]],
          "rejected": r["human_ref_" + "AB"[r["labels"]]]} for r in rows]"""),
    "Nectar": ([{"prompt": "hi ", "answers": [{"answer": a, "rank": r, "model": "m"} for a, r in
                                              (("so", 2.0), ("no", 3.0), ("yes", 1.0))]}], """
        [{"prompt": r["prompt"], "chosen": a[0]["answer"], "rejected": a[-1]["answer"]} for r in rows
         for a in [sorted(r["answers"], key=lambda answer: answer["rank"])]]"""),
    "HelpSteer2": ([{"prompt": "hi ", "response": a, "helpfulness": h} for a, h in (("no", 1), ("yes", 4))], """
        [{"prompt": a["prompt"], "chosen": max(a, b, key=lambda r: r["helpfulness"])["response"],
          "rejected": min(a, b, key=lambda r: r["helpfulness"])["response"]} for a, b in zip(*[iter(rows)] * 2)]"""),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_another_layout_is_refused_and_read_with_the_flag_that_the_answer_names(name):
    data, lines = OTHER_LAYOUTS[name]
    with pytest.raises(dpo.UsageError, match=r"has the columns .*--convert"):
        texts_of(data)
    Path("convert.py").write_text(f"def pairs(rows):\n    return {lines.strip()}\n")
    assert texts_of(data, convert="convert.py:pairs") == ["hi ", "yes<|im_end|>", "no<|im_end|>"]


def test_columns_of_other_names_are_named_by_flags():
    row = {"q": "hi ", "good": "yes", "poor": "no"}
    with pytest.raises(dpo.UsageError, match=r"has the columns q, good, poor.*--prompt-column"):
        texts_of([row])
    flags = {"prompt_column": "q", "chosen_column": "good", "rejected_column": "poor"}
    assert texts_of([row], **flags) == ["hi ", "yes<|im_end|>", "no<|im_end|>"]
    with pytest.raises(dpo.UsageError, match="--rejected-column"):
        texts_of([row], **flags | {"rejected_column": "bad"})
    assert texts_of([row], **flags, chat=True)[0] == ASKED.replace("hi", "hi ")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "hi", "chosen": "yes", "rejected": [says("no")]}, "both"),
        ({"prompt": "hi", "chosen": [{"role": "user"}], "rejected": [says("no")]}, "neither a text"),
        ({"prompt": "hi", "chosen": [], "rejected": []}, "neither a text"),
        ({"prompt": 7, "chosen": "yes", "rejected": "no"}, "7 is neither a text"),
        ({"prompt": "hi", "chosen": "yes", "rejected": None}, "None is neither a text.*--convert"),
        (
            {"chosen": [USER | {"content": [{"type": "image"}]}, says("a")], "rejected": [USER, says("b")]},
            "neither a text",
        ),
        (
            {"prompt": "hi", "chosen": [{"role": "assistant", "text": "yes"}], "rejected": [says("no")]},
            "neither a text",
        ),
        ({"prompt": "hi", "chosen": [says("yes")], "rejected": [says(None)]}, "neither a text"),
        ({"prompt": "hi", "chosen": str([says("yes")]), "rejected": str([says("no")])}, "neither a text"),  # of Python
        (
            {"chosen": [USER, says("a"), USER, says("c")], "rejected": [USER, says("b"), USER, says("d")]},
            "the chats differ",
        ),
        ({"chosen": [USER, says("a")], "rejected": [USER, says("a"), USER, says("b")]}, "the chats differ"),
        ({"prompt": [USER], "chosen": [says("a"), USER], "rejected": [says("b"), USER]}, "the chats differ"),
        ({"task": "1 + 1?", "chosen": "Step 1: 2", "rejected": "Step 1: 3"}, "--prompt-column"),
        ({"ask": "hi", "chosen": "yes", "rejected": "no"}, "--prompt-column"),
        ({"prompt": "other", "chosen": [USER, says("yes")], "rejected": [USER, says("no")]}, "--prompt-column"),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, says("a")], "rejected": [USER, says("b")]}, "--prompt-column"),
        ({"prompt": [SYSTEM, USER, USER, SYSTEM], "chosen": "a", "rejected": "b", "f": "llama2"}, "must alternate"),
        ({"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b", "f": "gemma"}, "System role not supported"),
        ({"system": "be kind", "prompt": "hi", "chosen": "a", "rejected": "b", "f": "gpt2"}, "chat template"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row, words):
    with pytest.raises(dpo.UsageError, match=f"row 1: .*{words}"):
        texts_of([row], family=row.get("f", "qwen3"))


def test_equal_pairs_are_counted_left_out_and_refused_where_all_are(capsys):
    pair = {"prompt": "hi ", "chosen": "yes", "rejected": "no"}
    texts_of([pair, pair | {"chosen": "no"}, pair | {"rejected": "long " * 999}])
    assert "1 pairs. Left out: 1 with equal replies, 1 of over 999 tokens" in capsys.readouterr().out
    thoughts = {"prompt": [USER], "chosen": [says("<think>a</think>yes")], "rejected": [says("<think>b</think>yes")]}
    with pytest.raises(dpo.UsageError, match=r"4 with equal replies.*template"):
        texts_of([thoughts] * 4, family="thoughtless")
    assert texts_of([thoughts])[1:] == [f"<think>\n{x}\n</think>\n\nyes<|im_end|>" for x in "ab"]
    with pytest.raises(dpo.UsageError, match="1 with equal replies"):
        texts_of([{"chosen": [USER, says("no")], "rejected": [USER, says("no")]}])


def test_a_judge_labels_the_pairs_and_learns_nothing_from_their_order():
    seen = []
    rows = [
        {"prompt": "hi ", "chosen": c, "rejected": r} for c, r in (("aa", "b"), ("b", "aa"), ("c", "dd"), ("dd", "c"))
    ]
    Path("judge.py").write_text("def longer(prompt, reply, other):\n    assert prompt == 'hi '\n"
                                "    assert reply < other\n    return len(reply) > len(other)\n")  # fmt: skip
    pairs = dpo.read_pairs(str(write_jsonl(Path("d.jsonl"), rows)), None, tokenizer_of("gemma"), 99,
                           dpo.Args(labels="judge.py:longer"))  # fmt: skip
    seen = [tokenizer_of("gemma").decode(pair.chosen) for pair in pairs]
    assert seen == ["aa<eos>", "aa<eos>", "dd<eos>", "dd<eos>"]
    for wrong in "judge.py", "judge.py:nothing", "nowhere.py:f":
        with pytest.raises(dpo.UsageError, match="--labels"):
            texts_of(rows, labels=wrong)


@pytest.mark.parametrize(
    ("function", "words"),
    [("(p, a, b): return None", "True or False, not None"), ("(p, a, b): return 0.7", "True or False, not 0.7"),
     ("(p, a): return True", "prompt, reply_1, reply_2")],
)  # fmt: skip
def test_a_judge_must_say_yes_or_no(function, words):
    Path("judge.py").write_text(f"def f{function}\n")
    with pytest.raises(dpo.UsageError, match=f"--labels judge.py:f must .*{words}"):
        texts_of([{"prompt": "hi ", "chosen": "yes", "rejected": "no"}], labels="judge.py:f")


def test_an_error_of_the_judge_is_its_own_and_what_it_changes_too():
    Path("judge.py").write_text("def f(p, a, b):\n    return int(a)\n\ndef g(p, a, b):\n    p.clear()\n    return 1\n")
    row = {"prompt": [USER], "chosen": "yes", "rejected": "no"}
    with pytest.raises(ValueError, match="invalid literal"):
        texts_of([row], labels="judge.py:f")
    assert texts_of([row], labels="judge.py:g")[0] == ASKED


@pytest.mark.parametrize(("script", "read"), [(dpo, dpo.read_pairs), (sft, sft.read_demonstrations)])
@pytest.mark.parametrize("returned", ["None", "[]", "(row for row in rows)", "['prompt']"])
def test_convert_must_return_rows(script, read, returned):
    Path("convert.py").write_text(f"def f(rows):\n    return {returned}\n")
    write_jsonl(Path("d.jsonl"), [{"prompt": "hi"}])
    with pytest.raises(script.UsageError, match=r"--convert convert.py:f must return a list of dicts"):
        read("d.jsonl", None, tokenizer_of("qwen3"), 99, script.Args(convert="convert.py:f"))


def test_converted_rows_may_have_unlike_keys():
    pair = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    Path("convert.py").write_text(
        f"def f(rows):\n    return [{pair}, {pair | {'system': 'be kind'}}, {{'prompt': 'hi'}}][:len(rows)]\n"
    )
    tokenizer, args = tokenizer_of("qwen3"), dpo.Args(convert="convert.py:f")
    data = str(write_jsonl(Path("d.jsonl"), [{"x": 1}] * 2))
    assert [tokenizer.decode(row.prompt) for row in dpo.read_pairs(data, None, tokenizer, 99, args)] == [
        ASKED,
        ASKED_KINDLY,
    ]
    write_jsonl(Path("d.jsonl"), [{"x": 1}] * 3)
    with pytest.raises(dpo.UsageError, match="row 3: None is neither"):
        dpo.read_pairs(data, None, tokenizer, 99, args)


# ---- People's data: files


def test_datasets_reads_every_kind_of_file(tmp_path):
    from datasets import Dataset, DatasetDict

    data = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    made = Dataset.from_list(data)
    Path("a b").mkdir()
    made.to_json("a b/x.jsonl")
    made.to_json("a b/x.jsonl.gz", compression="gzip")
    Path("a b/x.json").write_text(json.dumps(data))
    made.to_csv("a b/x.csv")
    made.to_parquet("a b/x.parquet")
    for kind in "jsonl", "jsonl.gz", "json", "csv", "parquet":
        assert [row["prompt"] for row in dpo.read_rows("--dataset", f"a b/x.{kind}")] == ["q0", "q1", "q2", "q3"], kind
    for name, part in ("one", data[:2]), ("two", data[2:]):
        write_jsonl(Path(f"part-{name}.jsonl"), part)
    assert len(dpo.read_rows("--dataset", "part-*.jsonl")) == 4
    Path("folder").mkdir()
    shutil.copy("part-one.jsonl", "folder/train.jsonl")
    shutil.copy("a b/x.jsonl", "folder/test.jsonl")
    assert [len(dpo.read_rows("--dataset", "folder", split=split)) for split in (None, "test", "train[:1]")] == [
        2,
        4,
        1,
    ]
    made.save_to_disk("saved")
    DatasetDict({"train_prefs": made, "test_prefs": made.select([0])}).save_to_disk("both")
    assert len(dpo.read_rows("--dataset", "saved")) == 4
    assert len(dpo.read_rows("--dataset", "both", split="test_prefs")) == 1
    made.to_json("part-[1].jsonl")
    Path("part-1.jsonl").write_text(Path("part-one.jsonl").read_text())
    assert len(dpo.read_rows("--dataset", "part-[1].jsonl")) == 4, "the file of this name, no pattern"
    Path("folder/dataset_infos.json").write_text("{}")  # as older folders of the hub have it
    assert len(dpo.read_rows("--dataset", "folder")) == 2
    Path("damaged.jsonl").write_text(json.dumps(data[0]) + "\n{")
    for wrong, split, words in (
        ("both", None, "train_prefs"), ("folder", "validation", "test"), ("damaged.jsonl", None, "JSON"),
        ("nothing.jsonl", None, "no such file"),
    ):  # fmt: skip
        with pytest.raises(dpo.UsageError, match=f"--dataset {wrong} can't be read: .*{words}"):
            dpo.read_rows("--dataset", wrong, split=split)


def test_held_out_pairs_share_no_prompt_with_the_others(folders):
    rows = [{"prompt": f"{i // 3} ", "chosen": f"{i}", "rejected": "no"} for i in range(90)]
    write_jsonl(Path("d.jsonl"), rows)
    tokenizer, model = tokenizer_of("gemma"), AutoModelForCausalLM.from_pretrained(folders / "gpt2")
    pairs, held_out = dpo.training_and_held_out(tokenizer, model, dpo.Args(dataset="d.jsonl"))
    assert len(held_out) == 9
    assert len(pairs) == 81
    assert not {pair.prompt_text for pair in pairs} & {pair.prompt_text for pair in held_out}
    write_jsonl(Path("d.jsonl"), [row | {"prompt": f"{i % 2} "} for i, row in enumerate(rows)])
    pairs, held_out = dpo.training_and_held_out(tokenizer, model, dpo.Args(dataset="d.jsonl", eval_pairs=5))
    assert (len(pairs), len(held_out)) == (85, 5)
    assert not {str(pair.chosen) for pair in pairs} & {str(pair.chosen) for pair in held_out}
    write_jsonl(Path("d.jsonl"), rows)
    write_jsonl(Path("t.jsonl"), rows[:7])
    pairs, held_out = dpo.training_and_held_out(tokenizer, model, dpo.Args(dataset="d.jsonl", eval_dataset="t.jsonl"))
    assert (len(pairs), len(held_out)) == (90, 7)
    with pytest.raises(dpo.UsageError, match=r"81 pairs .* --batch-size 90"):
        dpo.training_and_held_out(tokenizer, model, dpo.Args(dataset="d.jsonl", batch_size=90))


@pytest.mark.parametrize("script", [dpo, reward_model, sft])
def test_a_prompt_of_several_token_lists_is_on_one_side(script, folders, monkeypatch):
    """A tokenizer may merge a prompt's end with the start of a reply, so its ids are not always the same."""
    row = script.Demonstration if script is sft else script.Pair
    replies = ([1],) if script is sft else ([1], [2])
    found = [row([i], *replies, f"prompt {i % 30}") for i in range(90)]
    monkeypatch.setattr(script, "read_demonstrations" if script is sft else "read_pairs", lambda *_, **__: [*found])
    model = AutoModelForCausalLM.from_pretrained(folders / "gpt2")
    learned, held_out = script.training_and_held_out(tokenizer_of("gemma"), model, script.Args(dataset="d.jsonl"))
    assert len(learned) + len(held_out) == 90
    assert len(held_out) == 9
    assert not {row.prompt_text for row in learned} & {row.prompt_text for row in held_out}


@pytest.mark.parametrize("script", [dpo, reward_model, sft])
def test_evaluate_asks_what_the_run_held_out(script, folders, monkeypatch, tmp_path):
    """Also if the data or how to read them is said otherwise. Of other data it may have learned nothing: all of it."""
    monkeypatch.chdir(tmp_path)
    data = [{"prompt": f"{'a' * i} ", "chosen": "b c", "rejected": "d"} for i in range(90)]
    write_jsonl(
        Path("d.jsonl"), [{"prompt": row["prompt"], "completion": "b"} for row in data] if script is sft else data
    )
    tokenizer, model = tokenizer_of("gemma"), AutoModelForCausalLM.from_pretrained(folders / "gpt2")
    of_run = script.Args(dataset="d.jsonl", run_dir="run", seed=3)
    monkeypatch.setattr(script, "saved_args", lambda _: of_run)
    _, held_out = script.training_and_held_out(tokenizer, model, of_run)
    number = "eval_demonstrations" if script is sft else "eval_pairs"
    spelled = {"dataset": "./d.jsonl"}, {"dataset": f"{tmp_path}/d.jsonl"}, {"dataset_split": "train"}
    for flags in ({}, {"seed": 4}, {number: 2}, *spelled, {"max_length": 40}, {"chat": True}):
        args = replace(of_run, evaluate=True, **flags)
        assert script.training_and_held_out(tokenizer, model, args)[1] == held_out, flags
    args = replace(of_run, evaluate=True, dataset_split="train[:50]")
    assert len(script.training_and_held_out(tokenizer, model, args)[1]) == 50


def test_evaluating_another_dataset_judges_all_of_it(folders, capsys):
    dpo.train(arguments(folders, run_dir="run", learning_rate=1e-30))
    write_jsonl(Path("test.jsonl"), pairs_of_words(8, seed=1))
    for flag in "dataset", "eval_dataset":
        capsys.readouterr()
        args = dpo.saved_args("run", evaluate=True, **{flag: "test.jsonl"})
        held_out = []
        evaluate = dpo.evaluate

        def looking(run, pairs, args, evaluate=evaluate, held_out=held_out):
            held_out += pairs
            return evaluate(run, pairs, args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dpo, "evaluate", looking)
            result = dpo.evaluate_saved(args)
        assert len(held_out) == 8
        assert result["eval/loss"] == pytest.approx(math.log(2), abs=1e-4), "the untrained policy is its reference"


def test_each_epoch_has_every_pair_once_in_another_order():
    pairs = [dpo.Pair([1] * (i % 7 + 1), [i], [2] * (i % 11 + 1), "") for i in range(54)]
    args, number = dpo.Args(batch_size=8, total_timesteps=96), 6
    batches = dpo.batches_from(0, pairs, args)
    epochs = [[next(batches) for _ in range(number)] for _ in range(2)]
    for epoch in epochs:
        assert len({pair.chosen[0] for batch in epoch for pair in batch}) == 48
        lengths = [[len(pair.prompt) + len(pair.rejected) for pair in batch] for batch in epoch]
        assert np.mean([np.std(x) for x in lengths]) < 0.5 * np.std(np.concatenate(lengths)), "of similar length"
    assert epochs[0] != epochs[1]
    later = dpo.batches_from(72, pairs, args)
    assert [next(later) for _ in range(3)] == epochs[1][3:], "a resumed run takes the rest of its epoch"


# ---- Models


def test_models_that_are_no_causal_language_models_are_refused(folders, tmp_path):
    save_model(tmp_path / "scores", "llama", kind=AutoModelForSequenceClassification)
    save_model(tmp_path / "tied", "gpt2", kind=AutoModelForSequenceClassification)
    tokenizer = tokenizer_of("gemma")
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16)  # fmt: skip
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "classifier")
    for name, words in {
        "scores": "no weights for lm_head", "tied": "reward model", "bert": "looks ahead", "classifier": "no weights",
    }.items():  # fmt: skip
        with pytest.raises(dpo.UsageError, match=f"{name} .*{words}"):
            dpo.load_model(str(tmp_path / name), AutoModelForCausalLM, dpo.Args())


def test_a_model_whose_config_nests_that_of_the_text_trains(folders, tmp_path):
    tokenizer = tokenizer_of("gemma")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
             "max_position_embeddings": 256}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4, image_token_index=7,
                          boi_token_index=5, eoi_token_index=6)  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma3")
    tokenizer.save_pretrained(tmp_path / "gemma3")
    dpo.train(arguments(folders, model_name=str(tmp_path / "gemma3"), run_dir="run", total_timesteps=16))
    assert len(steps_of("run")) == 2


OF_THEIR_OWN = [
    OPTConfig(vocab_size=40, hidden_size=8, word_embed_proj_dim=8, num_hidden_layers=2, num_attention_heads=2,
              ffn_dim=8, max_position_embeddings=32, dropout=0.5, init_std=0.5),
    XGLMConfig(vocab_size=40, d_model=8, num_layers=2, attention_heads=2, ffn_dim=8, max_position_embeddings=32,
               dropout=0.5, activation_dropout=0.5, init_std=0.5),
]  # fmt: skip


def test_dropout_is_off_also_with_gradient_checkpointing(folders):
    config = copy.deepcopy(SIZES["gpt2"])
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained("dropout")
    for checkpointing in False, True:
        args = dpo.Args(gradient_checkpointing=checkpointing)
        model = dpo.make_trainable(dpo.load_model("dropout", AutoModelForCausalLM, args), "CAUSAL_LM", args)
        ids = torch.arange(20)[None]
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        assert any(module.training for module in model.modules()) == checkpointing


@pytest.mark.parametrize("config", OF_THEIR_OWN, ids=lambda config: config.model_type)
def test_checkpointing_turns_on_no_dropout_that_a_layer_has_of_its_own(config, tmp_path):
    """Of OPT the layers themselves drop out, where those of others leave it to modules within, which are in eval."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids, logits = torch.arange(20)[None], []
    for checkpointing in False, True:
        args = dpo.Args(gradient_checkpointing=checkpointing)
        model = dpo.make_trainable(dpo.load_model(str(tmp_path), AutoModelForCausalLM, args), "CAUSAL_LM", args)
        logits.append(model(input_ids=ids, use_cache=False).logits)
    torch.testing.assert_close(*logits)


def test_flags_that_a_models_layers_cannot_follow_are_one_line(tmp_path):
    sizes = {"vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2, "dff": 8}
    AutoModelForCausalLM.from_config(CTRLConfig(**sizes)).save_pretrained(tmp_path / "ctrl")
    config = MambaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    for name, flags in ("ctrl", {"gradient_checkpointing": True}), ("mamba", {"lora_rank": 2}):
        args = dpo.Args(**flags)
        model = dpo.load_model(str(tmp_path / name), AutoModelForCausalLM, args)
        with pytest.raises(dpo.UsageError, match=f"(?i){name}.* Leave the flag out"):
            dpo.make_trainable(model, "CAUSAL_LM", args)


def test_a_model_in_bfloat16_is_trained_and_saved_in_float32(folders):
    AutoModelForCausalLM.from_pretrained(folders / "gpt2").bfloat16().save_pretrained("half")
    AutoTokenizer.from_pretrained(folders / "gpt2").save_pretrained("half")
    dpo.train(arguments(folders, model_name="half", run_dir="run", total_timesteps=8, learning_rate=1e-6))
    before, after = (load_file(Path(name, "model.safetensors")) for name in ("half", "run/model"))
    for name, value in after.items():
        assert value.dtype == torch.float32
        assert (value != before[name].float()).any(), name


def test_replies_are_samples_of_the_model_whatever_its_folder_says(folders):
    """Two steps of a known distribution: counts follow it, also in a batch of prompts of unequal length."""
    run, _, _ = started(folders, "llama", run_dir="run")
    model = run.bare
    model.generation_config.top_k, model.generation_config.top_p, model.generation_config.temperature = 3, 0.5, 0.1
    model.generation_config.min_p, model.generation_config.min_new_tokens = 0.5, 9
    prompts, ends = [[5, 6, 7], [8]] * 1500, [run.tokenizer.eos_token_id, 40]
    replies = dpo.sample(model, prompts, ends, 1, (1, 0))
    assert replies == dpo.sample(model, prompts, ends, 1, (1, 0)) != dpo.sample(model, prompts, ends, 1, (1, 1))
    for i, prompt in enumerate(prompts[:2]):
        expected = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).detach().numpy()
        counts = np.bincount([reply[0] for reply in replies[i::2]], minlength=len(expected)) / 1500
        assert np.abs(counts - expected).max() < 0.05
        assert np.abs(counts - expected).sum() < 0.6
    long = dpo.sample(model, prompts[:300], ends, 30, (1, 0))
    assert {len(reply) for reply in long} > {30}
    assert min(len(reply) for reply in long) < 9
    for reply in long:
        assert not set(reply[:-1]) & set(ends), "it ends with the first end"
        assert len(reply) == 30 or reply[-1] in ends


@pytest.mark.parametrize(
    "rules",
    [
        {"num_beams": 2}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [*range(200)]}, {"typical_p": 0.2},
        {"num_return_sequences": 2, "do_sample": True}, {"stop_strings": ["a"]}, {"max_time": 0.0},
    ],
    ids=lambda rules: next(iter(rules)),
)  # fmt: skip
def test_no_rule_of_the_folder_changes_what_is_drawn(folders, rules):
    model = dpo.load_model(str(folders / "llama"), AutoModelForCausalLM, dpo.Args())
    asked = model, [[5, 6, 7], [8]] * 20, [256, 40], 12, (1,)
    expected = dpo.sample(*asked)
    model.generation_config.update(**rules)
    assert dpo.sample(*asked) == expected
    assert all(getattr(model.generation_config, name) == rule for name, rule in rules.items()), "it will be saved"


@pytest.mark.parametrize("script", ["sft", "dpo", "grpo", "ppo_rlhf"])
def test_in_plain_transformers_a_saved_model_stops_where_turns_end(script, tmp_path, monkeypatch):
    """As with base models of Qwen2.5: their eos token is <|endoftext|>, their chat template ends turns in another."""
    monkeypatch.setitem(TEMPLATES, "base", (["<|endoftext|>", "<|im_end|>", "<|im_start|>"], *TEMPLATES["qwen3"][1:]))
    folder = save_model(tmp_path / "model", "llama", "base")
    start = AutoModelForCausalLM.from_pretrained(folder)
    start.generation_config.top_k, start.generation_config.eos_token_id = 200, [7, 256]
    start.generation_config.do_sample = True
    start.save_pretrained(folder)
    pairs = [{"prompt": "hi", "chosen": "yes", "rejected": "no"} for _ in range(10)]
    Path(tmp_path / "judge.py").write_text("def length(prompt, reply):\n    return len(reply)\n")
    flags = {"model_name": str(folder), "dataset": str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), "chat": True,
             "device": "cpu", "batch_size": 2, "total_timesteps": 2, "eval_replies": 1, "max_new_tokens": 2,
             "run_dir": str(tmp_path / "run"), "reward": f"{tmp_path}/judge.py:length",
             "learning_rate": 1e-9}  # fmt: skip
    flags |= {"group_size": 2, "num_minibatches": 1, "reward": [flags["reward"]]} if script == "grpo" else {}
    flags |= {"num_minibatches": 1} if script == "ppo_rlhf" else {}
    module = importlib.import_module(f"algorithms.{script}")
    module.train(module.Args(**flags))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert (model.generation_config.eos_token_id, model.generation_config.top_k) == ([7, 256, 257], 200)
    torch.manual_seed(0)
    replies = model.generate(torch.tensor([[5, 6, 7]] * 64), max_new_tokens=40, pad_token_id=258)[:, 3:].tolist()
    behind = [token for reply in replies if 257 in reply for token in reply[reply.index(257) + 1 :]]
    assert {*behind} == {258}


def test_what_is_no_language_model_or_reward_model_is_named(folders, tmp_path):
    import peft

    for kind, name in (AutoModelForCausalLM, "writes"), (AutoModelForSequenceClassification, "judges"):
        base, task = kind.from_pretrained(folders / "llama"), {"writes": "CAUSAL_LM", "judges": "SEQ_CLS"}[name]
        base.config.pad_token_id = 0
        peft.get_peft_model(base, peft.LoraConfig(task, target_modules=["q_proj"])).save_pretrained(tmp_path / name)
    with pytest.raises(dpo.UsageError, match="judges can't be loaded as AutoModelForCausalLM: it is a reward model"):
        dpo.load_model(str(tmp_path / "judges"), AutoModelForCausalLM, dpo.Args())
    with pytest.raises(dpo.UsageError, match=r"writes has no tokenizer that can be used \(an adapter"):
        dpo.load_tokenizer(str(tmp_path / "writes"))
    for count in 2, 5:
        save_model(tmp_path / "labels", "llama", kind=AutoModelForSequenceClassification, num_labels=count)
        with pytest.raises(dpo.UsageError, match=f"score.weight has {count} outputs, 1 is needed"):
            dpo.load_reward(str(tmp_path / "labels"), dpo.Args(), torch.device("cpu"))


OFFICIAL = """\
{%- if messages[0].role == 'system' %}{% set system, turns = messages[0].content, messages[1:] %}\
{% else %}{% set system, turns = none, messages %}{% endif %}{{ bos_token }}{% for m in turns %}\
{% if m.role == 'user' %}{{ '[INST] ' + (system + '\\n\\n' if loop.last and system else '') + m.content + '[/INST]' }}\
{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""


def test_a_template_that_writes_the_prompt_otherwise_when_a_reply_follows_is_refused():
    """As Mistral's own: the system's text stands in the last user's turn, if nothing follows. It would be lost, and
    the user's words would be learned as the reply."""
    tokenizer = tokenizer_of("mistral")
    tokenizer.chat_template = OFFICIAL
    user = {"role": "user", "content": "hi"}
    prompt, reply = dpo.encode(tokenizer, [user], ["yes"])
    assert tokenizer.decode(prompt).endswith("[/INST]")
    assert tokenizer.decode(reply) == " yes</s>"
    with pytest.raises(dpo.UsageError, match="otherwise"):
        dpo.encode(tokenizer, [{"role": "system", "content": "be kind"}, user], ["yes"])


def test_what_is_nothing_behind_the_end_of_a_turn_is_left_out(monkeypatch):
    """Old tokenizers of Llama write an empty token there: the reply would get a second end."""
    tokenizer = tokenizer_of("qwen2")
    decode, ((_, reply)) = tokenizer.decode, dpo.encode(tokenizer, [{"role": "user", "content": "hi"}], ["yes"])
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: decode(ids).replace("\n", ""))
    assert dpo.encode(tokenizer, [{"role": "user", "content": "hi"}], ["yes"])[1] == reply
    assert reply[-1] == tokenizer.eos_token_id != reply[-2]


def test_a_reward_model_without_a_head_is_refused(folders):
    with pytest.raises(dpo.UsageError, match=r"--reward .*gpt2 has no head"):
        dpo.load_reward(str(folders / "gpt2"), dpo.Args(), torch.device("cpu"))


def test_files_of_equal_names_in_several_folders_are_all_read(tmp_path):
    for name in "one", "other":
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "pairs.jsonl", [{"prompt": name, "chosen": "a", "rejected": "b"}])
    rows = dpo.read_rows("--dataset", f"{tmp_path}/*/pairs.jsonl")
    assert sorted(row["prompt"] for row in rows) == ["one", "other"]


def test_a_saved_data_set_without_the_split_is_refused(tmp_path):
    from datasets import Dataset

    Dataset.from_list(pairs_of_words(5)).save_to_disk(tmp_path / "saved")
    assert len(dpo.read_rows("--dataset", str(tmp_path / "saved"))) == 5
    with pytest.raises(dpo.UsageError, match="train"):
        dpo.read_rows("--dataset", str(tmp_path / "saved"), None, "test")


def test_tools_may_be_empty_and_must_be_json(tmp_path):
    tokenizer, pair = tokenizer_of("qwen2"), {"prompt": "hi", "chosen": "a", "rejected": "b"}
    args = dpo.Args(chat=True)
    data = write_jsonl(tmp_path / "empty.jsonl", [pair | {"tools": ""}])
    assert len(dpo.read_pairs(str(data), None, tokenizer, 999, args)) == 1
    data = write_jsonl(tmp_path / "words.jsonl", [pair | {"tools": "a calculator"}])
    with pytest.raises(dpo.UsageError, match="row 1"):
        dpo.read_pairs(str(data), None, tokenizer, 999, args)


def test_a_limit_of_0_is_no_limit_of_the_gradient(folders):
    """As in Hugging Face's Trainer; it must not scale all gradients to 0."""
    for limit in 0.0, 1e9:
        dpo.train(arguments(folders, run_dir=f"run{limit}", total_timesteps=16, max_grad_norm=limit))
    free, limited = (load_file(Path(f"run{limit}", "model", "model.safetensors")) for limit in (0.0, 1e9))
    assert all(torch.equal(free[name], limited[name]) for name in free)


def test_the_kl_divergence_is_that_of_an_average_over_the_policys_replies(folders):
    """With replies of one token it is known: the sum over the vocabulary."""
    run, _, _ = started(folders, "llama", run_dir="run")
    with torch.no_grad():
        for parameter in run.bare.parameters():
            parameter += 0.05 * torch.randn_like(parameter, generator=None)
    pair = dpo.Pair([5, 6, 7], [8, run.tokenizer.eos_token_id], [9, run.tokenizer.eos_token_id], "hi")
    args = dpo.Args(eval_replies=2000, max_new_tokens=1, batch_size=1000, total_timesteps=1000)
    run.micro_batch_size, run.judge = 1000, lambda prompts, replies: [float(p == "hi") for p in prompts]
    result = dpo.evaluate(run, [pair], args)
    policy, reference = (m(input_ids=torch.tensor([pair.prompt])).logits[0, -1].log_softmax(-1)
                         for m in (run.bare, run.reference))  # fmt: skip
    kl = (policy.exp() * (policy - reference)).sum().item()
    assert kl > 0.05
    assert result["eval/kl"] == pytest.approx(kl, rel=0.2)
    assert result["eval/length"] == 1
    assert result["eval/reward"] == 1


def test_a_reward_models_folder_judges(tmp_path):
    """As plain transformers does, of prompts that are texts and of chats."""
    folder = str(save_model(tmp_path / "scores", "llama", "qwen3", AutoModelForSequenceClassification, num_labels=1))
    scores = dpo.load_reward(folder, dpo.Args(), torch.device("cpu"))([[USER], "hi "], ["yes", "no"])
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [ASKED + YES, "hi no<|im_end|>"]
    expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert scores == pytest.approx(expected, abs=1e-5)


# ---- Several processes


@pytest.mark.parametrize("count", [8, 9, 2])
def test_processes_share_the_work_in_its_order_and_all_have_as_much(count, monkeypatch):
    monkeypatch.setattr(dpo, "PROCESSES", 4)
    run, parts = types.SimpleNamespace(micro_batch_size=2, accelerator=types.SimpleNamespace(gather=lambda x: x)), []
    for rank in range(4):
        monkeypatch.setattr(dpo, "RANK", rank)
        parts.append(dpo.Run.share(run, torch.tensor, [*range(count)]))
    assert {len(part) for part in parts} == {math.ceil(count / 4)}
    assert torch.cat(parts)[:count].tolist() == [*range(count)]


TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def learn(folders, launcher, run_dir, *flags, **environ):
    command = [sys.executable, *launcher, SCRIPT, "--model-name", folders / "llama", "--dataset",
               folders / "pairs.jsonl", "--device", "cpu", "--batch-size", 8, "--total-timesteps", 32,
               "--eval-frequency", 16, "--eval-replies", 6, "--max-new-tokens", 6, "--learning-rate", "1e-3",
               "--run-dir", run_dir, *flags]  # fmt: skip
    env = os.environ | environ
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, timeout=280, check=False)


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true"}  # fmt: skip


def same_learning(one, two):
    first, second = timeless(Path(one)), timeless(Path(two))
    assert len(first) == len(second)
    for row, other in zip(first, second, strict=True):
        sampled = {"eval/kl", "eval/length"}  # each process draws its own replies
        # Before the first update margins are 0 but for rounding, and so have any sign
        sampled |= {"rewards/accuracies"} if row["global_step"] == 8 else set()
        assert row.keys() == other.keys()
        assert {k: v for k, v in row.items() if k not in sampled} == pytest.approx(
            {k: v for k, v in other.items() if k not in sampled}, rel=2e-3, abs=3e-4)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_learn_what_one_learns(folders):
    """Of replies of unequal lengths, in micro-batches, with DDP and with FSDP2; and they go on after a stop."""
    result = learn(folders, [], "one")
    assert result.returncode == 0, result.stderr
    for name, environ in ("ddp", {}), ("fsdp", FSDP):
        result = learn(folders, TWO, name, "--micro-batch-size", 2, **environ)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("run folder") == 1, "one process writes"
        same_learning("one", name)
    plain = AutoModelForCausalLM.from_pretrained("one/model").state_dict()
    sharded = AutoModelForCausalLM.from_pretrained("fsdp/model").state_dict()
    torch.testing.assert_close(sharded, plain, rtol=1e-3, atol=1e-3)
    command = [sys.executable, *TWO, SCRIPT, "--run-dir", "fsdp", "--resume", "--total-timesteps", "48"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ | FSDP, check=False)
    assert result.returncode == 0, result.stderr
    assert rows(Path("fsdp"))[-1]["global_step"] == 48


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_accelerate_launch_starts_it_and_a_mistake_is_said_once(folders):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    result = learn(folders, launch, "two", "--lora-rank", 2)
    assert result.returncode == 0, result.stderr
    assert rows(Path("two"))[-1]["global_step"] == 32
    result = learn(folders, TWO, "mistake", "--max-length", 1)
    assert result.stderr.count("error: ") == 1, "one process says what is wrong"
    assert not Path("mistake").exists()
