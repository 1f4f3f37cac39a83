"""benchmark/reviews: the grammar, the true reward, the frontier, and that make.py makes what is committed."""

import ast
import itertools
import json
import math
import random
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, call
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

FOLDER = ROOT / "benchmark" / "reviews"
sys.path.insert(0, str(FOLDER))
import make  # noqa: E402
import reward  # noqa: E402

COFFEE = "review the coffee : "
DATA = "demonstrations.parquet", "preferences.parquet", "prompts.parquet"
MADE = *DATA, "frontier.json", *(f"model/{name}" for name in ("model.safetensors", "tokenizer.json", "config.json"))


def read(name):
    return datasets.load_dataset("parquet", data_files=str(FOLDER / name), split="train")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def preferences(own_cache):
    return read("preferences.parquet").to_list()


@pytest.fixture(scope="module")
def pool(preferences):
    """True rewards of the 80,000 replies by the reference, 10,000 to each prompt: (8, 10000)"""
    rewards = {prompt: [] for prompt in make.PROMPTS}
    for row in preferences:
        rewards[row["prompt"]] += [reward.true_reward(row["prompt"], row[name]) for name in ("chosen", "rejected")]
    return np.array(list(rewards.values()))


@pytest.fixture(scope="module")
def frontier():
    return json.loads((FOLDER / "frontier.json").read_text())


@pytest.fixture
def tables(monkeypatch):
    """Replaces tables of the grammar: tables(MAX_CLAUSES=2)."""
    cached = make.grammar_means, make.log_future, make.best_future

    def replace(**values):
        for name, value in values.items():
            monkeypatch.setattr(make, name, value)
        for function in cached:
            function.cache_clear()

    yield replace
    monkeypatch.undo()
    replace()


@pytest.fixture
def small(tables):
    """A grammar of 666 reviews. Returns their texts."""
    tables(MAX_CLAUSES=2, FITS={"coffee": ["cup", "taste"]}, ASPECTS=["cup", "plot", "taste"])
    tables(VALUES={"superb": 1.2, "poor": -0.6}, PROMPTS=[COFFEE])
    return all_reviews()


def all_reviews():
    clauses = [f"the {a} is {d}{v}" for a in make.ASPECTS for d in make.DEGREES for v in make.VALUES]
    reviews = []
    for count in range(1, make.MAX_CLAUSES + 1):
        for chosen in itertools.product(clauses, repeat=count):
            for links in itertools.product([" and ", " but "], repeat=count - 1):
                reviews.append("".join(text + link for text, link in zip(chosen, [*links, " ."], strict=True)))
    return reviews


def by_formula(prompt, review):
    """-log of the probability with which the grammar writes it, from the clauses at once and not word by word."""
    fits, clauses, p = make.FITS[prompt.split()[2]], reward.parse_review(review), 1.0
    for i, (link, aspect, degree, value) in enumerate(clause.groups() for clause in clauses):
        p *= (0.5 if link else 1) * (0.75 * (aspect in fits) / len(fits) + 0.25 / len(make.ASPECTS))
        p *= {"not ": 0.25, "very ": 0.25, "": 0.5}[degree] / len(make.VALUES)
        goes_on = 1 / (1 + math.exp(-1.5 * make.DEGREES[degree] * make.VALUES[value] - 0.5))
        p *= 1 if i == make.MAX_CLAUSES - 1 else goes_on if i < len(clauses) - 1 else 1 - goes_on
    return -math.log(p)


# The true reward


def test_true_reward_by_hand():
    for review, expected in {
        "the cup is good .": 0.6,
        "the cup is very awful .": -1.8,
        "the cup is not superb .": -0.6,
        "the plot is good .": 0.0,
        "the cup is good and the taste is lovely .": 1.5,
        "the cup is good but the taste is lovely .": 1.2,
        "the cup is good and the cup is good .": 0.6,
        "the cup is bad but the smell is not bad .": -0.45,
        "the cup is good": reward.NONSENSE,
        "the cup is good and .": reward.NONSENSE,
        "the cup is good . .": reward.NONSENSE,
        "and the cup is good .": reward.NONSENSE,
        " and ".join(["the cup is good"] * 5) + " .": reward.NONSENSE,  # the grammar writes at most four clauses
        ".": reward.NONSENSE,
        "": reward.NONSENSE,
    }.items():
        assert reward.true_reward(COFFEE, review) == pytest.approx(expected), review


