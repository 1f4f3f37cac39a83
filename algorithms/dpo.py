"""Direct preference optimisation (DPO): fine-tune a language model on pairs of replies, of which people prefer one.

Reinforcement learning from human feedback (RLHF) fits a reward model r to the preferences, and then has the language
model, the policy pi, maximise r less beta times the KL divergence of pi from the reference pi_ref, the model at the
start. The optimum of that objective is known [3]. Solved for the reward, it says that every policy is optimal for some
reward, its implicit reward [4]. DPO fits the implicit reward to the preferences, as a classifier would: no reward
model, and no sampling. x is a prompt, y a reply, and of the two replies in a pair y_w was preferred to y_l.

    [1] log pi(y|x) = sum over the tokens of y, its end token included, of log pi(y_t | x, y_<t)
    [2] P(y_w is preferred to y_l) = sigmoid(r(x, y_w) - r(x, y_l))                   DPO, Eq. 1 (Bradley-Terry)
    [3] pi*(y|x) proportional to pi_ref(y|x) exp(r(x, y) / beta)                      DPO, Eq. 4
    [4] r(x, y) = beta log(pi(y|x) / pi_ref(y|x)), up to a function of x              DPO, Eq. 5
    [5] sigmoid: L = -(1 - epsilon) log P - epsilon log(1 - P)                        DPO, Eq. 7; cDPO, Eq. 3
    [6] hinge:   L = max(0, 1 - (r(x, y_w) - r(x, y_l)))                              RSO, hinge-norm (its gamma: beta)
    [7] ipo:     L = ((r(x, y_w) - r(x, y_l)) / beta - 1 / (2 beta))^2                IPO, Eq. 17 (its tau: beta)
    [8] added to L: -alpha log pi(y_w|x) / |y_w|                                      Iterative RPO

[5], [6] and [7] are what --loss-type chooses from, with P of [2] and r of [4]. They depend on the difference of the two
rewards only, so both replies may lose probability, to texts that no pair contains. [8], with |y_w| the number of y_w's
tokens, counteracts that; the papers of [5] to [7] are without it: --nll-coef 0.

DPO: Rafailov et al. 2023, arXiv:2305.18290. cDPO, where a share epsilon of the labels is wrong: Mitchell 2023,
ericmitchell.ai/cdpo.pdf. RSO: Liu et al. 2023, arXiv:2309.06657, with the hinge of SLiC-HF: Zhao et al. 2023,
arXiv:2305.10425. IPO: Azar et al. 2023, arXiv:2310.12036. Iterative RPO: Pang et al. 2024, arXiv:2404.19733.

Differs from the papers: AdamW instead of RMSprop, and the learning rate rises, then falls to 0. The reference is
the model as given; DPO first fits it to the preferred replies if another model wrote them. Its log-probabilities are
computed once, before training. [8] is on by default; with it, [3] is not quite the optimum any more. RSO's sampling of
new pairs is left out, and so are the further rounds of Iterative RPO. [7] sums over the tokens, as Eq. 17 reads; the
library TRL averages, and says that IPO's authors did.

By default it learns to write reviews. A small GPT is fitted to reviews made by a grammar. It is the reference: it
writes pairs of reviews, and [2] labels them by a reward that is known. So the true reward of the policy's reviews can
be shown, and beside it that of the optimum [3] at the same KL divergence. For real models, give --model-name and
--dataset, each a Hugging Face hub id or local. The data set has the columns prompt, chosen and rejected: texts or chat
messages. Without the column prompt, the prompt is what chosen and rejected have in common at their beginning.

    python algorithms/dpo.py
    torchrun --nproc-per-node 8 algorithms/dpo.py --model-name Qwen/Qwen3-0.6B --dataset pairs.jsonl
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "datasets>=5.2", "filelock>=3.20", "numpy>=2", "tokenizers>=0.23", "torch>=2.13", "tqdm>=4.66",
#     "transformers>=5.23,<6", "tyro>=1", "wandb>=0.31",
# ]
# ///

import copy
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, NoReturn

import filelock
import numpy as np
import torch
import torch.distributed.nn  # now, without a process group: imported later, it would hold the group in its defaults
import tyro
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, distributed, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerFast
from transformers.utils import logging

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


@dataclass
class Args:
    seed: int = 1  # all randomness follows from it
    total_timesteps: int = 80_000  # preference pairs to learn from, summed over all epochs; a step is a pair
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    eval_frequency: int | None = None  # steps between evaluations; None: a twentieth of the run
    checkpoint_frequency: int | None = None  # steps between checkpoints; None: a tenth of the run
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "plainrl"  # W&B project
    run_dir: str | None = None  # folder of the run; None: a new one in runs/
    resume: bool = False  # continue the run in --run-dir with its own arguments
    evaluate: bool = False  # only evaluate the model in --run-dir

    model_name: str | None = None  # a causal language model: hub id or local folder; None: a small GPT writes reviews
    dataset: str | None = None  # hub id, or a local .jsonl or .parquet file; None: the reviews
    num_pairs: int = 40_000  # pairs of reviews
    eval_pairs: int = 1000  # pairs held out for evaluation, at most a tenth of all
    eval_replies: int = 1000  # reviews that the policy writes in an evaluation
    max_length: int = 1024  # tokens of prompt and reply together; longer pairs are left out
    learning_rate: float = 5e-4  # of AdamW; for real models rather 1e-6, with LoRA 1e-5
    warmup: float = 0.1  # share of the run over which the learning rate rises; besides, it falls to 0 over all of it
    batch_size: int = 32  # pairs of an update, summed over all processes
    micro_batch_size: int | None = None  # pairs of a forward pass of one process; None: all of its update
    max_grad_norm: float = 1.0  # gradients with a larger norm are scaled down to it
    weight_decay: float = 0.0  # of AdamW
    lora_rank: int = 0  # train low-rank matrices beside each linear layer (LoRA, alpha = 2 rank); 0: train all weights
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    beta: float = 1.0  # [3] the price of a unit of KL divergence; for real data rather 0.1
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"  # [5], [6] or [7]
    label_smoothing: float = 0.0  # [5] epsilon
    nll_coef: float = 0.2  # [8] alpha; 0 in the papers of [5] to [7]

    def __post_init__(self) -> None:
        check_and_complete(
            self, num_pairs=(10, math.inf), warmup=(0, 1), lora_rank=(0, math.inf), label_smoothing=(0, 0.5)
        )
        check_data_flags(self)
        if self.beta == 0:
            refuse("--beta 0 makes every implicit reward 0: there is nothing to learn")
        if self.label_smoothing and self.loss_type != "sigmoid":
            refuse(f"--label-smoothing belongs to --loss-type sigmoid; {self.loss_type} does not use it")


def sequence_log_prob(model: nn.Module, ids: Tensor, is_reply: Tensor) -> Tensor:
    """[1] of each row's reply. ids: (B, T), padded at the end; is_reply: (B, T), true on its tokens -> (B,)"""
    first = int(is_reply.any(0).int().argmax())  # no row's reply begins earlier; K = T - first tokens are predicted
    device = model.device
    targets = ids.masked_fill(~is_reply, -100)[:, first:].to(device)  # (B, K); cross_entropy gives 0 at -100
    # Attention looks back only, so padding behind a row changes nothing in it and needs no mask
    # (B, K, vocabulary): the last K positions, each of which has read all before its target
    logits = model(input_ids=ids[:, :-1].to(device), logits_to_keep=targets.shape[1], use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return -losses.view(targets.shape).sum(-1)  # [1]


METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected",
)  # fmt: skip


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,  # log-probabilities [1]
    beta: float, loss_type: str, label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of each pair, (B,), and METRICS, (7, B). All log-probabilities are (B,)."""
    assert chosen.shape == rejected.shape == ref_chosen.shape == ref_rejected.shape
    chosen_rewards = beta * (chosen - ref_chosen)  # [4]
    rejected_rewards = beta * (rejected - ref_rejected)  # [4]
    margins = chosen_rewards - rejected_rewards
    if loss_type == "sigmoid":
        log_p, log_not_p = nn.functional.logsigmoid(margins), nn.functional.logsigmoid(-margins)  # [2]
        losses = -(1 - label_smoothing) * log_p - label_smoothing * log_not_p  # [5]
    elif loss_type == "hinge":
        losses = nn.functional.relu(1 - margins)  # [6]
    else:
        losses = (margins / beta - 1 / (2 * beta)).square()  # [7]
    accuracies = (margins.sign() + 1) / 2  # of a tie 1/2
    metrics = losses, chosen_rewards, rejected_rewards, accuracies, margins, chosen, rejected
    return losses, torch.stack(metrics).detach()


def optimum(rewards: np.ndarray, kl: float) -> tuple[np.ndarray, float]:
    """The policy [3] at the beta for which its KL divergence from the reference is kl: its weights, and that beta.

    rewards: (prompts, N), of N replies to each prompt that the reference wrote. So the reference weights each by 1 / N,
    and [3] in proportion to exp(r / beta), which is importance sampling: (prompts, N) weights, of sum 1 for a prompt.
    It is precise only where kl is far below log(N), the most that such weights can have.
    """
    low, high = 1e-3, 1e3  # bounds of beta, for bisection: the KL divergence falls as beta rises
    for _ in range(60):
        beta = math.sqrt(low * high)
        weights = np.exp((rewards - rewards.max(1, keepdims=True)) / beta)  # [3]; the maximum cancels
        weights /= weights.sum(1, keepdims=True)
        log_ratio = np.log(np.maximum(weights * rewards.shape[1], 1e-300))  # 1e-300: 0 log 0 is 0
        divergence = (weights * log_ratio).sum(1).mean()
        low, high = (beta, high) if divergence > kl else (low, beta)
    return weights, beta


class Pair(NamedTuple):
    """Token ids. Those of the replies include the end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def check_data_flags(args: Args) -> None:
    in_config = args.resume or args.evaluate  # then config.json names what the command line does not
    if (args.model_name is None) != (args.dataset is None) and not in_config:
        refuse("--model-name and --dataset go together; without them, a small GPT writes reviews")


