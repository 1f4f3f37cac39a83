"""Makes everything in this folder anew but README.md and reward.py, bit for bit on a CPU with the same packages.

A grammar writes reviews, the demonstrations. A small GPT is fitted to them: the reference. It writes pairs of reviews,
and the true reward labels them by the model of Bradley and Terry.

    python benchmark/reviews/make.py --output /tmp/reviews
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from reward import ASPECTS, DEGREES, FITS, MAX_CLAUSES, MISFIT, MISUSED, NONSENSE, VALUES, details, true_reward
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, PreTrainedTokenizerFast
from transformers.utils import logging

PROMPTS = [f"review the {thing} : " for thing in FITS]
PROMPT_LENGTH = 4  # tokens of each of them
MAX_TOKENS = 40  # of a reply; the longest review has 25, its end token included


def repeat_prompts(count: int) -> list[str]:
    return (PROMPTS * math.ceil(count / len(PROMPTS)))[:count]


# The grammar


def probability_of_more(value: float) -> float:
    """Of another clause behind one of this value: who is pleased writes on.

    To foresee that, the GPT must learn what words are worth, as real ones do.
    """
    return 1 / (1 + math.exp(-1.5 * value - 0.5))


def write_review(prompt: str, rng: random.Random) -> str:
    """One to four clauses: "the cup is not bad but the smell is superb ." """
    thing, clauses, goes_on = prompt.split()[2], [], True
    while goes_on and len(clauses) < MAX_CLAUSES:
        aspect = rng.choice(FITS[thing] if rng.random() < 0.75 else ASPECTS)
        degree, value = rng.choice(["not ", "very ", "", ""]), rng.choice(list(VALUES))
        clauses.append(f"the {aspect} is {degree}{value}")
        goes_on = rng.random() < probability_of_more(DEGREES[degree] * VALUES[value])
    # A link after each clause, at random; [:-5] takes the last one off
    return "".join(clause + rng.choice([" and ", " but "]) for clause in clauses)[:-5] + " ."


class State(NamedTuple):
    """Where in a review the grammar is, and what of the words before matters for those that follow."""

    thing: str
    next: str = "the"  # the, aspect, is, degree, value, link or end
    clauses: int = 0  # that are complete
    used: frozenset[str] = frozenset()  # aspects
    link: str = ""  # in front of the clause that is being written
    degree: str = ""  # of the clause that is being written
    value: float = 0.0  # of the last complete clause; only its sign once the link is written


def choices(state: State) -> dict[str, tuple[float, float, State | None]]:
    """Each word that can come next: its probability, what it adds to the true reward, and the state behind it.

    The true reward of a review is the sum of what its words add. A review ends with <end>, behind which is no state.
    """
    thing, _, clauses, used, link, degree, last = state
    if state.next in ("the", "is"):
        return {state.next: (1.0, 0.0, state._replace(next="aspect" if state.next == "the" else "degree"))}
    if state.next == "aspect":
        fits, result = FITS[thing], {}
        for aspect in ASPECTS:
            probability = 0.75 * (aspect in fits) / len(fits) + 0.25 / len(ASPECTS)
            penalty = MISFIT * ((aspect not in fits) + (aspect in used))
            result[aspect] = probability, -penalty, state._replace(next="is", used=used | {aspect})
        return result
    if state.next in ("degree", "value"):
        result, share = {}, 1.0
        if state.next == "degree":
            result = {word: (0.25, 0.0, state._replace(next="value", degree=f"{word} ")) for word in ("not", "very")}
            share = 0.5  # without a degree
        for word in VALUES:
            value = DEGREES[degree] * VALUES[word]
            misused = link != "" and link != ("and" if last * value > 0 else "but")
            after = State(thing, "link", clauses + 1, used, value=value)
            result[word] = share / len(VALUES), value - MISUSED * misused, after
        return result
    if state.next == "link":
        more = probability_of_more(last) if clauses < MAX_CLAUSES else 0.0
        behind = state._replace(next="the", value=math.copysign(1, last))
        result = {word: (more / 2, 0.0, behind._replace(link=word)) for word in ("and", "but") if more}
        return result | {".": (1 - more, 0.0, State(thing, "end"))}
    return {"<end>": (1.0, 0.0, None)}


def plain(state: State) -> State:
    """One of the states that have the same future: of the used aspects it matters how many fit, not which."""
    strays = [aspect for aspect in ASPECTS if aspect not in FITS[state.thing]]
    fitting = len(state.used & set(FITS[state.thing]))
    used = frozenset(FITS[state.thing][:fitting] + strays[: len(state.used) - fitting])
    return state._replace(used=used)


@cache
def grammar_means(state: State) -> tuple[float, float, float]:
    """Of what the grammar writes from here on: its entropy in nats, its mean number of tokens, its mean reward."""
    total = np.zeros(3)
    for probability, gain, after in choices(state).values():
        future = np.array(grammar_means(plain(after))) if after else 0.0
        total += probability * (np.array([-math.log(probability), 1.0, gain]) + future)
    return tuple(total.tolist())


def log_probability(prompt: str, review: str) -> float:
    """Of the review by the grammar, its end token included."""
    state, result = State(prompt.split()[2]), 0.0
    for word in [*review.split(), "<end>"]:
        probability, _, state = choices(state)[word]
        result += math.log(probability)
    return result


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {word for text in (*PROMPTS, *ASPECTS, *VALUES, "the is not very and but .") for word in text.split()}
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unknown>", *sorted(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unknown>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# The reference


def batches_of(lengths: list[int], size: int, seed: int) -> list[list[int]]:
    """All rows once, in random batches of similar length, which need little padding."""
    rng = random.Random(f"{seed} 0")
    rows = rng.sample(range(len(lengths)), len(lengths))
    rest = [rows.pop() for _ in range(len(rows) % size)]
    # Sorted in pools of 50 batches, not all at once: else all batches of short reviews would be nearly the same
    pools = [sorted(rows[i : i + 50 * size], key=lengths.__getitem__) for i in range(0, len(rows), 50 * size)]
    batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
    return rng.sample(batches, len(batches)) + ([rest] if rest else [])


def reply_log_probs(model: nn.Module, sequences: list[list[int]]) -> Tensor:
    """log pi(reply | prompt) of each sequence of token ids: of a prompt, a reply and the end token -> (B,)"""
    width = max(map(len, sequences))  # T
    ids = torch.tensor([ids + [model.config.pad_token_id] * (width - len(ids)) for ids in sequences])  # (B, T)
    # Attention looks back only, so padding behind a row changes nothing in it and needs no mask
    padding = torch.arange(width) >= torch.tensor([len(ids) for ids in sequences])[:, None]  # (B, T)
    targets = ids.masked_fill(padding, -100)[:, PROMPT_LENGTH:]  # (B, K); cross_entropy gives 0 at -100
    # (B, K, vocabulary): the last K positions, each of which has read all before its target
    logits = model(input_ids=ids[:, :-1], logits_to_keep=targets.shape[1], use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.view(targets.shape).sum(-1)


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str], replies: list[str]) -> list[list[int]]:
    texts = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]


def fit_reference(tokenizer: PreTrainedTokenizerFast, prompts: list[str], reviews: list[str], seed: int) -> nn.Module:
    """A small GPT that has seen each review once. The second half has the prompts of the first half."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 64, "n_layer": 3, "n_head": 4}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    same_but_faster = {"activation_function": "gelu_pytorch_tanh"}  # as GPT-2's "gelu_new"
    config = GPT2Config(**sizes, **ends, **no_dropout, **same_but_faster, initializer_range=0.1)
    model = AutoModelForCausalLM.from_config(config)

    sequences, half = tokenize(tokenizer, prompts, reviews), len(reviews) // 2
    lengths = [max(len(sequences[i]), len(sequences[half + i])) for i in range(half)]
    batches = batches_of(lengths, 16, seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    for i, batch in enumerate(tqdm(batches, "fitting the reference", disable=None)):
        optimizer.param_groups[0]["lr"] = 5e-3 * min((i + 1) / 50, 1 - i / len(batches))
        loss = -reply_log_probs(model, [sequences[row] for row in [*batch, *(half + i for i in batch)]]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def sample_replies(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: list[str], seed: int, stream: int
) -> list[str]:
    """One reply by the model to each prompt. Each stream has random numbers of its own."""
    torch.manual_seed(int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1)[0]))
    replies = []
    for i in tqdm(range(0, len(prompts), 1000), f"sampling replies, stream {stream}", disable=None):
        inputs = tokenizer(prompts[i : i + 1000], return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=MAX_TOKENS)[:, PROMPT_LENGTH:]
        replies += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return replies


