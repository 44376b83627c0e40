"""The test suite of `requests`, whose server is behind the tunnel: each test ends as it does without one."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, Process, until
from tunnel import HERE, Tunnel

VERSION = "2.34.2"
# They ask no server, or one of their own.
ELSEWHERE = ["TestTimeout::test_connect_timeout", "TestTimeout::test_total_timeout_connect", "TestPreparingURLs"]


@pytest.fixture(scope="module")
def suite():
    """The suite as its authors publish it, with the package's source."""
    folder = ROOT / f"target/requests-{VERSION}"
    if not folder.exists():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        archive = ROOT / f"target/requests-{VERSION}.tar.gz"
        subprocess.run([*download, "--dest", str(archive.parent), f"requests=={VERSION}"], check=True)
        subprocess.run(["tar", "xf", archive, "-C", archive.parent], check=True)
    return folder


def outcomes(suite, folder, url):
    """Runs the suite against a server, and returns how each of its tests ended, and what it printed."""
    report = folder / f"report-{len(url)}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "through_tunnel", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    command += [f"--junitxml={report}", "--timeout=60", "-k", " and ".join(f"not {name.rpartition(':')[2]}" for name in ELSEWHERE)]
    env = {"URL": url, "PYTHONPATH": f"{HERE}:{suite}/src", "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*command, "tests/test_requests.py"], cwd=suite, env=env, capture_output=True, text=True)
    assert report.exists(), done.stdout + done.stderr
    cases = ElementTree.parse(report).iter("testcase")
    ends = {f"{case.get('classname')}.{case.get('name')}": [child.tag for child in case if child.tag != "system-out"] for case in cases}
    return ends, done.stdout


def test_the_suite_of_requests_passes_as_it_does_directly(suite, tmp_path, redis):
    server = Process("httpbin", [sys.executable, str(HERE / "cluster/httpbin_behind.py")], tmp_path)
    url = until("httpbin", lambda: next((line for line in server.output().splitlines() if line.startswith("http")), None))
    settings = 'client_auth = "none"\npass_authorization = true\npass_cookies = true'
    tunnel = Tunnel(tmp_path, redis.url, url, None, config=settings)
    try:
        with ThreadPoolExecutor() as pool:
            runs = [pool.submit(outcomes, suite, tmp_path, server_url) for server_url in (url, tunnel.url)]
            (directly, _), (through, output) = [run.result() for run in runs]
    finally:
        tunnel.stop()
        server.stop()
    assert len(directly) > 250
    assert [name for name, end in directly.items() if "failure" in end or "error" in end] == []
    assert through == directly, output
