"""The rules of the house, each with its reason: what the package may write, import, and say about itself.

The README's tree is the block of code behind the line `<!-- tree -->`: a name (folders end in a slash), two blanks
or more, a comment; two blanks of indentation a level. Of the folders outside minivlm/, one that is listed without
files stands for all it holds.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import UnionType

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minivlm"
KERNELS = ROOT / "kernels"  # installed and imported as minivlm.kernels
SOURCES = sorted(PACKAGE.rglob("*.py")) + sorted(KERNELS.rglob("*.py"))
# From the bottom to the top. A file or folder imports what is on lower lines, and of its own line only itself: so
# no encoder knows a decoder, and nothing that people do with the model is known to the model.
LEVELS = (
    "kernels",
    "errors",
    "fields noise warpers",
    "sampler",
    "ops",
    "processor merge connector decoder vision",
    "answer shards stages vlm",
    "filling models quantisation row",
    "batch checkpoint",
    "generate",
    "chat hub",
    "pipeline",
    "__init__",
    "bench parity terminal train",
    "evaluate serve",
    "arguments",
    "cli",
    "__main__",
)
# Where gradients may be switched off: anywhere else a model could not be trained through it.
WITHOUT_GRADIENTS = ("generate.py", "ops/cpu_decoding.py", "batch.py", "train/", "evaluate/", "bench/", "serve/")
# tokenizers raises Exception itself; what is not exactly that is raised again.
CATCHES_EXCEPTION = {("processor/tokens.py", "from_folder"), ("serve/limits.py", "strict")}
# The model's thread hands every error to the answers that it concerns, which raise it in the client's task.
# The status of a stream is sent before it breaks: an event tells the client, the log has the trace.
HANDS_EXCEPTION_ON = {("serve/faults.py", "tried"), ("serve/wire.py", "told")}
COMPARES_WITH_TRANSFORMERS = ("parity.py", "bench/")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines


def name_of(path: Path) -> str:
    return path.relative_to(ROOT if path.is_relative_to(KERNELS) else PACKAGE).as_posix()


def nodes(kind: type | tuple[type, ...] | UnionType) -> Iterator[tuple[str, ast.AST]]:
    """Every node of a kind with the place where it is, such as "ops/rope.py:12"."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield f"{name_of(path)}:{node.lineno}", node


