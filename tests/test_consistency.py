"""Every script stands alone, and what several scripts contain is the same to the letter."""

import ast
import re
import sys
import tomllib

import pytest
from conftest import ROOT, SCRIPTS

TREES = {path: ast.parse(path.read_text()) for path in SCRIPTS}
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
# These learn from text, and have a second block below the ruled line: they are compared with each other alone
PREFERENCES = {"dpo", "reward_model"}
TEXT = PREFERENCES | {"sft", "ppo_rlhf", "grpo"}
each_rewritten = pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if path.stem not in TEXT], ids=lambda path: path.stem
)
EXEMPLAR = ROOT / "algorithms" / "ppo.py"
OF_VECTORS = ROOT / "algorithms" / "td3.py"  # the same where no observation is an image
RULED_LINE = (
    "# ---- Below this line nothing learns: command line, environments, evaluation, run folder, as in all scripts ----"
)
RULED_LINE_OF_TEXT = (
    "# ---- Below this line: what does not depend on the algorithm; the other text scripts have the same functions ----"
)
DIFFERS = {
    "Args": "each algorithm has flags of its own; the common ones are compared below",
    "train": "it is the algorithm's loop",
    "update": "it is the algorithm's gradient step",
    "td_target": "it is the algorithm's equation",
    "explore": "it is the algorithm's",
    "make_agent": "it names the spaces that the algorithm can act in",
}
VECTORS = "observations are vectors, never images"
DIFFERS_IN = {  # exceptions of single scripts: functions, classes, methods of Run; equal reasons stand for equal texts
    "td3": {"make_env": VECTORS},
    "sac": {"make_env": VECTORS},
    "her": {"make_env": VECTORS},
    "reinforce": {"make_env": VECTORS},
    "iql": {"make_env": VECTORS},
    "cql": {"make_env": VECTORS},
    "decision_transformer": {"make_env": VECTORS, "evaluate": "the agent remembers each episode, and what it earned"},
    "q_learning": {
        "make_env": "states are numbers", "evaluate": "exact returns as well", "Run.__init__": "states are numbers",
        "Run.start": "states have no shape", "Run.step": "one environment; arrays would take most of the time",
    },
    "dqn": {"ReplayBuffer": "images build on it; it samples n of its arrays"},
    "maddpg": {
        "make_env": "several agents in an environment", "evaluate": "a result for each agent",
        "ReplayBuffer": "the parts of all agents side by side",
    },
    "alphazero": {"make_env": "a game of OpenSpiel", "evaluate": "both sides of a game, and its exact solution"},
    "muzero": {
        "make_env": "vectors, or a game of OpenSpiel", "evaluate": "with the search, and games",
        "Tree": "of a learned model: rewards on the way, no ends", "search": "steps of a learned model",
        "optimal_moves": "the search begins at observations", "Network": "three networks",
        "Board": "its picture shows no thoughts",
    },
    "dpo": {
        "evaluate": "log-probabilities", "evaluate_saved": "replies",
        "load": "the policy",
    },
    "reward_model": {
        "evaluate": "accuracies", "evaluate_saved": "rewards",
        "load": "a model with another head",
    },
    "sft": {
        "evaluate": "single replies", "evaluate_saved": "without a reference", "USUAL": "other columns",
        "load": "weights may be new", "show_replies": "there is no reference",
        "training_and_held_out": "demonstrations",
        "batches_from": "batches of one length would make tokens of short replies count for more",
    },
    "grpo": {
        "METRICS": "a policy's", "evaluate": "several rewards", "evaluate_saved": "one network",
        "load": "several rewards", "play": "no values",
    },
    "ppo_rlhf": {
        "evaluate": "replies alone", "evaluate_saved": "prompts instead of pairs",
    },
}  # fmt: skip
HEADINGS = ["Run", "Evaluation", "Algorithm"]  # of the flags
MISSING_FLAGS = {
    "q_learning": {"num_envs", "device", "threads"}, "reinforce": {"num_envs"},
    "iql": {"num_envs"}, "cql": {"num_envs"}, "decision_transformer": {"num_envs"},
}  # fmt: skip
OWN_WORDS = {  # common flags with another comment
    "maddpg": {"env_id"},  # Gymnasium has none of its environments
    "muzero": {"env_id", "device"},
    "alphazero": {"env_id", "device"},  # nor of its; and each board is a vector, so auto is always the CPU
    "q_learning": {"total_timesteps"}, "reinforce": {"total_timesteps"},  # of one environment
    # Gradient steps
    "iql": {"total_timesteps"}, "cql": {"total_timesteps"}, "decision_transformer": {"total_timesteps"},
}  # fmt: skip
OWN_FLAGS_OF_PREFERENCES = {"model_name", "total_timesteps", "eval_replies", "max_new_tokens", "reward", "replies"}
LENGTHS = {  # lines at most above the ruled line, where the algorithm is
    "q_learning": 290, "reinforce": 290, "td3": 270, "sac": 270, "her": 350, "maddpg": 400,
    "iql": 350, "cql": 350, "decision_transformer": 350,
    "alphazero": 537,  # the aim is 350: the game, its exact solution, its picture and a game against you take 140
    "muzero": 587,  # the aim is 480: the games, their exact solutions and pictures take 140, as in alphazero
    "ppo": 356, "dqn": 355,  # the aim is 350: they also take images, and compile
    "sft": 351,  # the aim is 300: reading the columns of people's data sets takes 100
    "grpo": 334, "ppo_rlhf": 362,
    "reward_model": 384, "dpo": 415,  # the aim is 300: reading the columns of people's data sets takes 100 in each
}  # fmt: skip
# Lines at most below it. The aim is 210. What had to be there before (command line, environments, evaluation, W&B, run
# folder) takes about 220; exact resuming in mid-episode 35, loading a trained agent 15, longer runs and refused changes
# 20, mistakes as one line each 30, filming that is tried first and evaluations that are cut 10, images 20
SHARED_LENGTH = 361
SHARED_LENGTH_OF_BOTH = {"muzero": 371}  # environments of Gymnasium and games: it evaluates in both
# The aim is 260. Reading files, chats and templates takes 115, models, LoRA and rewards 120, the rest 220. Those that
# learn from replies of their own have what writes these, and what reads prompts: 140 more
SHARED_LENGTH_OF_TEXT = {"reward_model": 447, "sft": 462, "dpo": 470, "grpo": 592, "ppo_rlhf": 592}
BROUGHT_BY_OTHERS = {"ale_py", "matplotlib", "minari", "peft"}  # an extra of Gymnasium; what only some flags need
PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "pyspiel": "open-spiel"}  # of modules with another name


