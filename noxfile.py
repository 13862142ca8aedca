"""The matrix of versions that the tests run in: ``nox``, or one of its rows.

    pip install nox
    nox --list
    nox -s 'matrix(oldest)' -- tests/test_search.py tests/test_levels.py

A row makes its own environment. A row whose interpreter is not on the ``PATH`` is skipped. torch
comes from the index that pip is set to; for builds without CUDA set
``PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu``.
"""

from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False

CONSTRAINTS = Path(__file__).parent / "constraints.txt"

#: What has other versions in a row than in constraints.txt, with what a torch and a transformers
#: ask for.
_OWN = ("torch", "setuptools", "transformers", "huggingface-hub", "tokenizers", "peft")

#: Row -> Python, and requirements. "oldest" has the oldest that pyproject.toml admits.
ROWS = {
    "oldest": ("3.10", "torch==2.11.0", "transformers==5.0.0", "peft==0.18.0"),
    "between": ("3.12", "torch==2.12.1", "transformers==5.10.2", "peft==0.19.1"),
    "newest-python": ("3.13", "torch==2.13.0", "transformers", "peft"),
    "newer-torch": ("3.11", "torch==2.14.1", "transformers", "peft"),
    "newest": ("3.13", "torch==2.15.0", "transformers", "peft"),
}


@nox.session
@nox.parametrize(
    "python,requirements",
    [nox.param(python, wanted, id=row) for row, (python, *wanted) in ROWS.items()],
)
def matrix(session: nox.Session, requirements: list[str]) -> None:
    """Run the tests, or what is given after ``--``, with the versions of a row."""
    pins = Path(session.create_tmp(), "constraints.txt")
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins.write_text("\n".join(x for x in lines if x.partition("==")[0] not in _OWN) + "\n")
    session.install("-q", "-c", str(pins), *requirements, "-e", ".[test]")
    session.run("python", "-m", "pip", "list", silent=False)
    session.run("python", "-m", "pytest", *session.posargs)