def label(prompts: list[str], replies: list[list[str]], rng: random.Random) -> dict[str, list[str]]:
    """The columns of the preferences: of each prompt's two replies, the better one is more likely to be chosen."""
    columns = {"prompt": prompts, "chosen": [], "rejected": []}
    for prompt, one, other in zip(prompts, *replies, strict=True):
        margin = true_reward(prompt, one) - true_reward(prompt, other)
        if rng.random() > 1 / (1 + math.exp(-margin)):  # Bradley and Terry: sigmoid(margin)
            one, other = other, one
        columns["chosen"].append(one)
        columns["rejected"].append(other)
    return columns


# The truths
# The optimum at beta is pi(y|x) proportional to pi_ref(y|x) exp(r(x, y) / beta), with r the true reward: no policy has
# more reward at its KL divergence. Both follow from how the reference's rewards are distributed, far into the tail,
# where few of its own replies are. So other policies are sampled, the guides. Each is the reference, but a word is
# drawn more often if the grammar would make more of it:
#     guide(word) proportional to pi_ref(word) E[exp(reward that follows / beta)], the expectation under the grammar.
# As far as the reference writes what the grammar writes, this is the optimum itself. Each reply has a weight,
# pi_ref(y|x) / (mean of all guides' probabilities of y), so that weighted means over the replies are the reference's.