def test_there_are_scripts():
    assert SCRIPTS
    assert EXEMPLAR in SCRIPTS


def named_texts(path):
    """Functions, classes and constants by name, with their decorators; of Run each method, and the rest as Run."""
    lines = path.read_text().splitlines()

    def text(*nodes):
        first = (min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) for node in nodes)
        return "\n".join(line for a, node in zip(first, nodes, strict=True) for line in lines[a - 1 : node.end_lineno])

    for node in TREES[path].body:
        if isinstance(node, ast.ClassDef) and node.name == "Run":
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            yield from ((f"Run.{method.name}", text(method)) for method in methods)
            yield "Run", text(*(part for part in node.body if part not in methods))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, text(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, text(node)


def drifted():
    """Names with more than one text, and which scripts have each of them, but for the exceptions of single scripts."""
    texts = {}
    for path in SCRIPTS:
        for name, text in named_texts(path):
            group = name, path.stem in TEXT, DIFFERS_IN.get(path.stem, {}).get(name)
            texts.setdefault(group, {}).setdefault(text, []).append(path.stem)
    return {name: [*variants.values()] for (name, *_), variants in texts.items() if len(variants) > 1}


def test_names_in_several_scripts_have_one_text():
    assert not {name: scripts for name, scripts in drifted().items() if name not in DIFFERS}


def test_the_tables_of_differences_are_true():
    """What they excuse is there, and does differ: from the exemplar's, or in the other one of preferences."""
    assert DIFFERS.keys() <= drifted().keys()
    texts = {path.stem: dict(named_texts(path)) for path in SCRIPTS}
    for script, differences in DIFFERS_IN.items():
        other = sorted(PREFERENCES - {script})[0] if script in TEXT else "ppo"
        for name in differences:
            assert name in texts[script], (script, name)
            assert texts[script][name] != texts[other].get(name), (script, name)


def args_class(path):
    return next(node for node in TREES[path].body if isinstance(node, ast.ClassDef) and node.name == "Args")


def fields(path):
    return [node.target.id for node in args_class(path).body if isinstance(node, ast.AnnAssign)]


def flag_lines(path):
    """Headings and flags in order, without the defaults, which may differ."""
    nodes = [node for node in args_class(path).body if isinstance(node, ast.AnnAssign)]
    lines = path.read_text().splitlines()[args_class(path).lineno : nodes[-1].end_lineno]
    return [re.sub(r" = [^#]*#", " #", line.strip()) for line in lines]


def common_flags(path):
    """The first two groups: each flag's line by its name, and each heading by itself."""
    lines = flag_lines(path)
    lines = lines[: lines.index(f"# {HEADINGS[-1]}")]
    return {line.split(":")[0]: line for line in lines}


@each_script
def test_imports_nothing_of_ours(path):
    ours = {script.stem for script in SCRIPTS} | {"algorithms", "benchmark", "tests"}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & ours
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] not in ours


@each_rewritten
def test_common_flags_come_first_and_are_the_same(path):
    missing, own = MISSING_FLAGS.get(path.stem, set()), OWN_WORDS.get(path.stem, set())
    expected = common_flags(EXEMPLAR)
    if "def is_image" not in path.read_text():  # a script for vectors alone need not say what holds for images
        expected |= {name: common_flags(OF_VECTORS)[name] for name in ("device", "threads")}
    expected = {name: line for name, line in expected.items() if name not in missing}
    got = common_flags(path)
    assert [*got] == [*expected]
    assert {name: got[name] for name in got.keys() - own} == {name: expected[name] for name in got.keys() - own}
    assert not missing & {*fields(path)}


