"""Medians, ratios and verdicts of the results' page. Run with `python3 -m unittest discover bench`."""

import unittest

import tables


class Tables(unittest.TestCase):
    def test_median_ignores_runs_without_a_result(self):
        self.assertEqual(tables.median([3, None, 1, 2]), 2)
        self.assertIsNone(tables.median([None]))

    def test_verdict_follows_the_direction_of_the_figure(self):
        low = {"bar": 2048, "aim": 1280}
        self.assertEqual(tables.verdict(1000, low), "aim reached")
        self.assertEqual(tables.verdict(2048, low), "bar reached")
        self.assertEqual(tables.verdict(2049, low), "**missed**")
        high = {"bar": 5000, "aim": 10000, "higher_is_better": True}
        self.assertEqual(tables.verdict(4999, high), "**missed**")
        self.assertEqual(tables.verdict(10000, high), "aim reached")
        self.assertEqual(tables.verdict(1, {}), "")

    def test_peers_are_related_to_the_gateway(self):
        figure = {"title": "cpu", "unit": "us", "values": {"wsproxy": [2.0, 4.0], "node": [6.0]}, "marks": {}}
        text = tables.peers_table({"servers": ["wsproxy", "node"], "figures": [figure]})
        self.assertIn("| cpu | 3 us | 6 us (2.00x) |", text)

    def test_figures_show_the_spread_of_runs(self):
        figure = {"title": "p99", "unit": "ms", "values": [1.5, 2.5, 1.75], "bar": 5, "aim": 2}
        figure["of"] = "resume"
        text = tables.figures_table({"figures": [figure]}, "history")
        self.assertIn("| p99 | 1.75 ms (1.5 to 2.5) |  | <= 5 | <= 2 | aim reached | `bench/run history --only resume` |", text)

    def test_tunnels_are_judged_beside_their_peers(self):
        one = {"title": "small", "unit": "us", "of": "t", "bar": 1, "over": "hyper", "all": {"wsproxy": [3.0], "hyper": [4.0]}}
        two = {"title": "long", "unit": "s", "of": "t", "bar": 1.5, "above": "hyper", "all": {"wsproxy": [4.0], "hyper": [2.0]}}
        text = tables.tunnel_table({"figures": [one, two]})
        self.assertIn("| small | 3 us | 4 us | <= 1x two hyper proxies: 0.75x | bar reached | `--only t` |", text)
        self.assertIn("| long | 4 s | 2 s | <= 1.5 s above two hyper proxies: 2 | **missed** | `--only t` |", text)


if __name__ == "__main__":
    unittest.main()
