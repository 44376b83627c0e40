//! The file of a unix socket: made with its permissions, and removed with the listener. Knows no connections.

use std::{
    fs::{self, File, Permissions, TryLockError},
    io::{self, ErrorKind},
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process, thread,
    time::{Duration, Instant},
};

use socket2::{Domain, SockAddr, Socket, Type};
use tracing::warn;

/// The file through which processes reach a listener. Dropping it removes the file, unless another process has put its
/// own in that place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    /// Listens at `path`. A socket whose process is dead is replaced; one whose process lives, only with `takes_over`.
    /// That process then gets no further clients, and leaves the new file alone.
    ///
    /// # Errors
    /// [`ErrorKind::AddrInUse`]: another process listens there. [`ErrorKind::AlreadyExists`]: the file is no socket. Any
    /// other: the folder lacks, or may not be written.
    pub fn listen(
        path: &Path,
        mode: u32,
        backlog: i32,
        takes_over: bool,
    ) -> io::Result<(UnixListener, Self)> {
        // Two processes that start at once must not take each other's new socket for a dead one.
        let _lock = lock_folder(path)?;
        let mut successor = None;
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(found) if !found.file_type().is_socket() => {
                let message = "there is a file that is no socket, which is never replaced";
                return Err(io::Error::new(ErrorKind::AlreadyExists, message));
            }
            Ok(_) => match is_alive(path)? {
                false => fs::remove_file(path)?,
                true if !takes_over => {
                    let message = "another process listens there";
                    return Err(io::Error::new(ErrorKind::AddrInUse, message));
                }
                true => {
                    // Renamed onto the old file in one step, so that at every moment clients find one of both.
                    let beside = PathBuf::from(format!("{}.{}", path.display(), process::id()));
                    // A process that was killed before the rename left its file. In containers every process has the
                    // same id, so that each later one would find the name taken.
                    if fs::symlink_metadata(&beside)
                        .is_ok_and(|found| found.file_type().is_socket())
                    {
                        fs::remove_file(&beside)?;
                    }
                    successor = Some(beside);
                }
            },
        }
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        let made = successor.as_deref().unwrap_or(path);
        socket.bind(&SockAddr::unix(made)?)?;
        let metadata = fs::symlink_metadata(made)?;
        let identity = (metadata.dev(), metadata.ino());
        let mut file = Self { path: made.to_owned(), identity };
        // Before it listens, so that no client connects by the permissions that the umask left.
        fs::set_permissions(made, Permissions::from_mode(mode))?;
        socket.listen(backlog)?;
        if let Some(successor) = &successor {
            fs::rename(successor, path)?;
            path.clone_into(&mut file.path);
        }
        Ok((socket.into(), file))
    }

    fn is_own(&self) -> bool {
        let found = fs::symlink_metadata(&self.path);
        found.is_ok_and(|found| (found.dev(), found.ino()) == self.identity)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Without the lock a process that starts now could put its file there after the look at it.
        let _lock = lock_folder(&self.path);
        if !self.is_own() {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "The file of the unix socket was not removed.");
        }
    }
}

/// Returns whether a process listens at a socket's file.
fn is_alive(path: &Path) -> io::Result<bool> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A listener with a full queue would let a blocking connect wait.
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(false),
        Err(error) => Err(error),
    }
}

/// Locks the folder of `path` against other instances of the gateway; they hold the lock for moments only.
fn lock_folder(path: &Path) -> io::Result<File> {
    let folder = File::open(path.parent().unwrap_or_else(|| Path::new("/")))?;
    let start = Instant::now();
    loop {
        match folder.try_lock() {
            Ok(()) => return Ok(folder),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if start.elapsed() > LOCK_WAIT_MAX => {
                return Err(io::Error::new(
                    ErrorKind::TimedOut,
                    "another process locks the folder",
                ));
            }
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_RETRY),
        }
    }
}

/// Longest wait for a folder that another process locks.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(2);

/// Pause between two tries to lock a folder.
const LOCK_RETRY: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn listen(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
        SocketFile::listen(path, 0o620, 8, false)
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        // As a process that was killed: the listener is gone, and its file is not.
        drop(UnixListener::bind(&path).unwrap());
        let (listener, file) = listen(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o620);
        UnixStream::connect(&path).unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        drop(file);
        assert!(!path.exists());
        drop(listener);
    }

    #[test]
    fn a_full_queue_is_a_live_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let (_listener, _file) = SocketFile::listen(&path, 0o600, 0, false).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        assert!(is_alive(&path).unwrap());
    }

    #[test]
    fn other_files_are_never_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(listen(&link).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"data");
        assert!(listen(&folder.path().join("no/a.sock")).is_err());
    }

    #[test]
    fn the_file_of_a_successor_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let (_listener, file) = listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _successor = UnixListener::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn a_live_socket_is_taken_over_where_wished() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let (old, old_file) = listen(&path).unwrap();
        let (new, new_file) = SocketFile::listen(&path, 0o600, 8, true).unwrap();
        old.set_nonblocking(true).unwrap();
        // The look whether the old one lives.
        assert!(old.accept().is_ok());
        let _client = UnixStream::connect(&path).unwrap();
        assert!(new.accept().is_ok() && old.accept().is_err());
        drop(old_file);
        assert!(path.exists());
        drop(new_file);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_a_killed_successor_left_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let left = folder.path().join(format!("a.sock.{}", process::id()));
        drop(UnixListener::bind(&left).unwrap());
        let (_old, _old_file) = listen(&path).unwrap();
        let (_new, new_file) = SocketFile::listen(&path, 0o600, 8, true).unwrap();
        assert!(new_file.is_own() && !left.exists());
    }

    #[test]
    fn many_that_start_at_once_leave_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        let tries: Vec<_> = (0..8)
            .map(|_| {
                let path = path.clone();
                thread::spawn(move || listen(&path))
            })
            .collect();
        let results: Vec<_> = tries.into_iter().map(|each| each.join().unwrap()).collect();
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        assert!(UnixStream::connect(&path).is_ok());
    }
}