GUIDES = np.array([math.inf, 4, 2, 1.2, 0.8, 0.55, 0.4, 0.3, 0.22, 0.16, 0.11, 0.07])  # beta of each: G of them
GRID = np.geomspace(8, 0.08, 120)  # beta of the optima in frontier.json
BEST_OF = 2 ** np.arange(11)
GROUPS = 20  # of the replies, for standard errors: the figures are computed once without each of them
MIN_SAMPLE = 100  # no figures from a smaller effective sample


class Replies(NamedTuple):
    """Replies of the guides to one prompt."""

    rewards: np.ndarray  # (N,)
    lengths: np.ndarray  # (N,)
    fluent: np.ndarray  # (N,)
    weights: np.ndarray  # (N,)


def log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    highest = values.max(axis, keepdims=True)
    return (highest + np.log(np.exp(values - highest).sum(axis, keepdims=True))).squeeze(axis)


@cache
def log_future(state: State | None) -> np.ndarray:
    """log E[exp(r / beta)] for each of GUIDES, with r what the grammar's words add from here on: (G,)"""
    if state is None:
        return np.zeros(len(GUIDES))
    terms = [
        math.log(p) + gain / GUIDES + log_future(after and plain(after)) for p, gain, after in choices(state).values()
    ]
    return log_sum_exp(np.array(terms), 0)


