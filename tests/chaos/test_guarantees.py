"""docs/concepts/guarantees.md names tests that exist, and every scenario stands behind a promise."""

import pathlib
import re
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECTION = "## What shows it"


def text_of(folder, pattern):
    """All files of a folder, one behind the other."""
    return "\n".join(path.read_text() for path in sorted((ROOT / folder).rglob(pattern)))


class Guarantees(unittest.TestCase):
    """The table of promises and tests."""

    def test_named_tests_exist(self):
        table = (ROOT / "docs/concepts/guarantees.md").read_text().partition(SECTION)[2]
        rows = [line.split("|")[2:4] for line in table.splitlines() if line.startswith("| ")][1:]
        scenarios = set(re.findall(r"^async def (\w+)\(world\):$", text_of("tests/chaos/scenarios", "*.py"), re.M))
        others = "".join(text_of(f"crates/{crate}/tests/it", "*.rs") for crate in ["wsproxy", "wsproxy-proto"])
        others += text_of("tests/python", "test_*.py")
        named = set()
        for chaos, tests in rows:
            names = re.findall(r"`(\w+)`", chaos)
            named.update(names)
            self.assertLessEqual(set(names), scenarios)
            for name in re.findall(r"`(\w+)`", tests):
                self.assertRegex(others, rf"\b{name}\b")
        registered = set(re.findall(r"@scenario\(.*\)\nasync def (\w+)", text_of("tests/chaos/scenarios", "*.py")))
        self.assertEqual(registered - named, set())


if __name__ == "__main__":
    unittest.main()
