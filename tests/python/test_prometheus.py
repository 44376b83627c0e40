"""docs/reference/metrics.md and deploy/prometheus with a real Prometheus: every expression has a value, and every alert can fire."""

import json
import re
import shutil
import subprocess

import httpx
import pytest
from conftest import ROOT, Process, free_port, until

RULES = ROOT / "deploy/prometheus/wsproxy.rules.yml"
DOCS = (ROOT / "docs/reference/metrics.md").read_text()
WATCHED = DOCS.split("## What to watch")[1].split("\n## ")[0]
ROWS = [row for row in WATCHED.splitlines() if row.startswith("| ") and not row.startswith("| question")]
EXPRESSIONS = [expression for row in ROWS for expression in re.findall(r"`([^`]+)`", row.split(" | ")[1])]
ALERTS = re.findall(r"alert: (\w+)", RULES.read_text())
FAMILIES = {"WSPROXY_ENDPOINTS__EVENTS": "true", "WSPROXY_ENDPOINTS__AGENTS": "true", "SECRET_KEY": "a-secret-of-the-tests-with-more-than-32-bytes"}


def start_whole(start_gateway):
    """Starts an instance with all families, and waits for its database."""
    gateway = start_gateway(**FAMILIES)
    until("the database", lambda: "wsproxy_database_up 1" in httpx.get(f"{gateway.http}/metrics").text)
    return gateway


def program(name):
    found = shutil.which(name)
    assert found, f"{name} is missing: apt-get install prometheus"
    return found


