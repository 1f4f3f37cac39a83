"""sft.py against losses summed by hand, and the entropy of the grammar that wrote the default demonstrations."""

import copy
import dataclasses
import json
import math
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, rows, timeless
from text_models import bfloat16_autocast, tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from algorithms import sft

SCRIPT = ROOT / "algorithms" / "sft.py"
REVIEWS = ROOT / "benchmark" / "reviews"
CHAT = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"  # noqa: E501
SIZES = {
    "gpt2": GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3),
    "llama": LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=32, max_position_embeddings=64, initializer_range=0.3),
}  # fmt: skip
LINES = [
    ("the cup is good .", "yes"),
    ("no", "the cup is very good and the smell is bad ."),
    ("the", "smell ."),
    ("cup is", "lovely"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models with random weights that have no padding token, and 60 demonstrations of very different lengths."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), AutoTokenizer.from_pretrained(REVIEWS / "model")
    tokenizer.chat_template, tokenizer.pad_token = CHAT, "<end>"
    for name, config in SIZES.items():
        torch.manual_seed(0)
        config = copy.deepcopy(config)
        config.vocab_size, config.eos_token_id, config.bos_token_id = len(tokenizer), tokenizer.eos_token_id, None
        config.pad_token_id = tokenizer.eos_token_id
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    records = [{"prompt": f"review the {'coffee ' * (i % 3 + 1)}: ", "completion": LINES[i % 4][1]} for i in range(60)]
    write(folder / "rows.jsonl", records)
    return folder


@pytest.fixture(autouse=True)
def signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def arguments(folders, name="gpt2", **changes):
    flags = {"model_name": str(folders / name), "dataset": str(folders / "rows.jsonl"), "device": "cpu",
             "batch_size": 8, "total_timesteps": 64, "eval_frequency": 32, "checkpoint_frequency": 32,
             "learning_rate": 1e-3, "eval_replies": 4, "max_new_tokens": 8}  # fmt: skip
    return sft.Args(**flags | changes)


def demonstrations(folders, name="gpt2"):
    args = arguments(folders, name)
    tokenizer = sft.load_tokenizer(args.model_name)
    model = sft.load_model(args.model_name, AutoModelForCausalLM, args)
    return model, tokenizer, sft.read_demonstrations(args.dataset, None, tokenizer, 64, args)


def by_hand(model, prompt, reply):
    """-log pi of each token of the reply, from one pass for each, without padding."""
    losses = []
    for i in range(len(reply)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + reply[:i]])).logits[0, -1]
        losses.append(-logits.double().log_softmax(-1)[reply[i]].item())
    return losses


def a_run(model, batch, args, optimizer=None):
    """What update needs of Run, on one process, with plain gradients."""
    run = types.SimpleNamespace(model=model, micro_batch_size=args.micro_batch_size or args.batch_size)
    parts = args.batch_size // run.micro_batch_size

    def step(loss):
        (loss / parts).backward()  # as accelerate does
        return 0.0

    run.step = step
    run.accelerator = types.SimpleNamespace(accumulate=lambda _: sft.contextlib.nullcontext(), reduce=lambda x, _: x)
    return run


@pytest.mark.parametrize("name", SIZES)
def test_the_losses_are_those_of_the_replies_tokens_the_end_included_although_it_is_the_padding_token(folders, name):
    model, tokenizer, data = demonstrations(folders, name)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert all(row.reply[-1] == tokenizer.eos_token_id and row.reply.count(row.reply[-1]) == 1 for row in data)
    assert tokenizer.decode(data[0].prompt) == "review the coffee :"
    batch = data[:4]
    assert len({len(row.prompt) for row in batch}) > 1 and len({len(row.reply) for row in batch}) > 1
    expected = [loss for row in batch for loss in by_hand(model, row.prompt, row.reply)]
    losses, hits = sft.reply_losses(model, batch)
    assert losses.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(hits) == sum(len(row.reply) for row in batch)
    for row in batch:
        assert sft.reply_losses(model, [row])[0].tolist() == pytest.approx(
            by_hand(model, row.prompt, row.reply), rel=1e-4
        )