def read_records(source: str) -> Iterator[tuple[str, object]]:
    """The rows of a data set, each after the words with which a message says where it stands."""
    if source.endswith(".jsonl"):
        try:
            lines = Path(source).read_bytes().splitlines()
        except OSError as error:
            refuse(f"{source}: {error.strerror}")
        for number, line in enumerate(lines, 1):
            where = f"{source}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                refuse(f"{where} is not JSON: {error}")
            yield where, record
        return
    import datasets  # slow to import

    try:
        if source.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=source, split="train")
        else:
            rows = datasets.load_dataset(source, split="train")
    except Exception as error:  # unknown, unreachable, damaged: its message says which
        refuse(f"{source} can't be read as a data set: {error}")
    for number, record in enumerate(rows, 1):
        yield f"{source}, row {number}", record


def read_text(where: str, record: object, column: str) -> str | list[dict]:
    """What the record has in the column: a text or a list of chat messages. Anything else is refused."""
    if not isinstance(record, dict):
        refuse(f"{where} is not an object with columns")
    value = record.get(column)
    messages = value if isinstance(value, list) else []
    are_messages = all(isinstance(m, dict) and {type(m.get("role")), type(m.get("content"))} == {str} for m in messages)
    if not (isinstance(value, str) or (messages and are_messages)):
        shown = f"{value!r:.80}" if column in record else "missing"
        refuse(f"{where}: {column} must be a text or a list of messages with role and content; it is {shown}")
    return value


def common_length(*sequences: str | list) -> int:
    """How many items at their beginning all sequences have in common."""
    length = 0
    while all(len(items) > length and items[length] == sequences[0][length] for items in sequences):
        length += 1
    return length


def encode(
    where: str, tokenizer: PreTrainedTokenizerFast, prompt: str | list[dict], replies: list[str] | list[list[dict]]
) -> tuple[list[int], ...]:
    """Token ids of the prompt, and of each reply with its end token. where: for messages."""
    # Prompt and reply are tokenised together, as a model reads them: separately, the tokens could be others
    if isinstance(prompt, str):
        prompt_ids, *sequences = tokenizer([prompt, *(prompt + reply for reply in replies)]).input_ids
    elif tokenizer.chat_template is None:
        refuse(f"{where} has chat messages, but the model's tokenizer has no chat template")
    else:
        sequences = [tokenizer.apply_chat_template(prompt + reply, return_dict=False) for reply in replies]
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    end = tokenizer.eos_token_id
    start = common_length(prompt_ids, *sequences)  # less than the whole prompt where a token spans prompt and reply
    if start == 0:  # the first token to be predicted must follow something
        start, sequences = 1, [[end, *ids] for ids in sequences]
    # Many chat templates write the end token themselves, some with a line break behind it, which no model writes
    tails = [ids[start:-1] if ids[start:][-2:-1] == [end] else ids[start:] for ids in sequences]
    return sequences[0][:start], *(ids if ids[-1:] == [end] else [*ids, end] for ids in tails)


