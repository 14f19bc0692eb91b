"""Formats that cannot run here: one skip each, with the registry's reason, instead of one for every check."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("cases.subject", "cases.weight_checks", "cases.layer_checks")


@pytest.hookimpl(trylast=True)  # after -k and -m, so that only the libraries of selected cases are imported
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from cases.subject import Subject

    def unable(item: pytest.Item) -> bool:
        call = getattr(item, "callspec", None)
        subject = call.params.get("subject") if call else None
        if not isinstance(subject, Subject) or item.get_closest_marker("says_why"):
            return False
        try:
            return not subject.works
        except Exception:  # a case or a backend that is broken fails in its own tests
            return False

    dropped = [item for item in items if unable(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
