"""Tables of tokens: the bundled vocabulary's, made once."""

from __future__ import annotations

import pytest

from mlx_mixtral.constraints.compiler import Compiler
from mlx_mixtral.constraints.token_table import TokenTable
from mlx_mixtral.demo import checkpoint_path
from mlx_mixtral.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(checkpoint_path())


@pytest.fixture(scope="session")
def table(tokenizer: Tokenizer) -> TokenTable:
    return TokenTable(tokenizer)


@pytest.fixture(scope="session")
def compiler(table: TokenTable) -> Compiler:
    return Compiler(table)