def test_details_by_hand():
    assert reward.details(COFFEE, "the plot is very good .") == pytest.approx({"reward": 0.3, "length": 6, "fluent": 1})
    assert reward.details(COFFEE, "good cup") == {"reward": -2, "length": 2, "fluent": 0}


def test_the_reward_needs_python_alone():
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse((FOLDER / "reward.py").read_text()))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        )
    }
    assert {"re", "hashlib"} <= imported <= sys.stdlib_module_names


def test_the_judge_is_right_in_nine_cases_of_ten_and_in_either_order(preferences):
    right, of_equals = [], []
    for row in preferences[:8000]:
        prompt, a, b = row.values()
        prefers_a = reward.prefer(prompt, a, b)
        assert a == b or prefers_a != reward.prefer(prompt, b, a)
        margin = reward.true_reward(prompt, a) - reward.true_reward(prompt, b)
        (right.append(prefers_a == (margin > 0)) if abs(margin) > 1e-9 else of_equals.append(prefers_a))
    assert np.mean(right) == pytest.approx(reward.AGREEMENT, abs=0.012)  # 3.5 standard errors
    assert np.mean(of_equals) == pytest.approx(0.5, abs=0.15)
    # The same in each process and on each machine
    good, bad, judged = "the cup is good .", "the cup is bad .", [True, True, True, False, True, True, True, True]
    assert [reward.prefer(f"review the {thing} : ", good, bad) for thing in reward.FITS] == judged


# The grammar


def test_what_the_grammar_writes_it_can_read_and_its_words_add_up_to_the_true_reward():
    rng, lengths = random.Random(0), set()
    for prompt in make.repeat_prompts(2000):
        review = make.write_review(prompt, rng)
        lengths.add(len(reward.parse_review(review)))
        state, earned = make.State(prompt.split()[2]), 0.0
        for word in [*review.split(), "<end>"]:
            _, gain, state = make.choices(state)[word]
            earned += gain
        assert state is None
        assert earned == pytest.approx(reward.true_reward(prompt, review)), review
        assert make.log_probability(prompt, review) == pytest.approx(-by_formula(prompt, review))
    assert lengths == {1, 2, 3, 4}


def test_the_grammars_probabilities_sum_to_one(tables):
    """Over all reviews of one clause: that many are written. If no others are allowed: to one."""
    single = [f"the {a} is {d}{v} ." for a in make.ASPECTS for d in make.DEGREES for v in make.VALUES]
    rng = random.Random(0)
    written = [len(reward.parse_review(make.write_review(COFFEE, rng))) for _ in range(4000)]
    share = sum(math.exp(make.log_probability(COFFEE, review)) for review in single)
    assert np.mean([count == 1 for count in written]) == pytest.approx(share, abs=0.03)
    tables(MAX_CLAUSES=1)
    assert sum(math.exp(make.log_probability(COFFEE, review)) for review in single) == pytest.approx(1)


def test_at_each_word_the_probabilities_sum_to_one():
    rng = random.Random(0)
    for prompt in make.repeat_prompts(80):
        state = make.State(prompt.split()[2])
        for word in [*make.write_review(prompt, rng).split(), "<end>"]:
            words = make.choices(state)
            assert sum(probability for probability, _, _ in words.values()) == pytest.approx(1)
            state = words[word][2]


def test_entropy_length_and_reward_of_a_small_grammar_by_enumeration(small):
    assert len(small) == 18 + 18 * 18 * 2
    nats = np.array([by_formula(COFFEE, review) for review in small])
    p = np.exp(-nats)
    assert p.sum() == pytest.approx(1)
    rewards = [reward.true_reward(COFFEE, review) for review in small]  # its aspects fit as they do in the small one
    expected = p @ nats, p @ [len(review.split()) + 1 for review in small], p @ rewards
    assert make.grammar_means(make.State("coffee")) == pytest.approx(expected)