def test_no_gradient_comes_from_the_prompt(folders):
    """The logits at positions whose next token belongs to the prompt, and at the padding, have no gradient."""
    model, _, data = demonstrations(folders)
    batch, seen = data[:4], []

    def keep(module, inputs, output):
        output.logits.retain_grad()
        seen.append(output.logits)

    model.register_forward_hook(keep)
    sft.reply_losses(model, batch)[0].sum().backward()
    gradient, first = seen[0].grad.abs().sum(-1), min(len(row.prompt) for row in batch)
    for line, row in zip(gradient, batch, strict=True):
        start = len(row.prompt) - first
        learned = [start <= k < start + len(row.reply) for k in range(len(line))]
        assert (line > 0).tolist() == learned


def test_the_batchs_loss_is_the_mean_over_tokens_and_no_mean_of_means(folders):
    model, _, data = demonstrations(folders)
    batch, args = data[:8], arguments(folders)
    each = [by_hand(model, row.prompt, row.reply) for row in batch]
    means = [sum(losses) / len(losses) for losses in each]
    metrics = sft.update(a_run(model, batch, args), batch, args)
    mean = sum(map(sum, each)) / sum(map(len, each))
    assert metrics["losses/loss"] == pytest.approx(mean, rel=1e-5)
    assert abs(mean - sum(means) / len(means)) > 0.01, "these two must differ, or the test shows nothing"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_of_unequal_lengths_have_the_batchs_gradient(folders, size, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    results = []
    for micro_batch_size in None, size:
        model, _, data = demonstrations(folders)
        model, args = model.double(), arguments(folders, micro_batch_size=micro_batch_size)
        metrics = sft.update(a_run(model, data[:8], args), data[:8], args)
        results.append((metrics, [parameter.grad for parameter in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-9, atol=1e-12)


def test_what_stands_in_the_padding_changes_nothing_to_the_bit(folders, monkeypatch):
    model, _, data = demonstrations(folders)
    expected, pad = sft.reply_losses(model, data[:4])[0], sft.pad
    monkeypatch.setattr(sft, "pad", lambda lists, value: pad(lists, 7 if value == 0 else value))
    assert torch.equal(sft.reply_losses(model, data[:4])[0], expected)


def test_the_end_is_learned(folders, tmp_path):
    """After training, replies are as long as the demonstrations, and end in the end token."""
    rows_ = [{"prompt": "review the coffee : ", "completion": "the cup is good ."}] * 40
    args = arguments(folders, dataset=write(tmp_path / "one.jsonl", rows_), total_timesteps=480, eval_frequency=480,
                     learning_rate=2e-2, run_dir=str(tmp_path / "run"), max_new_tokens=20)  # fmt: skip
    result = sft.train(args)
    assert result["eval/length"] == pytest.approx(6, abs=0.5)
    assert result["eval/loss"] < 0.05
    assert result["eval/accuracy"] > 0.99


def test_killed_and_resumed_equals_unbroken(folders, tmp_path):
    command = [
        *(sys.executable, str(SCRIPT), "--model-name", str(folders / "gpt2"), "--dataset", str(folders / "rows.jsonl")),
        *("--device", "cpu", "--batch-size", "8", "--eval-frequency", "16", "--checkpoint-frequency", "16"),
        *("--learning-rate", "0.001", "--eval-replies", "4", "--max-new-tokens", "8", "--total-timesteps", "64"),
    ]
    flags = {"total_timesteps": 64, "eval_frequency": 16, "checkpoint_frequency": 16}
    sft.train(arguments(folders, run_dir=str(tmp_path / "whole"), **flags))
    run = subprocess.Popen([*command, "--run-dir", str(tmp_path / "killed")])
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    while run.poll() is None and not checkpoint.exists():
        sft.time.sleep(0.01)
    run.kill()
    run.wait()
    assert checkpoint.exists()
    sft.train(sft.saved_args(str(tmp_path / "killed"), resume=True))
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(folders, tmp_path):
    sft.train(arguments(folders, run_dir=str(tmp_path / "one"), total_timesteps=32))
    flags = dataclasses.asdict(
        arguments(folders, run_dir=str(tmp_path / "two"), total_timesteps=32, micro_batch_size=4)
    )
    program = f"from algorithms import sft; sft.train(sft.Args(**{flags!r}))"
    (tmp_path / "program.py").write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, str(tmp_path / "program.py")], check=True, env=sft.os.environ | {"PYTHONPATH": str(ROOT)})
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        names = [name for name in one if name.startswith(("losses/", "eval/loss", "eval/accuracy", "charts/learn"))]
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)


