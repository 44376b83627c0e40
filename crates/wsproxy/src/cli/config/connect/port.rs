//! The ports and the unix socket of the listeners: free, held by an instance, or by a process that is named where the kernel
//! tells it.

use std::{
    fs,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener},
    os::unix::fs::FileTypeExt,
    path::Path,
};

use super::{ANSWER_MAX, Finding};
use crate::{
    cli::http::{self, HttpPlace, Question},
    config::Config,
    http::listener::open::{self, Place},
    tls,
};

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let server = &config.server;
    let clients = HttpPlace::of_clients(config);
    let main = match &server.unix {
        Some(path) => judge_file(path, server.unix_mode, clients),
        None => judge("server.port", SocketAddr::new(server.bind, server.port), clients),
    };
    let admin = config.admin.port.map(|port| {
        let address = SocketAddr::new(config.admin.bind.unwrap_or(server.bind), port);
        judge("admin.port", address, HttpPlace::own(config))
    });
    [main].into_iter().chain(admin).collect()
}

/// Asks a listener whether it is that of an instance.
fn ask(place: HttpPlace) -> anyhow::Result<()> {
    let question = Question { method: "GET", headers: "", time_max: ANSWER_MAX };
    let trust = || Ok(tls::trusting_client_config()?);
    let (_, body) = place.route("/ready").ask(&question, trust, http::read_answer)?;
    let body: serde_json::Value = serde_json::from_slice(&body)?;
    anyhow::ensure!(body["ready"].is_boolean(), "the answer is not that of an instance");
    Ok(())
}

/// Judges the file of a unix socket, and the folder in which the gateway makes it.
fn judge_file(path: &Path, mode: u32, place: HttpPlace) -> Finding {
    let part = "unix";
    let what = format!("server.unix: {}", path.display());
    let listening = Place::Unix(path.to_owned(), mode);
    let advice = |kind| open::advice(&listening, kind).unwrap_or("choose another path");
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    if !folder.is_dir() {
        let what = format!("{what}: there is no folder {}", folder.display());
        return Finding::error(part, what, advice(ErrorKind::NotFound));
    }
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Finding::ok(part, format!("{what} is free; proxies open it by its mode {mode:04o}"))
        }
        Err(error) => Finding::error(part, format!("{what}: {error}"), advice(error.kind())),
        Ok(found) if !found.file_type().is_socket() => {
            let what = format!("{what}: there is a file that is no socket");
            Finding::error(part, what, advice(ErrorKind::AlreadyExists))
        }
        Ok(_) => match ask(place) {
            Ok(()) => Finding::ok(part, format!("{what} is in use by a running instance")),
            Err(error) if kind_of(&error) == Some(ErrorKind::ConnectionRefused) => {
                Finding::ok(part, format!("{what} was left by a dead process, and is replaced"))
            }
            Err(error) => {
                let what = format!("{what} is in use, and not by an instance that answers");
                let advice = "end that process, or choose another path";
                Finding::error(part, format!("{what}: {error:#}"), advice)
            }
        },
    }
}

fn kind_of(error: &anyhow::Error) -> Option<ErrorKind> {
    error.downcast_ref::<io::Error>().map(io::Error::kind)
}

fn judge(key: &'static str, address: SocketAddr, place: HttpPlace) -> Finding {
    let part = "port";
    let what = format!("{key}: {address}");
    let Err(error) = TcpListener::bind(address) else {
        return Finding::ok(part, format!("{what} is free"));
    };
    match error.kind() {
        ErrorKind::AddrInUse => match holder(address.port()) {
            Some((pid, name)) if name == "wsproxy" => {
                let what =
                    format!("{what} is in use by wsproxy (process {pid}), a running instance");
                Finding::ok(part, what)
            }
            Some((pid, name)) => {
                let what = format!("{what} is in use by {name} (process {pid})");
                Finding::error(part, what, "end that process, or choose another port")
            }
            None if ask(place).is_ok() => {
                Finding::ok(part, format!("{what} is in use by a running instance"))
            }
            None => {
                let advice = format!(
                    "see who holds it (as root: ss -ltnp 'sport = :{}'): no instance answers there",
                    address.port()
                );
                Finding::warning(part, format!("{what} is in use"), advice)
            }
        },
        kind => {
            let advice = open::advice(&Place::Tcp(address), kind);
            let advice = advice.unwrap_or("choose another address or port");
            Finding::error(part, format!("{what}: {error}"), advice)
        }
    }
}

/// Returns the process that listens on a port, and its name; `None` where the kernel does not tell this user.
fn holder(port: u16) -> Option<(u32, String)> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    let tables = tables.into_iter().filter_map(|path| fs::read_to_string(path).ok());
    let sockets: Vec<_> = tables.flat_map(|table| listening(&table, port)).collect();
    let processes = fs::read_dir("/proc").ok()?;
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let pid = pids.filter(|pid: &u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let mut links = files.filter_map(|file| fs::read_link(file.path()).ok());
        links.any(|link| sockets.iter().any(|socket| link.as_os_str() == socket.as_str()))
    });
    let pid = pid.min()?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some((pid, name.trim().to_owned()))
}

/// Returns the listening sockets of a table of the kernel, as links of open files name them.
fn listening(table: &str, port: u16) -> Vec<String> {
    let rows = table.lines().skip(1).filter_map(|row| {
        let mut fields = row.split_whitespace();
        let (local, state) = (fields.nth(1)?, fields.nth(1)?);
        let inode = fields.nth(5)?;
        let is_it = local
            .rsplit_once(':')
            .is_some_and(|(_, hex)| u16::from_str_radix(hex, 16).is_ok_and(|found| found == port));
        (is_it && state == LISTEN).then(|| format!("socket:[{inode}]"))
    });
    rows.collect()
}

/// State of a socket that listens, in tables of the kernel.
const LISTEN: &str = "0A";

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    #[test]
    fn a_port_in_use_is_told_with_its_holder() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = held.local_addr().unwrap();
        let place = || HttpPlace::read(&format!("http://{address}")).unwrap();
        let found = judge("server.port", address, place());
        let own = std::process::id().to_string();
        assert!(found.what.contains("is in use by") && found.what.contains(&own), "{}", found.what);
        drop(held);
        assert_eq!(judge("server.port", address, place()).level, Level::Ok);
        let foreign = judge("server.port", "192.0.2.1:8080".parse().unwrap(), place());
        assert_eq!(foreign.level, Level::Error);
    }
}
