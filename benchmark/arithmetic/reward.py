"""The verifier of the additions: it knows the answer, and no person has to judge. README.md explains the task."""


def answer(prompt: str) -> str:
    """Of "47+86=" it is "331": the digits of 133 from right to left, as one finds them on paper."""
    one, other = prompt.strip().removesuffix("=").split("+")
    return f"{int(one) + int(other):03d}"[::-1]


def correct(prompt: str, reply: str) -> float:
    """1 if the reply is the answer, else 0: almost right is wrong."""
    return float(reply.strip() == answer(prompt))
