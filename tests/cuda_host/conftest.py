"""The tests here need a C++ compiler and the package's ops."""

from __future__ import annotations

import host_build
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if host_build.compiler() is None:
        for item in items:
            if item.path.parent.name == "cuda_host":
                item.add_marker(pytest.mark.skip(reason="there is no C++ compiler"))