def test_lora_trains_little_and_its_folder_is_a_start_for_the_next(folders, tmp_path):
    pytest.importorskip("peft")
    args = arguments(folders, "llama", lora_rank=2, run_dir=str(tmp_path / "run"), learning_rate=1e-2)
    sft.train(args)
    losses = [row["eval/loss"] for row in rows(tmp_path / "run") if "eval/loss" in row]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "model" / "adapter_config.json").exists()
    again = sft.evaluate_saved(sft.saved_args(str(tmp_path / "run"), evaluate=True))
    assert again["eval/loss"] == pytest.approx(losses[-1], rel=1e-4)


def test_evaluating_a_run_has_its_precision(folders, tmp_path):
    (tmp_path / "reward.py").write_text("def letters(prompt, reply):\n    return len(reply)\n")
    with bfloat16_autocast():
        sft.train(arguments(folders, run_dir=str(tmp_path / "run"), reward=f"{tmp_path}/reward.py:letters"))
        result = sft.evaluate_saved(sft.saved_args(str(tmp_path / "run"), evaluate=True))
    last = [row for row in rows(tmp_path / "run") if "eval/loss" in row][-1]
    assert result == {name: value for name, value in last.items() if name in result}
    assert [*result] == ["eval/loss", "eval/accuracy", "eval/length", "eval/reward"]


def test_of_a_chat_each_reply_is_learned(folders, tmp_path):
    turns = [("system", "the"), ("user", "cup"), ("assistant", "good"), ("user", "smell"), ("assistant", "bad .")]
    messages = [{"role": role, "content": text} for role, text in turns]
    args = arguments(folders, dataset=write(tmp_path / "chat.jsonl", [{"messages": messages}] * 4))
    tokenizer = sft.load_tokenizer(args.model_name)
    found = sft.read_demonstrations(args.dataset, None, tokenizer, 64, args)
    assert len(found) == 8
    assert [found[0].prompt_text, found[1].prompt_text] == [messages[:2], messages[:4]]
    assert [tokenizer.decode(row.reply) for row in found[:2]] == ["good <end>", "bad . <end>"]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "cup ", "input": "", "output": "good"}, "cup "),
        ({"instruction": "cup", "input": "smell ", "output": "good"}, "cup\n\nsmell "),
        ({"question": "cup ", "answer": "good"}, "cup "),
        ({"prompt": "the cup is ", "completion": "the cup is good"}, "the cup is "),  # repeated
        ({"prompt": "cup ", "messages": "good"}, "cup "),
        ({"input": "cup ", "output": "good"}, "cup "),
        ({"problem": "cup ", "solution": "good", "answer": "bad"}, "cup "),  # the answer is its last word
        ({"prompt": [{"role": "user", "content": "cup"}], "completion": [{"role": "assistant", "content": "good"}]},
         [{"role": "user", "content": "cup"}]),
        ({"system": "the", "prompt": "cup", "response": "good"},
         [{"role": "system", "content": "the"}, {"role": "user", "content": "cup"}]),
        ({"conversations": [{"from": "human", "value": "cup"}, {"from": "gpt", "value": "good"}]},
         [{"role": "user", "content": "cup"}]),
        ({"system": "the", "messages": '[{"role": "system", "content": "the"}, {"role": "user", "content": "cup"}, '
                                       '{"role": "assistant", "content": "good"}]'},
         [{"role": "system", "content": "the"}, {"role": "user", "content": "cup"}]),
    ],
)  # fmt: skip
def test_usual_columns(folders, tmp_path, record, prompt):
    args = arguments(folders, dataset=write(tmp_path / "rows.jsonl", [record] * 2))
    tokenizer = sft.load_tokenizer(args.model_name)
    row = sft.read_demonstrations(args.dataset, None, tokenizer, 64, args)[0]
    assert row.prompt_text == prompt
    assert tokenizer.decode(row.reply) == "good <end>"


