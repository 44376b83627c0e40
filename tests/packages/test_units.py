"""Units of systemd: systemd takes them, and the template for several instances differs only where it must."""

import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
# Settings that each instance has for itself, and those that all must share. `StateDirectory` holds an embedded database, which is for one.
ONLY_IN_TEMPLATE = {"Description=wsproxy, a WebSocket gateway (%i)", "Environment=WSPROXY_SERVER__REUSE_PORT=true",
                    "Environment=WSPROXY_ADMIN__PORT=909%i", "User=wsproxy"}
ONLY_IN_UNIT = {"Description=wsproxy, a WebSocket gateway", "StateDirectory=wsproxy", "StateDirectoryMode=0700"}


def settings(name: str) -> list[str]:
    lines = (FOLDER / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


class Units(unittest.TestCase):
    def test_template_differs_only_where_instances_must(self) -> None:
        unit, template = settings("wsproxy.service"), settings("wsproxy@.service")
        self.assertEqual(set(template) - set(unit), ONLY_IN_TEMPLATE)
        self.assertEqual(set(unit) - set(template), ONLY_IN_UNIT)
        common = [[line for line in lines if line not in ONLY_IN_TEMPLATE | ONLY_IN_UNIT] for lines in (unit, template)]
        self.assertEqual(*common)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "there is no systemd-analyze")
    def test_systemd_takes_the_units(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("wsproxy.service", "wsproxy@.service"):
                # The program is not installed here.
                text = (FOLDER / name).read_text().replace("/usr/local/bin/wsproxy", shutil.which("true"))
                (Path(folder) / name).write_text(text)
            for name in ("wsproxy.service", "wsproxy@1.service", "wsproxy@4.service"):
                command = ["systemd-analyze", "verify", "--man=no", f"{folder}/{name}"]
                checked = subprocess.run(command, capture_output=True, text=True)
                self.assertEqual((checked.returncode, checked.stderr), (0, ""), name)


if __name__ == "__main__":
    unittest.main()
