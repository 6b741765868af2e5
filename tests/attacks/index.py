"""What the index of the attacks names; tests/conftest.py marks these tests, test_index.py sees that they exist."""

import re
from pathlib import Path

INDEX = (Path(__file__).parent / "README.md").read_text()
# But for patterns and files: test_a13_*.py, test_a6_...
NAMED = frozenset(
    name for name in re.findall(r"\btest_[a-z0-9_]+\b(?![.*])", INDEX) if not re.fullmatch(r"test_a\d+_", name)
)
