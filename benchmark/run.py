"""Runs scripts x environments x seeds, and knows afterwards what became of each run.

    python benchmark/run.py --suite classic --workers 4
    python benchmark/run.py --command "python algorithms/ppo.py" --env-ids CartPole-v1 --num-seeds 5 --workers 2

The same command again runs what is missing and resumes what was cut short. The output folder holds ledger.json, which
says of every run what became of it, and one folder a run, named after the environment, the script, the seed and a hash
of the script's text and arguments. Beside the script's own files, that folder tells the whole story of the run:

    process.json   the last attempt: its process, host and number
    exit_code      how that ended; absent while it lives
    output.log     what all attempts printed

So nothing is lost with the launcher: killed in the middle, its next call finds the runs that went on without it, waits
for those that still live, and takes the results of the others. What began on another host counts as alive until it has
written nothing for ten minutes. Neither the folders nor the ledger need this machine: with Ray or Slurm the output
folder is on a file system that all nodes share.

A suite may give an entry a name. Where a later entry has that name in braces in a flag, as in
reward = "{judge}/model", the flag gets the folder of the run with the same seed, and its run begins when that is done.

Exit codes: 0 all runs are done, 1 some are not, 2 a mistake of the user, 130 or 143 stopped by a signal.
"""

import hashlib
import importlib
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Literal

import filelock
import psutil
from command_line import parse, refuse
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

ROOT = Path(__file__).resolve().parent.parent
SUITES = ROOT / "benchmark" / "suites"
RESULT = "eval/episodic_return"
PROBE_SECONDS = 20
KEYS = "script", "total_timesteps", "env_ids", "seeds", "start_seed", "flags", "each", "name", "result"  # of a [[run]]
SILENCE = 600  # seconds without a word after which a run on another host is lost
DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError)  # what odd files of a run may raise

# The shell around each run. It waits for a word: a launcher that dies before it has written process.json starts no run.
# It survives SIGTERM to write the exit code down: whoever comes later can read how the run ended.
SHELL = 'read -r word || exit; trap : INT TERM; "$@" </dev/null; echo $? >"$0"'


@dataclass
class Args:
    command: str | None = None  # what to run, such as "python algorithms/ppo.py"; python is the launcher's own
    env_ids: tuple[str, ...] = ()  # environments for --command
    suite: str | None = None  # instead of a command: the name of a file in benchmark/suites, or the path of one
    num_seeds: int | None = None  # seeds of each environment; None: 3, or what the suite says, else 5
    start_seed: int | None = None  # the first of them; None: what the suite says, else 1
    output: str | None = None  # folder of the ledger and the runs; None: runs/sweep, or runs/ and the suite's name
    workers: int = 1  # runs at a time; with Ray as many as the cluster has room for
    threads: int | None = None  # CPU threads of a run; None: the cores shared among the workers, 1 with Ray or Slurm
    retry: int = 0  # further attempts in this call at a run that failed
    timeout: float | None = None  # seconds after which an attempt is stopped
    grace: float = 60  # seconds for a checkpoint between being told to stop and being killed
    probe_seconds: float | None = None  # of a trial run of each kind, for the estimate; None: the suite's, else 20
    track: bool = False  # log to Weights & Biases as well
    dry_run: bool = False  # only say what would be run
    ray_address: str | None = None  # run on this Ray cluster; auto finds it
    slurm: bool = False  # run as a Slurm job array
    slurm_cluster: Literal["slurm", "local"] = "slurm"  # local tries the same on this machine, all runs at once
    slurm_parameters: dict[str, str] = field(default_factory=dict)  # for sbatch, such as partition gpu account rl
    gpus_per_run: float = 0  # what a run asks of Ray or Slurm; the local pool deals out the GPUs that it finds


