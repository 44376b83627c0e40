//! The time within which a request must be answered. Knows no route.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::timeout;

/// Extension of a request: lets its handler say that the whole request has arrived, and that the answer waits for
/// another peer.
#[derive(Debug, Clone, Default)]
pub(crate) struct AnswerTime(Arc<AtomicBool>);

impl AnswerTime {
    /// Lifts the bound. The handler has read the whole request, and bounds the time of the answer itself.
    pub(crate) fn lift(&self) {
        self.0.store(true, Relaxed);
    }

    /// Waits for an answer at most for `limit`, unless the handler lifts the bound within this time.
    pub(crate) async fn bound<T>(
        &self,
        limit: Duration,
        answer: impl Future<Output = T>,
    ) -> Option<T> {
        let mut answer = std::pin::pin!(answer);
        match timeout(limit, answer.as_mut()).await {
            Ok(answer) => Some(answer),
            Err(_) if self.0.load(Relaxed) => Some(answer.await),
            Err(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(15);

    #[tokio::test(start_paused = true)]
    async fn only_a_lifted_bound_lets_an_answer_wait() {
        let (short, long) = (sleep(LIMIT / 2), sleep(LIMIT * 4));
        assert_eq!(AnswerTime::default().bound(LIMIT, short).await, Some(()));
        assert_eq!(AnswerTime::default().bound(LIMIT, long).await, None);
        let time = AnswerTime::default();
        let lifted = async {
            sleep(LIMIT / 2).await;
            time.lift();
            sleep(LIMIT * 4).await;
        };
        assert_eq!(time.bound(LIMIT, lifted).await, Some(()));
        let time = AnswerTime::default();
        let too_late = async {
            sleep(LIMIT * 2).await;
            time.lift();
        };
        assert_eq!(time.bound(LIMIT, too_late).await, None);
    }
}
