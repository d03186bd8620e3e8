"""What the tests of single pieces share."""

from __future__ import annotations

import pytest


@pytest.fixture
def said(capfdbinary):
    """A function that runs a tool in this process: (exit code, standard output, error)."""

    def call(tool, *words: str) -> tuple[int, str, str]:
        code = tool.main(list(words))
        found = capfdbinary.readouterr()
        return code, found.out.decode(), found.err.decode()

    return call