@dataclass
class Run:
    """One line of the ledger."""

    name: str  # its folder in the output folder
    group: str  # the same without the seed: runs that differ in nothing else
    launch: list[str]  # interpreter and script
    flags: list[str]
    env_id: str
    seed: int
    result: str  # the metric that must stand at the last step
    script_hash: str
    needs: dict[str, str] = field(default_factory=dict)  # runs that must be done before it: their entry, their folder
    status: str = "pending"  # running, done, failed, timed out, killed, NaN, no result
    exit_code: int | None = None
    last_lines: list[str] = field(default_factory=list)
    attempts: int = 0
    wall_s: float = 0.0  # of all attempts
    peak_mb: float = 0.0  # resident memory of all its processes
    host: str | None = None
    commit: str | None = None
    job: str | None = None  # Slurm's name for it
    step: int = 0
    total: int | None = None  # the step at which it ends
    seconds: float = 0.0  # the script's clock at that step
    sps: float | None = None
    episodic_return: float | None = None  # of the last evaluation, or before it the last episode
    final: float | None = None  # the result at the last step

    def __post_init__(self) -> None:
        """Raises TypeError or OverflowError where a file has held something else in the place of a number."""
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type in (int, float, int | None, float | None) and value is not each.default:
                math.isfinite(value)  # infinity is a number, too: what counts is that this raises nothing

    def command(self, output: Path) -> list[str]:
        """The words that start it; the launcher adds --run-dir."""
        places = {"root": ROOT, "seed": self.seed} | {name: output / folder for name, folder in self.needs.items()}
        flags = self.flags
        for name, place in places.items():
            flags = [flag.replace(f"{{{name}}}", str(place)) for flag in flags]
        env_id = [f"--env-id={self.env_id}"] if self.env_id else []
        return [*self.launch, *flags, *env_id, f"--seed={self.seed}"]


@dataclass
class Call:
    """What a run needs to know of the call that starts it; travels to other machines."""

    output: Path
    env: dict[str, str]
    timeout: float
    grace: float
    commit: str

    @property
    def stop(self) -> Path:
        """The sign to stop, which reaches the other machines as well."""
        return self.output / "stop"


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # no such file yet, or cut short
        return {}