def read_pairs(source: str, tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[Pair]:
    """The pairs of a data set, less those with more than max_length tokens."""
    pairs, num_long = [], 0
    for where, record in read_records(source):
        chosen, rejected = (read_text(where, record, column) for column in ("chosen", "rejected"))
        prompt = record.get("prompt")
        if type(chosen) is not type(rejected):
            refuse(f"{where}: chosen and rejected must both be texts, or both lists of messages")
        if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list)):  # chosen and rejected contain it
            start = common_length(chosen, rejected)
            while start and isinstance(chosen, str) and not chosen[start - 1].isspace():
                start -= 1  # not within a word
            prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
            if chosen == rejected or [] in (chosen, rejected):
                refuse(f"{where}: chosen and rejected must go on differently after their common beginning")
        elif type(read_text(where, record, "prompt")) is not type(chosen):
            refuse(f"{where}: prompt must be a text, as chosen and rejected are")
        pair = Pair(*encode(where, tokenizer, prompt, [chosen, rejected]))
        if len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) > max_length:
            num_long += 1
        else:
            pairs.append(pair)
    if num_long and RANK == 0:
        print(f"{num_long} of {num_long + len(pairs)} pairs have more than {max_length} tokens and are left out")
    if len(pairs) < 10:
        refuse(f"{source} has {len(pairs)} pairs of at most {max_length} tokens; at least 10 are needed")
    return pairs


