//! The client of a Redis: starts the tasks of its connections, and sends commands. Knows no command.

use std::sync::{Arc, atomic::Ordering};

use bytes::BytesMut;
use tokio_util::task::TaskTracker;
use wsproxy_proto::names::Names;

use crate::{
    bus::deliver::Deliver,
    redis::{
        cluster,
        health::Purpose,
        node::Nodes,
        pipeline::{Replies, task::PipelineTask},
        reader::RedisReader,
        resp::{self, Reply},
        scout,
        script::{self, Script},
        sentinel,
        shared::RedisShared,
    },
    store::{command::StoreError, not_done::NotDone},
};

/// A Redis. Clones share its connections.
#[derive(Clone)]
pub struct RedisClient(Arc<RedisShared>);

impl RedisClient {
    /// Starts the tasks that keep the connections made, for ever; messages go to `deliver`.
    pub(super) fn start(
        shared: Arc<RedisShared>,
        deliver: Box<dyn Deliver>,
        tasks: &TaskTracker,
    ) -> Self {
        // The first subscription of every connection; no caller waits for it.
        drop(shared.subscriptions.want(vec![shared.probe_channel.clone()]));
        tasks.spawn(RedisReader::new(shared.clone(), deliver).run());
        if let Nodes::One(node) = &shared.nodes {
            for purpose in [Purpose::Publish, Purpose::Command] {
                tasks.spawn(PipelineTask::new(shared.clone(), node.clone(), purpose).run());
            }
        }
        tasks.spawn(cluster::follow::run(shared.clone(), tasks.clone()));
        tasks.spawn(cluster::receivers::run(shared.clone()));
        tasks.spawn(scout::run(shared.clone()));
        tasks.spawn(sentinel::run(shared.clone()));
        Self(shared)
    }

    /// Returns the state that the connections share.
    pub(super) fn shared(&self) -> &RedisShared {
        &self.0
    }

    /// Returns the number of connections for commands so far. When it changes, commands may reach another server.
    pub(crate) fn command_connections(&self) -> u64 {
        self.0.command_connections.load(Ordering::Acquire)
    }

    /// Returns the names of keys and channels.
    pub(crate) fn names(&self) -> &Names {
        &self.0.names
    }

    /// Runs a script; `words` are the number of keys, the keys and the arguments.
    ///
    /// # Errors
    /// See [`Self::command`].
    pub(crate) async fn run(&self, script: &Script, words: &[&[u8]]) -> Result<Reply, StoreError> {
        script::assert_one_slot(script::keys(words));
        let call = |is_loaded| [&script.call(is_loaded)[..], words].concat();
        match self.command(&call(true)).await {
            // The script certainly did not run. The call with its text runs it, and loads it for later calls.
            Err(StoreError::NotDone { refusal: NotDone::Script, .. }) => {
                self.command(&call(false)).await
            }
            reply => reply,
        }
    }

    /// Runs a short script on one key; every call has its text.
    ///
    /// # Errors
    /// See [`Self::command`].
    pub(crate) async fn eval(
        &self,
        script: &str,
        key: &str,
        arguments: impl IntoIterator<Item = impl AsRef<[u8]>>,
    ) -> Result<Reply, StoreError> {
        let arguments: Vec<_> = arguments.into_iter().collect();
        let mut words: Vec<&[u8]> = vec![b"EVAL", script.as_bytes(), b"1", key.as_bytes()];
        words.extend(arguments.iter().map(AsRef::as_ref));
        self.command(&words).await
    }

    /// Sends a command to the server that has its key, and waits for the reply.
    ///
    /// # Errors
    /// [`StoreError::Full`] and [`StoreError::Closed`]: the command was not sent. Others: see [`StoreError`].
    pub(crate) async fn command(&self, words: &[&[u8]]) -> Result<Reply, StoreError> {
        match &self.0.nodes {
            Nodes::One(node) => node.commands.command(words).await,
            // Boxed, so that the callers' futures stay small with one server.
            Nodes::Cluster(cluster) => {
                Box::pin(cluster.command(words, self.0.response_timeout)).await
            }
        }
    }

    /// Runs a script several times, with one write and one wake-up for all; `calls` are the words of [`Self::run`].
    /// Returns a reply for each call.
    pub(crate) async fn run_each<const N: usize>(
        &self,
        script: &Script,
        calls: &[[impl AsRef<[u8]>; N]],
    ) -> Replies {
        let spelled = |is_loaded| {
            calls.iter().map(move |words| {
                script::assert_one_slot(script::keys(&words.each_ref().map(AsRef::as_ref)));
                script.call(is_loaded).into_iter().chain(words.iter().map(AsRef::as_ref))
            })
        };
        let mut replies = self.commands(spelled(true)).await;
        let is_unknown =
            |reply: &_| matches!(reply, Err(StoreError::NotDone { refusal: NotDone::Script, .. }));
        if replies.iter().any(is_unknown) {
            // These certainly did not run. The first call with the text loads the script.
            let unknown =
                replies.iter_mut().zip(spelled(false)).filter(|(reply, _)| is_unknown(reply));
            let (unknown, calls): (Vec<_>, Vec<_>) = unknown.unzip();
            for (unknown, reply) in unknown.into_iter().zip(self.commands(calls.into_iter()).await)
            {
                *unknown = reply;
            }
        }
        replies
    }

    /// Sends commands together, and waits for all their replies. Returns a reply for each; see [`Self::command`].
    pub(crate) async fn commands<'w>(
        &self,
        commands: impl ExactSizeIterator<Item = impl Iterator<Item = &'w [u8]> + Clone>,
    ) -> Replies {
        let count = commands.len();
        if count == 0 {
            return Replies::new();
        }
        let node = match &self.0.nodes {
            Nodes::One(node) => node,
            Nodes::Cluster(cluster) => {
                return Box::pin(cluster.commands(commands, self.0.response_timeout)).await;
            }
        };
        let mut spelled = BytesMut::with_capacity(count * COMMAND_BYTES);
        for words in commands {
            resp::command(&mut spelled, words.clone().count());
            words.for_each(|word| resp::word(&mut spelled, word));
        }
        node.commands.send_each(spelled.freeze(), count).await
    }
}

/// Room that is made for each of several commands before they are spelled.
const COMMAND_BYTES: usize = 384;