def write_json(path: Path, content: dict) -> None:
    """Puts a whole new file in the place of the old one: no crash leaves a part of one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_tail(path: Path, start: int = 0, size: int = 1 << 16) -> list[str]:
    """The last lines of a file; none from before start."""
    try:
        with open(path, "rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


# ---- What to run ----


def plan(args: Args) -> list[Run]:
    if (args.command is None) == (args.suite is None):
        refuse("give either --command, with --env-ids, or --suite")
    if args.suite:
        return plan_suite(args)
    if args.probe_seconds is None:
        args.probe_seconds = PROBE_SECONDS
    if not args.env_ids:
        refuse("--command needs --env-ids, such as --env-ids CartPole-v1 LunarLander-v3")
    try:
        words = shlex.split(args.command)
    except ValueError as error:
        refuse(f"--command {args.command!r}: {error}")
    end = next((i for i, word in enumerate(words, start=1) if word.endswith(".py")), 0)
    launch, flags = words[:end], words[end:]
    if not launch or not Path(launch[-1]).is_file():
        refuse(f"--command {args.command!r} names no script that exists, as in 'python algorithms/ppo.py'")
    if launch[0] in ("python", "python3"):  # PATH's may lack the packages: nobody need activate an environment
        launch[0] = sys.executable
    if not shutil.which(launch[0]):
        refuse(f"--command {args.command!r}: there is no program {launch[0]!r}")
    ours = {"--env-id", "--seed", "--run-dir", "--resume"} & {flag.split("=")[0].replace("_", "-") for flag in flags}
    if ours:
        refuse(f"--command: leave out {ours.pop()}, which the launcher adds")
    launch[-1] = str(Path(launch[-1]).resolve())  # other machines may start elsewhere
    return make_runs(args, launch, flags, args.env_ids, args.num_seeds or 3)


def plan_suite(args: Args) -> list[Run]:
    path = Path(args.suite) if args.suite.endswith(".toml") else SUITES / f"{args.suite}.toml"
    if not path.is_file():
        suites = sorted(file.stem for file in SUITES.glob("*.toml"))
        refuse(f"there is no suite {args.suite!r}, but {', '.join(suites)}")
    if args.env_ids:
        refuse("--env-ids goes with --command; a suite names its own environments")
    runs, missing, named = [], set(), {}
    try:
        suite = tomllib.loads(path.read_text())
        entries, probe_seconds = suite.pop("run"), float(suite.pop("probe_seconds", PROBE_SECONDS))
        if suite or not 0 <= probe_seconds < math.inf:
            refuse(f"{path}: beside [[run]] a suite may have probe_seconds, a number of at least 0, and nothing else")
        if args.probe_seconds is None:
            args.probe_seconds = probe_seconds
        for entry in entries:
            if unknown := sorted(entry.keys() - {*KEYS}):
                refuse(f"{path}: a [[run]] has no {unknown[0]}, but {', '.join(KEYS)}; a script's flags go into flags")
            if absent := [key for key in KEYS[:2] if key not in entry]:
                refuse(f"{path}: each [[run]] needs a {absent[0]}")
            script, env_ids, seeds = ROOT / entry.pop("script"), entry.pop("env_ids", [""]), entry.pop("seeds", 5)
            flags = {"total_timesteps": entry.pop("total_timesteps")} | entry.pop("flags", {})
            each = entry.pop("each", {})  # flags with several values: all combinations of them are run
            for key, values in [("env_ids", env_ids), *each.items()]:
                if not isinstance(values, list) or not values:
                    refuse(f"{path}: {key} = {values!r} must be a list of at least one value")
            for key, value, low in ("seeds", seeds, 1), ("start_seed", entry.setdefault("start_seed", 1), 0):
                if not isinstance(value, int) or value < low:
                    refuse(f"{path}: {key} = {value!r} must be a whole number of at least {low}")
            name = entry.pop("name", None)
            if not script.is_file():
                missing.add(script.name)
                continue
            launch, made = [sys.executable, str(script)], []
            for values in product(*each.values()):
                all_flags = flags | dict(zip(each, values, strict=True))
                words = [word for flag in all_flags.items() for word in to_words(*flag)]
                made += make_runs(args, launch, words, env_ids, args.num_seeds or seeds, named=named, **entry)
            if name is not None:
                of = {run.seed: run for run in made}
                if not re.fullmatch(r"[\w-]+", name) or name in (*named, "root", "seed") or len(of) < len(made):
                    refuse(f"{path}: name = {name!r} must be a new word, of a [[run]] with one run a seed")
                named[name] = of
            runs += made
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # among the last that it is no TOML
        refuse(f"{path} is not a suite: {error!r}")
    if missing:
        print("left out, for there is no such script yet:", ", ".join(sorted(missing)))
    return runs or refuse(f"{path} names no script that exists")


def to_words(name: str, value: object) -> list[str]:
    """A flag as it stands on a command line: --gamma=0.9, --no-anneal-lr, --reward one two"""
    name = name.replace("_", "-")
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"]


def make_runs(
    args: Args, launch: list[str], flags: list[str], env_ids: list[str], num_seeds: int, result: str = RESULT,
    start_seed: int = 1, named: dict[str, dict[int, Run]] | None = None,
) -> list[Run]:  # fmt: skip
    """The runs of one script with the same flags. Another text or another flag, but --track, makes another folder.

    named: of the suite's entries that have a name, the runs by seed. A flag with that name in braces needs such a run.
    """
    script = Path(launch[-1]).stem
    script_hash = hashlib.sha256(Path(launch[-1]).read_bytes()).hexdigest()
    runs, track = [], ["--track"] * args.track
    needed = {name: of for name, of in (named or {}).items() if any(f"{{{name}}}" in flag for flag in flags)}
    unlike = [run.group for of in needed.values() for run in [*of.values()][:1]]  # what they are made with counts, too
    for env_id in env_ids:
        words = [script_hash, flags, env_id, result] + [unlike] * bool(unlike)
        digest = hashlib.sha256(repr(words).encode()).hexdigest()[:8]
        env = re.sub(r"[^\w.-]", "-", env_id or "default")[:80]  # no folder's name is longer than 255 bytes
        first = start_seed if args.start_seed is None else args.start_seed
        for seed in range(first, first + num_seeds):
            name, group = f"{env}__{script}__{seed}__{digest}", f"{env}__{script}__{digest}"
            if absent := [entry for entry, of in needed.items() if seed not in of]:
                refuse(f"the suite has no run of {absent[0]} with seed {seed}, which {script} with that seed needs")
            needs = {entry: of[seed].name for entry, of in needed.items()}
            runs.append(Run(name, group, launch, [*flags, *track], env_id, seed, result, script_hash, needs))
    return runs


# ---- One run, on whatever machine it is: start it, watch it, judge it ----


NOTE = {"attempt": int, "earlier_s": int | float, "host": str, "commit": str, "log_start": int, "pid": int,
        "created": int | float}  # fmt: skip


def read_note(folder: Path) -> dict:
    """What process.json says of the last attempt; nothing if it is damaged, as if there had been no attempt."""
    note = read_json(folder / "process.json")
    whole = isinstance(note, dict) and all(isinstance(note.get(name), kind) for name, kind in NOTE.items())
    return note if whole and note["pid"] > 1 else {}


def find(folder: Path) -> list[psutil.Process]:
    """The living processes of a run on this host: of the session that its shell opened, even if that shell is dead."""
    note, family = read_note(folder), []
    if note.get("host") != socket.gethostname():
        return []
    with suppress(psutil.NoSuchProcess):
        try:  # known by its words: the time at which a process was created moves when somebody sets the clock
            words = psutil.Process(note["pid"]).cmdline()
        except psutil.AccessDenied:  # another user's
            return []
        if words and str(folder / "exit_code") not in words:  # it has none while it is ending
            return []  # the number has gone to another process
    for pid in psutil.pids():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(pid) == note["pid"] and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                family.append(psutil.Process(pid))
    return family


def start(run: Run, call: Call) -> None:
    folder = call.output / run.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [*run.launch, "--resume"] if (folder / "config.json").exists() else run.command(call.output)
    command = [*command, f"--run-dir={folder}"]
    wandb = {"WANDB_RUN_GROUP": run.group, "WANDB_TAGS": call.commit, "WANDB_JOB_TYPE": Path(run.launch[-1]).stem}
    note = {"attempt": run.attempts + 1, "earlier_s": run.wall_s, "host": socket.gethostname(), "commit": call.commit}
    with open(folder / "output.log", "ab") as log:
        note["log_start"] = log.tell()
        log.write(f"--- attempt {note['attempt']} on {note['host']}: {shlex.join(command)}\n".encode())
        log.flush()
        (folder / "exit_code").unlink(missing_ok=True)
        process = psutil.Popen(
            ["sh", "-c", SHELL, str(folder / "exit_code"), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=wandb | os.environ | call.env,
            start_new_session=True,  # its own process group: Ctrl-C does not reach it, and all of it can be killed
        )
    write_json(folder / "process.json", note | {"pid": process.pid, "created": process.create_time()})
    process.stdin.write(b"go\n")
    process.stdin.close()


def execute(run: Run, call: Call) -> Run:
    """Brings one run to an end; if it is under way already, joins it."""
    folder = call.output / run.name
    joined, verdict, pause = bool(find(folder)), None, 0.05
    if not joined:
        while lives_elsewhere(folder) and not call.stop.exists():
            time.sleep(1)
        judge(run, folder)
        if run.status == "done":
            return run
        if call.stop.exists():
            run.status = "pending"  # how an earlier call's attempt ended is no news of this call
            return run
        start(run, call)
    note = read_note(folder)
    began = time.monotonic() - (time.time() - note["created"])  # from here on nobody can set the clock
    while (family := find(folder)) and not verdict:
        if (folder / "exit_code").exists() and note["pid"] not in [process.pid for process in family]:
            break  # what the script has left behind, such as TensorBoard, ends with it
        with suppress(psutil.NoSuchProcess):
            run.peak_mb = max(run.peak_mb, sum(process.memory_info().rss for process in family) / 2**20)
        psutil.wait_procs(family, pause)
        pause = min(2 * pause, 1.0)
        if call.stop.exists():
            verdict = "killed"
        elif time.monotonic() - began > call.timeout:
            verdict = "timed out"
    if verdict:
        kill_group(note["pid"], signal.SIGTERM)
        psutil.wait_procs(family, call.grace)
    if find(folder):
        kill_group(note["pid"], signal.SIGKILL)
        psutil.wait_procs(family, call.grace)
    if not (folder / "exit_code").exists():
        if joined and not verdict:  # its shell died before it: ask the script, which trains no step if all is well
            return execute(run, call)
        (folder / "exit_code").write_text("137\n")
    judge(run, folder)
    if verdict and run.status != "done":
        run.status = verdict
    return run


def kill_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def read_progress(run: Run, folder: Path) -> None:
    """Fills in how far a run has come. Where its files are damaged, raises one of DAMAGE and fills in nothing."""
    total, rows = read_json(folder / "config.json").get("args", {}).get("total_timesteps"), []
    for line in read_tail(folder / "metrics.jsonl"):
        with suppress(ValueError):  # the first and the last line may be cut
            rows.append(json.loads(line))
    metrics = {name: value for row in rows for name, value in row.items()}  # the newest of each
    step, seconds = metrics.get("global_step", 0), metrics.get("time", 0.0)
    sps = step / seconds if seconds else None  # since it began, evaluations included: charts/SPS
    episodic_return = metrics.get(run.result, metrics.get("charts/episodic_return"))
    finals = [row[run.result] for row in rows if row.get("global_step") == total and run.result in row]
    final = finals[-1] if finals else None
    new = replace(run, total=total, step=step, seconds=seconds, sps=sps, episodic_return=episodic_return, final=final)
    vars(run).update(vars(new))


def judge(run: Run, folder: Path) -> None:
    """Fills in what became of a run that nobody runs now, from its folder alone."""
    try:
        read_end(run, folder)
    except DAMAGE as error:
        run.status, run.last_lines = "failed", [f"files in {folder} are damaged: {error!r}"]


def read_end(run: Run, folder: Path) -> None:
    note = read_note(folder)
    read_progress(run, folder)
    if not note:
        run.status = "pending"
        return
    run.attempts, run.host, run.commit = note["attempt"], note["host"], note["commit"]
    output = read_tail(folder / "output.log", note["log_start"])
    run.last_lines = output[1:][-5:]
    code = folder / "exit_code"
    run.exit_code = int(code.read_text() or 137) if code.exists() else None
    run.wall_s = note["earlier_s"] + last_sign(folder) - note["created"]
    if run.exit_code is None or run.exit_code > 128:  # the shell's way to say: by a signal
        run.status = "killed"
    elif run.exit_code:
        run.status = "NaN" if any("NaN or infinity" in line for line in output) else "failed"
    elif run.final is None:
        run.status = "no result"
        run.last_lines.append(f"no {run.result} at step {run.total}; to begin anew, delete {folder}")
    else:
        run.status = "done" if math.isfinite(run.final) else "NaN"


def last_sign(folder: Path) -> float:
    """When a run ended, or last wrote something, in seconds since 1970."""
    names = ["exit_code"] if (folder / "exit_code").exists() else ["process.json", "output.log", "metrics.jsonl"]
    return max((folder / name).stat().st_mtime for name in names if (folder / name).exists())


def lives_elsewhere(folder: Path) -> bool:
    """Whether another host has begun it, not ended it, and lately written: two in one folder would spoil each other."""
    host = read_note(folder).get("host", socket.gethostname())
    there = host != socket.gethostname() and not (folder / "exit_code").exists()
    return there and time.time() - last_sign(folder) < SILENCE


def is_running(folder: Path) -> bool:
    return bool(find(folder)) or lives_elsewhere(folder)


# ---- Where runs go: threads here, a Ray cluster, a Slurm array. Each gives back submit(runs, call) -> their jobs ----

Submit = Callable[[list[Run], Call], list]


def need(module: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        refuse(f"{flag} needs the package {module}: pip install {module}")


def find_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return os.environ["CUDA_VISIBLE_DEVICES"].replace(",", " ").split()
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    return result.stdout.split() if result.returncode == 0 else []


def local_pool(args: Args, pool: ThreadPoolExecutor) -> Submit:
    gpus = find_gpus()
    slots = queue.SimpleQueue()
    for i in range(args.workers):
        slots.put({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})

    def execute_in_slot(run: Run, call: Call) -> Run:
        slot = slots.get()
        try:
            return execute(run, replace(call, env=call.env | slot))
        finally:
            slots.put(slot)

    return lambda runs, call: [pool.submit(execute_in_slot, replace(run), call) for run in runs]


def ray_pool(args: Args) -> Submit:
    ray = need("ray", "--ray-address")
    host, _, port = args.ray_address.rpartition(":")
    try:
        if host and "/" not in host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(args.ray_address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of many kinds
        refuse(f"--ray-address {args.ray_address}: {error}")
    # Ray gives the runs of a lost node to another one, where they resume
    task = ray.remote(execute).options(num_cpus=args.threads, num_gpus=args.gpus_per_run, max_retries=5)
    return lambda runs, call: [task.remote(run, call).future() for run in runs]


def slurm_pool(args: Args, folder: Path) -> Submit:
    submitit = need("submitit", "--slurm")
    try:
        executor = submitit.AutoExecutor(folder, cluster=args.slurm_cluster)
    except RuntimeError as error:
        refuse(f"--slurm: {error}")
    if args.gpus_per_run:
        executor.update_parameters(gpus_per_node=math.ceil(args.gpus_per_run))
    executor.update_parameters(
        name="plainrl",
        timeout_min=math.ceil((args.timeout + args.grace) / 60) + 1 if args.timeout else 24 * 60,
        cpus_per_task=args.threads,
        slurm_array_parallelism=args.workers,
        slurm_additional_parameters=args.slurm_parameters,
    )

    def submit(runs: list[Run], call: Call) -> list:
        jobs = {}
        for run in runs:  # of an array that an earlier call has submitted, what Slurm still has is not submitted again
            if run.job and args.slurm_cluster == "slurm":
                job = submitit.SlurmJob(folder, run.job)
                jobs |= {} if job.done() else {run.name: job}
        try:
            with executor.batch():
                new = {run.name: executor.submit(execute, run, call) for run in runs if run.name not in jobs}
        except RuntimeError as error:  # in it is what sbatch said
            refuse(f"--slurm: {error}")
        jobs |= new
        for run in runs:
            run.job = jobs[run.name].job_id
        return [jobs[run.name] for run in runs]

    return submit


# ---- The ledger, the estimate, the table ----


@dataclass
class Ledger:
    path: Path
    runs: dict[str, Run] = field(default_factory=dict)  # of all calls with this output folder
    probes: dict[str, dict[str, float]] = field(default_factory=dict)  # by group: seconds and bytes of a whole run
    asked: list[str] = field(default_factory=list)  # the runs of the last call: others may be of older scripts

    def load(self) -> None:
        content = read_json(self.path)
        try:
            if self.path.exists():
                self.runs = {name: Run(**row) for name, row in content["runs"].items()}
                for group, trial in content["probes"].items():
                    self.probes[group] = {name: float(trial[name]) for name in ("seconds", "bytes")}
        except DAMAGE as error:
            refuse(f"{self.path} is damaged ({error!r}); delete it, the runs' folders hold all that matters")

    def save(self) -> None:
        runs = {name: asdict(run) for name, run in self.runs.items()}
        write_json(self.path, {"asked": self.asked, "runs": runs, "probes": self.probes})

    def seconds_left(self, run: Run) -> float | None:
        if run.status == "done":
            return 0.0
        if run.total and run.step and run.seconds:
            return (run.total - run.step) * run.seconds / run.step
        done = [other.wall_s for other in self.runs.values() if other.group == run.group and other.status == "done"]
        return sum(done) / len(done) if done else self.probes.get(run.group, {}).get("seconds")

    def seconds_left_for_all(self, runs: list[Run], workers: int) -> float | None:
        """Of the runs of which something is known."""
        left = [seconds for run in runs if (seconds := self.seconds_left(run)) is not None]
        return max(max(left), sum(left) / workers) if left else None

    def time_left(self, runs: list[Run], workers: int) -> str:
        unknown = sum(self.seconds_left(run) is None for run in runs)
        without = f", without {unknown} of unknown length" if 0 < unknown < len(runs) else ""
        return clock(self.seconds_left_for_all(runs, workers)) + without


def clock(seconds: float | None) -> str:
    with suppress(TypeError, ValueError, OverflowError):  # None, NaN, more than a million years
        return str(timedelta(seconds=round(seconds)))
    return "?"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def size_of(folder: Path) -> int:
    size = 0
    for place, _, names in os.walk(folder):  # goes past what can't be read
        for name in names:
            with suppress(OSError):  # gone in this moment
                size += os.stat(os.path.join(place, name)).st_size
    return size


def clear_probes(output: Path) -> None:
    for folder in output.glob("probe~*"):  # no run has that sign in its environment's name
        if find(folder):  # a launcher that was killed has left it behind
            kill_group(read_note(folder)["pid"], signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def probe(todo: list[Run], call: Call, submit: Submit, args: Args, ledger: Ledger) -> None:
    """Tries each script in each environment for some seconds, to know what a whole run takes."""
    clear_probes(call.output)
    unknown = [run for run in todo if ledger.seconds_left(run) is None and not run.needs] if args.probe_seconds else []
    first = {run.group: run for run in unknown}
    trials = []
    for group, run in first.items():
        flags = [flag for flag in run.flags if flag != "--track"]
        new = {"status": "pending", "attempts": 0, "wall_s": 0.0, "job": None}
        trials.append(replace(run, name=f"probe~{group}", flags=flags, **new))
    if trials:
        seconds = f"{args.probe_seconds:g} s"
        print(f"{len(trials)} trial runs of {seconds} each show how long the runs will take; --probe-seconds 0: none")
    drive(trials, replace(call, timeout=args.probe_seconds), submit, replace(args, retry=0), ledger)
    for trial in trials if not call.stop.exists() else []:
        folder = call.output / trial.name
        if trial.step and trial.total:
            scale = trial.total / trial.step
            rows = (folder / "metrics.jsonl").stat().st_size
            start = (folder / "config.json").stat().st_mtime - read_note(folder)["created"]
            size = size_of(folder) + (scale - 1) * rows  # checkpoints keep their size
            ledger.probes[trial.group] = {"seconds": start + scale * trial.seconds, "bytes": size}
        else:
            print(f"no estimate for {trial.group}: {trial.status} before its first metrics")
    clear_probes(call.output)
    ledger.save()


def columns(run: Run, ledger: Ledger) -> list[str]:
    result, sps = ("-" if number is None else short(number) for number in (run.episodic_return, run.sps))
    return [run.name, run.status, f"{run.step:,}", result, sps, clock(ledger.seconds_left(run))]


def short(number: float) -> str:
    return f"{number:,.1f}" if abs(number) >= 10 else f"{number:.3f}"


def headline(runs: list[Run], ledger: Ledger, workers: int) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in Counter(run.status for run in runs).items())
    return f"{counts}; time left {ledger.time_left(runs, workers)}"


def draw(runs: list[Run], ledger: Ledger, workers: int) -> Table:
    table = Table("run", "status", *(Column(name, "right") for name in ("step", "return", "SPS", "left")))
    table.title = headline(runs, ledger, workers)
    for run in sorted(runs, key=lambda run: run.status != "running"):  # a long table is cut at its lower end
        table.add_row(*columns(run, ledger))
    return table


def drive(todo: list[Run], call: Call, submit: Submit, args: Args, ledger: Ledger) -> None:
    """Hands the runs to the pool and follows each to its end, or all of them to a stop."""
    runs, jobs, tries, said, printed = todo, [], Counter(), {}, time.time()
    console = Console()
    try:
        with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
            while todo or jobs:
                if todo:
                    jobs += zip(todo, submit(todo, call), strict=True)
                    for run in todo:
                        run.status = "pending"
                    ledger.save()  # with Slurm's names of the jobs
                todo, under_way = [], []
                for run, job in jobs:
                    if not job.done():
                        under_way.append((run, job))
                        run.status = "running" if is_running(call.output / run.name) else run.status
                        with suppress(*DAMAGE):  # judge will name it
                            read_progress(run, call.output / run.name)
                        continue
                    take_result(run, job, call)
                    tries[run.name] += 1
                    if run.status != "done" and tries[run.name] <= args.retry and not call.stop.exists():
                        todo.append(run)
                jobs = under_way
                if live:
                    live.update(draw(runs, ledger, args.workers), refresh=True)
                for run in [run for run in runs if said.get(run.name, "pending") != run.status]:
                    said[run.name] = run.status
                    ledger.save()
                    if not live:
                        print("{}: {}, step {}, return {}, {} SPS, left {}".format(*columns(run, ledger)))
                if not live and time.time() - printed > 60:
                    printed = time.time()
                    print(headline(runs, ledger, args.workers))
                if call.stop.exists() and not any(run.status == "running" for run, _ in jobs):
                    break
                time.sleep(0.2)
    finally:  # also when there is no room for the ledger: then no other run begins
        for run, job in jobs:
            if run.status != "running":
                job.cancel()
    ledger.save()


def drive_in_order(todo: list[Run], call: Call, submit: Submit, args: Args, ledger: Ledger) -> None:
    """First the runs that need no other, then those that need these. What needs a run that has failed never begins."""

    def may_begin(run: Run) -> bool:
        return all(ledger.runs[name].status == "done" for name in run.needs.values())

    while ready := [run for run in todo if may_begin(run)]:
        drive(ready, call, submit, args, ledger)
        todo = [run for run in todo if run not in ready]


def take_result(run: Run, job: object, call: Call) -> None:
    try:
        vars(run).update(vars(job.result()))
    except Exception as error:  # the disk is full, a node is gone, somebody has cancelled the job
        judge(run, call.output / run.name)
        if run.status != "done":
            run.status, run.last_lines = "failed", [*run.last_lines, repr(error)]
    run.job = None


def check(args: Args) -> None:
    for name, value in vars(args).items():
        if type(value) in (int, float):
            low = 1 if name in ("num_seeds", "workers", "threads") else 0
            if not (math.isfinite(value) and value >= low) or (name == "timeout" and not value):
                bound = "above 0" if name == "timeout" else f"of at least {low}"
                refuse(f"--{name.replace('_', '-')} is {value} but must be a finite number {bound}")
    if args.slurm and args.ray_address:
        refuse("give either --slurm or --ray-address")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    elsewhere = args.slurm or args.ray_address  # other machines have other cores
    args.threads = args.threads or (1 if elsewhere else max(1, cores // args.workers))


def lock_output(output: Path) -> filelock.FileLock:
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(output / "ledger.lock", timeout=0)  # ends with the process, however that ends
        lock.acquire()
    except filelock.Timeout:
        refuse(f"--output {output} is in use by another launcher")
    except OSError as error:
        refuse(f"--output {output}: {error}")
    return lock


def work(runs: list[Run], todo: list[Run], call: Call, submit: Submit, args: Args, ledger: Ledger) -> None:
    """Says what it will take, does it, and says what it took and what is missing."""
    probe(todo, call, submit, args, ledger)
    sizes = [ledger.probes[run.group]["bytes"] for run in todo if run.group in ledger.probes]
    size, seconds = megabytes(sum(sizes)) if sizes else None, ledger.seconds_left_for_all(todo, args.workers)
    if seconds is not None:
        print(f"estimate: {ledger.time_left(todo, args.workers)}" + f", and {size}" * bool(size))
    started = time.time()
    drive_in_order(todo, call, submit, args, ledger)
    used = megabytes(sum(size_of(call.output / run.name) for run in todo))
    expected = f" (estimate {clock(seconds)})" * (seconds is not None), f" (estimate {size})" * bool(size)
    print(f"took {clock(time.time() - started)}{expected[0]} and {used}{expected[1]}")
    missing = [run for run in runs if run.status != "done"]
    begun = [run for run in missing if run.status != "pending"]
    for run in begun:
        print(f"{run.status}: {run.name}, exit code {run.exit_code}: {' | '.join(run.last_lines[-2:])}")
    if len(missing) > len(begun):
        print(f"runs not begun by this call: {len(missing) - len(begun)}")
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are done; {ledger.path}")
    if missing:
        print(f"the same command goes on with the others: {shlex.join([sys.executable, *sys.argv])}")
    else:
        report = Path(__file__).with_name("report.py")
        print(f"to sum them up: {shlex.join([sys.executable, str(report), str(call.output)])}")


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    args = parse(Args, __doc__)
    check(args)
    try:
        runs = list({run.name: run for run in plan(args)}.values())  # what is asked for twice runs once
    except OSError as error:  # it or a script of it can't be read
        refuse(f"{args.suite or args.command}: {error}")
    output = args.output or f"runs/{Path(args.suite).stem if args.suite else 'sweep'}"
    output = Path(os.path.realpath(output))  # which unlike Path.resolve goes past a link to itself
    lock = None if args.dry_run else lock_output(output)
    ledger = Ledger(output / "ledger.json", asked=[run.name for run in runs])
    ledger.load()
    for i, run in enumerate(runs):
        runs[i] = run = replace(ledger.runs.get(run.name, run), launch=run.launch, flags=run.flags, needs=run.needs)
        ledger.runs[run.name] = run
        if is_running(output / run.name):
            run.status = "running"
        elif run.status != "timed out":  # which only the launcher that stopped it knows
            judge(run, output / run.name)
    todo = [run for run in runs if run.status != "done"]
    todo.sort(key=lambda run: run.status != "running")  # first join what is under way
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done; output folder {output}")
    if args.dry_run:
        for run in todo:
            print(f"{run.status}: {run.name}: {shlex.join(run.command(output))}")
        return

    git = f"git -C '{Path(runs[0].launch[-1]).parent}' describe --always --abbrev=40 --exclude='*' --dirty"
    status, commit = subprocess.getstatusoutput(git)
    env = {name: value for name, value in os.environ.items() if name.startswith("WANDB_") and "KEY" not in name}
    for name in "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS":
        env[name] = str(args.threads)  # else every run takes all cores, and they wait for each other
    timeout = args.timeout or math.inf
    call = Call(output, env, timeout, args.grace, commit if status == 0 else "unknown")
    try:
        call.stop.unlink(missing_ok=True)
    except OSError as error:  # it is a folder
        refuse(error)
    pool = ThreadPoolExecutor(args.workers)
    if args.ray_address:
        submit = ray_pool(args)
    else:
        submit = slurm_pool(args, output / "slurm") if args.slurm else local_pool(args, pool)
    signals = []

    def ask_to_stop(number: int, _frame: object) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second time nobody waits for checkpoints
        call.stop.touch()

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, ask_to_stop)
    try:
        work(runs, todo, call, submit, args, ledger)
    except OSError as error:  # no room for the ledger: the runs are told to stop, too
        print("error:", error, file=sys.stderr)
        with suppress(OSError):  # if there is no room for that either, the runs go on to their ends
            call.stop.touch()
    pool.shutdown()  # before another launcher may begin the same runs
    lock.release()
    if any(run.status != "done" for run in runs):
        raise SystemExit(128 + signals[0] if signals else 1)


if __name__ == "__main__":
    main()