def test_entropy_of_the_grammar_by_sampling(frontier):
    rng = random.Random(5)
    nats = [by_formula(prompt, make.write_review(prompt, rng)) for prompt in make.repeat_prompts(8000)]
    error = np.std(nats) / math.sqrt(len(nats))
    assert frontier["grammar"]["entropy_per_review"] == pytest.approx(np.mean(nats), abs=4 * error)
    per_token = frontier["grammar"]["entropy_per_review"] / frontier["grammar"]["tokens_per_review"]
    assert frontier["grammar"]["entropy_per_token"] == pytest.approx(per_token, rel=1e-4)


# The frontier


class Writer:
    """Stands for a model: at power 1 it writes as the grammar does, at others not, and a share of nonsense besides."""

    def __init__(self, tokenizer, power=1.0, nonsense=0.0):
        self.words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        self.power, self.nonsense, self.config = power, nonsense, GPT2Config(n_layer=1)

    def probabilities(self, words):
        state = make.State("coffee")
        for word in words:
            state = make.choices(state).get(word, (0, 0, None))[2] if state else None
        if state is None:  # nonsense, and soon over
            return {word: 0.5 if word == "<end>" else 0.5 / (len(self.words) - 1) for word in self.words}
        given = {word: probability**self.power for word, (probability, _, _) in make.choices(state).items()}
        total, others = sum(given.values()), len(self.words) - len(given)
        return {
            word: (1 - self.nonsense) * given[word] / total if word in given else self.nonsense / others
            for word in self.words
        }

    def __call__(self, ids, past, use_cache, logits_to_keep):
        ids = ids.double()[:, None, :, None]
        texts = past.update(ids, ids, 0)[0][:, 0, 4:, 0].long().tolist()  # behind the prompt
        known = {}
        for text in map(tuple, texts):
            known[text] = known.get(text) or list(self.probabilities([self.words[i] for i in text]).values())
        return SimpleNamespace(logits=torch.tensor([[known[tuple(text)]] for text in texts]).double().log())


def test_if_the_reference_is_the_grammar_a_guide_is_the_optimum(tables):
    """Then each reply's weight times exp(r / beta) is the same number: the optimum's normaliser."""
    tables(GUIDES=np.array([0.5]))
    tokenizer = make.word_tokenizer()
    replies = make.sample_guided(Writer(tokenizer), tokenizer, COFFEE, 60, np.random.default_rng(0))
    log_z = np.log(replies.weights) + replies.rewards / 0.5
    assert log_z == pytest.approx(np.full(60, make.log_future(make.State("coffee"))[0]))
    assert replies.rewards.std() > 0.1
    assert replies.fluent.all()


def test_the_grammars_optimum_by_enumeration(small, tables):
    betas = np.array([4.0, 0.5])
    tables(GUIDES=betas)
    p = np.exp([-by_formula(COFFEE, review) for review in small])
    rewards = np.array([reward.true_reward(COFFEE, review) for review in small])
    expected = [math.log(p @ np.exp(rewards / beta)) for beta in betas]
    assert make.log_future(make.State("coffee")) == pytest.approx(expected)


