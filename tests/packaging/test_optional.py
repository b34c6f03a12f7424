"""A missing package skips a test only with ENV=current, never elsewhere."""

import optional
import pytest


@pytest.mark.parametrize("look", [optional.module, optional.require])
def test_a_missing_package(monkeypatch, look):
    monkeypatch.delenv("OE_EXT_TEST_MISSING", raising=False)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        look("no_such_package")
    monkeypatch.setenv("OE_EXT_TEST_MISSING", "skip")
    with pytest.raises(pytest.skip.Exception, match="no_such_package is not installed"):
        look("no_such_package")


def test_what_an_optional_package_lacks_is_an_error(monkeypatch, tmp_path):
    """The package is installed, but broken."""
    (tmp_path / "half_a_package.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OE_EXT_TEST_MISSING", "skip")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        optional.module("half_a_package")