def split(pairs: list[Pair], args: Args) -> tuple[list[int], list[int]]:
    """The rows, which are indices of pairs, for training, and those held out."""
    order = np.random.default_rng(args.seed).permutation(len(pairs)).tolist()
    num_eval = min(args.eval_pairs, len(pairs) // 10)
    return order[num_eval:], order[:num_eval]


def by_length(rows: list[int], pairs: list[Pair]) -> list[int]:
    """The rows in the order of their longer sequence's length, so that neighbours need little padding."""
    return sorted(rows, key=lambda i: len(pairs[i].prompt) + max(len(pairs[i].chosen), len(pairs[i].rejected)))


def epoch_batches(rows: list[int], pairs: list[Pair], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """All rows once, in random batches of pairs of similar length. The last batch may be smaller."""
    rng = random.Random(f"{seed} {epoch}")
    rows = rng.sample(rows, len(rows))
    rest = [rows.pop() for _ in range(len(rows) % batch_size)]
    # Sorted in pools of 50 batches, not all at once: else the batches of all epochs would be nearly the same
    pools = (by_length(rows[i : i + 50 * batch_size], pairs) for i in range(0, len(rows), 50 * batch_size))
    batches = [pool[i : i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)]
    return rng.sample(batches, len(batches)) + ([rest] if rest else [])


def collate(pairs: list[Pair], pad_id: int) -> tuple[Tensor, Tensor]:
    """(2B, T) each, the chosen before the rejected: token ids, padded at the end, and where they are the reply's."""
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(prompt) + len(reply) for prompt, reply in sequences)  # T
    ids = [prompt + reply + [pad_id] * (width - len(prompt) - len(reply)) for prompt, reply in sequences]
    start = torch.tensor([len(prompt) for prompt, _ in sequences])[:, None]  # (2B, 1)
    end = start + torch.tensor([len(reply) for _, reply in sequences])[:, None]
    position = torch.arange(width)  # (T,)
    return torch.tensor(ids), (start <= position) & (position < end)


def pair_log_probs(model: nn.Module, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """[1] of the chosen and of the rejected replies, (B,) each."""
    # On CUDA, matrix products are in bfloat16, softmax and sums in float32
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        log_probs = sequence_log_prob(model, *collate(pairs, model.config.pad_token_id))
    return log_probs.chunk(2)  # (2B,) -> (B,), (B,)


@torch.no_grad()
def all_log_probs(model: nn.Module, pairs: list[Pair], rows: list[int], args: Args) -> Tensor:
    """[1] of these rows' chosen and rejected replies, in a tensor for all N pairs, (N, 2). Processes share the work."""
    result = torch.zeros(len(pairs), 2, device=args.device)
    rows, size = by_length(rows, pairs), args.micro_batch_size or args.batch_size
    for i in range(RANK * size, len(rows), PROCESSES * size):
        batch = rows[i : i + size]
        result[batch] = torch.stack(pair_log_probs(model, [pairs[row] for row in batch]), 1)
    return sum_over_processes(result)


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, pairs: list[Pair], ref_log_probs: Tensor, batch: list[int],
    args: Args,
) -> dict[str, float]:  # fmt: skip
    """One step on a batch of rows, split among the processes and into micro-batches. Returns means over the batch.

    ref_log_probs: [1] by the reference of all pairs' chosen and rejected replies, (N, 2)
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # not None: a process may have no pair of a small batch
    mine = batch[RANK::PROCESSES]  # the pairs of this process
    sums = torch.zeros(len(METRICS), device=args.device)
    size = args.micro_batch_size or max(len(mine), 1)
    for rows in (mine[i : i + size] for i in range(0, len(mine), size)):
        log_probs = pair_log_probs(model, [pairs[row] for row in rows])
        refs = ref_log_probs[rows].unbind(1)  # as log_probs: of the chosen and of the rejected
        losses, metrics = dpo_loss(*log_probs, *refs, args.beta, args.loss_type, args.label_smoothing)
        lengths = torch.tensor([len(pairs[row].chosen) for row in rows], device=args.device)
        losses = losses - args.nll_coef * log_probs[0] / lengths  # [8]; the metric "loss" is without it
        (losses.sum() / len(batch)).backward()  # by the whole batch, so that its split changes nothing
        sums += metrics.sum(1)
    for parameter in parameters:
        sum_over_processes(parameter.grad)
    grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)  # the norm before clipping
    optimizer.step()
    means = sum_over_processes(sums) / len(batch)
    return dict(zip(METRICS, means.tolist(), strict=True)) | {"losses/grad_norm": grad_norm.item()}


def evaluate_pairs(model: nn.Module, pairs: list[Pair], ref_log_probs: Tensor, rows: list[int], args: Args) -> dict:
    """The metrics of held-out pairs."""
    log_probs, refs = all_log_probs(model, pairs, rows, args)[rows].unbind(1), ref_log_probs[rows].unbind(1)
    _, metrics = dpo_loss(*log_probs, *refs, args.beta, args.loss_type, args.label_smoothing)
    means = dict(zip(METRICS, metrics.mean(1).tolist(), strict=True))
    names = {"eval/loss": "loss", "eval/accuracy": "rewards/accuracies", "eval/margin": "rewards/margins"}
    return {name: means[of_update] for name, of_update in names.items()}


# The reviews: a grammar writes them, and true_reward, which no model sees, says how good they are
FITS = {  # what a review of each thing should speak of
    "coffee": ["taste", "smell", "cup", "price"],
    "concert": ["music", "sound", "seat", "staff"],
    "film": ["plot", "cast", "music", "ending"],
    "hotel": ["room", "bed", "staff", "price"],
    "novel": ["plot", "style", "cover", "ending"],
    "phone": ["screen", "battery", "camera", "price"],
    "pizza": ["taste", "smell", "crust", "size"],
    "train": ["seat", "staff", "view", "price"],
}
ASPECTS = sorted({aspect for aspects in FITS.values() for aspect in aspects})
VALUES = {
    "superb": 1.2, "lovely": 0.9, "good": 0.6, "decent": 0.3, "dull": -0.3, "poor": -0.6, "bad": -0.9, "awful": -1.2,
}  # fmt: skip
DEGREES = {"not ": -0.5, "very ": 1.5, "": 1}  # "not superb" is not as bad as "awful"
# Its groups: link, aspect, degree and value
CLAUSE = re.compile(rf"(and |but |)the ({'|'.join(ASPECTS)}) is (not |very |)({'|'.join(VALUES)})")
NONSENSE = -2.0  # the true reward of what is no review
PROMPTS = [f"review the {thing} : " for thing in FITS]


def repeat_prompts(count: int) -> list[str]:
    return (PROMPTS * math.ceil(count / len(PROMPTS)))[:count]


def write_review(prompt: str, rng: random.Random) -> str:
    """One to four clauses: "the cup is not bad but the smell is superb ." """
    thing, clauses, pleased = prompt.split()[2], [], True
    while pleased and len(clauses) < 4:
        aspect = rng.choice(FITS[thing] if rng.random() < 0.75 else ASPECTS)
        degree, value = rng.choice(["not ", "very ", "", ""]), rng.choice(list(VALUES))
        clauses.append(f"the {aspect} is {degree}{value}")
        # Who is pleased writes on. To foresee that, the GPT must learn what words are worth, as real ones do
        pleased = rng.random() < 1 / (1 + math.exp(-1.5 * DEGREES[degree] * VALUES[value] - 0.5))
    # A link after each clause, at random; [:-5] takes the last one off
    return "".join(clause + rng.choice([" and ", " but "]) for clause in clauses)[:-5] + " ."


def parse_review(review: str) -> list[re.Match]:
    """The matches of its clauses; [] if the grammar can't have written it."""
    clauses = [CLAUSE.fullmatch(part) for part in re.split(" (?=and |but )", review.removesuffix(" ."))]
    linked = all(clauses) and not clauses[0][1]  # the first has no link; the others were split where theirs begins
    return clauses if linked and len(clauses) <= 4 and review.endswith(" .") else []


def true_reward(prompt: str, review: str) -> float:
    """NONSENSE unless the grammar can have written it; else the sum of its clauses' values, less some penalties."""
    clauses = parse_review(review)
    if not clauses:
        return NONSENSE
    thing = prompt.split()[2]
    links, aspects = [clause[1] for clause in clauses], [clause[2] for clause in clauses]
    values = [DEGREES[clause[3]] * VALUES[clause[4]] for clause in clauses]
    strays = sum(aspect not in FITS[thing] for aspect in aspects)
    repetitions = len(aspects) - len(set(aspects))
    # "and" joins two clauses that both praise or both blame, "but" one of each
    fitting = ["and " if a * b > 0 else "but " for a, b in pairwise(values)]
    misused = sum(link != word for link, word in zip(links[1:], fitting, strict=True))
    return sum(values) - 0.6 * (strays + repetitions) - 0.3 * misused


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {word for text in (*PROMPTS, *ASPECTS, *VALUES, "the is not very and but .") for word in text.split()}
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unknown>", *sorted(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unknown>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_reviews(folder: Path, args: Args) -> None:
    """Makes reference/, a small GPT fitted to reviews, and pairs.jsonl, which it writes and true_reward labels."""
    if (folder / "pairs.jsonl").exists():
        return
    num_fit = min(args.num_pairs, 32_000)
    print(f"Fitting a small GPT to {2 * num_fit:,} reviews, and having it write {args.num_pairs:,} pairs")
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    tokenizer = word_tokenizer()
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 64, "n_layer": 3, "n_head": 4}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    same_but_faster = {"activation_function": "gelu_pytorch_tanh"}  # as GPT-2's "gelu_new"
    config = GPT2Config(**sizes, **ends, **no_dropout, **same_but_faster, initializer_range=0.1)
    model = AutoModelForCausalLM.from_config(config).to(args.device)

    prompts = repeat_prompts(num_fit)
    reviews = [[write_review(prompt, rng) for prompt in prompts] for _ in range(2)]
    encoded = (encode("", tokenizer, *example) for example in zip(prompts, zip(*reviews, strict=True), strict=True))
    pairs = [Pair(*ids) for ids in encoded]
    batches = epoch_batches(list(range(len(pairs))), pairs, 16, args.seed, 0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    for i, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 5e-3 * min((i + 1) / 50, 1 - i / len(batches))
        loss = -torch.cat(pair_log_probs(model, [pairs[row] for row in batch])).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    prompts = repeat_prompts(args.num_pairs)
    replies = [sample_reviews(model, tokenizer, prompts, args.seed, stream) for stream in range(2)]
    lines = []
    for prompt, one, other in zip(prompts, *replies, strict=True):
        margin = true_reward(prompt, one) - true_reward(prompt, other)
        if rng.random() > 1 / (1 + math.exp(-margin)):  # [2]
            one, other = other, one
        lines.append(json.dumps({"prompt": prompt, "chosen": one, "rejected": other}))
    save_pretrained(folder / "reference", model, tokenizer)
    content = "\n".join(lines).encode()
    write_file(folder / "pairs.jsonl", lambda file: file.write(content))  # last: it completes the rest


@torch.no_grad()
def sample_reviews(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: list[str], seed: int, stream: int
) -> list[str]:
    """One review by the model for each prompt, all of which have the same number of tokens.

    Each stream has random numbers of its own. This reseeds torch's generator, from which training draws nothing.
    """
    torch.manual_seed(int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1)[0]))
    reviews = []
    for i in range(0, len(prompts), 1000):
        inputs = tokenizer(prompts[i : i + 1000], return_tensors="pt", return_token_type_ids=False).to(model.device)
        ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=40)[:, inputs.input_ids.shape[1] :]
        reviews += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return reviews