def test_optimum_and_best_of_n_of_a_writer_unlike_the_grammar_by_enumeration(small, tables):
    betas = np.array([3.0, 1.0, 0.4, 0.15])
    tables(GRID=betas, GUIDES=np.array([math.inf, 1.0, 0.3, 0.1]), BEST_OF=np.array([1, 2, 8]))
    tokenizer = make.word_tokenizer()
    writer = Writer(tokenizer, power=0.6, nonsense=0.02)
    replies = [make.sample_guided(writer, tokenizer, COFFEE, 1000, np.random.default_rng(0))]
    found, best = make.optima(replies), make.best_of_n(replies)
    errors = make.standard_errors(make.optima, replies)

    p = []
    for review in small:
        words = [*review.split(), "<end>"]
        p.append(math.prod(writer.probabilities(words[:i])[word] for i, word in enumerate(words)))
    p = np.array([*p, 1 - sum(p)])  # the last is all nonsense
    assert 0.05 < p[-1] < 0.5
    rewards = np.array([*(reward.true_reward(COFFEE, review) for review in small), reward.NONSENSE])
    for i, beta in enumerate(betas):
        tilted = p * np.exp(rewards / beta)
        tilted /= tilted.sum()
        expected = {"reward": tilted @ rewards, "kl": tilted @ np.log(tilted / p), "fluency": 1 - tilted[-1]}
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, abs=4 * errors[name][i] + 1e-6), (name, beta)
            assert errors[name][i] < 0.05
    draws = np.random.default_rng(0).choice(rewards, (8, 200_000), p=p / p.sum())
    for i, n in enumerate((1, 2, 8)):
        assert best["reward"][i] == pytest.approx(draws[:n].max(0).mean(), abs=0.06)
    assert best["kl"][0] == pytest.approx(0)


def test_best_of_n_of_two_replies():
    """The better one, of probability 1/4, is the best of two with probability 1 - (3/4)^2."""
    replies = make.Replies(np.array([0.0, 1.0]), np.ones(2), np.ones(2), np.array([3.0, 1.0]))
    best, p = make.best_of_n([replies]), 7 / 16
    assert best["reward"][:2] == pytest.approx([0.25, p])
    assert best["kl"][:2] == pytest.approx([0, p * math.log(p / 0.25) + (1 - p) * math.log((1 - p) / 0.75)])


def test_optimum_of_a_gaussian_reward(tables):
    tables(GRID=np.array([2.0, 1.0]))
    rewards = np.random.default_rng(0).normal(size=100_000)
    found = make.optima([make.Replies(rewards, rewards, rewards, np.ones(100_000))])
    assert found["reward"] == pytest.approx([0.5, 1], abs=0.02)  # gain 1 / beta
    assert found["kl"] == pytest.approx([0.125, 0.5], abs=0.02)  # divergence 1 / (2 beta^2)
    assert found["ess"][0] == pytest.approx(100_000 * math.exp(-0.25), rel=0.02)


def test_truths_of_the_labels_of_two_replies():
    replies = make.Replies(np.array([0.0, 1.0]), np.ones(2), np.ones(2), np.ones(2))
    truths, p = make.label_truths([replies]), 1 / (1 + math.exp(-1))
    loss = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert truths == pytest.approx({"accuracy": (0.5 + p) / 2, "loss": (math.log(2) + loss) / 2})


def test_the_frontier_rises_and_its_slope_is_beta(frontier):
    rows = frontier["optimum"]
    betas = [row["beta"] for row in rows[1:]]
    assert rows[0]["beta"] is None
    assert betas == sorted(betas, reverse=True)
    assert len(rows) > 100
    kl, rewards = (np.array([row[name] for row in rows]) for name in ("kl", "reward"))
    assert (np.diff(kl) > 0).all()
    assert (np.diff(rewards) > 0).all()
    assert np.diff(kl).max() < 0.6, "dense"
    # Between two rows the slope lies between their betas: d reward / d KL = beta
    slopes = np.diff(rewards[1:-1]) / np.diff(kl[1:-1])
    assert (slopes < np.array(betas[:-2]) * 1.02).all()
    assert (slopes > np.array(betas[1:-1]) * 0.98).all()
    assert all(row["ess"] >= 100 for row in rows[1:-1])


