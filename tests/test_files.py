"""Files and folders that replace others, and who holds a folder."""

import errno
import os

import pytest

from rdo.errors import UserError
from rdo.files import HOLDER, held, replace_folder


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


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    """A mere file instead of a lock would be held for ever by a machine that died."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match="its file system has no locks"), held(tmp_path, "python train.py"):
        pass
    assert not (tmp_path / HOLDER).exists()
