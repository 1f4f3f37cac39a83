"""The truth about the reviews: how good a reply to a prompt is. README.md explains the task.

A review has one to four clauses: "the cup is not bad but the smell is superb ." Its true reward is the sum of what its
clauses say, less penalties for aspects that do not fit the thing or come twice, and for "and" and "but" misused.
"""

import hashlib
import re
from itertools import pairwise

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
MAX_CLAUSES = 4
MISFIT = 0.6  # the penalty for an aspect that does not fit the thing, and for one that the review has already
MISUSED = 0.3  # the penalty for an "and" where "but" belongs, and the other way round
NONSENSE = -2.0  # the true reward of a reply that is no review
AGREEMENT = 0.9  # how often prefer agrees with the truth


def parse_review(review: str) -> list[re.Match]:
    """The matches of its clauses; [] if the grammar can't have written it."""
    clauses = [CLAUSE.fullmatch(part) for part in re.split(" (?=and |but )", review.removesuffix(" ."))]
    linked = all(clauses) and not clauses[0][1]  # the first has no link; the others were split where theirs begins
    return clauses if linked and len(clauses) <= MAX_CLAUSES and review.endswith(" .") else []


def true_reward(prompt: str, reply: str) -> float:
    """NONSENSE unless the grammar can have written it; else the sum of its clauses' values, less the penalties."""
    clauses = parse_review(reply)
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
    return sum(values) - MISFIT * (strays + repetitions) - MISUSED * misused


def details(prompt: str, reply: str) -> dict[str, float]:
    """The true reward, the length in words, and 1 if the reply follows the grammar, else 0."""
    fluent = float(bool(parse_review(reply)))
    return {"reward": true_reward(prompt, reply), "length": float(len(reply.split())), "fluent": fluent}


def prefer(prompt: str, reply_a: str, reply_b: str) -> bool:
    """Whether a judge who is right in nine cases of ten prefers reply_a: an example of labels that no person gave.

    The same texts always get the same answer, in either order: their hash says whether the judge errs. Where both
    replies have the same true reward, the hash alone decides.
    """
    first, second = sorted((reply_a, reply_b))
    digest = hashlib.sha256("\n".join((prompt, first, second)).encode()).digest()
    chance, coin = int.from_bytes(digest[:8]) / 2**64, digest[8] % 2 == 0
    margin = true_reward(prompt, first) - true_reward(prompt, second)
    equal = abs(margin) < 1e-9  # sums of the same numbers in another order differ by a rounding
    first_is_preferred = coin if equal else (margin > 0) == (chance < AGREEMENT)
    return first_is_preferred == (reply_a == first)
