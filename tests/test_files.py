"""What replaces a file or folder is as readable as the umask says, whatever a library asked for."""

import os

import pytest

from rdo.files import replace_folder


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_a_folder_have_the_mode_that_the_umask_grants(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with replace_folder(tmp_path / "model") as folder:
            (folder / "inner").mkdir()
            for file in (folder / "model.safetensors", folder / "inner" / "more"):
                file.touch(0o600)
    finally:
        os.umask(before)
    for file in ("model.safetensors", "inner/more"):
        assert (tmp_path / "model" / file).stat().st_mode & 0o777 == mode
