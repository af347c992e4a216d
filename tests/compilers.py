"""Where torch.compile can run."""

import pytest

from parallel.compiled import refuse_compile


def compiler_there() -> bool:
    try:
        refuse_compile("cpu")
    except ValueError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not compiler_there(), reason="torch.compile needs a C++ compiler")
