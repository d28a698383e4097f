"""What `import datadist` loads, and what it costs beside its dependencies."""

from __future__ import annotations

import subprocess
import sys


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_no_plugin_and_no_vendor_library_is_imported() -> None:
    code = "import sys, datadist; print([m for m in sys.modules if m.startswith({})])"
    loaded = _run(code.format("('datadist_', 'torch', 'stevedore')"))
    assert loaded == "[]"


def test_the_dependencies_are_loaded_by_init_only() -> None:
    """So that the import costs less than that of the dependencies by themselves."""
    code = "import sys, datadist; print([m for m in ('numpy', 'pydantic') if m in sys.modules])"
    assert _run(code) == "[]"


def test_the_environment_variable_of_upstream_is_set_unless_it_is() -> None:
    code = "import os, datadist; print(os.environ['AUTO_USE_UC_MEMORY'])"
    assert _run(code) == "0"
    assert _run("import os; os.environ['AUTO_USE_UC_MEMORY'] = '1'; " + code) == "1"
