"""Network tests are skipped, with the reason, where no namespaces can be made."""

from __future__ import annotations

import pytest
from namespaces import reason_to_skip


@pytest.fixture(autouse=True, scope="session")
def hosts_can_be_made() -> None:
    """Skip all where they cannot."""
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