def test_what_stands_beside_a_whole_chat_is_named_as_unused(folders, tmp_path, capsys):
    """A passage in a column that is often the prompt's must not disappear as if it had been used."""
    chat = [{"role": "user", "content": "cup"}, {"role": "assistant", "content": "good"}]
    records = [{"context": "smell", "messages": chat}] * 2
    args = arguments(folders, dataset=write(tmp_path / "rows.jsonl", records))
    (row, _) = sft.read_demonstrations(args.dataset, None, sft.load_tokenizer(args.model_name), 64, args)
    assert row.prompt_text == chat[:1]
    assert "not used: the columns context" in capsys.readouterr().out


def test_input_beside_a_whole_chat_is_unused_too(folders, tmp_path, capsys):
    records = [
        {"input": "smell", "messages": [{"from": "human", "value": "cup"}, {"from": "gpt", "value": "good"}]}
    ] * 2
    args = arguments(folders, dataset=write(tmp_path / "rows.jsonl", records))
    sft.read_demonstrations(args.dataset, None, sft.load_tokenizer(args.model_name), 64, args)
    assert "not used: the columns input" in capsys.readouterr().out


def test_a_turn_without_weight_is_read_but_not_learned(folders, tmp_path):
    turns = [("human", "cup", None), ("gpt", "bad", 0), ("human", "smell", None), ("chatgpt", "good", 1)]
    chat = [{"from": who, "value": text, "weight": weight} for who, text, weight in turns]
    args = arguments(folders, dataset=write(tmp_path / "rows.jsonl", [{"conversations": chat}] * 2))
    tokenizer = sft.load_tokenizer(args.model_name)
    found = sft.read_demonstrations(args.dataset, None, tokenizer, 64, args)
    assert [tokenizer.decode(row.reply) for row in found] == ["good <end>"] * 2
    assert "bad" in tokenizer.decode(found[0].prompt)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "smell"}}]}


@pytest.mark.parametrize(
    ("family", "empty"),
    [
        ("qwen3", {"completion": ""}), ("qwen3", {"completion": " \n"}),
        ("qwen3", {"completion": [{"role": "assistant", "content": ""}]}),
        ("llama3", {"completion": [CALL | {"content": ""}]}),  # its template does not write calls
    ],
)  # fmt: skip
def test_a_reply_without_words_is_left_out_and_counted(tmp_path, capsys, family, empty):
    full = {
        "completion": "good" if isinstance(empty["completion"], str) else [{"role": "assistant", "content": "good"}]
    }
    data = write(tmp_path / "rows.jsonl", [{"prompt": "cup"} | row for row in (full, empty)])
    tokenizer = tokenizer_of(family)
    (row,) = sft.read_demonstrations(data, None, tokenizer, 64, sft.Args())
    assert "good" in tokenizer.decode(row.reply)
    assert "1 demonstrations. Left out: 1 without words, 0 of over 64 tokens" in capsys.readouterr().out


def test_a_column_named_for_the_prompt_is_not_its_input_too(folders, tmp_path):
    records = [{"instruction": "smell", "input": "cup ", "output": "good"}] * 2
    args = arguments(folders, dataset=write(tmp_path / "rows.jsonl", records), prompt_column="input")
    rows_read = sft.read_demonstrations(args.dataset, None, sft.load_tokenizer(args.model_name), 64, args)
    assert [row.prompt_text for row in rows_read] == ["cup ", "cup "]


@pytest.mark.parametrize(
    ("records", "flags", "word"),
    [
        ([{"text": "cup"}], [], "--reply-column"),
        ([{"completion": "cup"}], [], "--prompt-column"),
        ([{"messages": [{"role": "user", "content": "cup"}]}], [], "assistant"),
        ([{"prompt": "cup", "completion": "good"}], ["--from-scratch", "True", "--lora-rank", "2"], "--lora-rank"),
        ([{"prompt": "cup", "completion": "good"}], ["--max-length", "1"], "over 1 tokens"),
        ([{"prompt": "cup", "completion": 7}], [], "--convert"),
        (
            [{"messages": [{"role": "user", "text": "cup"}, {"role": "assistant", "text": "good"}]}],
            [],
            "neither a text",
        ),
        (
            [{"prompt": "cup", "completion": "good"}] * 4,
            ["--batch-size", "32", "--total-timesteps", "64"],
            "--batch-size",
        ),
        (
            [{"prompt": "cup", "completion": "good"}] * 4,
            ["--batch-size", "32", "--total-timesteps", "64", "--eval-split", "train"],
            "--batch-size",
        ),
    ],
)
def test_mistakes_are_one_line(cli, folders, tmp_path, records, flags, word):
    dataset = write(tmp_path / "rows.jsonl", records)
    code, _, err = cli("sft", "--model-name", folders / "gpt2", "--dataset", dataset, "--device", "cpu",
                       "--run-dir", tmp_path / "run", "--batch-size", 1, "--total-timesteps", 4, *flags)  # fmt: skip
    assert code == 2
    assert word in err
    assert err.count("\n") == 1


