"""A stand-in for a training script: keeps the same contract, in milliseconds, and misbehaves when told to.

The environment's name says how, and for how many attempts: crash-1 fails once, hang-9 hangs for ever, fine-0 behaves.
Each attempt adds a line to calls.txt in the run's folder when it begins, and one when it has trained to the end.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("--env-id")
parser.add_argument("--seed", type=int)
parser.add_argument("--run-dir", type=Path)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--total-timesteps", type=int, default=10)
parser.add_argument("--delay", type=float, default=0.0)
parser.add_argument("--learning-rate", type=float, default=0.1)
parser.add_argument("--norm-obs", action=argparse.BooleanOptionalAction, default=True)
parser.add_argument("--files", nargs="*", default=[])
parser.add_argument("--track", action="store_true")
args = parser.parse_args()

args.run_dir.mkdir(parents=True, exist_ok=True)
config, metrics, checkpoint, calls = (
    args.run_dir / name for name in ("config.json", "metrics.jsonl", "checkpoint.pt", "calls.txt")
)
lock = open(args.run_dir / ".lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a second process in this folder fails
with calls.open("a") as file:
    file.write("begin\n")
attempt = calls.read_text().count("begin")

step = 0
if args.resume:
    vars(args).update(json.loads(config.read_text())["args"])
    if checkpoint.exists():
        step = int(checkpoint.read_text())
        rows = metrics.read_text().splitlines(keepends=True) if step else []  # stopped before its first row: no file
        metrics.write_text("".join(rows[:step]))
    else:
        metrics.unlink(missing_ok=True)
else:
    if config.exists():
        sys.exit("error: this folder holds a run")
    kept = {name: value for name, value in vars(args).items() if name not in ("run_dir", "resume")}
    environment = {name: value for name, value in os.environ.items() if name.startswith(("WANDB", "OMP", "CUDA"))}
    config.write_text(json.dumps({"args": kept, "environment": environment}))
first_step = step
kind, times = args.env_id.split("-")
trouble = kind if attempt <= int(times) else "fine"
print(f"fake, attempt {attempt}, {trouble}", flush=True)


def stop(number: int, _frame: object) -> None:
    checkpoint.write_text(str(step))
    sys.exit(128 + number)


signal.signal(signal.SIGTERM, stop)
while step < args.total_timesteps:
    time.sleep(args.delay)
    if step == args.total_timesteps // 2:
        checkpoint.write_text(str(step))
        if trouble == "crash":
            sys.exit("Traceback: something broke")
        if trouble == "mistake":
            print("error: --env-id is unknown", file=sys.stderr)
            sys.exit(2)
        if trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "nan":
            print(f"error: NaN or infinity at step {step} in losses/policy_loss", file=sys.stderr)
            sys.exit(1)
        if trouble == "hang":  # deaf to SIGTERM, and with a child
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen(["sleep", "1000"])
            (args.run_dir / "child.pid").write_text(str(child.pid))
            child.wait()
        if trouble == "memory":
            ballast = bytearray(b"x") * 200_000_000
            time.sleep(2)  # long enough for a busy launcher to see it
        if trouble == "silent":
            sys.exit(0)
    step += 1
    seconds = step * max(args.delay, 0.001)
    row = {"global_step": step, "time": seconds, "charts/SPS": step / seconds, "charts/episodic_return": 1.0}
    if step == args.total_timesteps:
        row |= {} if trouble == "nothing" else {"eval/episodic_return": float("nan") if trouble == "nanresult" else 7.0}
    with metrics.open("a") as file:
        file.write(json.dumps(row) + "\n")
checkpoint.write_text(str(step))
if step > first_step:
    with calls.open("a") as file:
        file.write("end\n")