def judge(prompt: str, review: str) -> tuple[float, int, bool]:
    """True reward, length in words, and fluency: whether it follows the grammar."""
    return true_reward(prompt, review), len(review.split()), bool(parse_review(review))


def judge_reference(folder: Path) -> np.ndarray:
    """What judge returns for the reviews in pairs.jsonl, by the reference, N for each of PROMPTS: (prompts, N, 3)"""
    pool = {prompt: [] for prompt in PROMPTS}
    for _, record in read_records(str(folder / "pairs.jsonl")):
        pool[record["prompt"]] += [judge(record["prompt"], record[name]) for name in ("chosen", "rejected")]
    size = min(map(len, pool.values()))
    return np.array([judged[:size] for judged in pool.values()], dtype=float)


def evaluate_reviews(
    model: nn.Module, reference: nn.Module, tokenizer: PreTrainedTokenizerFast, pool: np.ndarray, args: Args
) -> dict[str, float]:
    """True reward, KL divergence and more, by sampling, beside the optimum [3] at that divergence.

    pool: of judge_reference, (prompts, N, 3)
    """
    prompts = repeat_prompts(args.eval_replies)
    reviews = sample_reviews(model, tokenizer, prompts, args.seed, 2)
    judged = np.array([judge(*text) for text in zip(prompts, reviews, strict=True)], dtype=float)  # (eval_replies, 3)
    of_reference = pool[np.arange(len(prompts)) % len(PROMPTS), :, 0]  # (eval_replies, N): rewards for the same prompt
    # Each review against all of the reference's for the same prompt; a tie is half a win
    wins = (judged[:, :1] > of_reference) + (judged[:, :1] == of_reference) / 2
    pairs = [  # of one review twice, as all_log_probs wants pairs
        Pair(*encode("", tokenizer, prompt, [review, review])) for prompt, review in zip(prompts, reviews, strict=True)
    ]
    rows = list(range(len(pairs)))
    log_ratio = all_log_probs(model, pairs, rows, args) - all_log_probs(reference, pairs, rows, args)
    kl = log_ratio[:, 0].mean().item()  # E[log pi(y|x) - log pi_ref(y|x)], with y by the policy
    weights, _ = optimum(pool[..., 0], kl)
    reward, length, fluency = judged.mean(0)
    best_reward, best_length, best_fluency = (weights[..., None] * pool).sum(1).mean(0)  # (prompts, N, 3) -> (3,)
    return {
        "eval/true_reward": reward,
        "eval/optimal_reward": best_reward,
        "eval/reference_reward": pool[..., 0].mean(),
        "eval/kl": kl,
        "eval/win_rate": wins.mean(),
        "eval/length": length,
        "eval/optimal_length": best_length,
        "eval/fluency": fluency,
        "eval/optimal_fluency": best_fluency,
    }


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # unknown, unreachable, damaged: its message says which
        refuse(f"{name} has no tokenizer that can be loaded: {error}")
    if tokenizer.eos_token_id is None:
        refuse(f"the tokenizer of {name} has no end token (eos_token): set one in its tokenizer_config.json")
    return tokenizer


def load_model(name: str | Path, args: Args) -> nn.Module:
    """The model in float32, as small steps get lost in bfloat16; what LoRA freezes is in bfloat16, save on the CPU."""
    dtype = torch.bfloat16 if args.lora_rank and args.device != "cpu" else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:
        refuse(f"{name} can't be loaded as a causal language model: {error}")
    return prepare_model(model, "CAUSAL_LM", args)


