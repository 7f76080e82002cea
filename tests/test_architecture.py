"""Who may import whom: cli -> pipelines -> sami_cache, and the layers inside. Read from the source, functions included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sami_cache", "pipelines", "cli")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# The first matching prefix decides what a module may import of the project's own.
ALLOWED = {
    "sami_cache.data": ("sami_cache.data", "sami_cache.errors"),
    "sami_cache.store": ("sami_cache.store", "sami_cache.errors"),
    "sami_cache.models": ("sami_cache.models", "sami_cache.errors"),
    "sami_cache": ("sami_cache",),
    "pipelines": ("pipelines", "sami_cache"),
    "cli": ("cli", "pipelines", "sami_cache"),
}
# Beyond the standard library.
FOREIGN = {
    "sami_cache.store": {"blake3", "google_crc32c", "numpy", "obstore", "pyarrow", "xxhash", "zstandard"},
    "sami_cache.data": {"blake3", "faster_coco_eval", "numpy", "PIL", "pyarrow", "simplejpeg", "torch"},
}
# Costly to import, and not needed by every command: they must not be loaded to show a help text.
HEAVY = {"torch", "timm", "matplotlib", "pyarrow", "numpy"}
LIGHT_PIPELINES = {"pipelines", "pipelines.recipes"}  # numbers, which are the defaults of options


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> list[str]:
    """Every module imported anywhere in the tree, except under `if TYPE_CHECKING`."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            found.append(node.module or "")
            found += [f"{node.module}.{alias.name}" for alias in node.names if node.module in PACKAGES]
        else:
            found += imports(node)
    return found


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def layer(name: str, table: dict) -> str | None:
    return next((prefix for prefix in table if within(name, (prefix,))), None)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_follow_the_layers(path):
    name = module_name(path)
    used = imports(ast.parse(path.read_text()))
    allowed = ALLOWED[layer(name, ALLOWED) or ""]
    own = [module for module in used if within(module, PACKAGES) and module != "sami_cache.__version__"]
    assert [module for module in own if not within(module, allowed) and module != "sami_cache"] == []


@pytest.mark.parametrize("path", [path for path in FILES if layer(module_name(path), FOREIGN)], ids=module_name)
def test_layers_use_only_the_libraries_they_name(path):
    prefix = layer(module_name(path), FOREIGN) or ""
    used = {module.partition(".")[0] for module in imports(ast.parse(path.read_text()))}
    assert used - set(sys.stdlib_module_names) - set(PACKAGES) <= FOREIGN[prefix]


def test_help_does_not_load_the_heavy_libraries():
    code = (
        f"import sys, cli.main; print(sorted(name for name in sys.modules if name in {HEAVY!r} "
        f"or name.startswith('pipelines') and name not in {LIGHT_PIPELINES!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_verifying_needs_no_torch():
    code = "import sys, pipelines.verify, pipelines.diff, pipelines.inspect; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_file_grows_past_reading():
    long = {str(path.relative_to(ROOT)): lines for path in FILES if (lines := len(path.read_text().splitlines())) > 400}
    assert long == {}


def test_the_checks_see_function_level_imports():
    tree = ast.parse("def f():\n    if True:\n        from sami_cache.models import teachers\n")
    assert "sami_cache.models" in imports(tree)
    assert not within("sami_cache.models", ALLOWED["sami_cache.store"])