@torch.no_grad()
def sample_guided(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int, rng: np.random.Generator
) -> Replies:
    """count replies of each guide."""
    vocabulary = tokenizer.get_vocab()
    words, known = sorted(vocabulary, key=vocabulary.get), cache(choices)

    @cache
    def futures(state: State | None) -> np.ndarray:
        """log E[exp(r / beta)] behind each word: (vocabulary, G), NaN where the grammar has no such word."""
        if state is None:  # nonsense already, whatever follows
            return np.zeros((len(words), len(GUIDES)))
        result = np.full((len(words), len(GUIDES)), np.nan)
        for word, (_, gain, after) in known(state).items():
            result[vocabulary[word]] = gain / GUIDES + log_future(after and plain(after))
        return result

    total = count * len(GUIDES)  # N
    guide = np.arange(total) // count
    states: list[State | None] = [State(prompt.split()[2])] * total  # None: the grammar can't have written it
    texts: list[list[str]] = [[] for _ in range(total)]
    earned = np.zeros(total)  # by the words so far
    log_ratio = np.zeros((total, len(GUIDES)))  # log(pi_ref / guide) of the words so far
    rows, past = np.arange(total), DynamicCache(config=model.config)  # rows: of the B replies that go on
    ids = torch.tensor(tokenizer(prompt).input_ids).repeat(total, 1)
    for _ in range(MAX_TOKENS):
        # past has no keyword here: versions of transformers differ in its name
        logits = model(ids, past, use_cache=True, logits_to_keep=1).logits
        log_probs = logits[:, -1].double().log_softmax(-1).numpy()  # (B, vocabulary)
        future = np.stack([futures(states[row]) for row in rows])  # (B, vocabulary, G)
        nonsense = ((NONSENSE - earned[rows])[:, None] / GUIDES)[:, None]  # (B, 1, G)
        future = np.where(np.isnan(future), nonsense, future)
        log_sums = log_sum_exp(log_probs[:, :, None] + future, 1)  # (B, G)
        each, own = np.arange(len(rows)), guide[rows]
        cumulated = np.exp(log_probs + future[each, :, own] - log_sums[each, own][:, None]).cumsum(1)  # (B, vocabulary)
        tokens = (cumulated > rng.random((len(rows), 1)) * cumulated[:, -1:]).argmax(1)  # (B,)
        log_ratio[rows] += log_sums - future[each, tokens]
        for row, token in zip(rows, tokens, strict=True):
            word = words[token]
            if word != tokenizer.eos_token:
                texts[row].append(word)
            _, gain, states[row] = known(states[row]).get(word, (0, 0, None)) if states[row] else (0, 0, None)
            earned[row] += gain
        going = np.flatnonzero(tokens != tokenizer.eos_token_id)
        if len(going) == 0:
            break
        rows, ids = rows[going], torch.from_numpy(tokens[going])[:, None]
        past.batch_select_indices(torch.from_numpy(going))
    judged = [details(prompt, " ".join(text)) for text in texts]
    columns = (np.array([judgement[name] for judgement in judged]) for name in ("reward", "length", "fluent"))
    return Replies(*columns, weights=np.exp(math.log(len(GUIDES)) - log_sum_exp(-log_ratio, 1)))


def optima(prompts: list[Replies]) -> dict[str, np.ndarray]:
    """The optimum at each beta of GRID, on average over the prompts. ess: the smallest effective sample of them."""
    rows = []
    for rewards, lengths, fluent, weights in prompts:
        tilted = np.log(weights / weights.sum()) + rewards / GRID[:, None]  # (len(GRID), N)
        log_z = log_sum_exp(tilted, 1)
        shares = np.exp(tilted - log_z[:, None])  # of sum 1: the optimum's probabilities
        reward = shares @ rewards
        rows.append([reward / GRID - log_z, reward, shares @ lengths, shares @ fluent, 1 / (shares**2).sum(1)])
    kl, reward, length, fluency, _ = np.mean(rows, 0)
    ess = np.min(rows, 0)[-1]
    return {"kl": kl, "reward": reward, "length": length, "fluency": fluency, "ess": ess}


