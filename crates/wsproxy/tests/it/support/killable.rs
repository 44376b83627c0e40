//! A part of a process that can end at once, and its connections with it, as if the process had been killed.

use tokio::{runtime, task};

/// A runtime of its own. Dropping it kills everything that runs there.
pub struct Killable(Option<runtime::Runtime>);

impl Killable {
    /// Runs `start` in a new runtime. What `start` forgets lives until the kill, and is not dropped then.
    pub async fn start<T, F>(start: impl FnOnce() -> F + Send + 'static) -> (Self, T)
    where
        T: Send + 'static,
        F: Future<Output = T>,
    {
        // The future need not be `Send`: it stays on one thread.
        let started = task::spawn_blocking(|| {
            let mut runtime = runtime::Builder::new_multi_thread();
            let runtime = runtime.worker_threads(1).enable_all().build().unwrap();
            let value = runtime.block_on(start());
            (runtime, value)
        });
        let (runtime, value) = started.await.unwrap();
        (Self(Some(runtime)), value)
    }

    pub fn kill(self) {
        drop(self);
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