def test_the_frontiers_ends(frontier, pool):
    start, *_, end = frontier["optimum"]
    assert start["kl"] == 0
    assert start["reward"] == frontier["reference"]["reward"]
    error = pool.std(1).mean() / math.sqrt(pool.size)
    assert start["reward"] == pytest.approx(pool.mean(), abs=4 * (error + frontier["best_of_n"][0]["reward_se"]))
    # At the other end the reference is confined to the best reviews
    model, tokenizer = (kind.from_pretrained(FOLDER / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    divergences = []
    for thing, fits in reward.FITS.items():
        texts = [" and ".join(f"the {a} is very superb" for a in order) for order in itertools.permutations(fits)]
        ids = torch.tensor(tokenizer([f"review the {thing} : {text} . <end>" for text in texts]).input_ids)
        with torch.no_grad():
            log_probs = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[:, 3:, 0].sum(1)
        divergences.append(-log_probs.logsumexp(0).item())
        assert reward.true_reward(f"review the {thing} : ", texts[0] + " .") == pytest.approx(end["reward"])
    assert end["beta"] == 0
    assert end["kl"] == pytest.approx(np.mean(divergences), rel=1e-4)
    assert end["reward"] == pytest.approx(4 * 1.8)
    before = frontier["optimum"][-2]
    assert before["kl"] < end["kl"]
    assert before["reward"] > end["reward"] - 0.2


def test_the_optimum_is_what_the_references_own_replies_say_where_they_can(frontier, pool):
    for row in frontier["optimum"][1:-1]:
        if row["beta"] > 0.9:
            tilted = np.exp(pool / row["beta"])
            log_z = np.log(tilted.mean(1))
            rewards = (tilted * pool).sum(1) / tilted.sum(1)
            assert row["reward"] == pytest.approx(rewards.mean(), abs=4 * row["reward_se"] + 0.03)
            assert row["kl"] == pytest.approx((rewards / row["beta"] - log_z).mean(), abs=4 * row["kl_se"] + 0.02)


def test_best_of_n_rises_below_the_optimum(frontier, pool):
    rows, optimum = frontier["best_of_n"], frontier["optimum"]
    assert [row["n"] for row in rows] == [2**i for i in range(11)]
    assert all(a["reward"] < b["reward"] and a["kl"] < b["kl"] for a, b in itertools.pairwise(rows))
    rng = np.random.default_rng(0)
    for row in rows:
        n = row["n"]
        assert row["kl"] <= row["kl_bound"] == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-5)
        best = np.interp(row["kl"], [o["kl"] for o in optimum], [o["reward"] for o in optimum])
        assert row["reward"] <= best + 1e-3
        if n <= 64:
            draws = rng.permuted(pool, axis=1)[:, : pool.shape[1] // n * n].reshape(-1, n).max(1)
            error = draws.std() / math.sqrt(len(draws))
            assert row["reward"] == pytest.approx(draws.mean(), abs=4 * (error + row["reward_se"])), n


def test_the_references_fit(frontier):
    """It can't be better than the grammar, and is not much worse."""
    grammar, reference = frontier["grammar"], frontier["reference"]
    gap = reference["cross_entropy_per_review"] - grammar["entropy_per_review"]
    assert 3 * reference["cross_entropy_per_review_se"] < gap < 0.1
    model, tokenizer = (kind.from_pretrained(FOLDER / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.num_parameters() == 157_312
    assert not any(value for name, value in model.config.to_dict().items() if name.endswith("pdrop"))
    rng = random.Random(99)
    reviews = [(prompt, make.write_review(prompt, rng)) for prompt in make.repeat_prompts(400)]
    total, exact = 0.0, sum(by_formula(*text) for text in reviews)
    for text in reviews:
        ids = torch.tensor([[*tokenizer("".join(text)).input_ids, tokenizer.eos_token_id]])
        labels = torch.where(torch.arange(ids.shape[1]) < 4, -100, ids)
        with torch.no_grad():
            total += model(ids, labels=labels).loss.item() * (ids.shape[1] - 4)
    assert (total - exact) / len(reviews) == pytest.approx(gap, abs=0.06)


def test_labels_are_drawn_from_the_true_reward(preferences, frontier):
    margins = [
        reward.true_reward(r["prompt"], r["chosen"]) - reward.true_reward(r["prompt"], r["rejected"])
        for r in preferences
    ]
    right = np.mean([(m > 1e-9) + (abs(m) < 1e-9) / 2 for m in margins])
    assert right == pytest.approx(frontier["labels"]["accuracy_of_the_truth"], abs=1e-5)
    expected = np.mean([1 / (1 + math.exp(-abs(m))) for m in margins])
    assert right == pytest.approx(expected, abs=0.008)  # 4 standard errors
    assert frontier["labels"]["expected_accuracy_of_the_truth"] == pytest.approx(expected, abs=0.005)
    loss = np.mean([math.log1p(math.exp(-m)) for m in margins])
    assert frontier["labels"]["expected_loss_of_the_truth"] == pytest.approx(loss, abs=0.01)


# The files


def test_the_files_are_small_and_readable():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if "__pycache__" not in path.parts) < 4e6
    for name, columns, count in zip(
        DATA,
        (["prompt", "completion"], ["prompt", "chosen", "rejected"], ["prompt"]),
        (64_000, 40_000, 8000),
        strict=True,
    ):
        rows = read(name)
        assert rows.column_names == columns
        assert len(rows) == count
        assert set(rows["prompt"]) == set(make.PROMPTS)


def test_texts_survive_the_tokenizer(preferences):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(
        make.word_tokenizer().backend_tokenizer.to_str()
    )
    for row in preferences[:200]:
        assert len(tokenizer(row["prompt"]).input_ids) == make.PROMPT_LENGTH
        ids = [*tokenizer(row["prompt"] + row["chosen"]).input_ids, tokenizer.eos_token_id]
        assert tokenizer.decode(ids[make.PROMPT_LENGTH :], skip_special_tokens=True) == row["chosen"]
        assert tokenizer.unk_token_id not in ids


def test_what_is_committed_is_what_the_maker_makes(preferences):
    """The demonstrations, all of them; of the pairs the first thousand, written by the committed model."""
    rng = random.Random(1)
    prompts = make.repeat_prompts(32_000) * 2
    demonstrations = read("demonstrations.parquet")
    assert demonstrations["prompt"][:] == prompts
    assert demonstrations["completion"][:] == [make.write_review(prompt, rng) for prompt in prompts]
    model, tokenizer = (kind.from_pretrained(FOLDER / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompts = make.repeat_prompts(1000)
    replies = [make.sample_replies(model, tokenizer, prompts, 1, stream) for stream in range(2)]
    columns = make.label(prompts, replies, rng)
    made = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    # Another machine rounds otherwise, and a reply in many goes another way
    assert np.mean([a == b for a, b in zip(made, preferences[:1000], strict=True)]) > 0.97


def test_the_made_reference_learns_at_a_rate_that_rises_and_falls(monkeypatch):
    rates, adamw = [], torch.optim.AdamW
    step = adamw.step
    monkeypatch.setattr(adamw, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    rng, prompts = random.Random(0), make.repeat_prompts(1600) * 2
    make.fit_reference(make.word_tokenizer(), prompts, [make.write_review(prompt, rng) for prompt in prompts], 1)
    assert len(rates) == 100, "each review once, 32 at a time"
    expected = {0: 1e-4, 9: 1e-3, 24: 2.5e-3, 75: 1.25e-3, 99: 5e-5}
    assert {i: rates[i] for i in expected} == pytest.approx(expected)


@pytest.mark.slow
def test_the_maker_makes_the_same_bits_again_and_others_from_another_seed(tmp_path):
    for name, seed in ("one", 1), ("same", 1), ("other", 2):
        done = call(FOLDER / "make.py", "--pairs", 200, "--replies", 20, "--seed", seed, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    for file in MADE:
        one, same, other = ((tmp_path / name / file).read_bytes() for name in ("one", "same", "other"))
        assert one == same, file
        seedless = "prompts.parquet", "model/tokenizer.json", "model/config.json"
        assert (one == other) == (file in seedless), file
    whole = (tmp_path / "one" / "frontier.json").read_bytes()
    (tmp_path / "one" / "frontier.json").unlink()
    done = call(FOLDER / "make.py", "--only-frontier", "--replies", 20, "--output", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one" / "frontier.json").read_bytes() == whole


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--pairs", 3], "--pairs"),
        (["--replies", 5], "--replies"),
        (["--seed", -1], "--seed"),
        (["--only-frontier"], "model"),
        (["--output", "/dev/null/x"], "/dev/null"),
    ],
)
def test_mistakes_are_one_line(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make.py", "--output", str(tmp_path), *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        make.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1