def reward_levels(rewards: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different true rewards, rising, and the reference's probability of each."""
    levels, index = np.unique(rewards.round(6), return_inverse=True)
    return levels, np.bincount(index, weights / weights.sum())


def best_of_n(prompts: list[Replies]) -> dict[str, np.ndarray]:
    """The best of n replies by the reference, one of the best at random: its true reward and its KL divergence."""
    rows = []
    for rewards, _, _, weights in prompts:
        levels, p = reward_levels(rewards, weights)  # (L,)
        up_to = p.cumsum().clip(max=1)  # the probability that a reply has this reward or less
        mass = up_to ** BEST_OF[:, None] - (up_to - p).clip(min=0) ** BEST_OF[:, None]  # (len(BEST_OF), L): of the best
        # Within a level the best has the reference's probabilities, so that the ratio is one of levels
        rows.append([mass @ levels, (mass * np.log(np.maximum(mass, 1e-300) / p)).sum(1)])
    reward, kl = np.mean(rows, 0)
    return {"reward": reward, "kl": kl}


def label_truths(prompts: list[Replies]) -> dict[str, float]:
    """Of the true reward as a judge of pairs whose labels it has drawn: its accuracy and its loss."""
    rows = []
    for rewards, _, _, weights in prompts:
        levels, p = reward_levels(rewards, weights)
        right = 1 / (1 + np.exp(-np.abs(levels[:, None] - levels)))  # (L, L): of a pair, the probability of its label
        loss = -right * np.log(right) - (1 - right) * np.log1p(-right)
        rows.append([p @ right @ p, p @ loss @ p])
    return dict(zip(("accuracy", "loss"), np.mean(rows, 0).tolist(), strict=True))


def standard_errors(figures: Callable[[list[Replies]], dict], prompts: list[Replies]) -> dict:
    """Of what the function returns, by the jackknife: without each group of replies in turn."""
    results = []
    for group in range(GROUPS):
        kept = np.arange(len(prompts[0].rewards)) % GROUPS != group
        results.append(figures([Replies(*(values[kept] for values in replies)) for replies in prompts]))
    spread = {name: np.std([result[name] for result in results], axis=0) for name in results[0]}
    return {name: math.sqrt(GROUPS - 1) * values for name, values in spread.items()}


@cache
def best_future(state: State) -> float:
    return max(gain + (best_future(plain(after)) if after else 0) for _, gain, after in choices(state).values())


def best_reviews(state: State) -> list[list[str]]:
    """The words of all reviews of the highest true reward, from here on."""
    result = []
    for word, (_, gain, after) in choices(state).items():
        if gain + (best_future(plain(after)) if after else 0) > best_future(plain(state)) - 1e-9:
            result += [[word, *rest] for rest in (best_reviews(after) if after else [[]])]
    return result


@torch.no_grad()
def limit_at_beta_0(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """The reference confined to the best reviews, which the optimum becomes as beta goes to 0. Exact."""
    rows = []
    for prompt in PROMPTS:
        reviews = [" ".join(words[:-1]) for words in best_reviews(State(prompt.split()[2]))]
        log_probs = reply_log_probs(model, tokenize(tokenizer, [prompt] * len(reviews), reviews)).double()
        judged = details(prompt, reviews[0])
        rows.append([-log_probs.logsumexp(0).item(), judged["reward"], judged["length"], judged["fluent"]])
    return dict(zip(("kl", "reward", "length", "fluency"), np.mean(rows, 0).tolist(), strict=True))


@torch.no_grad()
def reference_fit(model: nn.Module, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[float, float]:
    """The KL divergence of the grammar from the reference, in nats a review, and its standard error."""
    prompts = repeat_prompts(8000)
    reviews = [write_review(prompt, rng) for prompt in prompts]
    sequences = tokenize(tokenizer, prompts, reviews)
    reference = torch.cat([reply_log_probs(model, sequences[i : i + 1000]) for i in range(0, len(sequences), 1000)])
    exact = np.array([log_probability(*text) for text in zip(prompts, reviews, strict=True)])
    difference = exact - reference.double().numpy()
    return difference.mean().item(), difference.std().item() / math.sqrt(len(prompts))


def make_frontier(folder: Path, replies_of_each: int, seed: int) -> None:
    """frontier.json, from the model and the preferences in the folder."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    bar = tqdm(PROMPTS, "sampling the guides", disable=None)
    prompts = [sample_guided(model, tokenizer, prompt, replies_of_each, rng) for prompt in bar]

    optimum = optima(prompts)
    # Errors of reward and of KL divergence go together. By how much the curve is too high at one KL divergence is the
    # error of reward - beta kl, since beta is its slope
    errors = standard_errors(lambda p: (o := optima(p)) | {"height": o["reward"] - GRID * o["kl"]}, prompts)
    columns = {"beta": GRID, **optimum}
    columns |= {f"{name}_se": errors[name] for name in ("kl", "reward", "height")}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows = [row for row in rows if row["ess"] >= MIN_SAMPLE]
    means = [[np.average(values, weights=r.weights) for values in (r.rewards, r.lengths, r.fluent)] for r in prompts]
    reward, length, fluency = np.mean(means, 0)
    reference = {"reward": reward, "length": length, "fluency": fluency}
    limits = {"kl": 0.0, **reference}, limit_at_beta_0(model, tokenizer)
    rows = [{"beta": None, **limits[0]}, *rows, {"beta": 0.0, **limits[1]}]

    best, best_errors = best_of_n(prompts), standard_errors(best_of_n, prompts)
    bounds = np.log(BEST_OF) - (BEST_OF - 1) / BEST_OF
    columns = {"n": BEST_OF.tolist(), **best, "kl_bound": bounds} | {f"{name}_se": best_errors[name] for name in best}
    best_rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    means = np.mean([grammar_means(State(thing)) for thing in FITS], 0)
    gap, gap_error = reference_fit(model, tokenizer, random.Random(f"{seed} fit"))
    grammar = {
        "entropy_per_review": means[0], "entropy_per_token": means[0] / means[1], "tokens_per_review": means[1],
        "reward": means[2],
    }  # fmt: skip
    reference |= {
        "cross_entropy_per_review": means[0] + gap, "cross_entropy_per_token": (means[0] + gap) / means[1],
        "cross_entropy_per_review_se": gap_error,
    }  # fmt: skip
    pairs = pyarrow.parquet.read_table(folder / "preferences.parquet").to_pylist()
    margins = [true_reward(p["prompt"], p["chosen"]) - true_reward(p["prompt"], p["rejected"]) for p in pairs]
    labels = {"accuracy_of_the_truth": float(np.mean([(m > 1e-9) + (abs(m) < 1e-9) / 2 for m in margins]))}
    labels |= {f"expected_{name}_of_the_truth": value for name, value in label_truths(prompts).items()}
    write_json(
        folder / "frontier.json", grammar=grammar, reference=reference, labels=labels, best_of_n=best_rows, optimum=rows
    )


def write_json(path: Path, **parts: dict | list[dict]) -> None:
    """A line for each row. Six digits, of which those behind the ninth decimal are rounding; + 0.0 makes -0.0 a 0.0."""

    def shown(row: dict) -> str:
        return json.dumps(
            {name: round(float(f"{v:.6g}"), 9) + 0.0 if isinstance(v, float) else v for name, v in row.items()}
        )

    lines = []
    for name, part in parts.items():
        content = shown(part) if isinstance(part, dict) else "[\n  " + ",\n  ".join(map(shown, part)) + "\n ]"
        lines.append(f' "{name}": {content}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_table(path: Path, columns: dict[str, list[str]]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd", compression_level=19)


def make_data(folder: Path, num_pairs: int, seed: int) -> None:
    """Everything but frontier.json."""
    rng, tokenizer = random.Random(seed), word_tokenizer()
    demonstrations = repeat_prompts(min(num_pairs, 32_000)) * 2
    reviews = [write_review(prompt, rng) for prompt in demonstrations]
    write_table(folder / "demonstrations.parquet", {"prompt": demonstrations, "completion": reviews})
    model = fit_reference(tokenizer, demonstrations, reviews, seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    prompts = repeat_prompts(num_pairs)
    replies = [sample_replies(model, tokenizer, prompts, seed, stream) for stream in range(2)]
    write_table(folder / "preferences.parquet", label(prompts, replies, rng))
    write_table(folder / "prompts.parquet", {"prompt": repeat_prompts(8000)})


def refuse(message: str) -> NoReturn:
    print("error:", message, file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="the folder that is written")
    parser.add_argument("--pairs", type=int, default=40_000, help="pairs of replies")
    parser.add_argument(
        "--replies", type=int, default=500, help="replies of each guide to each prompt, for the frontier"
    )
    parser.add_argument("--seed", type=int, default=1, help="all randomness follows from it")
    parser.add_argument("--only-frontier", action="store_true", help="leave all but frontier.json as it is")
    args = parser.parse_args()
    for name, low in ("pairs", 10), ("replies", GROUPS), ("seed", 0):
        if not low <= getattr(args, name) <= 10**7:
            refuse(f"--{name} is {getattr(args, name)}, which is not a number from {low} to 10,000,000")
    if args.only_frontier and not (args.output / "model" / "config.json").exists():
        refuse(f"{args.output}/model is missing, which --only-frontier keeps: leave it out")
    torch.set_num_threads(1)  # sums are in the same order then, and a small model gains from it too
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"{args.output}: {error.strerror}")
    if not args.only_frontier:
        make_data(args.output, args.pairs, args.seed)
    make_frontier(args.output, args.replies, args.seed)


if __name__ == "__main__":
    main()
