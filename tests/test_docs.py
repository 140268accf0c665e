"""The README and the docs: their Python runs, their commands are there, their links lead somewhere."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import gradstep as gs

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path):
    pytest.importorskip("torch")
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), names)
    assert printed.getvalue(), f"{page.name} shows nothing"


def test_the_readme_reaches_the_answer_that_its_loop_looks_for():
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(blocks(ROOT / "README.md", "python")[0], names)
    assert printed.getvalue().startswith("[1. 2. 3. 4. 5. 6. 7. 8.]")
    assert names["opt"].step == 200


def test_the_readme_gives_both_commands_each_alone_in_its_block():
    commands = [block.strip() for block in blocks(ROOT / "README.md", "sh")]
    assert 'pip install ".[race]" && gradstep race' in commands
    assert 'pip install -e ".[test]" && pytest' in commands


def test_the_readme_sells_and_runs_within_its_first_forty_lines():
    start = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "gradstep race" in start
    assert "apply_gradients" in start


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_within_the_repository_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_pages_name_only_files_that_exist():
    for page in PAGES:
        for name in re.findall(r"(?:examples|benchmarks|tests)/[\w/]+\.py", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_public_name_has_a_docstring():
    missing = [name for name in gs.__all__ if not getattr(gs, name).__doc__]
    assert not missing


def test_every_optimizer_documents_its_formula_its_arguments_an_example_and_a_source():
    for name in gs.__all__:
        value = getattr(gs, name)
        if isinstance(value, type) and issubclass(value, gs.Optimizer) and hasattr(value, "rule"):
            for part in ("```", "Args:", "Raises:", "Example:", ">>>", "Source:"):
                assert part in value.__doc__, f"{name} lacks {part}"
            for argument in value.__signature__.parameters:
                assert f"        {argument}: " in value.__doc__, f"{name} does not describe {argument}"


def test_the_readme_has_no_placeholder_left():
    assert "BENCHMARK_TABLE" not in (ROOT / "README.md").read_text()