def prepare_model(model: nn.Module, task: str, args: Args) -> nn.Module:
    # Dropout off: in every pass the same text must get the same value; in dpo.py's first pass, the reference's.
    # Some modules are nn.Dropout, others, like attention, hold their rate as a number
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if args.lora_rank:
        try:
            import peft
        except ImportError:
            refuse("--lora-rank needs the package peft: pip install peft")
        lora = peft.LoraConfig(task, r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        model = peft.get_peft_model(model, lora)
        for parameter in model.parameters():
            if parameter.requires_grad:  # the head too: in bfloat16, small steps get lost
                parameter.data = parameter.data.float()
    return model.to(args.device).train()  # train: gradient checkpointing asks for it


class Trained:
    """What is trained of a model, as a part of a checkpoint: all of it, or LoRA's matrices and its head, if any."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model, tokenizer

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.model.named_parameters() if value.requires_grad}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = self.state_dict()
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in state.items()}:
            raise ValueError("another model")
        for name, value in own.items():
            value.copy_(state[name])


def save_pretrained(folder: Path, *parts: nn.Module | PreTrainedTokenizerFast) -> None:
    """Replaces the folder by one in the Hugging Face layout. A crash leaves half of folder.tmp, never of folder."""
    temporary = Path(f"{folder}.tmp")
    try:
        for part in parts:
            part.save_pretrained(temporary)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if number := re.search(r"os error (\d+)", str(error)):  # how libraries in Rust tell of a full disk
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from None
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def start_processes(args: Args) -> None:
    """Finds the device, and under torchrun the other processes. Process 0 alone writes, prints and hears signals."""
    if PROCESSES > 1:
        if args.model_name is None:
            refuse("torchrun is for --model-name and --dataset; the reviews are learned by one process")
        if args.device not in ("auto", "cpu", "cuda"):
            refuse(f"--device {args.device}: torchrun gives each process a GPU of its own, so name none")
        if args.device != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # first: choose_device puts a tensor there
    args.device = choose_device(args.device, small=args.model_name is None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if PROCESSES > 1:
        distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
        for number in (signal.SIGINT, signal.SIGTERM) if RANK else ():
            signal.signal(number, signal.SIG_IGN)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum, in all processes; values are overwritten with it."""
    if PROCESSES > 1:
        distributed.all_reduce(values)
    return values


def agree(run: "Run | None", step: int, args: Args) -> tuple[bool, bool, bool]:
    """Whether to evaluate, save and stop: process 0, which has the run, decides for all."""
    flags = torch.zeros(3, device=args.device)
    if run:
        flags += torch.tensor([run.evaluation_is_due(step), run.checkpoint_is_due(step), run.stopped()]).to(flags)
    return tuple(sum_over_processes(flags).bool().tolist())


def reference_log_probs(model: nn.Module, pairs: list[Pair], args: Args) -> Tensor:
    """[1] by the reference, which the model is before its first update: (number of pairs, 2). Kept in reference.pt."""
    path = Path(args.run_dir or "", "reference.pt")
    if args.resume and path.exists():
        log_probs = load_file(path)["log_probs"].to(args.device)
        if len(log_probs) != len(pairs):
            refuse(f"{path} is of {len(log_probs)} pairs, but there are {len(pairs)} now: has the data set changed?")
        return log_probs
    log_probs = all_log_probs(model, pairs, list(range(len(pairs))), args)
    if RANK == 0:
        save_file(path, {"log_probs": log_probs})
    return log_probs


def load(name: str | Path, source: str | Path, args: Args) -> tuple[nn.Module, PreTrainedTokenizerFast, list[Pair]]:
    tokenizer = load_tokenizer(name)
    model = load_model(name, args)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.eos_token_id  # any token will do: [1] leaves padding out
    limit = min(args.max_length, getattr(model.config, "max_position_embeddings", args.max_length))
    return model, tokenizer, read_pairs(str(source), tokenizer, limit)


def warn_if_stuck(metrics: dict[str, float]) -> None:
    if abs(metrics["rewards/margins"]) < 1e-4:  # nearly 0: sums of logarithms are rounded
        cause = "the updates are too small: raise --learning-rate"
        if metrics["losses/grad_norm"] == 0:
            cause = "no gradient reaches the weights: are they frozen, or are chosen and rejected equal?"
        tqdm.write(f"warning: after 50 updates the margins are still 0: {cause}", file=sys.stderr)


def train(args: Args) -> None:
    start_processes(args)
    torch.manual_seed(args.seed)
    reviews = args.model_name is None
    loaded = None if reviews else load(args.model_name, args.dataset, args)  # first: a mistake in it leaves no folder
    run = Run(args, "reviews" if reviews else Path(args.dataset).stem) if RANK == 0 else None
    if reviews:
        make_reviews(run.dir, args)
        torch.manual_seed(args.seed)  # for LoRA: a run that begins anew finds the reviews made, and draws nothing there
        loaded = load(run.dir / "reference", run.dir / "pairs.jsonl", args)
    model, tokenizer, pairs = loaded
    ref_log_probs = reference_log_probs(model, pairs, args)
    if reviews:
        reference_model, pool = copy.deepcopy(model), judge_reference(run.dir)
    rows, eval_rows = split(pairs, args)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=args.weight_decay, fused=True)
    parts = {"model": Trained(model, tokenizer), "optimizer": optimizer}
    if run:
        run.parts |= parts
        global_step = run.restore()  # 0 in a new run
    else:
        path = Path(args.run_dir or "", CHECKPOINT)
        global_step = load_file(path, **parts)["step"] if args.resume and path.exists() else 0
    batches = None

    while True:
        # 1. Evaluate and save where it is due, and at the end
        evaluation_is_due, checkpoint_is_due, stopped = agree(run, global_step, args)
        if evaluation_is_due:
            result = evaluate_pairs(model, pairs, ref_log_probs, eval_rows, args)
            if reviews:
                result |= evaluate_reviews(model, reference_model, tokenizer, pool, args)
            if run:
                run.log(global_step, result)
        if checkpoint_is_due and run:
            run.save(global_step)
        if stopped or global_step == args.total_timesteps:
            break

        # 2. Take the next batch of the epoch; at its end and after a resumption, draw the epoch's batches
        first_step, start_time = global_step, time.perf_counter()
        epoch, position = divmod(global_step, len(rows))
        if batches is None or position == 0:
            batches = epoch_batches(rows, pairs, args.batch_size, args.seed, epoch)
        batch = batches[position // args.batch_size][: args.total_timesteps - global_step]

        # 3. Learn
        # A linear rise times a linear fall: at the end of the warm-up it is (1 - warmup) * learning_rate, and no more
        rise = min(1, (global_step + len(batch)) / max(args.warmup * args.total_timesteps, 1))
        optimizer.param_groups[0]["lr"] = args.learning_rate * rise * (1 - global_step / args.total_timesteps)
        metrics = update(model, optimizer, pairs, ref_log_probs, batch, args)
        global_step += len(batch)

        # 4. Log, and say what is wrong if it can be seen
        # Before the first update the policy is the reference: all margins are 0, but for rounding
        if first_step == 0 and abs(metrics["rewards/margins"]) > 0.01 * args.beta * abs(metrics["logps/chosen"]):
            refuse("before the first update all margins must be 0: reference.pt is of another model")
        if run and first_step < 50 * args.batch_size <= global_step:
            warn_if_stuck(metrics)
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        metrics["charts/SPS"] = len(batch) / (time.perf_counter() - start_time)
        if run:
            run.log(global_step, metrics)
    if reviews:
        show_reviews(model, reference_model, tokenizer, args)
    if run:
        run.finish("Done. To evaluate it again:", "--evaluate")
    if PROCESSES > 1:
        distributed.destroy_process_group()


def show_reviews(model: nn.Module, reference: nn.Module, tokenizer: PreTrainedTokenizerFast, args: Args) -> None:
    """Three prompts, each with the review before and after, and their true rewards."""
    prompts = PROMPTS[:3]
    before, after = (sample_reviews(m, tokenizer, prompts, args.seed, 3) for m in (reference, model))
    for prompt, *reviews in zip(prompts, before, after, strict=True):
        tqdm.write(prompt)
        for word, review in zip(("before", "after"), reviews, strict=True):
            tqdm.write(f"    {word:>6} {true_reward(prompt, review):5.1f}  {review}")


def evaluate_saved(args: Args) -> None:
    """Evaluates the model in run_dir/model as the last evaluation of the run did, or on another --dataset."""
    folder, reviews = Path(args.run_dir), args.model_name is None
    start_processes(args)
    source = folder / "pairs.jsonl" if reviews else args.dataset
    args = replace(args, lora_rank=0)
    model, tokenizer, pairs = load(folder / MODEL, source, args)
    reference_model = load_model(folder / "reference" if reviews else args.model_name, args)
    reference_model.config.pad_token_id = model.config.pad_token_id
    rows = split(pairs, args)[1]
    ref_log_probs = all_log_probs(reference_model, pairs, rows, args)  # anew: the pairs may be others than the run's
    result = evaluate_pairs(model, pairs, ref_log_probs, rows, args)
    if reviews:
        result |= evaluate_reviews(model, reference_model, tokenizer, judge_reference(folder), args)
    if RANK == 0:
        print(*(f"{name} {value:.4g}" for name, value in result.items()), sep=", ")
    if PROCESSES > 1:
        distributed.destroy_process_group()


# Below the ruled line every script is the same. These are dpo.py's exceptions, under the names that they
# have in the other scripts: a model in the Hugging Face layout, with its tokenizer, is a folder.
MODEL, CHECKPOINT = "model", "checkpoint.pt"


def save_model(folder: Path, model: Trained) -> None:
    """Replaces the folder model/."""
    save_pretrained(folder / MODEL, model.model, model.tokenizer)


# ---- Below this line every script is the same: command line, environments, evaluation, run folder ----


def refuse(message: object) -> NoReturn:
    """Ends the program for a user's mistake: one line that says what to do, and exit code 2."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def check_and_complete(args: Args, **ranges: tuple[float, float]) -> None:
    """Refuses numbers out of range, by default integers below 1, others below 0. Fills in frequencies that are None."""
    ranges = {"seed": (0, 2**63 - 1), "gamma": (0, 1)} | ranges
    for name, value in vars(args).items():
        low, high = ranges.get(name, (1 if type(value) is int else 0, math.inf))  # type(): a bool is no count
        if type(value) in (int, float) and not (math.isfinite(value) and low <= value <= high):
            refuse(f"--{name.replace('_', '-')} is {value}, which is not a number from {low} to {high}")
    num_envs = vars(args).get("num_envs", 1)
    if args.total_timesteps % num_envs:
        refuse(f"--total-timesteps {args.total_timesteps} must be a multiple of --num-envs {num_envs}")
    args.eval_frequency = args.eval_frequency or math.ceil(args.total_timesteps / 20)
    args.checkpoint_frequency = args.checkpoint_frequency or math.ceil(args.total_timesteps / 10)


def parse_args() -> Args:
    """The command line. With --resume or --evaluate, the arguments in the run's config.json are put in front of it."""
    args = tyro.cli(Args, description=__doc__)
    if not args.resume and not args.evaluate:
        return args
    if args.run_dir is None:
        refuse("--resume and --evaluate need --run-dir")
    path = Path(args.run_dir, "config.json")
    try:
        config = json.loads(path.read_text())
        script, saved = config["script"], dict(config["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"{path} is missing or damaged ({error!r})")
    if script != Path(__file__).stem:
        refuse(f"--run-dir {args.run_dir} holds a run of {script}.py")
    flags = [f"--{'no-' if value is False else ''}{name}" for name, value in saved.items() if isinstance(value, bool)]
    flags += [f"--{name}={value}" for name, value in saved.items() if not isinstance(value, bool)]
    merged = tyro.cli(Args, args=flags + sys.argv[1:])
    for name in saved.keys() - {"run_dir", "resume", "device"}:
        if args.resume and getattr(merged, name) != saved[name]:
            refuse(f"--resume goes on with the run's own arguments; leave out --{name.replace('_', '-')}")
    return merged


def choose_device(name: str, small: bool) -> str:
    """auto takes a GPU if there is one, but the CPU for small networks, which don't repay the transfers."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not small else "cpu"
    try:
        torch.zeros(1, device=name)
    except (AssertionError, RuntimeError) as error:
        refuse(f"--device {name} can't be used here; --device cpu can ({error!s:.99})")
    if small:
        torch.set_num_threads(1)  # small matrices: a second thread costs more than it gives
    return name


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces the file atomically: a crash never leaves half of it."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind the latter
        temporary.unlink(missing_ok=True)
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def save_file(path: Path, state: dict) -> None:
    write_file(path, lambda file: torch.save(state, file))


def load_file(path: Path, **parts: nn.Module | torch.optim.Optimizer) -> dict:
    """Reads what save_file wrote, data and never code, into the parts of the same names."""
    if not path.exists():
        refuse(f"{path} is missing")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (PermissionError, MemoryError, torch.OutOfMemoryError):  # not the fault of what is in the file
        raise
    except Exception as error:  # a damaged file can raise anything
        refuse(f"{path} is damaged or of another script ({type(error).__name__})")
    return state


class Run:
    """A run's folder: config.json, metrics.jsonl, checkpoint, model, videos/. W&B, if tracking, gets the rows.

    Each of the parts has state_dict and load_state_dict. All go into the checkpoint; the one named model, which is what
    acts, also into a file of its own.
    """

    def __init__(self, args: Args, task: str, **parts: object):
        task = task.replace("/", "-").replace(":", "-")
        name = f"{task}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        args.run_dir = args.run_dir or f"runs/{name}"
        self.args, self.parts, self.dir = args, parts, Path(args.run_dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.dir / ".lock", timeout=0)  # ends with the process, however that ends
        try:
            self.lock.acquire()
        except filelock.Timeout:
            refuse(f"--run-dir {self.dir} is in use by another process")
        path = self.dir / "config.json"
        if not args.resume and (path.exists() or (self.dir / CHECKPOINT).exists()):
            refuse(f"--run-dir {self.dir} holds a run: continue it with --resume, or name another folder")
        config = json.loads(path.read_text()) if args.resume else self.describe()
        self.wandb = self.start_wandb(config) if args.track else None
        if not args.resume:
            write_file(path, lambda file: file.write(json.dumps(config, indent=1).encode()))
        self.metrics = open(self.dir / "metrics.jsonl", "ab")
        self.num_rows, self.evaluation_step, self.checkpoint_step = 0, 0, 0
        self.started, self.stop_signal = time.time(), None
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, self.ask_to_stop)
        print(f"{Path(__file__).name} on {task}, device {vars(args).get('device', 'cpu')}, run directory {self.dir}")

    def describe(self) -> dict:
        """What another person needs to know to repeat the run."""
        git = f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --abbrev=40 --exclude='*' --dirty"
        commit_status, commit = subprocess.getstatusoutput(git)
        cpu_status, cpu = subprocess.getstatusoutput("grep -m 1 'model name' /proc/cpuinfo")
        gpu_status, gpus = subprocess.getstatusoutput("nvidia-smi --query-gpu=name --format=csv,noheader")
        cpu = cpu.split(": ")[-1] if cpu_status == 0 else platform.machine()
        gpus = gpus if gpu_status == 0 else "none"
        packages = [distribution.metadata for distribution in distributions()]  # read once each
        return {
            "script": Path(__file__).stem,
            "args": asdict(self.args),
            "command": sys.argv,
            "commit": commit if commit_status == 0 else None,  # ends in -dirty if files differ from it
            "versions": {"python": platform.python_version()} | {m["Name"]: m["Version"] for m in packages},
            "hardware": f"{platform.platform()}, {os.cpu_count()} cores ({cpu}), GPUs: {gpus}",
            "wandb_id": os.urandom(8).hex(),
        }

    def start_wandb(self, config: dict) -> object:
        import wandb

        run = {"project": self.args.wandb_project_name, "name": self.dir.name, "id": config["wandb_id"]}
        try:
            run = wandb.init(dir=self.dir, config=config["args"], resume="allow", **run)
        except Exception as error:  # no key, no network, a wrong mode: it has many kinds
            refuse(f"--track: {error}; with WANDB_MODE=offline it needs neither account nor network")
        run.define_metric("*", step_metric="global_step")
        return run

    def ask_to_stop(self, number: int, _frame: object) -> None:
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the program at once

    def stopped(self) -> bool:
        return self.stop_signal is not None

    def restore(self) -> int:
        """Loads the last checkpoint, if any, and returns its step. Rows that were written after it are dropped."""
        state = {"step": 0, "evaluation_step": 0, "seconds": 0, "metrics_bytes": 0}
        if (self.dir / CHECKPOINT).exists():
            state = load_file(self.dir / CHECKPOINT, **self.parts)
        if self.metrics.tell() < state["metrics_bytes"]:
            refuse(f"{self.metrics.name} lacks rows that were there when {CHECKPOINT} was written")
        self.metrics.truncate(state["metrics_bytes"])
        self.num_rows = (self.dir / "metrics.jsonl").read_bytes().count(b"\n")
        self.checkpoint_step, self.evaluation_step = state["step"], state["evaluation_step"]
        self.started -= state["seconds"]
        self.bar = tqdm(total=self.args.total_timesteps, initial=self.checkpoint_step, unit=" steps", disable=None)
        return self.checkpoint_step

    def is_due(self, frequency: int, last: int, step: int) -> bool:
        """Whether a multiple of the frequency, or the end of the run, has been reached since the last time."""
        return step // frequency > last // frequency or step == self.args.total_timesteps > last

    def evaluation_is_due(self, step: int) -> bool:
        return self.is_due(self.args.eval_frequency, self.evaluation_step, step)

    def checkpoint_is_due(self, step: int) -> bool:
        return self.is_due(self.args.checkpoint_frequency, self.checkpoint_step, step) or self.stopped()

    def log(self, step: int, row: dict[str, float]) -> None:
        """Writes one row, unless it is empty. NaN or infinity becomes null in it, and ends the run."""
        if not row:
            return
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        row = {name: None if name in broken else float(value) for name, value in row.items()}
        row = {"global_step": step, "time": round(time.time() - self.started, 3)} | row
        self.metrics.write(json.dumps(row).encode() + b"\n")
        self.metrics.flush()
        try:
            if self.wandb and self.num_rows >= self.wandb.step:  # after --resume, rows recur that W&B has already
                self.wandb.log(row, step=self.num_rows, commit=True)
        except Exception as error:  # it must not end the run
            tqdm.write(f"W&B gets no more rows ({error!r}); metrics.jsonl gets all of them", file=sys.stderr)
            self.wandb = None
        self.num_rows += 1
        if broken:
            raise FloatingPointError(f"NaN or infinity at step {step} in {', '.join(broken)}")
        evaluation = [f"{name[5:]} {value:.4g}" for name, value in row.items() if name.startswith("eval/")]
        if evaluation:
            self.evaluation_step = step
            tqdm.write(f"step {step:>10,}: {', '.join(evaluation)}")
        if "charts/episodic_return" in row:
            self.bar.set_postfix_str(f"return {row['charts/episodic_return']:.1f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def save(self, step: int) -> None:
        """Writes checkpoint and model. Ends the program if a signal has asked for it."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(math.isfinite(values.sum()) for values in state["model"].values()):
            raise FloatingPointError(f"NaN or infinity at step {step} in the parameters")
        os.fsync(self.metrics.fileno())
        state |= {"step": step, "evaluation_step": self.evaluation_step}
        state |= {"seconds": time.time() - self.started, "metrics_bytes": self.metrics.tell()}
        save_model(self.dir, self.parts["model"])
        save_file(self.dir / CHECKPOINT, state)  # last: it completes the rest
        self.checkpoint_step = step
        if self.stopped():
            self.finish(f"Stopped at step {step}. To continue:", "--resume", 128 + self.stop_signal)
            raise SystemExit(128 + self.stop_signal)

    def finish(self, news: str, flags: str, exit_code: int = 0) -> None:
        self.bar.close()
        if self.wandb:
            self.wandb.finish(exit_code)
        self.lock.release()
        print(f"{news}\n    python {shlex.quote(sys.argv[0])} --run-dir {shlex.quote(str(self.dir))} {flags}")


def main() -> None:
    """Exit codes: 0 done, 2 user error, 130 or 143 stopped by a signal, 1 everything else."""
    sys.stdout.reconfigure(line_buffering=True)  # each line at once, into a pipe or a log file too
    args = parse_args()
    try:
        if args.evaluate:
            evaluate_saved(args)
        else:
            train(args)
    except KeyboardInterrupt:  # before or after training, where nothing has to be saved
        sys.exit(130)
    except (FloatingPointError, MemoryError, OSError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(1)  # not raise SystemExit: W&B listens to sys.exit


if __name__ == "__main__":
    main()
