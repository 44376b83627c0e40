"""The samples in deploy/, run with the real programs: only addresses, folders and the certificate are the test's own."""

import resource
import shutil
import socket
import ssl
import subprocess

from processes import ROOT, Process, free_port

# The gateway trusts 127.0.0.1, where the proxies run; clients come from another address of this machine.
CLIENT = "127.0.0.2"
ACCEPT = ("Accept", "text/event-stream")


def program(name):
    # Debian puts servers where the path of an ordinary user does not lead.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
    assert found, f"{name} is missing: apt-get install {name}"
    return found


class Certificate:
    """A certificate for localhost that vouches for itself, as files of every form that a program wants."""

    def __init__(self, folder, *extensions):
        self.cert, self.key, self.both = (folder / name for name in ["fullchain.pem", "privkey.pem", "wsproxy.pem"])
        command = [program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        command += ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        command += [word for extension in extensions for word in ("-addext", extension)]
        subprocess.run([*command, "-keyout", self.key, "-out", self.cert], check=True, capture_output=True)
        self.both.write_text(self.cert.read_text() + self.key.read_text())
        self.context = ssl.create_default_context(cafile=self.cert)


def replace(path, pairs):
    text = (ROOT / "deploy" / path).read_text()
    for old, new in pairs:
        assert old in text, f"{path} has no more: {old}"
        text = text.replace(old, new)
    return text


def nginx(folder, ports, upstreams, certificate):
    servers = [f"    server {upstream} max_fails=0;\n" for upstream in upstreams]
    conf = replace(
        "nginx/wsproxy.conf",
        [
            ("    server 127.0.0.1:8080 max_fails=0;\n    # server 127.0.0.1:8081 max_fails=0;\n", "".join(servers)),
            ("listen 80;", f"listen 127.0.0.1:{ports[0]};"),
            ("listen 443 ssl http2;", f"listen 127.0.0.1:{ports[1]} ssl http2;"),
            ("/etc/ssl/wsproxy", str(certificate.cert.parent)),
            ("/var/log/nginx", str(folder)),
        ],
    )
    (folder / "wsproxy.conf").write_text(conf)
    # Files for bodies would be beside those of the system's nginx.
    own = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"])
    main = replace(
        "nginx/nginx.conf",
        [
            ("/var/log/nginx", str(folder)),
            ("/run/nginx.pid", f"{folder}/nginx.pid"),
            ("include /etc/nginx/modules-enabled/*.conf;", ""),
            ("include /etc/nginx/mime.types;", own),
            ("/etc/nginx/conf.d", str(folder)),
        ],
    )
    (folder / "nginx").write_text(main)
    # One process, so that it ends with the test.
    return [program("nginx"), "-p", str(folder), "-c", str(folder / "nginx"), "-g", "daemon off; master_process off;"]


def haproxy(folder, ports, upstreams, certificate):
    servers = "".join(f"    server number-{at} {upstream.replace('unix:', 'unix@')}\n" for at, upstream in enumerate(upstreams))
    pairs = [
        ("    server one 127.0.0.1:8080\n    # server two 127.0.0.1:8081\n", servers),
        ("bind :80\n", f"bind 127.0.0.1:{ports[0]}\n"),
        ("bind :443 ", f"bind 127.0.0.1:{ports[1]} "),
        ("/etc/haproxy/wsproxy.pem", str(certificate.both)),
    ]
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 210_000:
        # Only who may raise the limit of descriptors gets them; in a container root may not.
        pairs.append(("maxconn 100000", "maxconn 5000"))
    (folder / "haproxy.cfg").write_text(replace("haproxy/haproxy.cfg", pairs))
    return [program("haproxy"), "-f", str(folder / "haproxy.cfg"), "-db"]


def haproxy_tcp(folder, ports, upstreams, certificate):
    servers = "".join(f"    server number-{at} {upstream.replace('unix:', 'unix@')}\n" for at, upstream in enumerate(upstreams))
    pairs = [
        ("    server one 127.0.0.1:8080\n    # server two 127.0.0.1:8081\n", servers),
        ("bind :443 ssl", f"bind 127.0.0.1:{ports[1]} ssl"),
        ("/etc/haproxy/wsproxy.pem", str(certificate.both)),
    ]
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 210_000:
        pairs.append(("maxconn 100000", "maxconn 5000"))
    (folder / "haproxy.cfg").write_text(replace("haproxy/haproxy-tcp.cfg", pairs))
    return [program("haproxy"), "-f", str(folder / "haproxy.cfg"), "-db"]


def haproxy_tcp_1(folder, ports, upstreams, certificate):
    """The same with version 1 of the header."""
    command = haproxy_tcp(folder, ports, upstreams, certificate)
    text = (folder / "haproxy.cfg").read_text()
    assert "send-proxy-v2 proxy-v2-options crc32c" in text
    (folder / "haproxy.cfg").write_text(text.replace("send-proxy-v2 proxy-v2-options crc32c", "send-proxy"))
    return command


def nginx_stream(folder, ports, upstreams, certificate):
    """No sample: nginx without HTTP, as the paragraph about it in the documentation has it."""
    (folder / "nginx").write_text(f"""
load_module {NGINX_STREAM};
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log;
events {{}}
stream {{
    server {{
        listen 127.0.0.1:{ports[1]} ssl;
        ssl_certificate {certificate.cert};
        ssl_certificate_key {certificate.key};
        proxy_pass {upstreams[0]};
        proxy_protocol on;
        proxy_timeout 90s;
    }}
}}
""")
    return [program("nginx"), "-p", str(folder), "-c", str(folder / "nginx"), "-g", "daemon off; master_process off;"]


def caddy(folder, ports, upstreams, certificate):
    addresses = " ".join(upstream.replace("unix:", "unix/") for upstream in upstreams)
    options = f"\tadmin off\n\thttp_port {ports[0]}\n\thttps_port {ports[1]}\n\tdefault_bind 127.0.0.1\n"
    text = replace(
        "caddy/Caddyfile",
        [
            ("reverse_proxy 127.0.0.1:8080 {", f"reverse_proxy {addresses} {{"),
            ("{\n\tlog default {", f"{{\n{options}\tlog default {{"),
            ("gateway.example {\n", f"localhost {{\n\ttls {certificate.cert} {certificate.key}\n"),
        ],
    )
    (folder / "Caddyfile").write_text(text)
    return [program("caddy"), "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


SAMPLES = {"nginx": nginx, "haproxy": haproxy, "caddy": caddy}
# Proxies that tell the client's address by the PROXY protocol, and do not look into HTTP.
BLIND = {"haproxy_tcp": haproxy_tcp, "haproxy_tcp_1": haproxy_tcp_1, "nginx_stream": nginx_stream}
NGINX_STREAM = "/usr/lib/nginx/modules/ngx_stream_module.so"


class Proxy:
    """A sample in front of instances."""

    def __init__(self, name, folder, upstreams, certificate):
        self.name, self.folder, self.context = name, folder, certificate.context
        self.plain_port, self.port = free_port(), free_port()
        self.http, self.ws = f"https://localhost:{self.port}", f"wss://localhost:{self.port}"
        command = (SAMPLES | BLIND)[name](folder, (self.plain_port, self.port), upstreams, certificate)
        # Caddy keeps files where these variables say.
        homes = {"XDG_DATA_HOME": str(folder / "data"), "XDG_CONFIG_HOME": str(folder / "config")}
        self.process = Process(name, command, folder, homes)
        self.process.ready(name, lambda: self.ask("/ready") == 200)

    def connect(self, path, headers=(), timeout=20):
        """Sends a request of a client at `CLIENT`; its socket."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout, source_address=(CLIENT, 0))
        client = self.context.wrap_socket(client, server_hostname="localhost")
        lines = [f"GET {path} HTTP/1.1", f"Host: localhost:{self.port}", *(f"{n}: {v}" for n, v in headers)]
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        return client

    def ask(self, path, headers=()):
        """The status of the answer to such a client."""
        with self.connect(path, [("Connection", "close"), *headers]) as client:
            return status(client)

    def logs(self):
        """All that it wrote."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.suffix == ".log"]
        return "\n".join(path.read_text(errors="replace") for path in files)

    def stop(self):
        self.process.stop()


def status(client):
    """The status of the answer that comes over a socket."""
    return int(client.recv(64).split(b" ")[1])