def test_a_mistake_in_the_reward_is_found_before_the_training(folders, tmp_path):
    (tmp_path / "judge.py").write_text("def f(prompt, reply):\n    return None\n")
    with pytest.raises(sft.UsageError, match=r"--reward .*judge.py:f must return a number, not None"):
        sft.train(arguments(folders, reward=f"{tmp_path}/judge.py:f", run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_from_scratch_the_weights_follow_from_the_seed(folders):
    run, weights = types.SimpleNamespace(), []
    for seed in 1, 1, 2:
        model = sft.load(run, str(folders / "gpt2"), arguments(folders, from_scratch=True, seed=seed))
        weights.append(model.transformer.wte.weight)
        assert not model.training
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert sft.Args(device="cpu").from_scratch
    assert not arguments(folders).from_scratch


def entropy_of_the_grammar():
    """Of a review of the default task, in nats, and its expected number of tokens with the end token."""
    sys.path.insert(0, str(REVIEWS))
    try:
        from reward import ASPECTS, DEGREES, FITS, MAX_CLAUSES, VALUES
    finally:
        sys.path.remove(str(REVIEWS))

    def entropy(chances):
        return -sum(p * math.log(p) for p in chances)

    aspects = [0.75 / 4 * (aspect in FITS["film"]) + 0.25 / len(ASPECTS) for aspect in ASPECTS]
    degrees = {"not ": 0.25, "very ": 0.25, "": 0.5}
    pleased = {(d, v): 1 / (1 + math.exp(-1.5 * DEGREES[d] * VALUES[v] - 0.5)) for d in DEGREES for v in VALUES}
    goes_on = sum(degrees[d] / 8 * p for (d, _), p in pleased.items())
    of_going_on = sum(degrees[d] / 8 * entropy([p, 1 - p]) for (d, _), p in pleased.items())
    total, tokens = 0.0, 2.0  # " ." and the end
    for clause in range(MAX_CLAUSES):
        reached = goes_on**clause
        total += reached * (entropy(aspects) + entropy(degrees.values()) + math.log(8))
        tokens += reached * 4.5 + (reached if clause else 0)  # half of the clauses have a degree; "and" or "but"
        if clause < MAX_CLAUSES - 1:
            total += reached * (of_going_on + goes_on * math.log(2))
    return total, tokens


def test_the_reference_of_the_reviews_has_nearly_the_grammars_entropy(tmp_path):
    total, tokens = entropy_of_the_grammar()
    assert total / tokens == pytest.approx(1.0314, abs=1e-4)
    run_dir = tmp_path / "run"
    args = sft.Args(
        device="cpu", run_dir=str(run_dir), from_scratch=False, eval_replies=1, dataset_split="train[:2000]"
    )
    with sft.contextlib.closing(sft.Run(args)) as run:
        run.model = run.bare = sft.load(run, args.model_name, args)
        data = sft.read_demonstrations(args.dataset, args.dataset_split, run.tokenizer, 64, args)
        result = sft.evaluate(run, data, args)
    # Of 2000 reviews by the grammar itself, the sampling error of the mean is about 1 %
    assert result["eval/loss"] == pytest.approx(total / tokens, rel=0.02)


@pytest.mark.slow
def test_the_default_run_comes_within_one_per_cent_of_the_entropy(tmp_path):
    total, tokens = entropy_of_the_grammar()
    result = sft.train(
        sft.Args(device="cpu", run_dir=str(tmp_path / "run"), eval_demonstrations=6000, eval_frequency=64_000)
    )
    assert result["eval/loss"] == pytest.approx(total / tokens, rel=0.01)
    assert Path(tmp_path / "run" / "model" / "model.safetensors").exists()
