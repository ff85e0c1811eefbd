"""The table of faults: one line for each, and what was seen in words."""

from types import SimpleNamespace

from fault_matrix import matrix


def report(row, longrepr=None):
    return SimpleNamespace(user_properties=[("fault", row)], longrepr=longrepr)


def test_a_line_says_what_was_seen():
    crash = SimpleNamespace(reprcrash=SimpleNamespace(message="AssertionError: a\nb"))
    stats = {
        "passed": [report(["judge: hangs", "a|b", "told"])] * 2 + [SimpleNamespace(user_properties=[])],
        "failed": [report(["judge: hangs", "a|b", "told"], crash)],
        "skipped": [report(["image: torn", "cut", "set aside"], ("file.py", 3, "Skipped: no PIL"))],
        "warnings": [SimpleNamespace()],
    }
    assert matrix(stats).splitlines() == [
        "| fault | injected how | expected | seen |",
        "| --- | --- | --- | --- |",
        "| image: torn | cut | set aside | skipped: no PIL |",
        r"| judge: hangs | a\|b | told | failed: AssertionError: a (1 of 3); passed (2 of 3) |",
    ]
