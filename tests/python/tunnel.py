"""A cluster behind the gateway: an imitation of a Kubernetes API server, or any upstream, with an agent beside it."""

import hashlib
import json
import os
import subprocess
import sys

import httpx
from conftest import ROOT, Gateway, Process, free_port

HERE = ROOT / "tests/python"
CLIENT, AGENT, UPSTREAM = "client-token-for-tests", "agent-token-for-tests", "upstream-token-for-tests"
PROXY = "/clusters/c1/proxy"


def digest(token):
    return hashlib.sha256(token.encode()).hexdigest()


class ApiServer:
    """The imitation in `cluster/apiserver.py`, over TLS."""

    def __init__(self, folder, certificate):
        self.url = f"https://127.0.0.1:{free_port()}"
        command = [sys.executable, str(HERE / "cluster/apiserver.py"), self.url.rpartition(":")[2]]
        env = {"TOKEN": UPSTREAM, "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = Process("apiserver", [*command, str(certificate.cert), str(certificate.key)], folder, env)
        headers = {"Authorization": f"Bearer {UPSTREAM}"}
        self.process.ready("API server", lambda: httpx.get(f"{self.url}/healthz", verify=certificate.context, headers=headers))


class Tunnel:
    """A gateway, over TLS where there is a certificate, and an agent of the cluster `c1`. `dial`: the port that the agent dials."""

    def __init__(self, folder, redis_url, upstream, certificate, *, config="", agent=(), port=None, dial=None, **settings):
        self.folder, self.certificate = folder, certificate
        self.gateway = TunnelGateway(folder, redis_url, self.write("tunnel", config), certificate, port, **settings)
        self.url = f"{self.gateway.http}{PROXY}"
        (folder / "agent-token").write_text(AGENT)
        (folder / "upstream-token").write_text(UPSTREAM)
        self.upstream = upstream
        self.agent = self.start_agent("agent", *agent, port=dial)
        try:
            self.ready(self.agent)
        except BaseException:
            self.stop()
            raise

    def start_agent(self, name, *arguments, port=None, command=()):
        """Starts an agent of the cluster that dials the instance, or a port of this machine. `command` begins its command."""
        gateway = f"ws://127.0.0.1:{port}" if port else self.gateway.ws
        command = [*command, self.gateway.command[0], "agent", "--gateway", gateway, "--cluster", "c1", "--upstream", self.upstream]
        command += ["--token-file", str(self.folder / "agent-token")]
        command += ["--ca-file", str(self.certificate.cert)] if self.certificate else []
        if self.upstream.startswith("https"):
            upstream_token = str(self.folder / "upstream-token")
            command += ["--upstream-ca", str(self.certificate.cert), "--upstream-token-file", upstream_token]
        return Process(name, [*command, *arguments], self.folder)

    def ready(self, agent, gateway=None):
        """Waits until an instance has a lane of the cluster, or the way to one."""
        gateway = gateway or self.gateway
        headers = {"Authorization": f"Bearer {CLIENT}"}
        url = f"{gateway.http}{PROXY}/healthz"
        # A cluster without an agent answers too: 503.
        agent.ready("the agent's lane", lambda: httpx.get(url, verify=gateway.verify, headers=headers).status_code < 500)

    def write(self, name, config):
        """Writes the configuration of an instance, and returns its path."""
        lines = ["[server]", 'bind = "127.0.0.1"', "[endpoints]", "tunnel = true", "[tunnel]", config]
        lines.append(f'agents = [{{ cluster = "c1", token_sha256 = "{digest(AGENT)}" }}]')
        if "client_auth" not in config:
            lines.append(f'clients = [{{ token_sha256 = "{digest(CLIENT)}", clusters = ["c1", "c2"] }}]')
        if self.certificate:
            lines += ["[tls]", f'certificate = "{self.certificate.cert}"', f'key = "{self.certificate.key}"']
        path = self.folder / f"{name}.toml"
        path.write_text("\n".join(lines))
        return path

    def stop(self):
        self.agent.stop()
        self.gateway.process.stop()

    def kubeconfig(self):
        """Writes the configuration of kubectl, and returns its path."""
        cluster = {"server": self.url, "certificate-authority": str(self.certificate.cert)}
        value = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c1", "cluster": cluster}],
            "users": [{"name": "user", "user": {"token": CLIENT}}],
            "contexts": [{"name": "c1", "context": {"cluster": "c1", "user": "user"}}],
            "current-context": "c1",
        }
        path = self.folder / "kubeconfig"
        path.write_text(json.dumps(value))
        return path


def peer():
    """Returns the lines with which an instance is reached by others."""
    return f'peer_bind = "127.0.0.1:{free_port()}"\npeer_secret = "a-secret-of-instances-with-32-bytes"\n'


class TunnelGateway(Gateway):
    """An instance with the configuration of a file."""

    def __init__(self, folder, redis_url, file, certificate, port=None, **settings):
        self.verify = certificate.context if certificate else True
        super().__init__(folder, redis_url, port=port, WSPROXY_CONFIG=str(file), **settings)
        if certificate:
            self.http, self.ws = self.http.replace("http:", "https:"), self.ws.replace("ws:", "wss:")

    def is_ready(self):
        scheme = "http" if self.verify is True else "https"
        return httpx.get(f"{scheme}://127.0.0.1:{self.port}/ready", verify=self.verify).status_code == 200


class Kubectl:
    """One version of kubectl, for the cluster behind the gateway."""

    def __init__(self, program, tunnel):
        self.program = program
        self.env = {"PATH": os.environ["PATH"], "HOME": str(tunnel.folder), "KUBECONFIG": str(tunnel.kubeconfig())}
        self.folder = tunnel.folder

    def __call__(self, *arguments, code=0, **options):
        """Runs a command to its end, and returns what it printed."""
        command = [self.program, *arguments]
        done = subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, timeout=60, **options)
        assert done.returncode == code, f"{arguments}: {done.returncode}: {done.stderr.decode()}"
        return done.stdout if code == 0 else done.stderr

    def start(self, name, *arguments):
        """Starts a command that goes on."""
        return Process(name, [self.program, *arguments], self.folder, self.env)


def debian_kubectl():
    """Returns Debian's kubectl, which speaks SPDY. It is taken out of its package: another kubectl may be installed."""
    folder = ROOT / "target/kubectl-debian"
    program = folder / "usr/bin/kubectl"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        get = ["apt-get", "-o", "APT::Sandbox::User=root", "download", "-qq", "kubernetes-client"]
        if subprocess.run(get, cwd=folder, check=False, capture_output=True).returncode:
            # The lists of packages may be missing or old.
            subprocess.run(["apt-get", "update", "-qq"], check=False, capture_output=True)
            subprocess.run(get, cwd=folder, check=True, capture_output=True)
        [package] = folder.glob("kubernetes-client_*.deb")
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        package.unlink()
    return str(program)


def pypi_kubectl():
    """Returns the kubectl of PyPI, which speaks WebSocket."""
    return str(ROOT / "target/venv/bin/kubectl")
