"""Writes the table that leads from each numbered equation of a script to its lines, into algorithms/README.md.

    python benchmark/equations.py

In a script's docstring an equation stands as [3] and its text. A line computes it if its comment begins with [3]. Where
there is none, as for a whole function, the docstring of that function begins with [3].
"""

import re
from pathlib import Path

ALGORITHMS = Path(__file__).parent.parent / "algorithms"
BEGIN, END = "<!-- equations: python benchmark/equations.py writes this part -->", "<!-- end of equations -->"
SOURCE = re.compile(r"(authors'|[A-Za-z][\w&.-]*)(,| (?!<-|=)|$)")  # how a reference begins, and no formula does


def equations(docstring: str) -> dict[int, list[tuple[str, str]]]:
    """Number -> its lines, each as the formula and where it is from, which may be empty."""
    found, number = {}, None
    for line in docstring.splitlines():
        if begins := re.match(r" +\[(\d+)\] ", line):
            number = int(begins[1])
            line = line[begins.end() :]
        elif not line.startswith("     "):  # a line that goes on with an equation stands further right
            number = None
        if number is None:
            continue
        *formula, source = [""] * ("  " not in line.strip()) + re.split(" {2,}", line.strip())
        if not any(formula) or not SOURCE.match(source):
            formula, source = [*formula, source], ""
        found.setdefault(number, []).append((" ".join(" ".join(formula).split()), source))
    return found


def lines_of(script: str, number: int) -> list[int]:
    """The numbers of the lines that compute the equation, below the flags and above what all scripts share."""
    lines = script.splitlines()
    flags = next(i for i, line in enumerate(lines) if line.startswith("class Args"))
    first = next(i for i in range(flags + 1, len(lines)) if re.match(r"\S", lines[i]))
    last = next(i for i, line in enumerate(lines) if line.startswith("# ---- Below this line"))
    for pattern in rf"# (\[\d+\](, | and | to ))*\[{number}\]", rf'"""\[{number}\]':
        if hits := [i + 1 for i in range(first, last) if re.search(pattern, lines[i])]:
            return hits
    return []


def table() -> str:
    rows = ["| script | | equation | from | line |", "|---|---|---|---|---|"]
    for path in sorted(ALGORITHMS.glob("*.py")):
        script = path.read_text()
        for number, parts in equations(script.split('"""')[1]).items():
            formulas = "<br>".join("`" + formula.replace("|", r"\|") + "`" for formula, _ in parts)
            sources = "<br>".join(dict.fromkeys(source for _, source in parts if source))
            links = ", ".join(f"[{line}]({path.name}#L{line})" for line in lines_of(script, number))
            rows.append(f"| {path.stem} | [{number}] | {formulas} | {sources} | {links} |")
    return "\n".join(rows)


def with_table(page: str) -> str:
    """The page with the part between the two marks written anew."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    guide = ALGORITHMS / "README.md"
    guide.write_text(with_table(guide.read_text()))
    print(f"{guide} leads from the equations to their lines")