@each_script
def test_flags_have_three_headings_and_no_blank_line_between_them(path):
    """The help is the text from class Args to the first blank line, with a blank line before each heading."""
    lines = flag_lines(path)
    assert [line for line in lines if line.startswith("#")] == [f"# {heading}" for heading in HEADINGS]
    assert lines[0] == "# Run"
    assert "" not in lines
    assert path.read_text().splitlines()[args_class(path).lineno + len(lines)] == "", "but one after the last"


def test_the_scripts_of_preferences_have_the_same_common_flags():
    first, second = (common_flags(ROOT / "algorithms" / f"{name}.py") for name in sorted(PREFERENCES))
    common = [[name for name in flags if name not in OWN_FLAGS_OF_PREFERENCES] for flags in (first, second)]
    assert common[0] == common[1]
    assert {name: first[name] for name in common[0]} == {name: second[name] for name in common[0]}


def attributes_of(tree, name):
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {
        node.attr for node in nodes if getattr(node.value, "id", "") == name or getattr(node.value, "attr", "") == name
    }


@each_script
def test_every_flag_is_read_and_every_read_is_a_flag(path):
    # args.x and self.args.x; of_run: the arguments of the run that --evaluate looks at; flags: these or those
    read = {name for of in ("args", "of_run", "flags") for name in attributes_of(TREES[path], of)}
    assert {*fields(path)} <= read | attributes_of(args_class(path), "self")
    methods = {node.name for node in args_class(path).body if isinstance(node, ast.FunctionDef)}
    assigned = [node for node in args_class(path).body if isinstance(node, ast.Assign)]  # num_envs = 1
    constants = {node.id for assignment in assigned for node in ast.walk(assignment) if isinstance(node, ast.Name)}
    assert read <= {*fields(path)} | methods | constants


@each_script
def test_every_flag_has_its_help_beside_it(path):
    for name in fields(path):
        assert re.search(rf"^    {name}: .* = .*  # \S", path.read_text(), re.MULTILINE), name


def ruled_line(script):
    return RULED_LINE_OF_TEXT if script in TEXT else RULED_LINE


def inline_metadata(path):
    return re.search(r"^# /// script\n(?:# .*\n|#\n)+# ///$", path.read_text(), re.MULTILINE)[0].splitlines()


@each_script
def test_no_code_is_commented_out(path):
    for line in path.read_text().splitlines():
        comment = re.match(r"\s*# (.*)", line)
        if comment and line not in inline_metadata(path) and comment[1] not in HEADINGS:
            with pytest.raises(SyntaxError):
                ast.parse(comment[1])


def requirements(text):
    return sorted(line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip())


@each_script
def test_inline_dependencies_are_those_of_requirements_txt(path):
    inline = tomllib.loads("\n".join(line[2:] for line in inline_metadata(path)[1:-1]))
    ours = requirements((ROOT / "requirements.txt").read_text().split("# What working on them needs")[0])
    assert set(inline["dependencies"]) <= set(ours)
    names = {re.split(r"[^\w-]", line)[0] for line in inline["dependencies"]}
    imported = {node.names[0].name for node in ast.walk(TREES[path]) if isinstance(node, ast.Import)}
    imported |= {node.module for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert {PACKAGES.get(name, name) for name in others} <= names | BROUGHT_BY_OTHERS, "what it imports, it names"
    assert inline["requires-python"] == ">=3.11"


@each_script
def test_equations_of_the_docstring_stand_in_the_code(path):
    text = path.read_text()
    numbers = set(re.findall(r"^    (\[\d\])", ast.get_docstring(TREES[path]), re.MULTILINE))
    assert numbers
    code = text.split('"""', 2)[2]
    for number in numbers:
        assert re.search(rf"# .*{re.escape(number)}", code), number


@each_script
def test_lines_fit_and_the_shared_part_is_ruled_off(path):
    text = path.read_text()
    assert not [line for line in text.splitlines() if len(line) > 120]
    assert text.splitlines().count(ruled_line(path.stem)) == 1
    assert text.rstrip().endswith('if __name__ == "__main__":\n    main()')


@each_script
def test_the_docstring_is_read_in_a_minute(path):
    docstring = TREES[path].body[0]
    assert docstring.end_lineno - docstring.lineno + 1 <= 30


def lengths(script):
    """All lines count, blank ones too."""
    lines = (ROOT / "algorithms" / f"{script}.py").read_text().splitlines()
    own = lines.index(ruled_line(script))
    return own, len(lines), len(lines) - own


@pytest.mark.parametrize("script", LENGTHS)
def test_scripts_are_short(script):
    own, _, shared = lengths(script)
    assert own <= LENGTHS[script]
    assert shared <= (SHARED_LENGTH_OF_TEXT | SHARED_LENGTH_OF_BOTH).get(script, SHARED_LENGTH)


def test_every_script_has_a_length():
    assert {path.stem for path in SCRIPTS} == LENGTHS.keys()
