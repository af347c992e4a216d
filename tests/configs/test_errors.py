"""What the system's own errors become for a person."""

from pathlib import Path

import pytest

from configs.errors import sentence


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_a_folder_is_to_be(tmp_path: Path, below: str) -> None:
    """That the path exists is what is wrong: "give a path that exists" would lead nowhere."""
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match="taken") as caught:
        (tmp_path / "taken" / below).mkdir(parents=True)
    assert sentence(caught.value).endswith("; a folder is made there, so give a path where no file is in the way")
