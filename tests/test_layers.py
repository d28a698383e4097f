"""The check of layers finds what it is there for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import layers


@pytest.mark.parametrize("package", layers.PACKAGES)
def test_no_import_points_upwards_and_there_is_no_circle(package: str) -> None:
    found = layers.imports(layers.modules(package, layers.PACKAGES[package]))
    assert found
    assert layers.circles(found) == []
    if package == "datadist":
        assert layers.upward(found) == []
        assert {layers.layer(module) for module in found} == set(layers.LAYERS)


@pytest.mark.parametrize(
    "text",
    [
        "from datadist.engine import engine",
        "from datadist.engine.engine import Engine",
        "import datadist.engine.engine",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from datadist.engine import engine",
        "def call():\n    from datadist.engine.engine import Engine",
        'importlib.import_module("datadist.engine.engine")',
    ],
)
def test_every_way_to_import_is_seen(tmp_path: Path, text: str) -> None:
    for name, content in (
        ("caches/pool", text),
        ("engine/engine", "from datadist.caches import pool"),
    ):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir()
        path.write_text(content)
    found = layers.imports(layers.modules("datadist", tmp_path))
    assert found["datadist.caches.pool"] == {"datadist.engine.engine"}
    assert layers.upward(found) == [
        "datadist.caches.pool (caches) imports datadist.engine.engine (engine)"
    ]
    (circle,) = layers.circles(found)
    assert "datadist.caches.pool" in circle