def calls(pattern: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call of something whose written name ends as the pattern says."""
    for where, node in nodes(ast.Call):
        if re.search(rf"(^|\.){pattern}$", ast.unparse(node.func)):
            yield where, node


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top or inside a function; of minivlm's own, each name by itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import hides what is imported"
            # `from minivlm import hub` is the module minivlm.hub.
            split = node.module == "minivlm"
            found |= {f"minivlm.{alias.name}" for alias in node.names} if split else {node.module}
    return found


# ---- what is not written


def test_no_default_hides_a_missing_attribute():
    assert [where for where, call in calls("getattr") if len(call.args) > 2 or call.keywords] == []


def test_every_weight_is_accounted_for_when_loading():
    loose = [where for where, call in calls("load_state_dict") if any(k.arg == "strict" for k in call.keywords)]
    assert loose == []


def test_no_error_is_swallowed_with_others():
    """A clause names what it expects; `except Exception` would turn our own mistakes into something else."""
    broad = set()
    for path in SOURCES:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, FUNCTIONS | ast.Module):
                for node in inside(function):
                    if isinstance(node, ast.ExceptHandler):
                        caught = "" if node.type is None else ast.unparse(node.type)
                        if caught == "" or re.search(r"\b(Base)?Exception\b", caught):
                            again = any(isinstance(part, ast.Raise) for part in ast.walk(node))
                            place = (name_of(path), function.name if isinstance(function, FUNCTIONS) else "")
                            broad.add(place)
                            assert again or place in HANDS_EXCEPTION_ON, f"{name_of(path)}:{node.lineno}"
    assert broad == CATCHES_EXCEPTION | HANDS_EXCEPTION_ON


def inside(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function or module, without those of the functions in it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, FUNCTIONS):
            yield node
            yield from inside(node)


def test_behaviour_depends_on_arguments_not_on_the_environment():
    hidden = [where for where, node in nodes(ast.Attribute) if ast.unparse(node) in ("os.environ", "os.getenv")]
    assert hidden == []


def test_nothing_is_rebound_globally():
    assert [where for where, _ in nodes(ast.Global)] == []


def test_keyword_arguments_are_named_and_typed():
    """`**kwargs: Any` passes on what nobody checks; only a library's own class may get what it alone knows."""
    for where, node in nodes(FUNCTIONS):
        if node.args.kwarg is not None:
            typed = node.args.kwarg.annotation is not None and ast.unparse(node.args.kwarg.annotation) != "Any"
            of_a_library = node.name == "__init__" and "super().__init__(" in ast.unparse(node)
            assert typed or of_a_library, where


def test_gradients_are_switched_off_only_where_nobody_trains():
    for where, node in nodes((ast.Attribute, ast.Name)):
        if ast.unparse(node).endswith(("no_grad", "inference_mode", "set_grad_enabled")):
            assert where.startswith(WITHOUT_GRADIENTS), where


def test_pickle_is_never_opened():
    for path in SOURCES:
        modules = imports(path) - ({"pickle"} if name_of(path) == "kernels/cpu/single_row.py" else set())
        assert not modules & {"pickle", "dill", "joblib", "shelve"}, name_of(path)
    assert "UnpicklingError" in (KERNELS / "cpu/single_row.py").read_text()  # an error of Numba's, and all that it has
    assert [where for where, _ in calls(r"torch\.load")] == []


def test_nothing_is_left_for_later():
    for path in SOURCES:
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8")), name_of(path)


# ---- what is


def test_files_and_functions_are_short():
    for path in SOURCES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE, name_of(path)
    for where, node in nodes(FUNCTIONS):
        assert node.end_lineno - node.lineno < LONGEST_FUNCTION, where


def test_every_file_and_public_name_says_what_it_is():
    silent = []
    for path in SOURCES:
        module = ast.parse(path.read_text(encoding="utf-8"))
        public = [n for n in module.body if isinstance(n, FUNCTIONS | ast.ClassDef) and n.name[0] != "_"]
        silent += [f"{name_of(path)} {n.name}" for n in public if not ast.get_docstring(n)]
        silent += [] if ast.get_docstring(module) else [name_of(path)]
    assert silent == []


def unit(module: str) -> str:
    """The file or folder of the package that a module name means; a public name of minivlm means its __init__."""
    parts = module.split(".")
    if parts[1:2] == ["kernels"]:
        return "kernels"
    if len(parts) == 1 or not ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()):
        return "__init__"
    return parts[1]


def test_a_file_imports_only_what_is_below_it():
    level = {name: number for number, names in enumerate(LEVELS) for name in names.split()}
    for path in SOURCES:
        own = name_of(path).split("/")[0].removesuffix(".py")
        assert own in level, f"{own} has no place in LEVELS"
        for module in imports(path):
            if module.split(".")[0] == "minivlm" and unit(module) != own:
                assert level[unit(module)] < level[own], f"{name_of(path)} imports {module}"


def test_the_processor_needs_no_model_code():
    """Text and pictures can be prepared, and image tokens counted, where no model is."""
    for path in (PACKAGE / "processor").glob("*.py"):
        units = {unit(module) for module in imports(path) if module.split(".")[0] == "minivlm"}
        assert units <= {"errors", "fields", "processor"}, name_of(path)


def test_triton_is_imported_by_kernels_only():
    """It is installed on Linux alone; elsewhere everything but the kernels works."""
    for path in SOURCES:
        foreign = {module.split(".")[0] for module in imports(path)} & {"triton"}
        assert not foreign or path.is_relative_to(KERNELS), name_of(path)


def test_numba_is_imported_by_its_kernels_when_they_are_needed():
    """It is an extra; a small model, as the shipped one, answers sooner without it."""
    for path in SOURCES:
        foreign = {module.split(".")[0] for module in imports(path)} & {"numba", "llvmlite"}
        assert not foreign or path.is_relative_to(KERNELS / "cpu"), name_of(path)
    code = "import sys, minivlm; minivlm.load(device='cpu').generate('hi', max_new_tokens=2); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "minivlm.kernels.cpu.single_row" in loaded.split() and "numba" not in loaded.split()


