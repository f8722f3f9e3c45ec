"""Nothing that an argument names is unpickled: what in the sources could do so is listed here, and each is closed."""

import ast
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src" / "miaobi"
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "_pickle", "torch.distributed.checkpoint"}
CLOSED = {  # file: who reads a pickle, and why nothing in it is executed
    "train/older_state.py": "pickle.Unpickler whose find_class knows a dozen names and makes plain data of them",
    "corpus/workers.py": "results of prepare's own workers, which the same command started",
    "corpus/nanogpt.py": "meta.pkl by an unpickler that finds no class at all, see tests/corpus/test_prepared.py",
}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression of names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def suspects(tree: ast.AST) -> list[str]:
    """Everything in a file that could execute what it reads."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            banned = MODULES - {"pickle"}
            found += [f"import {n}" for n in names if n in banned or n.startswith("torch.distributed.checkpoint")]
        if isinstance(node, ast.Attribute) and dotted(node) in {"pickle.load", "pickle.loads", "pickle.Unpickler"}:
            found.append(dotted(node))
        if isinstance(node, ast.Attribute) and node.attr in {"all_gather_object", "broadcast_object_list",
                                                             "scatter_object_list", "gather_object"}:  # fmt: skip
            found.append(dotted(node))
        if isinstance(node, ast.Call):
            name, given = dotted(node.func), {k.arg: k.value for k in node.keywords}
            closed = isinstance(given.get("weights_only"), ast.Constant) and given["weights_only"].value is True
            if name == "torch.load" and not closed:
                found.append("torch.load without weights_only=True")
            if name in {"eval", "exec"} or name in {"joblib.load", "torch.jit.load", "torch.hub.load"}:
                found.append(name)
            if name in {"np.load", "numpy.load"} and "allow_pickle" in given:
                found.append("np.load with pickles")
            if name.endswith("YAML") and any(
                isinstance(v, ast.Constant) and v.value == "unsafe" for v in [*given.values(), *node.args]
            ):
                found.append("unsafe YAML")
    return found


def test_no_source_executes_what_it_reads():
    found = {str(p.relative_to(SOURCES)): suspects(ast.parse(p.read_text())) for p in sorted(SOURCES.rglob("*.py"))}
    assert {name for name, what in found.items() if what} <= CLOSED.keys(), found


def test_the_scan_sees_what_it_is_to_see():
    for line in (
        "import pickle\npickle.loads(x)", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(x)",
        "dist.all_gather_object(a, b)", "np.load(f, allow_pickle=True)", "YAML(typ='unsafe')",
        "import torch.distributed.checkpoint as dcp",
    ):  # fmt: skip
        assert suspects(ast.parse(line)), line
