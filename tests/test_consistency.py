"""Every script stands alone, and what several scripts contain is the same to the letter."""

import ast
import re
import sys
import tomllib

import pytest
from conftest import ROOT, SCRIPTS

TREES = {path: ast.parse(path.read_text()) for path in SCRIPTS}
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
DIFFERS = {
    "Args": "each algorithm has flags of its own; the common ones are compared below",
    "train": "it is the algorithm's loop",
    "update": "it is the algorithm's gradient step",
    "gradient_steps_until": "DQN counts environment steps per gradient step, the others the reverse",
    "Actor": "it is the algorithm's policy",
    "td_target": "it is the algorithm's equation",
    "explore": "it is the algorithm's",
    "make_agent": "it names the spaces that the algorithm can act in",
}
DIFFERS_IN = {  # exceptions of single scripts, with what they differ in
    "q_learning": {
        "make_env": "states are numbers", "make_envs": "it has one environment", "save_file": "NumPy's files",
        "load_file": "NumPy's files", "save_model": "its type", "evaluate_saved": "exact returns; no device",
    },
    "maddpg": dict.fromkeys(
        ["make_env", "make_envs", "evaluate", "evaluate_saved", "Critics"], "several agents in an environment"
    ),
}  # fmt: skip
for script in "dpo", "reward_model":
    DIFFERS_IN[script] = {
        "save_model": "Hugging Face's layout", "evaluate_saved": "no environment", "evaluate_pairs": "other results",
        "load": "a model with another head",
    }  # fmt: skip
COMMON_FLAGS = 14
NO_ENVIRONMENT = {"env_id", "num_envs", "eval_episodes", "capture_video"}
MISSING_FLAGS = {"q_learning": {"num_envs", "device"}, "dpo": NO_ENVIRONMENT, "reward_model": NO_ENVIRONMENT}
BROUGHT_BY_OTHERS = {"ale_py", "matplotlib", "peft"}  # an extra of Gymnasium; and what only some flags need
OWN_WORDS = {  # common flags with another comment
    "maddpg": {"env_id"},
    "reinforce": {"checkpoint_frequency"},
    "dpo": {"total_timesteps", "checkpoint_frequency"},
    "reward_model": {"total_timesteps", "checkpoint_frequency"},
}


def test_there_are_scripts():
    assert SCRIPTS


def test_names_in_several_scripts_have_one_text():
    texts = {}
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in DIFFERS_IN.get(path.stem, {}):
                text = ast.get_source_segment(path.read_text(), node)
                texts.setdefault(node.name, {}).setdefault(text, []).append(path.stem)
    drifted = {name: list(variants.values()) for name, variants in texts.items() if len(variants) > 1}
    assert not drifted.keys() - DIFFERS.keys(), drifted


def test_the_table_of_differences_is_true():
    names = {path.stem: {getattr(node, "name", None) for node in tree.body} for path, tree in TREES.items()}
    for script, differences in DIFFERS_IN.items():
        assert differences.keys() <= names.get(script, differences.keys())


def fields(tree):
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return [node.target.id for node in args.body if isinstance(node, ast.AnnAssign)]


@each_script
def test_imports_nothing_of_ours(path):
    ours = {script.stem for script in SCRIPTS} | {"algorithms", "benchmark", "tests"}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & ours
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] not in ours


@each_script
def test_common_flags_come_first_and_are_the_same(path):
    def flag_lines(path):  # without the defaults, which may differ
        lines = {
            name: re.search(rf"^    {name}: .*", path.read_text(), re.MULTILINE)[0] for name in fields(TREES[path])
        }
        return [re.sub(r" = [^#]*#", " #", line) for line in lines.values()]

    exemplar = ROOT / "algorithms" / "ppo.py"
    missing, own = MISSING_FLAGS.get(path.stem, set()), OWN_WORDS.get(path.stem, set())
    common = [line for line in flag_lines(exemplar)[:COMMON_FLAGS] if line.split(":")[0].strip() not in missing]
    for line, theirs in zip(common, flag_lines(path)[: len(common)], strict=True):
        name = line.split(":")[0].strip()
        assert theirs.startswith(f"    {name}: ") if name in own else theirs == line
    assert not missing & set(fields(TREES[path]))


def attributes_of(tree, name):
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {
        node.attr for node in nodes if getattr(node.value, "id", "") == name or getattr(node.value, "attr", "") == name
    }


@each_script
def test_every_flag_is_read_and_every_read_is_a_flag(path):
    args_class = next(node for node in TREES[path].body if isinstance(node, ast.ClassDef) and node.name == "Args")
    read = attributes_of(TREES[path], "args")  # args.x and self.args.x
    assert set(fields(TREES[path])) <= read | attributes_of(args_class, "self")
    methods = {node.name for node in args_class.body if isinstance(node, ast.FunctionDef)}
    assert read <= set(fields(TREES[path])) | methods


@each_script
def test_every_flag_has_its_help_beside_it(path):
    for name in fields(TREES[path]):
        assert re.search(rf"^    {name}: .* = .*  # \S", path.read_text(), re.MULTILINE), name


def inline_metadata(path):
    return re.search(r"^# /// script\n(?:# .*\n|#\n)+# ///$", path.read_text(), re.MULTILINE)[0].splitlines()


@each_script
def test_no_code_is_commented_out(path):
    for line in path.read_text().splitlines():
        comment = re.match(r"\s*# (.*)", line)
        if comment and line not in inline_metadata(path):
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
    assert others <= names | BROUGHT_BY_OTHERS, "what it imports, it names"
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
    assert text.count("# ---- Below this line every script is the same") == 1
    assert text.rstrip().endswith('if __name__ == "__main__":\n    main()')