def test_transformers_is_imported_only_for_comparison():
    for path in SOURCES:
        if not name_of(path).startswith(COMPARES_WITH_TRANSFORMERS):
            assert "transformers" not in {module.split(".")[0] for module in imports(path)}, name_of(path)


def test_the_servers_packages_are_imported_by_the_server_only():
    """They are an extra; without it everything else works."""
    packages = {"fastapi", "httpx", "jsonschema", "llguidance", "prometheus_client", "pydantic", "starlette", "uvicorn"}
    for path in SOURCES:
        if not name_of(path).startswith("serve/"):
            assert not {module.split(".")[0] for module in imports(path)} & packages, name_of(path)
    code = "import sys, minivlm.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not packages & set(loaded.split())


# ---- what it says about itself


def ignored(path: Path) -> bool:
    """Hidden, or made by tools and named in .gitignore; git itself is not asked, an exported copy has none."""
    patterns = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("#")]
    return path.name.startswith(".") or any(fnmatch(path.name, pattern) for pattern in patterns)


def on_disk(folder: Path) -> Iterator[Path]:
    """Every file and folder below a folder, relative to the root."""
    for path in sorted(folder.iterdir()):
        if not ignored(path):
            yield path.relative_to(ROOT)
            if path.is_dir():
                yield from on_disk(path)


def readme_tree() -> list[Path]:
    """The paths of the README's tree."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- tree -->\n", 1)[1].split("```")[1]
    paths: list[Path] = []
    folders: list[str] = []
    for line in block.splitlines()[1:]:  # the first is what follows the fence
        if line.strip():
            depth, odd = divmod(len(line) - len(line.lstrip(" ")), 2)
            name, _, comment = line.strip().partition("  ")
            assert not odd and depth <= len(folders), f"{line!r}: two blanks of indentation a level"
            assert comment.strip() or line.strip() == name, line
            del folders[depth:]
            paths.append(Path(*folders, name))
            if name.endswith("/"):
                folders.append(name)
    return paths


def test_the_readmes_tree_equals_the_disk():
    listed = readme_tree()
    assert len(listed) == len(set(listed))
    opened = {parent for path in listed for parent in path.parents}
    expected = set()
    for path in on_disk(ROOT):
        closed = [parent for parent in path.parents if parent in listed and parent not in opened]
        inside_a_closed_folder = closed and path.parts[0] != "minivlm"
        if not inside_a_closed_folder and not is_empty_init(ROOT / path):
            expected.add(path)
    assert {path for path in listed if not is_empty_init(ROOT / path)} == expected


def is_empty_init(path: Path) -> bool:
    """An __init__.py with no more than a docstring, which a tree need not show."""
    return path.name == "__init__.py" and path.is_file() and len(ast.parse(path.read_text(encoding="utf-8")).body) <= 1


def test_every_bug_of_the_checklist_is_guarded():
    """The numbers in tests/CHECKLIST.md are those that docstrings of tests name."""
    tests = ROOT / "tests"
    rows = re.findall(r"^\| (\d+) \|", (tests / "CHECKLIST.md").read_text(encoding="utf-8"), re.MULTILINE)
    named: set[str] = set()
    for path in tests.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for numbers in re.findall(r"^checklist (\d+(?:, \d+)*)", ast.get_docstring(node) or ""):
                    named |= set(numbers.split(", "))
    assert rows == [str(number) for number in range(1, len(rows) + 1)]
    assert named == set(rows)


def test_every_folder_of_the_package_is_installed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    folders = {f"minivlm.{name}" if name.startswith("kernels") else name for name in folders}
    assert {name for name in packages if not name.startswith("minivlm.weights")} == folders


@pytest.mark.parametrize("lines", [["a/  x", "   b.py  x"], ["b.py  x", "  c.py  x"], ["a/", "    c.py  x"]])
def test_a_malformed_tree_is_noticed(lines, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text("\n".join(["<!-- tree -->", "```", *lines, "```"]))
    monkeypatch.setattr("test_house.ROOT", tmp_path)
    with pytest.raises(AssertionError):
        readme_tree()
