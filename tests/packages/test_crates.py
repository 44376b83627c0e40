"""Every crate is either ready to be published or says that it is not to be."""

import json
import subprocess
import unittest
from pathlib import Path

ROOT = Path(__file__).parents[2]
LICENSES = ("LICENSE-MIT", "LICENSE-APACHE")


def cargo(*arguments: str) -> str:
    return subprocess.run(["cargo", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def crates() -> list[dict]:
    return json.loads(cargo("metadata", "--no-deps", "--format-version=1", "--locked"))["packages"]


class Crates(unittest.TestCase):
    def test_every_crate_has_description_and_license(self) -> None:
        for crate in crates():
            with self.subTest(crate["name"]):
                self.assertEqual(crate["license"], "MIT OR Apache-2.0")
                self.assertTrue(crate["description"])

    def test_published_crates_have_all_that_a_registry_shows(self) -> None:
        published = [crate for crate in crates() if crate["publish"] is None]
        self.assertTrue(published)
        for crate in published:
            with self.subTest(crate["name"]):
                self.assertTrue(crate["keywords"] and crate["categories"])
                files = cargo("package", "--list", "--allow-dirty", "--quiet", "-p", crate["name"]).split("\n")
                for needed in ("Cargo.toml", "README.md", "src/lib.rs", *LICENSES):
                    self.assertIn(needed, files)
                folder = Path(crate["manifest_path"]).parent
                for license_file in LICENSES:
                    self.assertEqual((folder / license_file).read_bytes(), (ROOT / license_file).read_bytes())

    def test_published_crates_depend_on_published_versions(self) -> None:
        versions = {crate["name"]: crate["version"] for crate in crates() if crate["publish"] is None}
        for crate in crates():
            for dependency in crate["dependencies"]:
                if crate["publish"] is None and dependency.get("path"):
                    with self.subTest(f"{crate['name']} -> {dependency['name']}"):
                        self.assertEqual(dependency["req"], f"^{versions[dependency['name']]}")


if __name__ == "__main__":
    unittest.main()
