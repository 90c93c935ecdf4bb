"""`mlo` can be imported with every torch that it supports: private names of torch are looked up where they are used."""

import ast
from pathlib import Path

import mlo

# It is there in every torch since 1.13, and torch's own optimizers and data loaders rely on it.
_STABLE = {("torch.utils", "_pytree")}


def test_no_module_imports_a_private_name_of_torch():
    private = []
    for path in Path(mlo.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                names = {(node.module, alias.name) for alias in node.names} - _STABLE
                private += [f"{path.name}: {m}.{n}" for m, n in names if n.startswith("_") or "._" in f".{m}"]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
                private += [f"{path.name}: {m}" for m in modules if "._" in m]
    assert not private
