"""To three prompts a reply of each model, with its true reward; then the means of many replies.

Replies are drawn at random, with the same random numbers for all models. The KL divergence is that from the first one,
in nats a reply.

    python benchmark/replies.py runs/rlhf/sft runs/rlhf/dpo runs/rlhf/ppo_rlhf runs/rlhf/grpo
"""

import argparse
import sys
from pathlib import Path

import torch
from reviews.reward import FITS, details
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PROMPTS = [f"review the {thing} : " for thing in FITS]
OF_EACH = 64  # replies to each of the eight prompts
SHOWN = 3  # prompts


@torch.no_grad()
def reply_log_probs(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(y|x), (B,). ids: (B, T) of prompts and replies; mask: (B, T), True where a reply is."""
    log_probs = model(ids[:, :-1]).logits.log_softmax(-1)  # (B, T - 1, vocabulary)
    return (log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, each with its model/; the reference first")
    runs = parser.parse_args().runs
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the models are small
    for run in runs:
        if not (run / "model" / "config.json").exists():
            print(f"error: {run} holds no model/, which a finished run has", file=sys.stderr)
            raise SystemExit(2)
    models = {run.name: AutoModelForCausalLM.from_pretrained(run / "model").eval() for run in runs}
    tokenizer = AutoTokenizer.from_pretrained(runs[0] / "model")
    width, shown, means = max(map(len, models)), [[] for _ in PROMPTS], []
    for name, model in models.items():
        figures, distances = [], []
        for i, prompt in enumerate(PROMPTS):
            torch.manual_seed(i)
            start = tokenizer([prompt] * OF_EACH, return_tensors="pt").input_ids  # (B, T of the prompt)
            end, plain = tokenizer.eos_token_id, {"do_sample": True, "top_k": 0, "max_new_tokens": 48}
            ids = model.generate(start, pad_token_id=end, **plain)  # (B, T)
            mask = torch.arange(ids.shape[1]) >= start.shape[1]
            mask = mask & ((ids == end).cumsum(1) - (ids == end).long() == 0)  # up to the end token, with it
            distances.append(reply_log_probs(model, ids, mask) - reply_log_probs(models[runs[0].name], ids, mask))
            replies = tokenizer.batch_decode(ids[:, start.shape[1] :], skip_special_tokens=True)
            figures += [details(prompt, reply) for reply in replies]
            shown[i].append(f"    {name:{width}} {details(prompt, replies[0])['reward']:5.1f}  {replies[0]}")
        reward, fluent = (sum(f[key] for f in figures) / len(figures) for key in ("reward", "fluent"))
        kl = torch.cat(distances).mean().item() + 0.0
        means.append(f"    {name:{width}} {reward:5.2f}  KL divergence {kl:5.2f}, {fluent:.0%} follow the grammar")
    for prompt, lines in list(zip(PROMPTS, shown, strict=True))[:SHOWN]:
        print(prompt, *lines, sep="\n")
    print(f"true reward, the mean of {len(PROMPTS) * OF_EACH} replies", *means, sep="\n")


if __name__ == "__main__":
    main()
