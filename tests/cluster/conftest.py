"""Fixtures for tests that need several machines."""

import pytest

from tests.cluster.nodes import cluster


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Yield two nodes and a control host; see tests/cluster/nodes.py."""
    with cluster(tmp_path_factory.mktemp("nodes")) as hosts:
        yield hosts
