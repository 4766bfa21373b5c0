"""Checks the Python snippets of README.md and of the docs by mypy, with the settings of the package.

    python tests/helpers/readme_snippets.py [FILE ...]

Every snippet is a file of its own, and so is a notebook. Names that it takes from the text around it, such as `model`,
may be anything.
"""

import ast
import builtins
import json
import re
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets_of(document: Path) -> list[str]:
    if document.suffix == ".ipynb":
        cells = json.loads(document.read_text(encoding="utf-8"))["cells"]
        return ["\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")]
    return re.findall(r"^```py(?:thon)?\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def as_module(snippet: str) -> str:
    """The snippet behind declarations of the names that it does not define."""
    snippet = re.sub(r", \.\.\.(?=[)\]}])", "", snippet)  # "and so on", which is not Python everywhere
    nodes = list(ast.walk(ast.parse(snippet)))
    defined = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    defined |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {(name.asname or name.name).partition(".")[0] for name in node.names}
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    declared = [f"{name}: Any\n" for name in sorted(used - defined - set(dir(builtins)))]
    return "from typing import Any\n" + "".join(declared) + snippet


def main(documents: list[Path]) -> int:
    from mypy import api  # the tests, which take the snippets from here, do without it

    with tempfile.TemporaryDirectory() as folder:
        files = []
        for document in documents:
            for number, snippet in enumerate(snippets_of(document), start=1):
                file = Path(folder, f"{document.stem.lower()}_{number}.py")
                file.write_text(as_module(snippet), encoding="utf-8")
                files.append(str(file))
        # `model = get_peft_model(model, ...)`, as everybody writes it, gives a name another type
        options = ["--config-file", str(ROOT / "pyproject.toml"), "--allow-redefinition"]
        printed, errors, code = api.run([*options, *files])
    print(printed + errors, end="")
    return code


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]] or [*DOCUMENTS, *(ROOT / "docs").rglob("*.ipynb")]))
