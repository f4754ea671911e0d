"""No test can hang the suite: every process that a test starts has a limit of its own."""

import ast
from collections.abc import Iterator

from helpers import ROOT

# Of the checkpoint writer and of threading.Event, not of processes.
OTHER_WAITS = ("writer.wait", "all_done.wait", "may_write.wait")


def unlimited_calls(source: str) -> Iterator[str]:
    """Calls that wait for a process without a time limit."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, attribute = ast.unparse(node.func), node.func.attr
        limited = any(keyword.arg == "timeout" for keyword in node.keywords)
        if name in ("subprocess.run", "subprocess.check_output", "subprocess.check_call"):
            waits = True
        else:
            waits = attribute in ("communicate", "wait") and not name.endswith(OTHER_WAITS) and not node.args
        if waits and not limited:
            yield f"line {node.lineno}: {name}"


def test_every_process_in_the_tests_has_a_time_limit() -> None:
    found = {
        path.relative_to(ROOT): list(unlimited_calls(path.read_text(encoding="utf-8")))
        for path in (ROOT / "tests").rglob("*.py")
    }
    assert {path: calls for path, calls in found.items() if calls} == {}
    assert list(unlimited_calls("subprocess.run(x)\nprocess.wait()\na.b.communicate(timeout=2)")) != []