class Prometheus:
    def __init__(self, folder, target, rules):
        self.http = f"http://127.0.0.1:{free_port()}"
        config = folder / "prometheus.json"
        config.write_text(
            json.dumps(
                {
                    # A scrape may take as long as the interval: one that a busy machine delays is no outage.
                    "global": {"scrape_interval": "2s", "evaluation_interval": "500ms"},
                    "rule_files": [str(rules)],
                    "scrape_configs": [{"job_name": "wsproxy", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
                }
            )
        )
        command = [program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        command.append(f"--web.listen-address={self.http.removeprefix('http://')}")
        self.process = Process("prometheus", command, folder)
        self.process.ready("prometheus", lambda: httpx.get(f"{self.http}/-/ready").status_code == 200)

    def query(self, expression):
        answer = httpx.get(f"{self.http}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def firing(self):
        alerts = httpx.get(f"{self.http}/api/v1/alerts").json()["data"]["alerts"]
        return [alert["labels"] for alert in alerts if alert["state"] == "firing"]


@pytest.fixture
def start_prometheus(tmp_path):
    started = []

    def start(target):
        # Alerts that wait for minutes in operation need not wait here.
        rules = tmp_path / "wsproxy.rules.yml"
        rules.write_text(re.sub(r"for: \w+", "for: 0s", RULES.read_text()))
        started.append(Prometheus(tmp_path, target, rules))
        return started[-1]

    yield start
    for prometheus in started:
        prometheus.process.stop()


def test_the_documentation_names_every_alert():
    assert len(EXPRESSIONS) >= len(ROWS) >= 10
    assert sorted(re.findall(r"`(Wsproxy\w+)`", WATCHED)) == sorted(ALERTS)


def test_every_documented_expression_has_a_value_and_an_outage_fires(start_gateway, start_prometheus, redis):
    gateway = start_whole(start_gateway)
    prometheus = start_prometheus(gateway.port)
    until("two scrapes", lambda: prometheus.query('count_over_time(up{job="wsproxy"}[5m]) > 2'))
    assert prometheus.query("up")[0]["value"][1] == "1", "the samples can be read"
    missing = [expression for expression in EXPRESSIONS if not prometheus.query(expression)]
    assert missing == []
    assert prometheus.firing() == []

    redis.kill()
    refused = httpx.get(f"{gateway.http}/demo/ws/s-1", headers={"Accept": "text/event-stream", "Authorization": "Bearer x"}, timeout=20)
    assert refused.status_code == 503, refused.text

    def names():
        return {alert["alertname"] for alert in prometheus.firing()}

    until("the alerts", lambda: {"WsproxyBusAway", "WsproxyHandshakesFail"} <= names())
    # The very first refusal of this kind is seen.
    outcomes = [alert["outcome"] for alert in prometheus.firing() if alert["alertname"] == "WsproxyHandshakesFail"]
    assert outcomes == ["bus_unavailable"]
    redis.start()
    until("the end of the outage", lambda: "WsproxyBusAway" not in names())


def test_every_alert_fires_on_the_series_of_an_instance(start_gateway, tmp_path):
    """promtool plays the series that an instance serves: at rest nothing fires, and after one change exactly one alert does."""
    gateway = start_whole(start_gateway)
    samples = httpx.get(f"{gateway.http}/metrics", headers={"Accept": "application/json"}).json()["metrics"]
    assert sorted(CHANGES) == sorted(ALERTS)
    tests = [play(samples, None, {})] + [play(samples, alert, change) for alert, change in CHANGES.items()]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "15s", "tests": tests}))
    promtool("test", "rules", str(plan))


def test_rules_and_both_text_formats_are_well_formed(start_gateway):
    gateway = start_whole(start_gateway)
    promtool("check", "rules", str(RULES))
    text = httpx.get(f"{gateway.http}/metrics", headers={"Accept": "text/plain; version=0.0.4"})
    assert text.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    promtool("check", "metrics", stdin=text.text)
    open_metrics = httpx.get(f"{gateway.http}/metrics")
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")


def promtool(*arguments, stdin=""):
    done = subprocess.run([program("promtool"), *arguments], input=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


# Samples are 15 s apart, and what happens begins after ten minutes.
REST, AFTER = 40, 160
ONCE = f"0+0x{REST} 1+0x{AFTER}"
OFTEN = f"0+0x{REST} 0+20x{AFTER}"


def gauge(before, after):
    return f"{before}+0x{REST} {after}+0x{AFTER}"


# By alert: a series, with some of its labels, and its values.
CHANGES = {
    "WsproxyDown": [("up", {}, gauge(1, 0))],
    "WsproxyBusAway": [("wsproxy_bus_connected", {}, gauge(1, 0))],
    "WsproxyBusRefusesWrites": [("wsproxy_bus_writable", {}, gauge(1, 0))],
    "WsproxyBusPartAway": [("wsproxy_bus_whole", {}, gauge(1, 0))],
    "WsproxyHandshakesFail": [("wsproxy_handshakes_total", {"endpoint": "events", "outcome": "internal"}, ONCE)],
    "WsproxyNearlyFull": [
        ("wsproxy_connections_max", {}, gauge(100, 100)),
        ("wsproxy_active_connections", {"endpoint": "sessions"}, gauge(10, 50)),
        ("wsproxy_active_connections", {"endpoint": "events"}, gauge(10, 42)),
    ],
    "WsproxySlow": [
        ("wsproxy_message_latency_seconds_bucket", {"endpoint": "events", "le": le}, OFTEN)
        for le in ["0.1", "0.25", "0.5", "1.0", "2.5", "10.0", "+Inf"]
    ],
    "WsproxyMessagesUnheard": [
        ("wsproxy_messages_unheard_total", {"endpoint": "events"}, OFTEN),
        ("wsproxy_messages_received_total", {"endpoint": "events"}, OFTEN),
    ],
    "WsproxyMessagesLost": [("wsproxy_message_errors_total", {"endpoint": "events", "kind": "lost"}, ONCE)],
    "WsproxyHistoryLost": [("wsproxy_history_lost_total", {"reason": "trimmed"}, OFTEN)],
    "WsproxyInternalErrors": [("wsproxy_disconnects_total", {"endpoint": "sessions", "reason": "internal"}, ONCE)],
    "WsproxyIssuerAway": [("wsproxy_jwks_fetch_failures_total", {}, OFTEN)],
    "WsproxyLinksFlap": [("wsproxy_bus_links_lost_total", {}, OFTEN)],
    "WsproxyDatabaseAway": [("wsproxy_database_up", {}, gauge(1, 0))],
    "WsproxyDatabaseTakesNoWrites": [("wsproxy_database_writable", {}, gauge(1, 0))],
    "WsproxyAgentAnswersLost": [("wsproxy_agent_answers_lost_total", {}, ONCE)],
    "WsproxyAgentsFlap": [("wsproxy_agent_replaced_total", {"where": "flapping"}, OFTEN)],
    "WsproxyTunnelReaderStalls": [("wsproxy_tunnel_reader_stalls_total", {}, ONCE)],
    "WsproxyAuditIncomplete": [("wsproxy_audit_rows_total", {"outcome": "dropped"}, ONCE)],
    "WsproxyLogIncomplete": [("wsproxy_log_lines_dropped_total", {}, ONCE)],
}


def play(samples, alert, change):
    """A test of promtool in which `change` happens to an instance with these samples."""
    series = {"up": ({}, f"1+0x{REST + AFTER + 1}")}
    for sample in samples:
        series[spell(sample["name"], sample["labels"])] = (sample["labels"], f"{sample['value']}+0x{REST + AFTER + 1}")
    for name, labels, values in change:
        spelled = spell(name, labels)
        assert spelled in series, f"{spelled} is no series of an instance that has just started"
        series[spelled] = (labels, values)
    spelled = [{"series": spell(key.split("{")[0], labels | {"job": "wsproxy", "instance": "one"}), "values": values}
               for key, (labels, values) in series.items()]
    fires = f'clamp_max(count(ALERTS{{alertstate="firing",alertname="{alert}"}}), 1)'
    others = f'count(ALERTS{{alertstate="firing",alertname!="{alert}"}})'
    checks = [{"expr": others, "eval_time": time, "exp_samples": []} for time in ["9m", "16m", "24m"]]
    checks.append({"expr": fires, "eval_time": "9m", "exp_samples": []})
    if alert:
        # Conditions that have to last do so by then; single events are still within their windows.
        time = "24m" if any(values == OFTEN for _, _, values in change) else "13m"
        checks.append({"expr": fires, "eval_time": time, "exp_samples": [{"labels": "{}", "value": 1}]})
    return {"interval": "15s", "input_series": spelled, "promql_expr_test": checks}


def spell(name, labels):
    pairs = ",".join(f'{key}="{labels[key]}"' for key in sorted(labels))
    return f"{name}{{{pairs}}}" if pairs else name
